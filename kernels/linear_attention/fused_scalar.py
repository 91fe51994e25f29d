"""Triton kernels of linear attention whose decay is absent or one number per head and token.

One kernel, `sweep`, computes the output and all three gradients, since all four are the same sum

    out_t = sum_{s <= t} D(t, s) (a_t . b_s) y_s  +  D(t, 0) a_t M,        M' = D(C, 0) M + sum_s D(C, s) b_s^T y_s

with D the product of the decays in between, over time or against it:

    output         a = q    b = k    y = v     over time,       M = S
    gradient of q  a = do   b = v    y = k     over time,       M = S^T
    gradient of k  a = v    b = do   y = q     against time,    M = dS^T
    gradient of v  a = k    b = q    y = do    against time,    M = dS

A program walks the chunks of one segment of a sequence for one head and one slice of y's channels, with M in registers. `collect`
sums what each segment adds to M, and `chain` turns these into what each segment starts from; with one segment neither runs.
`gates` sums the decays up chunk by chunk beforehand, `gate_gradient` sums their gradient up afterwards: it is
sum_{s >= t} (q_s . dq_s - k_s . dk_s) + S . dS at the segment's end.

Floor, K = V = D channels of two bytes, per token and head: forward 4 D numbers of 2 bytes (q, k, v in, o out), backward 7 D (q, k, v,
do in, dq, dk, dv out); 4 D^2 + 4 C D FLOP forward, 2.5 times that backward.
"""

import triton
from triton import language as tl

from zoo.kernels.fused import load_tile, segment_of

LEAST = tl.constexpr(-80.0)  # e^-80 of anything representable beside it is nothing; sums over a chunk stay small
NONE, TOKEN, ROWS, COLUMNS = (tl.constexpr(kind) for kind in range(4))  # decays: absent, per token, per row or column of the state


@triton.jit
def gates(G, SUMS, TOTALS, TABLE, g_b, g_t, g_h, s_b, s_h, H, CHUNKS, C: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """Running sums of log-decays within each chunk, SUMS [B, H, T], and their totals, TOTALS [segments, CHUNKS, H].
    Programs: segments x CHUNKS x blocks of heads."""
    blocks = tl.cdiv(H, BH)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    row, start, stop = segment_of(TABLE, place // CHUNKS)
    t, h = start + place % CHUNKS * C + tl.arange(0, C)[:, None], (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    inside = (t < stop) & (h[None, :] < H)
    each = tl.maximum(tl.load(G + row * g_b + t * g_t + h[None, :] * g_h, mask=inside, other=0.0).to(ACC), LEAST)
    tl.store(SUMS + row * s_b + h[None, :] * s_h + t, tl.cumsum(each, 0), mask=inside)
    tl.store(TOTALS + place * H + h, tl.sum(tl.where(inside, each, 0.0), 0), mask=h < H)


@triton.jit
def load_sums(SUMS, i, left, C: tl.constexpr):
    """Running sums of a chunk, and the last of them."""
    total = tl.load(SUMS + tl.minimum(left, C) - 1)
    return tl.load(SUMS + i, mask=i < left, other=0.0), total


@triton.jit
def load_edges(EDGES, c, channels, REVERSE: tl.constexpr):
    """By what a state with one decay per channel is multiplied where it is read, before and after the chunk is added."""
    read, before, after = (2, 3, 0) if REVERSE else (0, 1, 2)
    inside = c < channels
    read = tl.exp(tl.load(EDGES + read * channels + c, mask=inside, other=0.0))
    before = tl.exp(tl.load(EDGES + before * channels + c, mask=inside, other=0.0))
    return read, before, tl.exp(tl.load(EDGES + after * channels + c, mask=inside, other=0.0))


@triton.jit
def scores(p, P, DIAGONAL, own, i, left, safe, C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, BONUS: tl.constexpr):
    """A chunk's scores with decays per channel, from the product of scaled queries and keys where it is safe."""
    t, s = (i[None, :], i[:, None]) if REVERSE else (i[:, None], i[None, :])
    p = tl.where(((t > s) if BONUS else (t >= s)) & safe, p, 0.0)
    if DECAY == ROWS:
        if not safe:
            p += tl.load(P + own * C + t * C + s, mask=t < left, other=0.0).to(p.dtype)
        if BONUS:
            p += tl.where(t == s, tl.load(DIAGONAL + own + i, mask=i < left, other=0.0)[:, None], 0.0)
    return p


@triton.jit
def advance_by_token(
    a, b, y, m, p, causal, sums, total, REVERSE: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):
    """A chunk's output and the state behind it, with one decay per token."""
    between = (sums[None, :] - sums[:, None]) if REVERSE else (sums[:, None] - sums[None, :])
    p = tl.where(causal, p * tl.exp(tl.minimum(between, 0.0)), 0.0).to(TYPE)
    seen, kept = tl.exp(sums), tl.exp(tl.minimum(total - sums, 0.0))
    out = tl.dot(a, m.to(TYPE), input_precision=PRECISION, out_dtype=ACC) * (kept if REVERSE else seen)[:, None]
    out = tl.dot(p, y, out, input_precision=PRECISION, out_dtype=ACC)
    y = (y * (seen if REVERSE else kept)[:, None]).to(TYPE)
    return out, tl.dot(tl.trans(b), y, m * tl.exp(total), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def advance_by_channel(
    a, b, y, m, p, EDGES, d, D, w, W, DECAY: tl.constexpr, REVERSE: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with one decay per row or column of the state."""
    if DECAY == ROWS:
        read, before, after = load_edges(EDGES, d, D, REVERSE)
        out = tl.dot(a, (m * read[:, None]).to(TYPE), input_precision=PRECISION, out_dtype=ACC)
        before, after = before[:, None], after[:, None]
    else:
        read, before, after = load_edges(EDGES, w, W, REVERSE)
        out = tl.dot(a, m.to(TYPE), input_precision=PRECISION, out_dtype=ACC) * read[None, :]
        before, after = before[None, :], after[None, :]
    out = tl.dot(p, y, out, input_precision=PRECISION, out_dtype=ACC)
    return out, tl.dot(tl.trans(b), y, m * before, input_precision=PRECISION, out_dtype=ACC) * after


@triton.jit
def sweep(
    A, B, Y, OUT, INIT, FINAL, SUMS, TABLE, Z, R, EDGES, SAFES, P, DIAGONAL,
    a_b, a_t, a_h, b_b, b_t, b_h, y_b, y_t, y_h, o_b, o_t, o_h, z_b, z_t, z_h, r_slice, s_b, s_h,
    a_rep, b_rep, y_rep, z_rep, m_row, m_col, m_size, size, scale, H, D, W, CHUNKS,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    BONUS: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_R: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; R [slices, B, H, T] takes `z . out` of the slice. Programs: segments x heads x slices of W."""
    slices = tl.cdiv(W, BW)
    slice_, h, segment = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:  # no segment at all
        return
    i, d, w = tl.arange(0, C), tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    A += row * a_b + start * a_t + (h // a_rep) * a_h
    B += row * b_b + start * b_t + (h // b_rep) * b_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    OUT += row * o_b + start * o_t + h * o_h
    own = row * s_b + h * s_h + start
    at = tl.load(TABLE + segment * 5 + (4 if REVERSE else 3))
    tile = (at * H + h) * m_size + d[:, None] * m_row + w[None, :] * m_col
    # zeros as a constant would make ptxas run the matrix products one by one
    m = tl.load(INIT + tile, mask=(d[:, None] < D) & (w[None, :] < W), other=0.0).to(ACC)
    length = (stop - start).to(tl.int32)
    chunks = tl.cdiv(length, C)
    for n in range(0, chunks):
        j = (chunks - 1 - n) if REVERSE else n
        left, t = length - j * C, (j * C).to(tl.int64)
        a = load_tile(A + t * a_t, i, d, a_t, left, D, EVEN, TYPE)
        b = load_tile(B + t * b_t, i, d, b_t, left, D, EVEN, TYPE)
        y = load_tile(Y + t * y_t, i, w, y_t, left, W, EVEN, TYPE)
        p = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
        causal = (i[:, None] <= i[None, :]) if REVERSE else (i[:, None] >= i[None, :])
        if DECAY == NONE:
            p = tl.where(causal, p, 0.0).to(TYPE)
            out = tl.dot(a, m.to(TYPE), input_precision=PRECISION, out_dtype=ACC)
            out = tl.dot(p, y, out, input_precision=PRECISION, out_dtype=ACC)
            m = tl.dot(tl.trans(b), y, m, input_precision=PRECISION, out_dtype=ACC)
        elif DECAY == TOKEN:
            sums, total = load_sums(SUMS + own + t, i, left, C)
            out, m = advance_by_token(a, b, y, m, p, causal, sums, total, REVERSE, TYPE, ACC, PRECISION)
        else:
            place = (segment * CHUNKS + j) * H + h
            safe = tl.load(SAFES + place) != 0
            p = scores(p, P, DIAGONAL, own + t, i, left, safe, C, DECAY, REVERSE, BONUS).to(TYPE)
            edges = EDGES + place * 4 * (D if DECAY == ROWS else W)
            out, m = advance_by_channel(a, b, y, m, p, edges, d, D, w, W, DECAY, REVERSE, TYPE, ACC, PRECISION)
        out *= scale
        written = (i[:, None] < left) if EVEN else (i[:, None] < left) & (w[None, :] < W)
        tl.store(OUT + t * o_t + i[:, None] * o_t + w[None, :], out.to(OUT.dtype.element_ty), mask=written)
        if HAS_R:
            z = load_tile(Z + row * z_b + (start + t) * z_t + (h // z_rep) * z_h, i, w, z_t, left, W, EVEN, ACC)
            tl.store(R + slice_ * r_slice + own + t + i, tl.sum(z * out, 1), mask=i < left)
    if HAS_FINAL:
        at = tl.load(TABLE + segment * 5 + (3 if REVERSE else 4))
        tl.store(FINAL + (at * H + h) * size + d[:, None] * W + w[None, :], m, mask=(d[:, None] < D) & (w[None, :] < W))


@triton.jit
def collect(
    B, Y, BOUNDS, SUMS, TABLE, EDGES, b_b, b_t, b_h, y_b, y_t, y_h, s_b, s_h, b_rep, y_rep, H, D, W, CHUNKS,
    BD: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What every segment adds to M, into BOUNDS at its end (its start if REVERSE). Programs: segments x heads x tiles of D x W."""
    slices = tl.cdiv(W, BW)
    tiles = tl.cdiv(D, BD) * slices
    tile_, h, segment = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H, (tl.program_id(0) // tiles // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    i, d, w = tl.arange(0, C), (tile_ // slices) * BD + tl.arange(0, BD), (tile_ % slices) * BW + tl.arange(0, BW)
    B += row * b_b + start * b_t + (h // b_rep) * b_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    own = row * s_b + h * s_h + start
    length = (stop - start).to(tl.int32)
    m = tl.zeros((BD, BW), ACC)
    chunks = tl.cdiv(length, C)
    for n in range(0, chunks):
        j = (chunks - 1 - n) if REVERSE else n
        left, t = length - j * C, (j * C).to(tl.int64)
        b = load_tile(B + t * b_t, i, d, b_t, left, D, EVEN, TYPE)
        y = load_tile(Y + t * y_t, i, w, y_t, left, W, EVEN, TYPE)
        if DECAY == NONE:
            m = tl.dot(tl.trans(b), y, m, input_precision=PRECISION, out_dtype=ACC)
        elif DECAY == TOKEN:
            sums, total = load_sums(SUMS + own + t, i, left, C)
            y = (y * tl.exp(tl.minimum(sums if REVERSE else total - sums, 0.0))[:, None]).to(TYPE)
            m = tl.dot(tl.trans(b), y, m * tl.exp(total), input_precision=PRECISION, out_dtype=ACC)
        else:
            place = (segment * CHUNKS + j) * H + h
            _, before, after = load_edges(EDGES + place * 4 * D, d, D, REVERSE)
            m = tl.dot(tl.trans(b), y, m * before[:, None], input_precision=PRECISION, out_dtype=ACC) * after[:, None]
    at = tl.load(TABLE + segment * 5 + (3 if REVERSE else 4))
    inside = (d[:, None] < D) & (w[None, :] < W)
    tl.store(BOUNDS + (at * H + h) * D * W + d[:, None] * W + w[None, :], m, mask=inside)


@triton.jit
def chain(
    BOUNDS, TOTALS, FIRST, INIT, H, D, W,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, HAS_INIT: tl.constexpr,
):  # fmt: skip
    """BOUNDS from what each segment adds to what M is at each boundary. FIRST [sequences + 1]: their first segments; segment s of
    sequence n lies between the boundaries s + n and s + n + 1. DECAY: 0, or the dimensions of TOTALS: 2 for [segments, H], 3 for
    [segments, H, D]. Programs: sequences x heads x blocks of D x W."""
    size = D * W
    blocks = tl.cdiv(size, BLOCK)
    x, h = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(0) // blocks % H
    n = (tl.program_id(0) // blocks // H).to(tl.int64)
    first, last = tl.load(FIRST + n), tl.load(FIRST + n + 1)
    inside = x < size
    if HAS_INIT:
        m = tl.load(INIT + (n * H + h) * size + x, mask=inside, other=0.0).to(BOUNDS.dtype.element_ty)
    else:
        m = tl.zeros((BLOCK,), BOUNDS.dtype.element_ty)
    tl.store(BOUNDS + (((last if REVERSE else first) + n) * H + h) * size + x, m, mask=inside)
    for j in range(0, last - first):
        segment = (last - 1 - j) if REVERSE else (first + j)
        at = BOUNDS + ((segment + n + (0 if REVERSE else 1)) * H + h) * size + x
        added = tl.load(at, mask=inside, other=0.0)
        if DECAY == 3:
            m *= tl.exp(tl.load(TOTALS + (segment * H + h) * D + x // W, mask=inside, other=0.0))
        elif DECAY == 2:
            m *= tl.exp(tl.load(TOTALS + segment * H + h))
        m += added
        tl.store(at, m, mask=inside)


@triton.jit
def gate_gradient(
    RQ, RK, DG, S, DS, TABLE, r_slice, r_b, r_h, g_b, g_t, g_h, scale, H, SLICES, SIZE,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DG from RQ = q . dq and RK = k . dk, each [slices, B, H, T], and the states and their gradients at the segments' ends.
    Programs: segments x heads."""
    ACC: tl.constexpr = RQ.dtype.element_ty
    h, segment = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    at = (tl.load(TABLE + segment * 5 + 4) * H + h) * SIZE
    both = tl.zeros((BLOCK,), ACC)
    for x in range(0, SIZE, BLOCK):
        j = x + tl.arange(0, BLOCK)
        both += tl.load(S + at + j, mask=j < SIZE, other=0.0).to(ACC) * tl.load(DS + at + j, mask=j < SIZE, other=0.0)
    later = tl.sum(both, 0) * scale
    chunks = tl.cdiv(stop - start, C)
    for n in range(0, chunks):
        t = start + (chunks - 1 - n) * C + tl.arange(0, C)
        each = tl.zeros((C,), ACC)
        for s in range(0, SLICES):
            each += tl.load(RQ + s * r_slice + row * r_b + h * r_h + t, mask=t < stop, other=0.0)
            each -= tl.load(RK + s * r_slice + row * r_b + h * r_h + t, mask=t < stop, other=0.0)
        whole = tl.sum(each, 0)
        tl.store(DG + row * g_b + t * g_t + h * g_h, later + whole - tl.cumsum(each, 0) + each, mask=t < stop)
        later += whole

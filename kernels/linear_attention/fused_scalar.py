"""Triton kernels of linear attention whose decay is absent or one number per head and token.

One kernel, `sweep`, computes the output and all three gradients, since all four are the same sum

    out_t = sum_{s <= t} D(t, s) (a_t . b_s) y_s  +  D(t, 0) a_t M,        M' = D(C, 0) M + sum_s D(C, s) b_s^T y_s

with D the product of the decays in between, over time or against it:

    output         a = q    b = k    y = v     over time,       M = S
    gradient of q  a = do   b = v    y = k     over time,       M = S^T
    gradient of k  a = v    b = do   y = q     against time,    M = dS^T
    gradient of v  a = k    b = q    y = do    against time,    M = dS

A program walks the chunks of one segment of a sequence for one head and one slice of y's channels, with M in registers; TURNED it
holds the transposes of M and of its sums, whose factor M then is, and passes from one product to the next without leaving registers.
`fused_bounds` finds what each segment starts from.
`prepare` sums the decays up chunk by chunk beforehand, and scales keys and queries by them, so that what is left for `sweep` are
factors of rows and of M. `fused_gate` makes the gradient of the decay.

Floor, K = V = D channels of two bytes, per token and head: forward 4 D numbers of 2 bytes (q, k, v in, o out), backward 7 D (q, k, v,
do in, dq, dk, dv out); 4 D^2 + 4 C D FLOP forward, 2.5 times that backward.
"""

import triton
from triton import language as tl

from zoo.kernels.fused import LEAST, SAFE, load_tile, segment_of

# decays: absent, per token, the same where not all chunks are scaled, per row or column of the state
NONE, TOKEN, EXACT, ROWS, COLUMNS = (tl.constexpr(kind) for kind in range(5))


@triton.jit
def chunk_of(TABLE, H, C: tl.constexpr, CHUNKS):
    """Row, first token, how many tokens exist, head and place of this program's chunk; programs: segments x CHUNKS x heads."""
    h, place = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, place // CHUNKS)
    start += place % CHUNKS * C
    return row, start, tl.minimum(stop - start, C).to(tl.int32), h, place * H + h


@triton.jit
def prepare(
    X, Z, G, XS, ZS, SUMS, EDGES, TABLE,
    x_b, x_t, x_h, z_b, z_t, z_h, g_b, g_t, g_h, o_b, o_t, o_h, s_b, s_h, x_rep, z_rep, H, D, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, HAS_Z: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """SUMS [B, H, T], running sums of log-decays within each chunk; EDGES [segments, CHUNKS, H, 2], the one in its middle and the last;
    XS and ZS, keys (or values) times e^(middle - sum) and queries (or the output's gradients) times e^(sum - middle). Where that may
    overflow they are as they were, and the middle is 1. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H, C, CHUNKS)
    i = tl.arange(0, C)
    each = tl.maximum(tl.load(G + row * g_b + (start + i) * g_t + h * g_h, mask=i < left, other=0.0).to(ACC), LEAST)
    sums = tl.cumsum(each, 0)
    middle = tl.sum(tl.where(i < C // 2, each, 0.0), 0)
    near = tl.where(i < left, sums - middle, 0.0)
    safe = tl.max(tl.abs(near), 0) <= SAFE
    near = tl.exp(tl.where(safe, near, 0.0))[:, None]
    tl.store(SUMS + row * s_b + h * s_h + start + i, sums, mask=i < left)
    tl.store(EDGES + place * 2, tl.where(safe, middle, 1.0))
    tl.store(EDGES + place * 2 + 1, tl.sum(each, 0))
    X += row * x_b + start * x_t + (h // x_rep) * x_h
    out = row * o_b + start * o_t + h * o_h
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        at, inside = out + i[:, None] * o_t + d[None, :], (i[:, None] < left) & (d[None, :] < D)
        x = load_tile(X, i, d, x_t, left, D, False, ACC)
        tl.store(XS + at, (x / near).to(XS.dtype.element_ty), mask=inside)
        if HAS_Z:
            z = load_tile(Z + row * z_b + start * z_t + (h // z_rep) * z_h, i, d, z_t, left, D, False, ACC)
            tl.store(ZS + at, (z * near).to(ZS.dtype.element_ty), mask=inside)


@triton.jit
def at_the_edge(TABLE, segment, segments, REVERSE: tl.constexpr):
    """Whether a segment is its sequence's last (first, if REVERSE): its neighbour's boundary is another."""
    if REVERSE:
        other, own, there = -1, 3, segment > 0
    else:
        other, own, there = 8, 4, segment + 1 < segments
    TABLE += segment * 5
    return tl.load(TABLE + other, mask=there, other=-1) != tl.load(TABLE + own)


@triton.jit
def scores(a, b, i, REVERSE: tl.constexpr, TURNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T (b a^T if TURNED), and which of them count."""
    causal = (i[:, None] >= i[None, :]) if REVERSE == TURNED else (i[:, None] <= i[None, :])
    if TURNED:
        a, b = b, a
    return tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC), causal


@triton.jit
def read(a, m, TURNED: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a M."""
    if TURNED:
        return tl.dot(m.to(TYPE), tl.trans(a), input_precision=PRECISION, out_dtype=ACC)
    else:
        return tl.dot(a, m.to(TYPE), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def plus(p, y, out, TURNED: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out + p y."""
    if TURNED:
        return tl.dot(tl.trans(y), p.to(TYPE), out, input_precision=PRECISION, out_dtype=ACC)
    else:
        return tl.dot(p.to(TYPE), y, out, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def write(b, y, m, TURNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """M + b^T y."""
    if TURNED:
        return tl.dot(tl.trans(y), b, m, input_precision=PRECISION, out_dtype=ACC)
    else:
        return tl.dot(tl.trans(b), y, m, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def load_edge(EDGES, chunk, ROW: tl.constexpr, c, channels):
    """One of four numbers per channel, logarithms of what a state is multiplied by around a chunk; see `fused_channel.prepare`."""
    return tl.load(EDGES + (chunk * 4 + ROW) * channels + c, mask=c < channels, other=0.0)


@triton.jit
def exactly(p, sums, middle, total, REVERSE: tl.constexpr):
    """For one decay per token where a chunk may not be scaled: its scores with decays, what is read of the state before it is multiplied
    by, and what y is in the state behind it. Where the middle is 1, b and y are not scaled."""
    edge = tl.where(middle > 0, sums, middle)  # what was divided by
    near = (edge[None, :] - sums[:, None]) if REVERSE else (sums[:, None] - edge[None, :])
    of_state, of_y = tl.exp((total - sums) if REVERSE else sums), tl.exp(edge if REVERSE else (total - edge))
    return p * tl.exp(tl.minimum(near, SAFE)), of_state[:, None], of_y[:, None]


@triton.jit
def load_rest(EDGES, chunk, READ: tl.constexpr, c, channels):
    """What a state is multiplied by between being read and written to, where the chunk is not safe."""
    return load_edge(EDGES, chunk, READ + 1, c, channels) - load_edge(EDGES, chunk, READ, c, channels)


@triton.jit
def load_decays(SUMS, EDGES, SAFES, j, i, c, channels, own, length, place, H, h, C: tl.constexpr, DECAY: tl.constexpr, READ: tl.constexpr):
    """Of chunk j: logarithms of what M is multiplied by before and after its sums are added; for EXACT the middle and the whole sum.
    Then of what rows of the sums are multiplied by (for EXACT the running sums), and whether the chunk is safe."""
    chunk = (place + j) * H + h
    if (DECAY == TOKEN) | (DECAY == EXACT):
        before, after = tl.load(EDGES + chunk * 2), tl.load(EDGES + chunk * 2 + 1)
        near = tl.load(SUMS + own + j * C + i, mask=i < length - j * C, other=0.0)
        safe = before <= 0
        if DECAY == TOKEN:
            near = (before - near) if READ else (near - before)
            before, after = ((after - before), before) if READ else (before, (after - before))
    else:
        before, after = load_edge(EDGES, chunk, READ, c, channels), load_edge(EDGES, chunk, 2 - READ, c, channels)
        near = tl.zeros((C,), before.dtype)
        safe = tl.load(SAFES + chunk) != 0
    return before, after, near, safe


@triton.jit
def scaled(m, log, DECAY: tl.constexpr):
    """M times what a chunk's edge says."""
    by = tl.exp(log)
    if DECAY == ROWS:
        by = by[:, None]
    elif DECAY == COLUMNS:
        by = by[None, :]
    return m * by


@triton.jit
def store_tile(OUT, x, i, c, stride, left, channels, EVEN: tl.constexpr, TURNED: tl.constexpr):
    """Tokens i of a chunk of which `left` exist, channels c; x is the transpose if TURNED."""
    if TURNED:
        inside = (i[None, :] < left) if EVEN else (i[None, :] < left) & (c[:, None] < channels)
        tl.store(OUT + i[None, :] * stride + c[:, None], x.to(OUT.dtype.element_ty), mask=inside)
    else:
        inside = (i[:, None] < left) if EVEN else (i[:, None] < left) & (c[None, :] < channels)
        tl.store(OUT + i[:, None] * stride + c[None, :], x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def walk(
    A, B, Y, X, OUT, MET, SUMS, EDGES, SAFES, DIAGONAL, m, a_t, b_t, y_t, x_t, o_t, own, place, length, h, w, scale, H, D, W,
    DP: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, TURNED: tl.constexpr, DECAY: tl.constexpr,
    BONUS: tl.constexpr, GATED: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All chunks of a segment; returns M behind them."""
    i, d, last = tl.arange(0, C), tl.arange(0, DP), tl.cdiv(length, C) - 1
    READ: tl.constexpr = 2 if REVERSE else 0
    SCALED: tl.constexpr = (DECAY != NONE) & (DECAY != EXACT)
    c, channels = (w, W) if DECAY == COLUMNS else (d, D)
    if DECAY != NONE:  # loaded a chunk ahead, so that nothing waits for them
        before, after, near, safe = load_decays(
            SUMS, EDGES, SAFES, last if REVERSE else 0, i, c, channels, own, length, place, H, h, C, DECAY, READ
        )
    for n in range(0, last + 1):
        j = (last - n) if REVERSE else n
        left, t = length - j * C, (j * C).to(tl.int64)
        a = load_tile(A + t * a_t, i, d, a_t, left, D, EVEN, TYPE)
        b = load_tile(B + t * b_t, i, d, b_t, left, D, EVEN, TYPE)
        y = load_tile(Y + t * y_t, i, w, y_t, left, W, EVEN, TYPE)
        if GATED:
            x = load_tile(X + t * x_t, i, w, x_t, left, W, EVEN, TYPE)
        if DECAY != NONE:
            following = tl.maximum(j - 1, 0) if REVERSE else tl.minimum(j + 1, last)
            before_, after_, near_, safe_ = load_decays(
                SUMS, EDGES, SAFES, following, i, c, channels, own, length, place, H, h, C, DECAY, READ
            )
        p, causal = scores(a, b, i, REVERSE, TURNED, ACC, PRECISION)
        if DECAY >= ROWS:  # what is missing is `exact_outputs`, or the bonus
            causal = causal & safe & ((i[:, None] != i[None, :]) | (not BONUS))
        p = tl.where(causal, p, 0.0)
        if BONUS and DECAY == ROWS:
            itself = tl.load(DIAGONAL + own + t + i, mask=i < left, other=0.0)
            p += tl.where(i[:, None] == i[None, :], itself[:, None], 0.0)
        if DECAY == EXACT:
            p, of_state, of_y = exactly(p, near, before, after, REVERSE)
            out = read(a, m, TURNED, TYPE, ACC, PRECISION) * of_state
        else:
            if SCALED:
                m = scaled(m, before, DECAY)
            out = read(a, m, TURNED, TYPE, ACC, PRECISION)
            if DECAY >= ROWS and not safe:
                m = scaled(m, load_rest(EDGES, (place + j) * H + h, READ, c, channels), DECAY)
        if GATED:
            met = tl.sum(x.to(ACC) * out, 1) * scale
            tl.store(MET + own + t + i, (met * tl.exp(near)) if DECAY == TOKEN else met, mask=i < left)
        out = plus(p, y, out, TURNED, TYPE, ACC, PRECISION)
        if DECAY == EXACT:
            y, m = (y * of_y).to(TYPE), m * tl.exp(after)
        m = write(b, y, m, TURNED, ACC, PRECISION)
        if DECAY == TOKEN:
            out *= tl.exp(near)[:, None]
        if SCALED:  # once for the edges of two chunks
            before_ = before_ + after
        if DECAY != NONE:
            before, after, near, safe = before_, after_, near_, safe_
        store_tile(OUT + t * o_t, out * scale, i, w, o_t, left, W, EVEN, TURNED)
    if SCALED:
        m = scaled(m, after, DECAY)
    return m


@triton.jit
def sweep(
    A, B, Y, X, OUT, MET, INIT, FINAL, SUMS, TABLE, EDGES, UNSAFE, SAFES, DIAGONAL,
    a_b, a_t, a_h, b_b, b_t, b_h, y_b, y_t, y_h, x_b, x_t, x_h, o_b, o_t, o_h, s_b, s_h,
    a_rep, b_rep, y_rep, x_rep, met_size, m_row, m_col, m_size, size, scale, H, D, W, CHUNKS, ALIKE: tl.constexpr,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, TURNED: tl.constexpr,
    DECAY: tl.constexpr, BONUS: tl.constexpr, GATED: tl.constexpr, HAS_FINAL: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. UNSAFE `[segments, H]`: positive where some chunk was not scaled; FINAL takes M behind a sequence's last segment
    (first if REVERSE). If GATED, MET [slices, B, H, T], met_size apart, takes what of OUT stems from M, times X, summed over the slice.
    ALIKE: the strides of A, B, Y, X and OUT over tokens are one, for which registers are short.
    Programs: segments x heads x slices of W."""
    slices = tl.cdiv(W, BW)
    slice_, h, segment = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:  # no segment at all
        return
    if ALIKE:
        b_t, y_t, x_t, o_t = a_t, a_t, a_t, a_t
    d, w = tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    A += row * a_b + start * a_t + (h // a_rep) * a_h
    B += row * b_b + start * b_t + (h // b_rep) * b_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    OUT += row * o_b + start * o_t + h * o_h
    if GATED:
        X += row * x_b + start * x_t + (h // x_rep) * x_h
        MET += slice_ * met_size
    own = row * s_b + h * s_h + start
    at = tl.load(TABLE + segment * 5 + (4 if REVERSE else 3))
    row_, column = (d[None, :], w[:, None]) if TURNED else (d[:, None], w[None, :])
    inside = (row_ < D) & (column < W)
    # zeros as a constant would make ptxas run the matrix products one by one
    m = tl.load(INIT + (at * H + h) * m_size + row_ * m_row + column * m_col, mask=inside, other=0.0).to(ACC)
    length, place = (stop - start).to(tl.int32), segment * CHUNKS
    if DECAY == TOKEN:
        if tl.load(UNSAFE + segment * H + h) > 0:
            m = walk(A, B, Y, X, OUT, MET, SUMS, EDGES, SAFES, DIAGONAL, m, a_t, b_t, y_t, x_t, o_t, own, place, length, h, w, scale, H, D,
                     W, DP, C, EVEN, REVERSE, TURNED, EXACT, BONUS, GATED, TYPE, ACC, PRECISION)  # fmt: skip
        else:
            m = walk(A, B, Y, X, OUT, MET, SUMS, EDGES, SAFES, DIAGONAL, m, a_t, b_t, y_t, x_t, o_t, own, place, length, h, w, scale, H, D,
                     W, DP, C, EVEN, REVERSE, TURNED, DECAY, BONUS, GATED, TYPE, ACC, PRECISION)  # fmt: skip
    else:
        m = walk(A, B, Y, X, OUT, MET, SUMS, EDGES, SAFES, DIAGONAL, m, a_t, b_t, y_t, x_t, o_t, own, place, length, h, w, scale, H, D, W,
                 DP, C, EVEN, REVERSE, TURNED, DECAY, BONUS, GATED, TYPE, ACC, PRECISION)  # fmt: skip
    if HAS_FINAL and at_the_edge(TABLE, segment, tl.num_programs(0) // (slices * H), REVERSE):
        at = tl.load(TABLE + segment * 5 + (3 if REVERSE else 4))
        tl.store(FINAL + (at * H + h) * size + row_ * W + column, m, mask=inside)

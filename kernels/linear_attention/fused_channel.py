"""Triton kernels of linear attention with one decay per key channel, and RWKV's bonus.

With G the running sums of log-decays in a chunk of C tokens, a chunk needs sum_k q_tk k_sk exp(G_tk - G_sk) for s <= t, which is a
matrix product only of q exp(G_t - e) and k exp(e - G_s) for one e. Pairs are therefore split by halves: for s in the first and t in the
second half of a block, e is G at the edge between them and both exponents are never positive, whatever the decays; blocks of C,
C / 2, ... 32 tokens leave only pairs within 16 tokens. There e is G in their middle where it spans less than `SAFE`, else halving goes
on to the end.

`sums_by_chunk` writes G, `prepare` the scores, q exp(G) and k exp(G_C - G). With these, output and dv are `sweep_values`, in which
a state decays row by row; dq and dk are what `within` finds inside a chunk plus `sweep_keys`, in which it decays column by column.
With a bonus o_t reads S_{t-1}: G of the token before stands for G where q is scaled, and the token itself is read apart.

Floor, K = V = D channels of two bytes, decays too, per token and head: 10 D bytes forward, 18 D backward.
"""

import triton
from triton import language as tl

from zoo.kernels.linear_attention.fused_scalar import LEAST, load_tile, segment_of

SMALLEST = tl.constexpr(16)  # tokens within which pairs share one e
SAFE = tl.constexpr(40.0)  # e^40 squared, times a few thousand, is finite in float32 and bfloat16


@triton.jit
def sums_by_chunk(G, SUMS, TOTALS, TABLE, g_b, g_t, g_h, s_b, s_t, s_h, H, D, C: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """Running sums of log-decays within each chunk, SUMS [B, T, H, K], and their totals over segments, TOTALS [segments, H, K].
    Programs: segments x heads x blocks of K."""
    blocks = tl.cdiv(D, BD)
    h, segment = tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    i, d = tl.arange(0, C), (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    total = tl.zeros((BD,), ACC)
    for n in range(0, tl.cdiv(stop - start, C)):
        t = start + n * C + i[:, None]
        inside = (t < stop) & (d[None, :] < D)
        each = tl.maximum(tl.load(G + row * g_b + t * g_t + h * g_h + d[None, :], mask=inside, other=0.0).to(ACC), LEAST)
        tl.store(SUMS + row * s_b + t * s_t + h * s_h + d[None, :], tl.cumsum(each, 0), mask=inside)
        total += tl.sum(each, 0)
    tl.store(TOTALS + (segment * H + h) * D + d, total.to(tl.float32), mask=d < D)


@triton.jit
def chunk_of(TABLE, H, C: tl.constexpr, CHUNKS):
    """Row, first token, how many tokens exist, and head of this program's chunk; programs: segments x heads x CHUNKS."""
    n, h = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS % H
    row, start, stop = segment_of(TABLE, (tl.program_id(0) // CHUNKS // H).to(tl.int64))
    start += n * C
    return row, start, tl.minimum(stop - start, C).to(tl.int32), h


@triton.jit
def load_gates(SUMS, i, d, stride, left, D, EXCLUSIVE: tl.constexpr):
    """G as keys meet it, and as queries do."""
    inside = (i[:, None] < left) & (d[None, :] < D)
    sums = tl.load(SUMS + i[:, None] * stride + d[None, :], mask=inside, other=0.0)
    read = sums
    if EXCLUSIVE:
        read = tl.load(SUMS + (i[:, None] - 1) * stride + d[None, :], mask=inside & (i[:, None] > 0), other=0.0)
    return sums, read


@triton.jit
def load_edge(SUMS, i, d, stride, left, D, half):
    """G at the edge between the halves of the block of `2 half` tokens that each token lies in."""
    at = tl.minimum((i & -(2 * half)) + half - 1, left - 1)
    return tl.load(SUMS + at[:, None] * stride + d[None, :], mask=d[None, :] < D, other=0.0)


@triton.jit
def halves(i, j, half):
    """Which of tokens i lie in the second half of a block whose first half holds j."""
    return ((i & -(2 * half)) == (j & -(2 * half))) & ((i & half) != 0) & ((j & half) == 0)


@triton.jit
def near(i, j, EXCLUSIVE: tl.constexpr):
    """Which of tokens i read j within one smallest block."""
    same = i // SMALLEST == j // SMALLEST
    return same & (i > j) if EXCLUSIVE else same & (i >= j)


@triton.jit
def is_safe(sums, read, edge):
    return tl.maximum(tl.max(tl.max(tl.abs(sums - edge), 1), 0), tl.max(tl.max(tl.abs(read - edge), 1), 0)) <= SAFE


@triton.jit
def factors(sums, read, edge, CLAMP: tl.constexpr):
    """exp(G_t - e) for queries and exp(e - G_s) for keys."""
    query, key = (read - edge).to(tl.float32), (edge - sums).to(tl.float32)
    if CLAMP:
        query, key = tl.minimum(query, 0.0), tl.minimum(key, 0.0)
    return tl.exp(query), tl.exp(key)


@triton.jit
def product(p, q, k, sums, read, edge, mask, CLAMP: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """p plus the scores that `mask` picks."""
    query, key = factors(sums, read, edge, CLAMP)
    return p + tl.where(mask, tl.dot((q * query).to(TYPE), tl.trans((k * key).to(TYPE)), input_precision=PRECISION), 0.0)


@triton.jit
def prepare(
    Q, K, SUMS, U, P, QS, KS, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, s_b, s_t, s_h, p_b, p_h, q_rep, k_rep, H, D, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, BONUS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores P [B, H, T, C], queries QS as they meet the state at the chunk's start, keys KS as they enter the one at its end
    (strides of SUMS). Programs: see `chunk_of`."""
    row, start, left, h = chunk_of(TABLE, H, C, CHUNKS)
    if left <= 0:
        return
    i = tl.arange(0, C)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    at = row * s_b + start * s_t + h * s_h
    p = tl.zeros((C, C), tl.float32)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        q = load_tile(Q, i, d, q_t, left, D, EVEN, tl.float32)
        k = load_tile(K, i, d, k_t, left, D, EVEN, tl.float32)
        sums, read = load_gates(SUMS + at, i, d, s_t, left, D, BONUS)
        last = tl.load(SUMS + at + (left - 1) * s_t + d, mask=d < D, other=0.0)
        inside = (i[:, None] < left) & (d[None, :] < D)
        place = at + i[:, None] * s_t + d[None, :]
        tl.store(QS + place, (q * tl.exp(read.to(tl.float32))).to(QS.dtype.element_ty), mask=inside)
        tl.store(KS + place, (k * tl.exp(tl.minimum(last[None, :] - sums, 0.0).to(tl.float32))).to(KS.dtype.element_ty), mask=inside)
        middle = load_edge(SUMS + at, i, d, s_t, left, D, SMALLEST // 2)
        safe = is_safe(sums, read, middle)
        half = C // 2
        while half >= (SMALLEST if safe else 1):
            edge = load_edge(SUMS + at, i, d, s_t, left, D, half)
            p = product(p, q, k, sums, read, edge, halves(i[:, None], i[None, :], half), True, TYPE, PRECISION)
            half //= 2
        if safe:
            p = product(p, q, k, sums, read, middle, near(i[:, None], i[None, :], BONUS), False, TYPE, PRECISION)
        elif not BONUS:
            p += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
        if BONUS:
            u = tl.load(U + h * D + d, mask=d < D, other=0.0).to(tl.float32)
            p += tl.where(i[:, None] == i[None, :], tl.sum(q * k * u[None, :], 1)[:, None], 0.0)
    tl.store(P + row * p_b + h * p_h + (start + i[:, None]) * C + i[None, :], p.to(P.dtype.element_ty), mask=i[:, None] < left)


@triton.jit
def sweep_values(
    A, B, Y, OUT, P, INIT, FINAL, SUMS, TABLE,
    y_b, y_t, y_h, o_b, o_t, o_h, s_b, s_t, s_h, p_b, p_h, y_rep, scale, H, D, W,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, HAS_FINAL: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = P y + a M, M' = exp(G_C) M + b^T y: the output over time with a = QS, b = KS, y = v, M = S; the gradient of v against
    time with P transposed, a = KS, b = QS, y = do, M = dS. Programs: segments x heads x slices of W."""
    slices = tl.cdiv(W, BW)
    slice_, h, segment = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    i, d, w = tl.arange(0, C), tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    A += row * s_b + start * s_t + h * s_h
    B += row * s_b + start * s_t + h * s_h
    SUMS += row * s_b + start * s_t + h * s_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    OUT += row * o_b + start * o_t + h * o_h
    P += row * p_b + h * p_h + start * C
    length = (stop - start).to(tl.int32)
    at = tl.load(TABLE + segment * 5 + (4 if REVERSE else 3))
    m = tl.load(INIT + (at * H + h) * D * W + d[:, None] * W + w[None, :], mask=(d[:, None] < D) & (w[None, :] < W), other=0.0)
    chunks = tl.cdiv(length, C)
    for n in range(0, chunks):
        first = ((chunks - 1 - n) if REVERSE else n) * C
        left, t = length - first, first.to(tl.int64)
        a = load_tile(A + t * s_t, i, d, s_t, left, D, EVEN, TYPE)
        b = load_tile(B + t * s_t, i, d, s_t, left, D, EVEN, TYPE)
        y = load_tile(Y + t * y_t, i, w, y_t, left, W, EVEN, TYPE)
        p = tl.load(P + t * C + i[:, None] * C + i[None, :], mask=i[:, None] < left, other=0.0).to(TYPE)
        last = tl.load(SUMS + (t + tl.minimum(left, C) - 1) * s_t + d, mask=d < D, other=0.0)
        if REVERSE:
            p = tl.trans(p)
        out = tl.dot(p, y, tl.dot(a, m.to(TYPE), input_precision=PRECISION), input_precision=PRECISION) * scale
        m *= tl.exp(last.to(tl.float32))[:, None]
        m = tl.dot(tl.trans(b), y, m, input_precision=PRECISION)
        written = (i[:, None] < left) if EVEN else (i[:, None] < left) & (w[None, :] < W)
        tl.store(OUT + t * o_t + i[:, None] * o_t + w[None, :], out.to(OUT.dtype.element_ty), mask=written)
    if HAS_FINAL:
        at = tl.load(TABLE + segment * 5 + (3 if REVERSE else 4))
        tl.store(FINAL + (at * H + h) * D * W + d[:, None] * W + w[None, :], m, mask=(d[:, None] < D) & (w[None, :] < W))


@triton.jit
def collect_rows(
    B, Y, BOUNDS, SUMS, TABLE, y_b, y_t, y_h, s_b, s_t, s_h, y_rep, H, D, W,
    BD: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What every segment adds to M of `sweep_values`, into BOUNDS at its end (its start if REVERSE).
    Programs: segments x heads x tiles of D x W."""
    slices = tl.cdiv(W, BW)
    tiles = tl.cdiv(D, BD) * slices
    tile_, h, segment = tl.program_id(0) % tiles, tl.program_id(0) // tiles % H, (tl.program_id(0) // tiles // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    i, d, w = tl.arange(0, C), (tile_ // slices) * BD + tl.arange(0, BD), (tile_ % slices) * BW + tl.arange(0, BW)
    B += row * s_b + start * s_t + h * s_h
    SUMS += row * s_b + start * s_t + h * s_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    length = (stop - start).to(tl.int32)
    m = tl.zeros((BD, BW), tl.float32)
    chunks = tl.cdiv(length, C)
    for n in range(0, chunks):
        first = ((chunks - 1 - n) if REVERSE else n) * C
        left, t = length - first, first.to(tl.int64)
        b = load_tile(B + t * s_t, i, d, s_t, left, D, EVEN, TYPE)
        y = load_tile(Y + t * y_t, i, w, y_t, left, W, EVEN, TYPE)
        last = tl.load(SUMS + (t + tl.minimum(left, C) - 1) * s_t + d, mask=d < D, other=0.0)
        m = tl.dot(tl.trans(b), y, m * tl.exp(last.to(tl.float32))[:, None], input_precision=PRECISION)
    at = tl.load(TABLE + segment * 5 + (3 if REVERSE else 4))
    inside = (d[:, None] < D) & (w[None, :] < W)
    tl.store(BOUNDS + (at * H + h) * D * W + d[:, None] * W + w[None, :], m, mask=inside)


@triton.jit
def pull(dq, dk, dp, dpt, q, k, sums, read, edge, mask, maskt, CLAMP: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """dq and dk plus what the scores that `mask` picks give them; dpt and maskt are the transposed ones."""
    query, key = factors(sums, read, edge, CLAMP)
    dq += tl.dot(tl.where(mask, dp, 0.0).to(TYPE), (k * key).to(TYPE), input_precision=PRECISION) * query
    dk += tl.dot(tl.where(maskt, dpt, 0.0).to(TYPE), (q * query).to(TYPE), input_precision=PRECISION) * key
    return dq, dk


@triton.jit
def within(
    Q, K, V, DO, SUMS, DQ, DK, OWN, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, s_b, s_t, s_h, own_b, own_h,
    q_rep, k_rep, v_rep, scale, H, D, W, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, EVEN: tl.constexpr, BONUS: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The part of dq and dk that comes through scores within a chunk (strides of SUMS), without the bonus', whose share of it is
    OWN = scale do . v, [B, H, T]. Programs: see `chunk_of`."""
    row, start, left, h = chunk_of(TABLE, H, C, CHUNKS)
    if left <= 0:
        return
    i = tl.arange(0, C)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    V += row * v_b + start * v_t + (h // v_rep) * v_h
    DO += row * do_b + start * do_t + h * do_h
    at = row * s_b + start * s_t + h * s_h
    dp, dpt = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    own = tl.zeros((C,), tl.float32)
    for first in range(0, W, BW):
        w = first + tl.arange(0, BW)
        v = load_tile(V, i, w, v_t, left, W, EVEN, TYPE)
        do = load_tile(DO, i, w, do_t, left, W, EVEN, TYPE)
        dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
        dpt = tl.dot(v, tl.trans(do), dpt, input_precision=PRECISION)
        if BONUS:
            own += tl.sum(do.to(tl.float32) * v.to(tl.float32), 1)
    dp *= scale
    dpt *= scale
    if BONUS:
        tl.store(OWN + row * own_b + h * own_h + start + i, own * scale, mask=i < left)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        q = load_tile(Q, i, d, q_t, left, D, EVEN, tl.float32)
        k = load_tile(K, i, d, k_t, left, D, EVEN, tl.float32)
        sums, read = load_gates(SUMS + at, i, d, s_t, left, D, BONUS)
        dq, dk = tl.zeros((C, BD), tl.float32), tl.zeros((C, BD), tl.float32)
        middle = load_edge(SUMS + at, i, d, s_t, left, D, SMALLEST // 2)
        safe = is_safe(sums, read, middle)
        half = C // 2
        while half >= (SMALLEST if safe else 1):
            edge = load_edge(SUMS + at, i, d, s_t, left, D, half)
            mask, maskt = halves(i[:, None], i[None, :], half), halves(i[None, :], i[:, None], half)
            dq, dk = pull(dq, dk, dp, dpt, q, k, sums, read, edge, mask, maskt, True, TYPE, PRECISION)
            half //= 2
        if safe:
            mask, maskt = near(i[:, None], i[None, :], BONUS), near(i[None, :], i[:, None], BONUS)
            dq, dk = pull(dq, dk, dp, dpt, q, k, sums, read, middle, mask, maskt, False, TYPE, PRECISION)
        elif not BONUS:
            same = tl.sum(tl.where(i[:, None] == i[None, :], dp, 0.0), 1)
            dq += same[:, None] * k
            dk += same[:, None] * q
        inside = (i[:, None] < left) & (d[None, :] < D)
        place = at + i[:, None] * s_t + d[None, :]
        tl.store(DQ + place, dq.to(DQ.dtype.element_ty), mask=inside)
        tl.store(DK + place, dk.to(DK.dtype.element_ty), mask=inside)


@triton.jit
def sweep_keys(
    A, B, Y, OUT, INIT, SUMS, TABLE,
    a_b, a_t, a_h, b_b, b_t, b_h, s_b, s_t, s_h, a_rep, b_rep, scale, H, D, W,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT += scale e a M, M' = M exp(G_C) + b^T y: the gradient of q over time with a = do, b = v, y = KS, M = S^T and e = exp(G); that
    of k against time with a = v, b = do, y = QS, M = dS^T and e = exp(G_C - G). Y and OUT have the strides of SUMS; D values, W keys.
    Programs: segments x heads x slices of W."""
    slices = tl.cdiv(W, BW)
    slice_, h, segment = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    i, d, w = tl.arange(0, C), tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    A += row * a_b + start * a_t + (h // a_rep) * a_h
    B += row * b_b + start * b_t + (h // b_rep) * b_h
    own = row * s_b + start * s_t + h * s_h
    length = (stop - start).to(tl.int32)
    at = tl.load(TABLE + segment * 5 + (4 if REVERSE else 3))
    m = tl.load(INIT + (at * H + h) * D * W + d[:, None] + w[None, :] * D, mask=(d[:, None] < D) & (w[None, :] < W), other=0.0)
    chunks = tl.cdiv(length, C)
    for n in range(0, chunks):
        first = ((chunks - 1 - n) if REVERSE else n) * C
        left, t = length - first, first.to(tl.int64)
        a = load_tile(A + t * a_t, i, d, a_t, left, D, EVEN, TYPE)
        b = load_tile(B + t * b_t, i, d, b_t, left, D, EVEN, TYPE)
        y = load_tile(Y + own + t * s_t, i, w, s_t, left, W, EVEN, TYPE)
        last = tl.load(SUMS + own + (t + tl.minimum(left, C) - 1) * s_t + w, mask=w < W, other=0.0)
        sums, read = load_gates(SUMS + own + t * s_t, i, w, s_t, left, W, EXCLUSIVE)
        e = tl.exp(tl.minimum(last[None, :] - sums, 0.0).to(tl.float32)) if REVERSE else tl.exp(read.to(tl.float32))
        out = tl.dot(a, m.to(TYPE), input_precision=PRECISION) * e * scale
        m *= tl.exp(last.to(tl.float32))[None, :]
        m = tl.dot(tl.trans(b), y, m, input_precision=PRECISION)
        written = (i[:, None] < left) if EVEN else (i[:, None] < left) & (w[None, :] < W)
        place = OUT + own + t * s_t + i[:, None] * s_t + w[None, :]
        out += tl.load(place, mask=written, other=0.0).to(tl.float32)
        tl.store(place, out.to(OUT.dtype.element_ty), mask=written)


@triton.jit
def finish(
    Q, K, DQ, DK, DG, OWN, U, DU, S, DS, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, s_b, s_t, s_h, g_b, g_t, g_h, own_b, own_h, q_rep, k_rep, scale, H, D, W,
    C: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """DG from q . dq - k . dk, channel by channel, summed up against time from S . dS at the segment's end; with a bonus also its
    gradient, DU [segments, H, K], and its part of dq and dk. Programs: segments x heads x blocks of K."""
    blocks = tl.cdiv(D, BD)
    block, h, segment = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    i, d = tl.arange(0, C), block * BD + tl.arange(0, BD)
    if BONUS:
        u = tl.load(U + h * D + d, mask=d < D, other=0.0).to(tl.float32)
        du = tl.zeros((BD,), tl.float32)
    if start < stop:
        at = (tl.load(TABLE + segment * 5 + 4) * H + h) * D * W
        later = tl.zeros((BD,), tl.float32)
        for first in range(0, W, BLOCK):
            w = first + tl.arange(0, BLOCK)
            tile = at + d[:, None] * W + w[None, :]
            inside = (d[:, None] < D) & (w[None, :] < W)
            later += tl.sum(tl.load(S + tile, mask=inside, other=0.0) * tl.load(DS + tile, mask=inside, other=0.0), 1)
        later *= scale
        chunks = tl.cdiv(stop - start, C)
        for n in range(0, chunks):
            t = start + (chunks - 1 - n) * C + i[:, None]
            inside = (t < stop) & (d[None, :] < D)
            q = tl.load(Q + row * q_b + t * q_t + (h // q_rep) * q_h + d[None, :], mask=inside, other=0.0).to(tl.float32)
            k = tl.load(K + row * k_b + t * k_t + (h // k_rep) * k_h + d[None, :], mask=inside, other=0.0).to(tl.float32)
            place = row * s_b + t * s_t + h * s_h + d[None, :]
            dq = tl.load(DQ + place, mask=inside, other=0.0).to(tl.float32)
            dk = tl.load(DK + place, mask=inside, other=0.0).to(tl.float32)
            read, each = q * dq, q * dq - k * dk
            whole = tl.sum(each, 0)
            dg = later[None, :] + whole[None, :] - tl.cumsum(each, 0) + each
            if BONUS:
                dg -= read
                own = tl.load(OWN + row * own_b + h * own_h + t, mask=t < stop, other=0.0)
                du += tl.sum(own * q * k, 0)
                tl.store(DQ + place, (dq + own * u[None, :] * k).to(DQ.dtype.element_ty), mask=inside)
                tl.store(DK + place, (dk + own * u[None, :] * q).to(DK.dtype.element_ty), mask=inside)
            tl.store(DG + row * g_b + t * g_t + h * g_h + d[None, :], dg.to(DG.dtype.element_ty), mask=inside)
            later += whole
    if BONUS:
        tl.store(DU + (segment * H + h) * D + d, du, mask=d < D)

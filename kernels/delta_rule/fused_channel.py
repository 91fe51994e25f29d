"""Triton kernels of the delta rule with one decay per key channel: what surrounds those of `fused_delta`.

With G the running sums of log-decays in a chunk, scores are sum_c q_tc k_sc exp(G_tc - G_sc), a matrix product of q exp(G_t - e) and
k exp(e - G_s) for any e. Where no exponent passes `SAFE` with e the sums at the chunk's middle, `scale` makes the queries, the keys as
readers, k exp(G - e), and as writers, k exp(e - G), and what follows runs as if there were no decay, but for its states. Other chunks
keep q exp(G), k exp(G) and k exp(G_C - G), which meet the state only; their scores come from `exact_scores` and their gradients from
`exact_gradients`, which split pairs by halves: for s in the first and t in the second half of a block, e is G at the edge between and
both exponents are never positive, for any decays. `gradients` is that of `fused_delta` for three scaled tensors in place of two, and
`finish` turns them into those of q, k and the decays.

Floor, K = V = D channels of two bytes, decays too, per token and head: 10 D bytes forward, 18 D backward.
"""

import triton
from triton import language as tl

from zoo.kernels.delta_rule.fused_delta import CHANNEL, chunk_of, load_edges, store_tile, surprises
from zoo.kernels.fused import LEAST, SAFE, factors, halves, load_tile, segment_of


@triton.jit
def load_gates(G, i, d, stride, left, D, EVEN: tl.constexpr, ACC: tl.constexpr):
    """Running sums of log-decays, and the whole sum."""
    each = tl.maximum(load_tile(G, i, d, stride, left, D, EVEN, ACC), LEAST)
    return tl.cumsum(each, 0), tl.sum(each, 0)


@triton.jit
def scale(
    Q, K, G, QS, KR, KW, EDGES, SAFES, SUMS, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, q_rep, k_rep, factor, LENGTH, H, D,
    DP: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """QS, the output's factor in it, KR and KW; EDGES `[chunks, H, 4, K]`: e of queries, e of keys, G_C less each (keys' first); SAFES
    `[chunks, H]`: which chunks are; of others G, in SUMS. Programs: chunks x heads."""
    row, start, left, h, chunk = chunk_of(TABLE, H)
    if left <= 0:
        return
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    G += row * g_b + start * g_t + h * g_h
    own, across = ((row * LENGTH + start) * H + h) * D, H * D
    i, d = tl.arange(0, C), tl.arange(0, DP)
    sums, total = load_gates(G, i, d, g_t, left, D, EVEN, ACC)
    e = tl.sum(tl.where(i[:, None] == tl.minimum(C // 2, left) - 1, sums, 0.0), 0)
    safe = tl.max(tl.max(tl.where(i[:, None] < left, tl.abs(sums - e[None, :]), 0.0), 1), 0) <= SAFE
    for_q, for_k = tl.where(safe, e, 0.0), tl.where(safe, e, total)
    read = tl.exp(sums - for_q[None, :])
    store_tile(QS + own, load_tile(Q, i, d, q_t, left, D, EVEN, ACC) * factor * read, i, d, across, left, D, EVEN)
    k = load_tile(K, i, d, k_t, left, D, EVEN, ACC)
    store_tile(KR + own, k * read, i, d, across, left, D, EVEN)
    store_tile(KW + own, k * tl.exp(for_k[None, :] - sums), i, d, across, left, D, EVEN)
    if not safe:
        store_tile(SUMS + own, sums, i, d, across, left, D, EVEN)
    edge = EDGES + (chunk * H + h) * 4 * D + d
    tl.store(edge, for_q, mask=d < D)
    tl.store(edge + D, for_k, mask=d < D)
    tl.store(edge + 2 * D, total - for_k, mask=d < D)
    tl.store(edge + 3 * D, total - for_q, mask=d < D)
    tl.store(SAFES + chunk * H + h, safe.to(tl.int32))


@triton.jit
def exact_scores(
    Q, K, SUMS, P, KK, SAFES, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, q_rep, k_rep, factor, LENGTH, H, D,
    C: tl.constexpr, BD: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the chunks that are not safe, scores of queries and keys P and of keys and earlier keys KK, `[B, H, T, C]`.
    Programs: chunks x heads."""
    row, start, left, h, chunk = chunk_of(TABLE, H)
    if left <= 0:
        return
    if tl.load(SAFES + chunk * H + h) != 0:
        return
    i = tl.arange(0, C)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    own, across = (row * LENGTH + start) * H + h, H * D
    SUMS += own * D
    p, kk = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        q = load_tile(Q, i, d, q_t, left, D, False, ACC)
        k = load_tile(K, i, d, k_t, left, D, False, ACC)
        sums = load_tile(SUMS, i, d, across, left, D, False, ACC)
        half = C // 2
        while half >= 1:
            query, key = factors(SUMS, sums, sums, i, d, across, left, D, half)
            writer, mask = tl.trans((k * key).to(TYPE)), halves(i[:, None], i[None, :], half)
            p += tl.where(mask, tl.dot((q * query).to(TYPE), writer, input_precision=PRECISION, out_dtype=ACC), 0.0)
            kk += tl.where(mask, tl.dot((k * query).to(TYPE), writer, input_precision=PRECISION, out_dtype=ACC), 0.0)
            half //= 2
        p += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    store_tile(P + own * C, p * factor, i, i, H * C, left, C, True)
    store_tile(KK + own * C, kk, i, i, H * C, left, C, True)


@triton.jit
def gradients(
    Q, KR, KW, V, U, T, DO, DU, BETA, EDGES, SAFES, KK, STATES, DSTATES, N, M, DQ, DKR, DKW, DBETA, ENDS, TABLE,
    v_b, v_t, v_h, do_b, do_t, do_h, b_b, b_t, b_h, v_rep, LENGTH, H, D, VALUES,
    DP: tl.constexpr, VP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ, DKR and DKW, of scaled queries and keys, without what passes through scores where a chunk is not safe; DBETA; ENDS
    `[chunks, H, K]`, S' . dS'; DU becomes the gradient of V; N and M are scratch. Programs: chunks x heads."""
    row, start, left, h, chunk = chunk_of(TABLE, H)
    if left <= 0:
        return
    i, d = tl.arange(0, C), tl.arange(0, DP)
    own, place = (row * LENGTH + start) * H + h, chunk * H + h
    V += row * v_b + start * v_t + (h // v_rep) * v_h
    DO += row * do_b + start * do_t + h * do_h
    STATES, DSTATES, EDGES = STATES + place * D * VALUES, DSTATES + place * D * VALUES, EDGES + place * 4 * D
    U, DU, N, M, stride, cell, across = U + own * VALUES, DU + own * VALUES, N + own * C, M + own * C, H * VALUES, own * D, H * D
    safe = tl.load(SAFES + place) != 0
    read, _, after = load_edges(EDGES, d, D, False)
    kr = load_tile(KR + cell, i, d, across, left, D, EVEN, TYPE)
    kw = load_tile(KW + cell, i, d, across, left, D, EVEN, TYPE)
    beta = tl.load(BETA + row * b_b + (start + i) * b_t + h * b_h, mask=i < left, other=0.0).to(ACC)
    t = load_tile(T + own * C, i, i, H * C, left, C, True, TYPE)
    n, m, dbeta, _ = surprises(
        kr, t, beta, tl.full((C,), 1.0, ACC), read, V, U, DO, DU, STATES, i, d, v_t, do_t, stride, left, D, VALUES, VP, BW, C, EVEN,
        CHANNEL, TYPE, ACC, PRECISION,
    )  # fmt: skip
    kk = tl.dot(kr, tl.trans(kw), input_precision=PRECISION, out_dtype=ACC)
    if not safe:
        kk = load_tile(KK + own * C, i, i, H * C, left, C, True, ACC)
    dbeta -= tl.sum(tl.where(i[:, None] > i[None, :], kk * m, 0.0), 1)  # dR . L U
    tl.store(DBETA + own + i * H, dbeta.to(DBETA.dtype.element_ty), mask=i < left)
    store_tile(N, tl.where((i[:, None] >= i[None, :]) & safe, n, 0.0), i, i, H * C, left, C, True)
    store_tile(M, tl.where((i[:, None] > i[None, :]) & safe, -m * beta[:, None], 0.0), i, i, H * C, left, C, True)
    tl.debug_barrier()  # N, M and DU are read by other threads than wrote them
    dq, dkr, end = tl.zeros((C, DP), ACC), tl.zeros((C, DP), ACC), tl.zeros((DP,), ACC)
    for first in range(0, VP, BW):
        w = first + tl.arange(0, BW)
        dv = load_tile(DU, i, w, stride, left, VALUES, EVEN, TYPE)
        do = load_tile(DO, i, w, do_t, left, VALUES, EVEN, TYPE)
        s = load_tile(STATES, d, w, VALUES, D, VALUES, EVEN, ACC)
        end += tl.sum(s * load_tile(DSTATES, d, w, VALUES, D, VALUES, EVEN, ACC), 1)
        s = tl.trans((s * read[:, None]).to(TYPE))
        dq = tl.dot(do, s, dq, input_precision=PRECISION, out_dtype=ACC)
        dkr = tl.dot((-dv).to(TYPE), s, dkr, input_precision=PRECISION, out_dtype=ACC)
    n, m = load_tile(N, i, i, H * C, left, C, True, TYPE), load_tile(M, i, i, H * C, left, C, True, TYPE)
    store_tile(DQ + cell, tl.dot(n, kw, dq, input_precision=PRECISION, out_dtype=ACC), i, d, across, left, D, EVEN)
    store_tile(DKR + cell, tl.dot(m, kw, dkr, input_precision=PRECISION, out_dtype=ACC), i, d, across, left, D, EVEN)
    dkw = tl.zeros((C, DP), ACC)
    for first in range(0, VP, BW):
        w = first + tl.arange(0, BW)
        u = load_tile(U, i, w, stride, left, VALUES, EVEN, TYPE)
        ds = (load_tile(DSTATES, d, w, VALUES, D, VALUES, EVEN, ACC) * after[:, None]).to(TYPE)
        dkw = tl.dot(u, tl.trans(ds), dkw, input_precision=PRECISION, out_dtype=ACC)
    whole = tl.exp(tl.load(EDGES + d, mask=d < D, other=0.0) + tl.load(EDGES + 3 * D + d, mask=d < D, other=0.0))
    tl.store(ENDS + place * D + d, end * whole + tl.sum(kw * dkw, 0), mask=d < D)
    q = load_tile(Q + cell, i, d, across, left, D, EVEN, TYPE)
    dkw = tl.dot(tl.trans(n), q, dkw, input_precision=PRECISION, out_dtype=ACC)
    dkw = tl.dot(tl.trans(m), kr, dkw, input_precision=PRECISION, out_dtype=ACC)
    store_tile(DKW + cell, dkw, i, d, across, left, D, EVEN)


@triton.jit
def exact_gradients(
    Q, K, U, DO, DV, SUMS, DQ, DKR, DKW, SAFES, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, q_rep, k_rep, factor, LENGTH, H, D, VALUES,
    C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Make DQ, DKR and DKW those of q and of k as reader and writer where a chunk is not safe. Programs: chunks x heads."""
    row, start, left, h, chunk = chunk_of(TABLE, H)
    if left <= 0:
        return
    if tl.load(SAFES + chunk * H + h) != 0:
        return
    i = tl.arange(0, C)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    DO += row * do_b + start * do_t + h * do_h
    own, across, stride = (row * LENGTH + start) * H + h, H * D, H * VALUES
    at, own = own * VALUES, own * D
    n, nt, m, mt = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC), tl.zeros((C, C), ACC), tl.zeros((C, C), ACC)
    for first in range(0, VALUES, BW):
        w = first + tl.arange(0, BW)
        u = load_tile(U + at, i, w, stride, left, VALUES, False, TYPE)
        do = load_tile(DO, i, w, do_t, left, VALUES, False, TYPE)
        dv = load_tile(DV + at, i, w, stride, left, VALUES, False, TYPE)
        n = tl.dot(do, tl.trans(u), n, input_precision=PRECISION, out_dtype=ACC)
        nt = tl.dot(u, tl.trans(do), nt, input_precision=PRECISION, out_dtype=ACC)
        m = tl.dot(dv, tl.trans(u), m, input_precision=PRECISION, out_dtype=ACC)
        mt = tl.dot(u, tl.trans(dv), mt, input_precision=PRECISION, out_dtype=ACC)
    same = tl.sum(tl.where(i[:, None] == i[None, :], n, 0.0), 1) * factor
    n, nt, m, mt = (n * factor).to(TYPE), (nt * factor).to(TYPE), (-m).to(TYPE), (-mt).to(TYPE)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        q = load_tile(Q, i, d, q_t, left, D, False, ACC)
        k = load_tile(K, i, d, k_t, left, D, False, ACC)
        sums = load_tile(SUMS + own, i, d, across, left, D, False, ACC)
        total = tl.load(SUMS + own + (left - 1) * across + d, mask=d < D, other=0.0)
        dq = load_tile(DQ + own, i, d, across, left, D, False, ACC) * tl.exp(sums) * factor + same[:, None] * k
        dkr = load_tile(DKR + own, i, d, across, left, D, False, ACC) * tl.exp(sums)
        dkw = load_tile(DKW + own, i, d, across, left, D, False, ACC) * tl.exp(tl.minimum(total[None, :] - sums, 0.0))
        dkw += same[:, None] * q
        half = C // 2
        while half >= 1:
            query, key = factors(SUMS + own, sums, sums, i, d, across, left, D, half)
            mask, maskt = halves(i[:, None], i[None, :], half), halves(i[None, :], i[:, None], half)
            writer, asked, reader = (k * key).to(TYPE), (q * query).to(TYPE), (k * query).to(TYPE)
            dq += tl.dot(tl.where(mask, n, 0.0), writer, input_precision=PRECISION, out_dtype=ACC) * query
            dkr += tl.dot(tl.where(mask, m, 0.0), writer, input_precision=PRECISION, out_dtype=ACC) * query
            new = tl.dot(tl.where(maskt, nt, 0.0), asked, input_precision=PRECISION, out_dtype=ACC)
            dkw += tl.dot(tl.where(maskt, mt, 0.0), reader, new, input_precision=PRECISION, out_dtype=ACC) * key
            half //= 2
        store_tile(DQ + own, dq, i, d, across, left, D, False)
        store_tile(DKR + own, dkr, i, d, across, left, D, False)
        store_tile(DKW + own, dkw, i, d, across, left, D, False)


@triton.jit
def finish(
    Q, K, G, DQ, DKR, DKW, DG, ENDS, SAFES, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, q_rep, k_rep, factor, LENGTH, H, D,
    C: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DQ made final, DKR the gradient of k, and DG, summed up against time. Programs: chunks x heads x blocks of K."""
    blocks = tl.cdiv(D, BD)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    row, start, stop = segment_of(TABLE, place // H)
    left, h = (stop - start).to(tl.int32), place % H
    if left <= 0:
        return
    i, d = tl.arange(0, C), (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    q = load_tile(Q + row * q_b + start * q_t + (h // q_rep) * q_h, i, d, q_t, left, D, EVEN, ACC)
    k = load_tile(K + row * k_b + start * k_t + (h // k_rep) * k_h, i, d, k_t, left, D, EVEN, ACC)
    at, across = ((row * LENGTH + start) * H + h) * D, H * D
    dq = load_tile(DQ + at, i, d, across, left, D, EVEN, ACC)
    dkr = load_tile(DKR + at, i, d, across, left, D, EVEN, ACC)
    dkw = load_tile(DKW + at, i, d, across, left, D, EVEN, ACC)
    if tl.load(SAFES + place) != 0:
        sums, _ = load_gates(G + row * g_b + start * g_t + h * g_h, i, d, g_t, left, D, EVEN, ACC)
        e = tl.sum(tl.where(i[:, None] == tl.minimum(C // 2, left) - 1, sums, 0.0), 0)
        read = tl.exp(sums - e[None, :])
        dq *= read * factor
        dkr *= read
        dkw *= tl.exp(e[None, :] - sums)
    each = q * dq + k * (dkr - dkw)
    end = tl.load(ENDS + place * D + d, mask=d < D, other=0.0)
    dg = (end + tl.sum(each, 0))[None, :] - tl.cumsum(each, 0) + each
    store_tile(DQ + at, dq, i, d, across, left, D, EVEN)
    store_tile(DKR + at, dkr + dkw, i, d, across, left, D, EVEN)
    store_tile(DG + at, dg, i, d, across, left, D, EVEN)

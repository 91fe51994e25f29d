"""Triton kernels of the general delta rule, chunk by chunk.

Let S be the state before a chunk of C tokens, S' the one behind it, and u_t = a_t S_{t-1} what the tokens move. With G the running sums
of log-decays, q~_t = q_t exp(G_t), a~_t = a_t exp(G_{t-1}), and keys b~_s, k~_s = b_s, k_s exp(-G_s), the scores A_xy = x~ y~^T
are causal (those of a strictly), u = T (a~ S + A_ak v) with T = (I - A_ab)^-1, and the values drop out of everything else:

    S' = exp(G_C) S + P S + Y^T v      P = X^T a~,  X = exp(G_C) T^T b~,  Y = exp(G_C) k~ + A_ak^T X
    o  = R S + M v                     R = q~ + N a~,  N = A_qb T,  M = A_qk + N A_ak
    u  = Z S + L v                     Z = T a~,  L = T A_ak

`transitions` makes these matrices for all chunks side by side, `chain` takes S through them, `outputs` reads it. Against time `chain`
takes the gradient of S, dS = exp(G_C) dS' + P^T dS' + R^T do, and `value_gradients` makes

    dv = Y dS' + M^T do      dr = X dS' + N^T do      dr being the gradient of a~ S + A_ak v

With queries (q, a), their cotangents (do, dr), keys (k, b) and their values (v, u), `key_gradients` is that of linear attention:
the gradient of a query is do S^T + (do v^T) k~ + (do u^T) b~, that of a key v dS'^T + (v do^T) q~ + (v dr^T) a~, and so on.

G enters as differences from e, its value at the chunk's middle, where nothing is further than `SAFE` from it, all of RWKV-7's decays
among them. Other chunks are left to launches with EXACT, which take the scores by halves: for s in the first and t in the second half
of a block, e is G at the edge between, and no exponent is positive, for any decays.

Floor, K = V = D channels of two bytes, decays too, per token and head: forward 14 D bytes, backward 26 D. With the matrices, K = V = C, it
is 50 D and 140 D: the backward makes them anew.
"""

import triton
from triton import language as tl

from zoo.kernels.delta_rule.fused_shared import unit_lower_inverse
from zoo.kernels.fused import LEAST, SAFE, halves, load_tile, segment_of


@triton.jit
def load_sums(G, i, d, stride, left, D, EVEN: tl.constexpr, ACC: tl.constexpr):
    """Running sums of log-decays as keys and q meet them, as a does, and the whole sum."""
    each = tl.maximum(load_tile(G, i, d, stride, left, D, EVEN, ACC), LEAST)
    sums = tl.cumsum(each, 0)
    return sums, sums - each, tl.sum(each, 0)


@triton.jit
def centre(sums, total, i, C: tl.constexpr, EXACT: tl.constexpr):
    """e of queries and of keys; with EXACT they meet the state alone, at either end of the chunk."""
    if EXACT:
        return tl.zeros_like(total), total
    e = tl.sum(tl.where(i[:, None] == C // 2 - 1, sums, 0.0), 0)
    return e, e


@triton.jit
def edge_factors(sums, query, i, half):
    """exp(G_t - e) for queries and exp(e - G_s) for keys, e at the edge between the halves of the block of `2 half` tokens they lie in."""
    at = ((i & -(2 * half)) + half - 1)[:, None]
    edge = tl.gather(sums, tl.broadcast_to(at, sums.shape[0], sums.shape[1]), 0)
    return tl.exp(tl.minimum(query - edge, 0.0)), tl.exp(tl.minimum(edge - sums, 0.0))


@triton.jit
def exact_scores(x, y, sums, query, i, OWN: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """Scores of queries with keys, for any decays, of the token itself if OWN; `query`: the sums that queries meet."""
    t, s = i[:, None], i[None, :]
    p = tl.zeros((C, C), ACC)
    half = C // 2
    while half >= 1:
        for_x, for_y = edge_factors(sums, query, i, half)
        new = tl.dot((x * for_x).to(TYPE), tl.trans((y * for_y).to(TYPE)), input_precision=PRECISION, out_dtype=ACC)
        p += tl.where(halves(t, s, half), new, 0.0)
        half //= 2
    if OWN:
        p += tl.where(t == s, tl.sum(x * y, 1)[:, None], 0.0)
    return p


@triton.jit
def chunk_of(TABLE, H):
    """Row, first token, how many tokens exist, head and place of this program's chunk; programs: chunks x heads."""
    h, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, chunk)
    return row, start, (stop - start).to(tl.int32), h, chunk * H + h


@triton.jit
def store(X, place, i, j, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A chunk's whole matrix."""
    tl.store(X + place * ROWS * COLUMNS + i[:, None] * COLUMNS + j[None, :], x.to(X.dtype.element_ty))


@triton.jit
def load(X, place, i, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    return tl.load(X + place * ROWS * COLUMNS + i[:, None] * COLUMNS + j[None, :]).to(TYPE)


@triton.jit
def inverses(
    A, B, G, T, SAFES, TABLE, a_b, a_t, a_h, b_b, b_t, b_h, g_b, g_t, g_h, H, D,
    C: tl.constexpr, DP: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """T [chunks, H, C, C], and SAFES: which chunks are. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H)
    if left <= 0:  # no chunk at all
        return
    if EXACT and tl.load(SAFES + place) != 0:
        return
    i, d = tl.arange(0, C), tl.arange(0, DP)
    sums, before, total = load_sums(G + row * g_b + start * g_t + h * g_h, i, d, g_t, left, D, EVEN, ACC)
    a = load_tile(A + row * a_b + start * a_t + h * a_h, i, d, a_t, left, D, EVEN, ACC)
    b = load_tile(B + row * b_b + start * b_t + h * b_h, i, d, b_t, left, D, EVEN, ACC)
    if EXACT:
        ab = exact_scores(a, b, sums, before, i, False, C, TYPE, ACC, PRECISION)
    else:
        e, _ = centre(sums, total, i, C, EXACT)
        apart = tl.maximum(tl.abs(sums - e[None, :]), tl.abs(before - e[None, :]))
        safe = tl.max(tl.max(apart, 1), 0) <= SAFE
        tl.store(SAFES + place, safe.to(tl.int32))
        if not safe:
            return
        a, b = (a * tl.exp(before - e[None, :])).to(TYPE), (b * tl.exp(e[None, :] - sums)).to(TYPE)
        ab = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
        ab = tl.where(i[:, None] > i[None, :], ab, 0.0)
    store(T, place, i, i, unit_lower_inverse(-ab, i, C, ACC, PRECISION), C, C)


@triton.jit
def at_states(E, for_q, for_k, total, DP: tl.constexpr):
    """How q meets a state and how keys do, kept beside the decay over the chunk."""
    read, kept = tl.exp(for_q), tl.exp(total - for_k)
    tl.store(E, tl.exp(total))
    tl.store(E + DP, read)
    tl.store(E + 2 * DP, kept)
    return read, kept


@triton.jit
def transitions(
    Q, K, A, B, G, T, E, P, YT, R, M, Z, L, XT, N, QA, KB, SAFES, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, a_h, b_b, b_t, b_h, g_b, g_t, g_h, scale, more, H, D,
    C: tl.constexpr, DP: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Matrices of a chunk, each `[chunks, H, rows, columns]`: P [K, K], Y^T [K, C], R [C, K], M [C, C] and, unless `more` (0 or C) is
    0, Z [C, K], L [C, C], X^T [K, C], N [C, C], and QA and KB [2 C, K], decayed q on a and k on b, or plain with EXACT; E
    [chunks, H, 3, K], the decays over it, and how q meets a state and how keys do. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H)
    if left <= 0:
        return
    if (tl.load(SAFES + place) != 0) == EXACT:
        return
    i, d = tl.arange(0, C), tl.arange(0, DP)
    sums, before, total = load_sums(G + row * g_b + start * g_t + h * g_h, i, d, g_t, left, D, EVEN, ACC)
    for_q, for_k = centre(sums, total, i, C, EXACT)
    read, kept = at_states(E + place * 3 * DP + d, for_q, for_k, total, DP)
    # what moves the state first, so that little is alive at once. T is not rounded, lest its errors add up in P; a~ and b~ are as in T
    t = load(T, place, i, i, C, C, ACC)
    a = load_tile(A + row * a_b + start * a_t + h * a_h, i, d, a_t, left, D, EVEN, ACC)
    b = load_tile(B + row * b_b + start * b_t + h * b_h, i, d, b_t, left, D, EVEN, ACC)
    as_, bs = (a * tl.exp(before - for_q[None, :])).to(TYPE), (b * tl.exp(for_k[None, :] - sums)).to(TYPE)
    wide_a, wide_b, seen = as_.to(ACC), bs.to(ACC), i[:, None] >= i[None, :]
    xt = tl.dot(tl.trans(wide_b), t, input_precision=PRECISION, out_dtype=ACC)
    p = tl.dot(xt, wide_a, input_precision=PRECISION, out_dtype=ACC)
    store(P, place, d, d, p * kept[:, None] * read[None, :], DP, DP)
    if more > 0:
        store(XT, place, d, i, xt * kept[:, None], DP, C)
        store(Z, place, i, d, tl.dot(t, wide_a, input_precision=PRECISION, out_dtype=ACC) * read[None, :], C, DP)
        store(QA, place, C + i, d, a if EXACT else as_, 2 * C, DP)
        store(KB, place, C + i, d, b if EXACT else bs, 2 * C, DP)
    xt = xt.to(TYPE)

    k = load_tile(K + row * k_b + start * k_t + h * k_h, i, d, k_t, left, D, EVEN, ACC)
    ks = (k * tl.exp(for_k[None, :] - sums)).to(TYPE)
    if EXACT:
        ak = exact_scores(a, k, sums, before, i, False, C, TYPE, ACC, PRECISION).to(TYPE)
    else:
        ak = tl.where(i[:, None] > i[None, :], tl.dot(as_, tl.trans(ks), input_precision=PRECISION, out_dtype=ACC), 0.0).to(TYPE)
    yt = tl.dot(xt, ak, input_precision=PRECISION, out_dtype=ACC) + tl.trans(ks)
    store(YT, place, d, i, yt * kept[:, None], DP, C)
    if more > 0:
        store(L, place, i, i, tl.dot(t, ak.to(ACC), input_precision=PRECISION, out_dtype=ACC), C, C)

    q = load_tile(Q + row * q_b + start * q_t + h * q_h, i, d, q_t, left, D, EVEN, ACC) * scale
    qs = (q * tl.exp(sums - for_q[None, :])).to(TYPE)
    if EXACT:
        qb = exact_scores(q, b, sums, sums, i, True, C, TYPE, ACC, PRECISION)
    else:
        qb = tl.where(seen, tl.dot(qs, tl.trans(bs), input_precision=PRECISION, out_dtype=ACC), 0.0)
    n = tl.dot(qb, t, input_precision=PRECISION, out_dtype=ACC).to(TYPE)
    if more > 0:
        store(N, place, i, i, n, C, C)
        store(QA, place, i, d, q if EXACT else qs, 2 * C, DP)
        store(KB, place, i, d, k if EXACT else ks, 2 * C, DP)
    r = tl.dot(n, as_, input_precision=PRECISION, out_dtype=ACC) + qs
    store(R, place, i, d, r * read[None, :], C, DP)
    if EXACT:
        qk = exact_scores(q, k, sums, sums, i, True, C, TYPE, ACC, PRECISION)
    else:
        qk = tl.where(seen, tl.dot(qs, tl.trans(ks), input_precision=PRECISION, out_dtype=ACC), 0.0)
    store(M, place, i, i, tl.dot(n, ak, qk, input_precision=PRECISION, out_dtype=ACC), C, C)


@triton.jit
def chain(
    E, P, X, V, INIT, STATES, FINAL, FIRST, TABLE, v_b, v_t, v_h, m_row, m_col, m_size, H, D, W,
    DP: tl.constexpr, BW: tl.constexpr, WP: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, REVERSE: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """STATES [chunks, H, K, V], S before each chunk with X = Y^T, and FINAL [sequences, H, K, V], the last one; if REVERSE dS' behind each
    chunk with X = R and V = do, and dS of the first. FIRST [sequences + 1]: their first chunks.
    Programs: sequences x heads x slices of V."""
    slices: tl.constexpr = WP // BW
    slice_, h, sequence = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    first, last = tl.load(FIRST + sequence), tl.load(FIRST + sequence + 1)
    some = last > first
    row = tl.load(TABLE + first * 5, mask=some, other=0)
    start, stop = tl.load(TABLE + first * 5 + 1, mask=some, other=0), tl.load(TABLE + (last - 1) * 5 + 2, mask=some, other=0)
    i, d, w = tl.arange(0, C), tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    V += row * v_b + start * v_t + h * v_h
    length, chunks = (stop - start).to(tl.int32), (last - first).to(tl.int32)
    inside = (d[:, None] < D) & (w[None, :] < W)
    m = tl.load(INIT + (sequence * H + h) * m_size + d[:, None] * m_row + w[None, :] * m_col, mask=inside, other=0.0).to(ACC)
    for n in range(0, chunks):
        j = (chunks - 1 - n) if REVERSE else n
        place = (first + j) * H + h
        tl.store(STATES + place * DP * WP + d[:, None] * WP + w[None, :], m.to(STATES.dtype.element_ty))
        v = load_tile(V + (j * C).to(tl.int64) * v_t, i, w, v_t, length - j * C, W, EVEN, TYPE)
        p, e = load(P, place, d, d, DP, DP, TYPE), tl.load(E + place * 3 * DP + d)
        if REVERSE:
            p, x = tl.trans(p), tl.trans(load(X, place, i, d, C, DP, TYPE))
        else:
            x = load(X, place, d, i, DP, C, TYPE)
        old = m.to(TYPE)
        m = tl.dot(x, v, m * e[:, None], input_precision=PRECISION, out_dtype=ACC)
        m = tl.dot(p, old, m, input_precision=PRECISION, out_dtype=ACC)
    tl.store(FINAL + (sequence * H + h) * D * W + d[:, None] * W + w[None, :], m, mask=inside)


@triton.jit
def outputs(
    R, M, S, V, OUT, TABLE, v_b, v_t, v_h, o_b, o_t, o_h, H, W,
    C: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, BW: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """R S + M v. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H)
    if left <= 0:
        return
    i, d = tl.arange(0, C), tl.arange(0, DP)
    r, m = load(R, place, i, d, C, DP, TYPE), load(M, place, i, i, C, C, TYPE)
    for first in range(0, WP, BW):
        w = first + tl.arange(0, BW)
        v = load_tile(V + row * v_b + start * v_t + h * v_h, i, w, v_t, left, W, EVEN, TYPE)
        s = load(S, place, d, w, DP, WP, TYPE)
        out = tl.dot(r, s, input_precision=PRECISION, out_dtype=ACC)
        out = tl.dot(m, v, out, input_precision=PRECISION, out_dtype=ACC)
        at = OUT + row * o_b + start * o_t + h * o_h + i[:, None] * o_t + w[None, :]
        tl.store(at, out.to(OUT.dtype.element_ty), mask=(i[:, None] < left) & (w[None, :] < W))


@triton.jit
def value_gradients(
    Z, L, XT, N, YT, M, S, DS, V, DO, DV, VALUES, COTANGENTS, TABLE, v_b, v_t, v_h, do_b, do_t, do_h, dv_b, dv_t, dv_h, H, W,
    C: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr, BW: tl.constexpr, EVEN: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DV, and VALUES, v on u, and COTANGENTS, do on dr, [chunks, H, 2 C, V]. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H)
    if left <= 0:
        return
    i, d = tl.arange(0, C), tl.arange(0, DP)
    for first in range(0, WP, BW):
        w = first + tl.arange(0, BW)
        v = load_tile(V + row * v_b + start * v_t + h * v_h, i, w, v_t, left, W, EVEN, TYPE)
        u = tl.dot(load(Z, place, i, d, C, DP, TYPE), load(S, place, d, w, DP, WP, TYPE), input_precision=PRECISION, out_dtype=ACC)
        u = tl.dot(load(L, place, i, i, C, C, TYPE), v, u, input_precision=PRECISION, out_dtype=ACC)
        store(VALUES, place, i, w, v, 2 * C, WP)
        store(VALUES, place, C + i, w, u, 2 * C, WP)
        do = load_tile(DO + row * do_b + start * do_t + h * do_h, i, w, do_t, left, W, EVEN, TYPE)
        ds = load(DS, place, d, w, DP, WP, TYPE)
        dr = tl.dot(tl.trans(load(XT, place, d, i, DP, C, TYPE)), ds, input_precision=PRECISION, out_dtype=ACC)
        dr = tl.dot(tl.trans(load(N, place, i, i, C, C, TYPE)), do, dr, input_precision=PRECISION, out_dtype=ACC)
        store(COTANGENTS, place, i, w, do, 2 * C, WP)
        store(COTANGENTS, place, C + i, w, dr, 2 * C, WP)
        dv = tl.dot(tl.trans(load(YT, place, d, i, DP, C, TYPE)), ds, input_precision=PRECISION, out_dtype=ACC)
        dv = tl.dot(tl.trans(load(M, place, i, i, C, C, TYPE)), do, dv, input_precision=PRECISION, out_dtype=ACC)
        at = DV + row * dv_b + start * dv_t + h * dv_h + i[:, None] * dv_t + w[None, :]
        tl.store(at, dv.to(DV.dtype.element_ty), mask=(i[:, None] < left) & (w[None, :] < W))


@triton.jit
def exact_part(
    p, z, sums, row_sums, z_sums, i, side, own, C: tl.constexpr, BD: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p z with the decays between, for any of these, what lies on the diagonal if `own`; rows are queries, or keys with side 1."""
    sign = 1 - 2 * side
    diagonal = (i[:, None] == i[None, :]) & (own != 0)
    out = tl.dot(tl.where(diagonal, p, 0.0).to(TYPE), z.to(TYPE), input_precision=PRECISION, out_dtype=ACC)
    half = C // 2
    while half >= 1:
        at = ((i & -(2 * half)) + half - 1)[:, None]
        edge = tl.gather(sums, tl.broadcast_to(at, C, BD), 0)
        seen = tl.where(side == 1, halves(i[None, :], i[:, None], half), halves(i[:, None], i[None, :], half))
        decayed = (z * tl.exp(tl.minimum((edge - z_sums) * sign, 0.0))).to(TYPE)
        each = tl.dot(tl.where(seen, p, 0.0).to(TYPE), decayed, input_precision=PRECISION, out_dtype=ACC)
        out += each * tl.exp(tl.minimum((row_sums - edge) * sign, 0.0))
        half //= 2
    return out


@triton.jit
def key_gradients(
    QA, KB, G, E, VALUES, COTANGENTS, S, DS, GRADS, LATER, SAFES, TABLE, g_b, g_t, g_h, d_kind, d_b, d_t, d_h, H, D,
    C: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, WP: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GRADS [4, B, T, H, K], of decayed q, a, k and b, with EXACT of plain ones; LATER [chunks, H, K], S' . dS'.
    Programs: chunks x heads x blocks of K x sides, queries being read from keys, and keys from queries."""
    blocks: tl.constexpr = DP // BD
    side, block, h = tl.program_id(0) % 2, tl.program_id(0) // 2 % blocks, tl.program_id(0) // (2 * blocks) % H
    chunk = (tl.program_id(0) // (2 * blocks) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, chunk)
    left, place = (stop - start).to(tl.int32), chunk * H + h
    if left <= 0:
        return
    if (tl.load(SAFES + place) != 0) == EXACT:
        return
    i, d, w = tl.arange(0, C), block * BD + tl.arange(0, BD), tl.arange(0, WP)
    x_, y_ = (tl.where(side == 1, VALUES, COTANGENTS), tl.where(side == 1, COTANGENTS, VALUES))
    own_, z_ = (tl.where(side == 1, KB, QA), tl.where(side == 1, QA, KB))
    state = load(tl.where(side == 1, DS, S), place, d, w, DP, WP, TYPE)
    y, second_y = load(y_, place, i, w, 2 * C, WP, TYPE), load(y_, place, C + i, w, 2 * C, WP, TYPE)
    z, second_z = load(z_, place, i, d, 2 * C, DP, TYPE), load(z_, place, C + i, d, 2 * C, DP, TYPE)
    at_state = tl.load(E + place * 3 * DP + (1 + side) * DP + d)
    GRADS += row * d_b + start * d_t + h * d_h + 2 * side * d_kind
    at, inside = i[:, None] * d_t + d[None, :], (i[:, None] < left) & (d[None, :] < D)
    later = tl.zeros((BD,), ACC)
    if side == 1:
        later += tl.sum(load(S, place, d, w, DP, WP, ACC) * load(DS, place, d, w, DP, WP, ACC), 1) * tl.load(E + place * 3 * DP + d)
    apart = (i[:, None] - i[None, :]) * (1 - 2 * side)
    for kind in range(0, 2):
        x = load(x_, place, kind * C + i, w, 2 * C, WP, TYPE)
        out = tl.dot(x, tl.trans(state), input_precision=PRECISION, out_dtype=ACC) * at_state[None, :]
        if EXACT:
            sums, before, total = load_sums(G + row * g_b + start * g_t + h * g_h, i, d, g_t, left, D, EVEN, ACC)
            row_sums = tl.where((side == 0) & (kind == 1), before, sums)
            out *= tl.exp(tl.where(side == 1, total[None, :] - sums, row_sums))
        if side == 1:
            later += tl.sum(load(own_, place, kind * C + i, d, 2 * C, DP, ACC) * out, 0)
        p = tl.dot(x, tl.trans(y), input_precision=PRECISION, out_dtype=ACC)
        second = tl.dot(x, tl.trans(second_y), input_precision=PRECISION, out_dtype=ACC)
        strict, second_strict = kind * (1 - side), kind * (1 - side) + side
        if EXACT:
            second_sums = tl.where(side == 1, before, sums)
            out += exact_part(p, z.to(ACC), sums, row_sums, sums, i, side, strict == 0, C, BD, TYPE, ACC, PRECISION)
            out += exact_part(
                second, second_z.to(ACC), sums, row_sums, second_sums, i, side, second_strict == 0, C, BD, TYPE, ACC, PRECISION
            )
        else:
            out = tl.dot(tl.where(apart >= strict, p, 0.0).to(TYPE), z, out, input_precision=PRECISION, out_dtype=ACC)
            second = tl.where(apart >= second_strict, second, 0.0).to(TYPE)
            out = tl.dot(second, second_z, out, input_precision=PRECISION, out_dtype=ACC)
        tl.store(GRADS + kind * d_kind + at, out.to(GRADS.dtype.element_ty), mask=inside)
    if side == 1:
        tl.store(LATER + place * DP + d, later)


@triton.jit
def finish(
    QA, KB, G, GRADS, DG, LATER, SAFES, TABLE, g_b, g_t, g_h, d_kind, d_b, d_t, d_h, scale, H, D,
    C: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """GRADS from those of decayed tiles, and DG: what later tokens of the chunk gain by q . dq + a . da - k . dk - b . db, a reading before
    its own decay, and LATER. Programs: chunks x heads x blocks of K."""
    blocks: tl.constexpr = DP // BD
    block, h, chunk = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, chunk)
    left, place = (stop - start).to(tl.int32), chunk * H + h
    if left <= 0:
        return
    i, d = tl.arange(0, C), block * BD + tl.arange(0, BD)
    at, inside = i[:, None] * d_t + d[None, :], (i[:, None] < left) & (d[None, :] < D)
    GRADS += row * d_b + start * d_t + h * d_h
    sums, before, total = load_sums(G + row * g_b + start * g_t + h * g_h, i, d, g_t, left, D, EVEN, ACC)
    e, _ = centre(sums, total, i, C, False)
    decayed = tl.load(SAFES + place).to(ACC)
    each, of_a = tl.zeros((C, BD), ACC), tl.zeros((C, BD), ACC)
    for kind in tl.static_range(0, 4):
        own = load(KB if kind >= 2 else QA, place, (kind % 2) * C + i, d, 2 * C, DP, ACC)
        out = tl.load(GRADS + kind * d_kind + at, mask=inside, other=0.0).to(ACC)
        each += own * out * (-1 if kind >= 2 else 1)
        if kind == 1:
            of_a = own * out
        exponent = (e[None, :] - sums) if kind >= 2 else ((before if kind == 1 else sums) - e[None, :])
        out *= tl.exp(exponent * decayed) * (scale if kind == 0 else 1.0)
        tl.store(GRADS + kind * d_kind + at, out.to(GRADS.dtype.element_ty), mask=inside)
    dg = (tl.load(LATER + place * DP + d) + tl.sum(each, 0))[None, :] - tl.cumsum(each, 0) + each - of_a
    tl.store(DG + row * d_b + start * d_t + h * d_h + at, dg.to(DG.dtype.element_ty), mask=inside)

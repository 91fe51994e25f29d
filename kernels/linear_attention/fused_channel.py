"""Triton kernels of linear attention with one decay per key channel, and RWKV's bonus.

With G the running sums of log-decays in a chunk, scores are sum_k q_tk k_sk exp(G_tk - G_sk), a matrix product of q exp(G_t - e) and
k exp(e - G_s) for any e. Where no exponent passes `SAFE` with e the sums at the chunk's middle, that is all: `prepare` scales queries
and keys so, and `sweep` runs as if there were no decay, but for its state. Other chunks keep q exp(G) and k exp(G_C - G), which meet
the state only; their scores come from `exact_scores` and their gradients from `exact_gradients`, which split pairs by halves: for s in
the first and t in the second half of a block, e is G at the edge between and both exponents are never positive, for any decays.
With a bonus o_t reads S_{t-1}: G of the token before stands for G where q is scaled, and the token itself is read apart.
`finish` turns the gradients of scaled queries and keys into those of q, k, the decays and the bonus.

Floor, K = V = D channels of two bytes, decays too, per token and head: 10 D bytes forward, 18 D backward.
"""

import triton
from triton import language as tl

from zoo.kernels.fused import LEAST, SAFE, factors, halves, load_tile, segment_of
from zoo.kernels.linear_attention.fused_scalar import chunk_of


@triton.jit
def load_row(X, d, inside, ACC: tl.constexpr):
    return tl.load(X + d, mask=inside, other=0.0).to(ACC)


@triton.jit
def prepare(
    Q, K, G, U, QS, KS, EDGES, SAFES, SUMS, DIAGONAL, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, s_b, s_t, s_h, r_b, r_h, q_rep, k_rep, H, D, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, BONUS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """QS and KS, scaled queries and keys; EDGES [segments, CHUNKS, H, 4, K]: e of queries, e of keys, G_C less each (keys' first);
    SAFES: which chunks are; of others G, in SUMS (strides of QS); DIAGONAL [B, H, T]: how a token reads itself by the bonus.
    Sums run token by token, in registers. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H, C, CHUNKS)
    d = tl.arange(0, BD)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    G += row * g_b + start * g_t + h * g_h
    own = row * s_b + start * s_t + h * s_h
    total, e = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    for i in range(0, left, AHEAD):
        gs = ()
        for n in tl.static_range(AHEAD):
            gs += (load_row(G + (i + n) * g_t, d, (d < D) & (i + n < left), ACC),)
        for n in tl.static_range(AHEAD):
            each = tl.maximum(gs[n], LEAST)
            total += each
            e += tl.where(i + n < C // 2, each, 0.0)
    safe = tl.max(tl.maximum(-e, e - total), 0) <= SAFE
    for_q, for_k = tl.where(safe, e, 0.0), tl.where(safe, e, total)
    edge = EDGES + place * 4 * D + d
    tl.store(edge, for_q, mask=d < D)
    tl.store(edge + D, for_k, mask=d < D)
    tl.store(edge + 2 * D, total - for_k, mask=d < D)
    tl.store(edge + 3 * D, total - for_q, mask=d < D)
    tl.store(SAFES + place, safe.to(tl.int32))
    u = tl.zeros((BD,), ACC)
    if BONUS:
        u += load_row(U + h * D, d, d < D, ACC)
    sums = tl.zeros((BD,), ACC)
    for i in range(0, left, AHEAD):
        gs, qs, ks = (), (), ()
        for n in tl.static_range(AHEAD):
            inside = (d < D) & (i + n < left)
            gs += (load_row(G + (i + n) * g_t, d, inside, ACC),)
            qs += (load_row(Q + (i + n) * q_t, d, inside, ACC),)
            ks += (load_row(K + (i + n) * k_t, d, inside, ACC),)
        for n in tl.static_range(AHEAD):
            inside, at = (d < D) & (i + n < left), own + (i + n) * s_t + d
            before = sums
            sums += tl.maximum(gs[n], LEAST)
            tl.store(QS + at, (qs[n] * tl.exp((before if BONUS else sums) - for_q)).to(QS.dtype.element_ty), mask=inside)
            tl.store(KS + at, (ks[n] * tl.exp(for_k - sums)).to(KS.dtype.element_ty), mask=inside)
            tl.store(SUMS + at, sums, mask=inside & (safe == 0))
            if BONUS:
                tl.store(DIAGONAL + row * r_b + h * r_h + start + i + n, tl.sum(qs[n] * ks[n] * u, 0), mask=i + n < left)


@triton.jit
def load_exact(SUMS, i, d, stride, left, D, EXCLUSIVE: tl.constexpr):
    """G as keys meet it, and as queries do."""
    inside = (i[:, None] < left) & (d[None, :] < D)
    sums = tl.load(SUMS + i[:, None] * stride + d[None, :], mask=inside, other=0.0)
    read = sums
    if EXCLUSIVE:
        read = tl.load(SUMS + (i[:, None] - 1) * stride + d[None, :], mask=inside & (i[:, None] > 0), other=0.0)
    return sums, read


@triton.jit
def exact_outputs(
    Q, K, Y, OUT, SUMS, SAFES, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, o_b, o_t, o_h, s_b, s_t, s_h, q_rep, k_rep, y_rep, scale, H, D, W, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, REVERSE: tl.constexpr, BONUS: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to OUT what the tokens of chunks that are not safe give one another: scores (transposed if REVERSE) times Y. Programs: see
    `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H, C, CHUNKS)
    if (left <= 0) | (tl.load(SAFES + place) != 0):
        return
    i = tl.arange(0, C)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    Y += row * y_b + start * y_t + (h // y_rep) * y_h
    SUMS += row * s_b + start * s_t + h * s_h
    OUT += row * o_b + start * o_t + h * o_h
    p = tl.zeros((C, C), ACC)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        q = load_tile(Q, i, d, q_t, left, D, False, ACC)
        k = load_tile(K, i, d, k_t, left, D, False, ACC)
        sums, read = load_exact(SUMS, i, d, s_t, left, D, BONUS)
        half = C // 2
        while half >= 1:
            query, key = factors(SUMS, sums, read, i, d, s_t, left, D, half)
            query, key = (q * query).to(TYPE), (k * key).to(TYPE)
            if REVERSE:
                new = tl.dot(key, tl.trans(query), input_precision=PRECISION, out_dtype=ACC)
                p += tl.where(halves(i[None, :], i[:, None], half), new, 0.0)
            else:
                new = tl.dot(query, tl.trans(key), input_precision=PRECISION, out_dtype=ACC)
                p += tl.where(halves(i[:, None], i[None, :], half), new, 0.0)
            half //= 2
        if not BONUS:
            p += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    for first in range(0, W, BW):
        w = first + tl.arange(0, BW)
        out = OUT + i[:, None] * o_t + w[None, :]
        more = tl.dot(p.to(TYPE), load_tile(Y, i, w, y_t, left, W, False, TYPE), input_precision=PRECISION, out_dtype=ACC) * scale
        inside = (i[:, None] < left) & (w[None, :] < W)
        tl.store(out, (tl.load(out, mask=inside, other=0.0).to(ACC) + more).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def exact_gradients(
    Q, K, V, DO, SUMS, DQ, DK, SAFES, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, s_b, s_t, s_h, q_rep, k_rep, v_rep, scale, H, D, W, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, BONUS: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ and DK of the chunks that are not safe, from what the state gave those of scaled queries and keys. Programs: see `chunk_of`."""
    row, start, left, h, place = chunk_of(TABLE, H, C, CHUNKS)
    if (left <= 0) | (tl.load(SAFES + place) != 0):
        return
    i = tl.arange(0, C)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    V += row * v_b + start * v_t + (h // v_rep) * v_h
    DO += row * do_b + start * do_t + h * do_h
    own = row * s_b + start * s_t + h * s_h
    dp, dpt = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC)
    for first in range(0, W, BW):
        w = first + tl.arange(0, BW)
        v = load_tile(V, i, w, v_t, left, W, False, TYPE)
        do = load_tile(DO, i, w, do_t, left, W, False, TYPE)
        dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION, out_dtype=ACC)
        dpt = tl.dot(v, tl.trans(do), dpt, input_precision=PRECISION, out_dtype=ACC)
    same = tl.sum(tl.where(i[:, None] == i[None, :], dp, 0.0), 1) * scale
    dp, dpt = (dp * scale).to(TYPE), (dpt * scale).to(TYPE)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        inside = (i[:, None] < left) & (d[None, :] < D)
        q = load_tile(Q, i, d, q_t, left, D, False, ACC)
        k = load_tile(K, i, d, k_t, left, D, False, ACC)
        sums, read = load_exact(SUMS + own, i, d, s_t, left, D, BONUS)
        total = tl.load(SUMS + own + (left - 1) * s_t + d, mask=d < D, other=0.0)
        at = own + i[:, None] * s_t + d[None, :]
        dq = tl.load(DQ + at, mask=inside, other=0.0).to(ACC) * tl.exp(read)
        dk = tl.load(DK + at, mask=inside, other=0.0).to(ACC) * tl.exp(tl.minimum(total[None, :] - sums, 0.0))
        half = C // 2
        while half >= 1:
            query, key = factors(SUMS + own, sums, read, i, d, s_t, left, D, half)
            mask, maskt = halves(i[:, None], i[None, :], half), halves(i[None, :], i[:, None], half)
            dq += tl.dot(tl.where(mask, dp, 0.0), (k * key).to(TYPE), input_precision=PRECISION, out_dtype=ACC) * query
            dk += tl.dot(tl.where(maskt, dpt, 0.0), (q * query).to(TYPE), input_precision=PRECISION, out_dtype=ACC) * key
            half //= 2
        if not BONUS:
            dq += same[:, None] * k
            dk += same[:, None] * q
        tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=inside)
        tl.store(DK + at, dk.to(DK.dtype.element_ty), mask=inside)


@triton.jit
def own_gradient(V, DO, OWN, v_b, v_t, v_h, do_b, do_t, do_h, r_b, r_h, v_rep, scale, H, T, W, C: tl.constexpr, BW: tl.constexpr):
    """OWN [B, H, T] = scale do . v. Programs: rows x heads x blocks of C tokens."""
    ACC: tl.constexpr = OWN.dtype.element_ty
    blocks = tl.cdiv(T, C)
    block, h, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    t = block.to(tl.int64) * C + tl.arange(0, C)
    total = tl.zeros((C,), ACC)
    for first in range(0, W, BW):
        w = first + tl.arange(0, BW)
        inside = (t[:, None] < T) & (w[None, :] < W)
        v = tl.load(V + row * v_b + t[:, None] * v_t + (h // v_rep) * v_h + w[None, :], mask=inside, other=0.0).to(ACC)
        do = tl.load(DO + row * do_b + t[:, None] * do_t + h * do_h + w[None, :], mask=inside, other=0.0).to(ACC)
        total += tl.sum(v * do, 1)
    tl.store(OWN + row * r_b + h * r_h + t, total * scale, mask=t < T)


@triton.jit
def rows_product(X, Y, at, d, D, W, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """x . y of rows d of two matrices [D, W] that begin at `at`."""
    total = tl.zeros(d.shape, ACC)
    for first in range(0, W, BLOCK):
        w = first + tl.arange(0, BLOCK)
        tile, inside = at + d[:, None] * W + w[None, :], (d[:, None] < D) & (w[None, :] < W)
        total += tl.sum(tl.load(X + tile, mask=inside, other=0.0).to(ACC) * tl.load(Y + tile, mask=inside, other=0.0), 1)
    return total


@triton.jit
def finish(
    Q, K, G, DQ, DK, DG, EDGES, SAFES, OWN, U, DU, S, DS, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, s_b, s_t, s_h, dg_b, dg_t, dg_h, r_b, r_h, q_rep, k_rep, scale, H, D, W, CHUNKS,
    C: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, BONUS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DQ and DK from those of scaled queries and keys; DG from q . dq - k . dk, channel by channel, summed up against time from S . dS
    at the segment's end; DU [segments, H, K] and the bonus' part of DQ and DK from OWN = scale do . v, [B, H, T].
    Programs: segments x heads x blocks of K."""
    blocks = tl.cdiv(D, BD)
    block, h, segment = tl.program_id(0) % blocks, tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    d = block * BD + tl.arange(0, BD)
    if start == stop:
        if BONUS:
            tl.store(DU + (segment * H + h) * D + d, tl.zeros((BD,), ACC), mask=d < D)
        return
    u, du = tl.zeros((BD,), ACC), tl.zeros((BD,), ACC)
    if BONUS:
        u += load_row(U + h * D, d, d < D, ACC)
    later = rows_product(S, DS, (tl.load(TABLE + segment * 5 + 4) * H + h) * D * W, d, D, W, BLOCK, ACC) * scale
    Q += row * q_b + (h // q_rep) * q_h
    K += row * k_b + (h // k_rep) * k_h
    G += row * g_b + h * g_h
    DG += row * dg_b + h * dg_h
    own = row * s_b + h * s_h
    place = segment * CHUNKS
    chunks = tl.cdiv(stop - start, C).to(tl.int32)
    for m in range(0, chunks):
        j = chunks - 1 - m
        begin, left = start + j * C, tl.minimum(stop - start - j * C, C).to(tl.int32)
        edges = EDGES + ((place + j) * H + h) * 4 * D
        safe = tl.load(SAFES + (place + j) * H + h) != 0
        e = load_row(edges, d, d < D, ACC)
        sums = e + load_row(edges + 3 * D, d, d < D, ACC)
        for i in range(0, left, AHEAD):
            qs, ks, gs, dqs, dks, owns = (), (), (), (), (), ()
            for n in tl.static_range(AHEAD):
                t = begin + left - 1 - i - n
                inside = (d < D) & (i + n < left)
                qs += (load_row(Q + t * q_t, d, inside, ACC),)
                ks += (load_row(K + t * k_t, d, inside, ACC),)
                gs += (load_row(G + t * g_t, d, inside, ACC),)
                dqs += (load_row(DQ + own + t * s_t, d, inside, ACC),)
                dks += (load_row(DK + own + t * s_t, d, inside, ACC),)
                if BONUS:
                    owns += (tl.load(OWN + row * r_b + h * r_h + t, mask=i + n < left, other=0.0),)
            for n in tl.static_range(AHEAD):
                t = begin + left - 1 - i - n
                inside = (d < D) & (i + n < left)
                q, k, each = qs[n], ks[n], tl.maximum(gs[n], LEAST)
                dq = dqs[n] * tl.where(safe, tl.exp(tl.minimum((sums - each if BONUS else sums) - e, SAFE)), 1.0)
                dk = dks[n] * tl.where(safe, tl.exp(tl.minimum(e - sums, SAFE)), 1.0)
                sums -= each
                later += (-k * dk) if BONUS else (q * dq - k * dk)
                tl.store(DG + t * dg_t + d, later.to(DG.dtype.element_ty), mask=inside)
                if BONUS:
                    later += q * dq
                    du += owns[n] * q * k
                    dq, dk = dq + owns[n] * u * k, dk + owns[n] * u * q
                tl.store(DQ + own + t * s_t + d, dq.to(DQ.dtype.element_ty), mask=inside)
                tl.store(DK + own + t * s_t + d, dk.to(DK.dtype.element_ty), mask=inside)
    if BONUS:
        tl.store(DU + (segment * H + h) * D + d, du, mask=d < D)

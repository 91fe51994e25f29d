"""Triton kernels of the delta rule, chunk by chunk.

With S the state before a chunk, G the running sums of log-decays in it and D(t, s) = exp(G_t - G_s), what the chunk writes is

    U = T diag(beta) (V - e^G K S),    T = (I + diag(beta) L)^-1,    L = strict lower triangle of K K^T * D,
    O = Q' S + P U,                    P = scale * lower triangle of Q K^T * D,    Q' = scale e^G Q,
    S' = e^{G_C} S + K'^T U,           K' = e^{G_C - G} K

`prepare` makes T, P, T diag(beta) V, W = T diag(beta) e^G K, Q' and K' for all chunks side by side; `sweep` walks the chunks of a
sequence for one head and one slice of V with S in registers. The gradients, a bar before a name:

    dU = P^T dO + K' dS',    dS = e^{G_C} dS' + Q'^T dO - W^T dU

by `sweep_back` against time; then with dR = T^T dU and E = V - e^G K S - L U, the surprise, dbeta = dR . E and dV = beta dR, and with
N = scale * lower triangle of dO U^T * D and M = strict lower triangle of -dV U^T * D

    dQ = N K + scale e^G dO S^T,    dK = N^T Q + (M + M^T) K - e^G dV S^T + e^{G_C - G} U dS'^T

in `gradients`, chunks side by side. No gradient passes through the inverse itself. That of G_t is what its token reads less what is
read of it, q . dQ + k . (dK where it reads) - k . (dK where it is read); with S' . dS' added at the end, its sums against time are
the gradient of the log-decays, chunk by chunk.

With one decay per channel, Q' comes from `fused_channel`, and K twice, as reader and as writer K'; what is above then holds without
decays, but for S where it is read, kept and left, see there.

What kernels hand to one another lies as [B, T, H, channels], squares (T, P, N, M) as [B, T, H, C].

Floor, K = V = D channels of two bytes, per token and head: forward 8 D bytes (q, k, v in, o out), backward 14 D; 6 D^2 + O(C D) FLOP
forward, 2.5 times that backward. With chunks of D / 2 tokens these kernels move 33 D bytes forward and 44 D backward.
"""

import triton
from triton import language as tl

from zoo.kernels.delta_rule.fused_shared import unit_lower_inverse
from zoo.kernels.fused import LEAST, load_tile, segment_of

NONE, TOKEN, CHANNEL = (tl.constexpr(kind) for kind in range(3))  # decays


@triton.jit
def chunk_of(TABLE, H):
    """Row, first token, how many tokens exist, head and chunk of this program; programs: chunks x heads."""
    h, chunk = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, chunk)
    return row, start, (stop - start).to(tl.int32), h, chunk


@triton.jit
def sequence_of(TABLE, FIRST, n):
    """First chunk of a sequence, how many it has, row, first token, length."""
    first, end = tl.load(FIRST + n), tl.load(FIRST + n + 1)
    row, start, _ = segment_of(TABLE, first)
    stop = tl.load(TABLE + tl.maximum(end - 1, first) * 5 + 2)
    return first, (end - first).to(tl.int32), row, start, tl.where(first < end, stop - start, 0).to(tl.int32)


@triton.jit
def store_tile(X, x, i, c, stride, left, channels, EVEN: tl.constexpr):
    """Tokens i of a chunk of which `left` exist, channels c."""
    inside = (i[:, None] < left) if EVEN else (i[:, None] < left) & (c[None, :] < channels)
    tl.store(X + i[:, None] * stride + c[None, :], x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def load_edges(EDGES, c, channels, REVERSE: tl.constexpr):
    """By what a state with one decay per channel is multiplied where it is read, before and after the chunk is added."""
    read, before, after = (2, 3, 0) if REVERSE else (0, 1, 2)
    inside = c < channels
    read = tl.exp(tl.load(EDGES + read * channels + c, mask=inside, other=0.0))
    before = tl.exp(tl.load(EDGES + before * channels + c, mask=inside, other=0.0))
    return read, before, tl.exp(tl.load(EDGES + after * channels + c, mask=inside, other=0.0))


@triton.jit
def prepare(
    Q, K, V, BETA, G, QS, KS, W, U, T, P, SUMS, SAFES, KK, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, b_b, b_t, b_h, g_b, g_t, g_h, q_rep, k_rep, v_rep, scale, LENGTH, H, D, VALUES,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """T, P, W, U = T diag(beta) V, Q' and, with one decay per token, K' and the running sums of log-decays `[B, T, H]`. With one per
    channel Q and K come scaled, K' is there, and scores of chunks that are not safe are in P and KK. Programs: chunks x heads."""
    row, start, left, h, chunk = chunk_of(TABLE, H)
    if left <= 0:
        return
    i, d = tl.arange(0, C), tl.arange(0, DP)
    own = (row * LENGTH + start) * H + h
    beta = tl.load(BETA + row * b_b + (start + i) * b_t + h * b_h, mask=i < left, other=0.0).to(ACC)
    q = load_tile(Q + row * q_b + start * q_t + (h // q_rep) * q_h, i, d, q_t, left, D, EVEN, TYPE)
    k = load_tile(K + row * k_b + start * k_t + (h // k_rep) * k_h, i, d, k_t, left, D, EVEN, TYPE)
    writer = k
    if DECAY == CHANNEL:
        writer = load_tile(KS + own * D, i, d, H * D, left, D, EVEN, TYPE)
    kk = tl.dot(k, tl.trans(writer), input_precision=PRECISION, out_dtype=ACC)
    qk = tl.dot(q, tl.trans(writer), input_precision=PRECISION, out_dtype=ACC) * scale
    seen, asked = beta, tl.full((C,), scale, ACC)
    if DECAY == TOKEN:
        each = tl.maximum(tl.load(G + row * g_b + (start + i) * g_t + h * g_h, mask=i < left, other=0.0).to(ACC), LEAST)
        sums = tl.cumsum(each, 0)
        tl.store(SUMS + own + i * H, sums, mask=i < left)
        between = tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0))
        kk *= between
        qk *= between
        seen, asked, kept = beta * tl.exp(sums), asked * tl.exp(sums), tl.exp(tl.minimum(tl.sum(each, 0) - sums, 0.0))
        store_tile(KS + own * D, k * kept[:, None], i, d, H * D, left, D, EVEN)
    if DECAY == CHANNEL:
        safe = tl.load(SAFES + chunk * H + h) != 0
        if not safe:
            kk = load_tile(KK + own * C, i, i, H * C, left, C, True, ACC)
            qk = load_tile(P + own * C, i, i, H * C, left, C, True, ACC)
    else:
        store_tile(QS + own * D, q * asked[:, None], i, d, H * D, left, D, EVEN)
    store_tile(P + own * C, tl.where(i[:, None] >= i[None, :], qk, 0.0), i, i, H * C, left, C, True)
    t = unit_lower_inverse(tl.where(i[:, None] > i[None, :], kk * beta[:, None], 0.0), i, C, ACC, INVERSE)
    store_tile(T + own * C, t, i, i, H * C, left, C, True)
    reader = tl.dot((t * seen[None, :]).to(TYPE), k, input_precision=PRECISION, out_dtype=ACC)
    store_tile(W + own * D, reader, i, d, H * D, left, D, EVEN)
    t = (t * beta[None, :]).to(TYPE)
    for first in range(0, VALUES, BW):
        w = first + tl.arange(0, BW)
        v = load_tile(V + row * v_b + start * v_t + (h // v_rep) * v_h, i, w, v_t, left, VALUES, EVEN, TYPE)
        u = tl.dot(t, v, input_precision=PRECISION, out_dtype=ACC)
        store_tile(U + own * VALUES, u, i, w, H * VALUES, left, VALUES, EVEN)


@triton.jit
def sweep(
    Q, K, W, U, P, SUMS, EDGES, OUT, STATES, INIT, FINAL, TABLE, FIRST,
    k_b, k_t, k_h, k_rep, m_row, m_col, m_size, LENGTH, H, D, VALUES,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, DECAY: tl.constexpr, KEEP: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT and the last state FINAL; if KEEP also U in place of T diag(beta) V, and STATES `[chunks, H, K, V]`, before every chunk.
    Programs: sequences x heads x slices of V."""
    slices = tl.cdiv(VALUES, BW)
    slice_, h, n = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    first, chunks, row, start, length = sequence_of(TABLE, FIRST, n)
    i, d, w = tl.arange(0, C), tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    K += row * k_b + (h // k_rep) * k_h
    inside = (d[:, None] < D) & (w[None, :] < VALUES)
    tile = d[:, None] * VALUES + w[None, :]
    # zeros as a constant would make ptxas run the matrix products one by one
    s = tl.load(INIT + (n * H + h) * m_size + d[:, None] * m_row + w[None, :] * m_col, mask=inside, other=0.0).to(ACC)
    for j in range(0, chunks):
        left, t = length - j * C, start + j * C
        own, place = (row * LENGTH + t) * H + h, (first + j) * H + h
        if DECAY == TOKEN:
            total = tl.load(SUMS + own + (tl.minimum(left, C) - 1) * H)
        reader = load_tile(W + own * D, i, d, H * D, left, D, EVEN, TYPE)
        u = load_tile(U + own * VALUES, i, w, H * VALUES, left, VALUES, EVEN, TYPE)
        q = load_tile(Q + own * D, i, d, H * D, left, D, EVEN, TYPE)
        p = load_tile(P + own * C, i, i, H * C, left, C, True, TYPE)
        k = load_tile(K + t * k_t, i, d, k_t, left, D, EVEN, TYPE)
        if KEEP:
            tl.store(STATES + place * D * VALUES + tile, s.to(STATES.dtype.element_ty), mask=inside)
        if DECAY == CHANNEL:
            read, before, after = load_edges(EDGES + place * 4 * D, d, D, False)
            seen = (s * read[:, None]).to(TYPE)
            s *= before[:, None]
        else:
            seen = s.to(TYPE)
        if DECAY == TOKEN:
            s *= tl.exp(total)
        u = (u - tl.dot(reader, seen, input_precision=PRECISION, out_dtype=ACC)).to(TYPE)
        out = tl.dot(q, seen, input_precision=PRECISION, out_dtype=ACC)
        s = tl.dot(tl.trans(k), u, s, input_precision=PRECISION, out_dtype=ACC)
        out = tl.dot(p, u, out, input_precision=PRECISION, out_dtype=ACC)
        if DECAY == CHANNEL:
            s *= after[:, None]
        store_tile(OUT + own * VALUES, out, i, w, H * VALUES, left, VALUES, EVEN)
        if KEEP:
            store_tile(U + own * VALUES, u, i, w, H * VALUES, left, VALUES, EVEN)
    tl.store(FINAL + (n * H + h) * D * VALUES + tile, s, mask=inside)


@triton.jit
def sweep_back(
    Q, K, W, P, DO, SUMS, EDGES, DU, DSTATES, INIT, FINAL, TABLE, FIRST,
    k_b, k_t, k_h, do_b, do_t, do_h, k_rep, m_row, m_col, m_size, LENGTH, H, D, VALUES,
    DP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-dU into DU; DSTATES `[chunks, H, K, V]`, the gradient of the state after every chunk, and FINAL, that of the first state; INIT
    is that of the last. Programs: sequences x heads x slices of V."""
    slices = tl.cdiv(VALUES, BW)
    slice_, h, n = tl.program_id(0) % slices, tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    first, chunks, row, start, length = sequence_of(TABLE, FIRST, n)
    i, d, w = tl.arange(0, C), tl.arange(0, DP), slice_ * BW + tl.arange(0, BW)
    K += row * k_b + (h // k_rep) * k_h
    DO += row * do_b + h * do_h
    inside = (d[:, None] < D) & (w[None, :] < VALUES)
    tile = d[:, None] * VALUES + w[None, :]
    ds = tl.load(INIT + (n * H + h) * m_size + d[:, None] * m_row + w[None, :] * m_col, mask=inside, other=0.0).to(ACC)
    for m in range(0, chunks):
        j = chunks - 1 - m
        left, t = length - j * C, start + j * C
        own, place = (row * LENGTH + t) * H + h, (first + j) * H + h
        if DECAY == TOKEN:
            total = tl.load(SUMS + own + (tl.minimum(left, C) - 1) * H)
        k = load_tile(K + t * k_t, i, d, k_t, left, D, EVEN, TYPE)
        do = load_tile(DO + t * do_t, i, w, do_t, left, VALUES, EVEN, TYPE)
        p = load_tile(P + own * C, i, i, H * C, left, C, True, TYPE)
        q = load_tile(Q + own * D, i, d, H * D, left, D, EVEN, TYPE)
        reader = load_tile(W + own * D, i, d, H * D, left, D, EVEN, TYPE)
        tl.store(DSTATES + place * D * VALUES + tile, ds.to(DSTATES.dtype.element_ty), mask=inside)
        if DECAY == CHANNEL:
            read, before, after = load_edges(EDGES + place * 4 * D, d, D, True)
            seen = (ds * read[:, None]).to(TYPE)
            ds *= before[:, None]
        else:
            seen = ds.to(TYPE)
        if DECAY == TOKEN:
            ds *= tl.exp(total)
        du = tl.dot(k, seen, input_precision=PRECISION, out_dtype=ACC)
        du = tl.dot(tl.trans(p), do, du, input_precision=PRECISION, out_dtype=ACC)
        ds = tl.dot(tl.trans(q), do, ds, input_precision=PRECISION, out_dtype=ACC)
        less = (-du).to(TYPE)
        ds = tl.dot(tl.trans(reader), less, ds, input_precision=PRECISION, out_dtype=ACC)
        if DECAY == CHANNEL:
            ds *= after[:, None]
        store_tile(DU + own * VALUES, less, i, w, H * VALUES, left, VALUES, EVEN)
    tl.store(FINAL + (n * H + h) * D * VALUES + tile, ds, mask=inside)


@triton.jit
def surprises(
    k, t, beta, seen, read, V, U, DO, DU, STATES, i, d, v_t, do_t, stride, left, D, VALUES,
    VP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dO U^T and dR U^T of a chunk, dR . (V - e^G K S) and dR . e^G K S token by token; DU, which holds -dU, becomes dV."""
    n, m, dbeta, reads = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC), tl.zeros((C,), ACC), tl.zeros((C,), ACC)
    for first in range(0, VP, BW):
        w = first + tl.arange(0, BW)
        v = load_tile(V, i, w, v_t, left, VALUES, EVEN, TYPE)
        u = load_tile(U, i, w, stride, left, VALUES, EVEN, TYPE)
        do = load_tile(DO, i, w, do_t, left, VALUES, EVEN, TYPE)
        du = load_tile(DU, i, w, stride, left, VALUES, EVEN, TYPE)
        s = load_tile(STATES, d, w, VALUES, D, VALUES, EVEN, TYPE)
        if DECAY == CHANNEL:
            s = (s * read[:, None]).to(TYPE)
        ks = tl.dot(k, s, input_precision=PRECISION, out_dtype=ACC) * seen[:, None]
        dr = -tl.dot(tl.trans(t), du, input_precision=PRECISION, out_dtype=ACC)
        store_tile(DU, dr * beta[:, None], i, w, stride, left, VALUES, EVEN)
        dbeta += tl.sum(dr * (v - ks), 1)
        reads += tl.sum(dr * ks, 1)
        n = tl.dot(do, tl.trans(u), n, input_precision=PRECISION, out_dtype=ACC)
        m = tl.dot(dr.to(TYPE), tl.trans(u), m, input_precision=PRECISION, out_dtype=ACC)
    return n, m, dbeta, reads


@triton.jit
def by_states(
    U, DV, STATES, DSTATES, i, d, stride, left, D, VALUES,
    DP: tl.constexpr, VP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV S^T, U dS'^T, and S . dS' channel by channel."""
    by_s, by_ds, end = tl.zeros((C, DP), ACC), tl.zeros((C, DP), ACC), tl.zeros((DP,), ACC)
    for first in range(0, VP, BW):
        w = first + tl.arange(0, BW)
        u, dv = load_tile(U, i, w, stride, left, VALUES, EVEN, TYPE), load_tile(DV, i, w, stride, left, VALUES, EVEN, TYPE)
        s = load_tile(STATES, d, w, VALUES, D, VALUES, EVEN, TYPE)
        ds = load_tile(DSTATES, d, w, VALUES, D, VALUES, EVEN, TYPE)
        by_s = tl.dot(dv, tl.trans(s), by_s, input_precision=PRECISION, out_dtype=ACC)
        by_ds = tl.dot(u, tl.trans(ds), by_ds, input_precision=PRECISION, out_dtype=ACC)
        if DECAY == TOKEN:
            end += tl.sum(s.to(ACC) * ds, 1)
    return by_s, by_ds, end


@triton.jit
def gradients(
    Q, K, V, U, T, DO, DU, BETA, SUMS, STATES, DSTATES, N, M, DQ, DK, DBETA, DG, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, b_b, b_t, b_h, q_rep, k_rep, v_rep, scale, LENGTH, H, D, VALUES,
    DP: tl.constexpr, VP: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DBETA and DG without decays or with one per token; DU becomes the gradient of V; N and M are scratch, for their
    transposes. Programs: chunks x heads."""
    row, start, left, h, chunk = chunk_of(TABLE, H)
    if left <= 0:
        return
    i, d, own = tl.arange(0, C), tl.arange(0, DP), (row * LENGTH + start) * H + h
    V += row * v_b + start * v_t + (h // v_rep) * v_h
    DO += row * do_b + start * do_t + h * do_h
    STATES, DSTATES = STATES + (chunk * H + h) * D * VALUES, DSTATES + (chunk * H + h) * D * VALUES
    U, DU, N, M, stride = U + own * VALUES, DU + own * VALUES, N + own * C, M + own * C, H * VALUES
    k = load_tile(K + row * k_b + start * k_t + (h // k_rep) * k_h, i, d, k_t, left, D, EVEN, TYPE)
    beta = tl.load(BETA + row * b_b + (start + i) * b_t + h * b_h, mask=i < left, other=0.0).to(ACC)
    t = load_tile(T + own * C, i, i, H * C, left, C, True, TYPE)
    seen, kept, between, whole = tl.full((C,), 1.0, ACC), tl.full((C,), 1.0, ACC), tl.full((C, C), 1.0, ACC), 1.0
    if DECAY == TOKEN:
        sums, total = tl.load(SUMS + own + i * H, mask=i < left, other=0.0), tl.load(SUMS + own + (tl.minimum(left, C) - 1) * H)
        seen, kept, whole = tl.exp(sums), tl.exp(tl.minimum(total - sums, 0.0)), tl.exp(total)
    n, m, dbeta, reads = surprises(
        k, t, beta, seen, seen, V, U, DO, DU, STATES, i, d, v_t, do_t, stride, left, D, VALUES, VP, BW, C, EVEN, DECAY, TYPE, ACC, PRECISION
    )
    if DECAY == TOKEN:
        between = tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0))
    kk = tl.dot(k, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    m = tl.where(i[:, None] > i[None, :], m * between, 0.0)
    within = tl.sum(kk * m, 1)  # dR . L U
    tl.store(DBETA + own + i * H, (dbeta - within).to(DBETA.dtype.element_ty), mask=i < left)
    store_tile(N, tl.where(i[:, None] >= i[None, :], n * between * scale, 0.0), i, i, H * C, left, C, True)
    store_tile(M, -m * beta[:, None], i, i, H * C, left, C, True)
    reads *= -beta  # k . (dK where it reads S)
    within *= -beta  # k . (dK where it reads what was written in the chunk)
    tl.debug_barrier()  # N, M and DU are read by other threads than wrote them
    dq = tl.zeros((C, DP), ACC)
    for first in range(0, VP, BW):
        w = first + tl.arange(0, BW)
        do = load_tile(DO, i, w, do_t, left, VALUES, EVEN, TYPE)
        s = load_tile(STATES, d, w, VALUES, D, VALUES, EVEN, TYPE)
        dq = tl.dot(do, tl.trans(s), dq, input_precision=PRECISION, out_dtype=ACC)
    n, m = load_tile(N, i, i, H * C, left, C, True, TYPE), load_tile(M, i, i, H * C, left, C, True, TYPE)
    q = load_tile(Q + row * q_b + start * q_t + (h // q_rep) * q_h, i, d, q_t, left, D, EVEN, TYPE)
    dq = tl.dot(n, k, dq * (scale * seen)[:, None], input_precision=PRECISION, out_dtype=ACC)
    store_tile(DQ + own * D, dq, i, d, H * D, left, D, EVEN)
    each = tl.sum(q * dq, 1)
    by_s, by_ds, end = by_states(U, DU, STATES, DSTATES, i, d, stride, left, D, VALUES, DP, VP, BW, C, EVEN, DECAY, TYPE, ACC, PRECISION)
    dk = by_ds * kept[:, None] - by_s * seen[:, None]
    last = tl.sum(end, 0) * whole + tl.sum(tl.sum(k * dk, 1) - reads, 0)  # S' . dS'
    dk = tl.dot(tl.trans(n), q, dk, input_precision=PRECISION, out_dtype=ACC)
    dk = tl.dot(m, k, dk, input_precision=PRECISION, out_dtype=ACC)
    dk = tl.dot(tl.trans(m), k, dk, input_precision=PRECISION, out_dtype=ACC)
    store_tile(DK + own * D, dk, i, d, H * D, left, D, EVEN)
    if DECAY == TOKEN:
        each += 2.0 * (reads + within) - tl.sum(k * dk, 1)
        dg = last + tl.sum(each, 0) - tl.cumsum(each, 0) + each
        tl.store(DG + own + i * H, dg.to(DG.dtype.element_ty), mask=i < left)

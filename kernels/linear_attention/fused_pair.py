"""Triton kernel of linear attention without decay for the gradients of k and v in one walk.

Both are sums against time of `fused_scalar`, over the same tokens: that of v with a, b, y = k, q, do and M = dS, that of k with v, do, q
and dS^T. A program has both states in registers, each turned, as the factor of its product, and reads q, k, v and do once.

Floor, D channels of two bytes, per token and head: 6 D numbers of 2 bytes (q, k, v, do in, dk, dv out); 8 D^2 + 8 C D FLOP.
"""

import triton
from triton import language as tl

from zoo.kernels.fused import load_tile, segment_of
from zoo.kernels.linear_attention.fused_scalar import at_the_edge, plus, read, scores, store_tile, write


@triton.jit
def pair(
    Q, K, V, DO, DK, DV, INIT, FINAL, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    q_rep, k_rep, v_rep, m_row, m_col, m_size, scale, H, D, W, ALIKE: tl.constexpr,
    DP: tl.constexpr, WP: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, HAS_FINAL: tl.constexpr, TYPE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module, and `fused_scalar.sweep` for INIT, FINAL and the rest. Programs: segments x heads."""
    h, segment = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:  # no segment at all
        return
    if ALIKE:
        k_t, v_t, do_t, dk_t, dv_t = q_t, q_t, q_t, q_t, q_t
    i, d, w = tl.arange(0, C), tl.arange(0, DP), tl.arange(0, WP)
    Q += row * q_b + start * q_t + (h // q_rep) * q_h
    K += row * k_b + start * k_t + (h // k_rep) * k_h
    V += row * v_b + start * v_t + (h // v_rep) * v_h
    DO += row * do_b + start * do_t + h * do_h
    DK += row * dk_b + start * dk_t + h * dk_h
    DV += row * dv_b + start * dv_t + h * dv_h
    INIT += (tl.load(TABLE + segment * 5 + 4) * H + h) * m_size
    # zeros as a constant would make ptxas run the matrix products one by one
    for_k = tl.load(INIT + d[:, None] * m_row + w[None, :] * m_col, mask=(d[:, None] < D) & (w[None, :] < W), other=0.0).to(ACC)
    for_v = tl.load(INIT + d[None, :] * m_row + w[:, None] * m_col, mask=(d[None, :] < D) & (w[:, None] < W), other=0.0).to(ACC)
    length = (stop - start).to(tl.int32)
    last = tl.cdiv(length, C) - 1
    for n in range(0, last + 1):
        j = last - n
        left, t = length - j * C, (j * C).to(tl.int64)
        q = load_tile(Q + t * q_t, i, d, q_t, left, D, EVEN, TYPE)
        k = load_tile(K + t * k_t, i, d, k_t, left, D, EVEN, TYPE)
        v = load_tile(V + t * v_t, i, w, v_t, left, W, EVEN, TYPE)
        do = load_tile(DO + t * do_t, i, w, do_t, left, W, EVEN, TYPE)
        # both scores first: the compiler then keeps everything in registers, and the wgmmas of a product are not run one by one
        p, causal = scores(k, q, i, True, True, ACC, PRECISION)
        p = tl.where(causal, p, 0.0).to(TYPE)
        dp, causal = scores(v, do, i, True, True, ACC, PRECISION)
        dp = tl.where(causal, dp, 0.0).to(TYPE)
        dv = plus(p, do, read(k, for_v, True, TYPE, ACC, PRECISION), True, TYPE, ACC, PRECISION)
        for_v = write(q, do, for_v, True, ACC, PRECISION)
        store_tile(DV + t * dv_t, dv * scale, i, w, dv_t, left, W, EVEN, True)
        dk = plus(dp, q, read(v, for_k, True, TYPE, ACC, PRECISION), True, TYPE, ACC, PRECISION)
        for_k = write(do, q, for_k, True, ACC, PRECISION)
        store_tile(DK + t * dk_t, dk * scale, i, d, dk_t, left, D, EVEN, True)
    if HAS_FINAL and at_the_edge(TABLE, segment, tl.num_programs(0) // H, True):
        at = (tl.load(TABLE + segment * 5 + 3) * H + h) * D * W
        tl.store(FINAL + at + d[:, None] * W + w[None, :], for_k, mask=(d[:, None] < D) & (w[None, :] < W))

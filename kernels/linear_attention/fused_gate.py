"""Triton kernel of linear attention for the gradient of a decay per head or token.

What token s gives to token u weighs W_us = scale (q_u . k_s) (do_u . v_s) D(u, s), and the gradient of the log-decay of token t is the
sum over all s < t <= u. Within a chunk, W is made again and summed up in float32. Between chunks, a_u = scale q_u . (D(u, 0) S do_u), the
sum over all s before the chunk, and b_s = scale v_s . (D(C, s) dS^T k_s), that over all u behind it, come from `fused_scalar.sweep`. With E
the sum over all pairs with the chunk's end between them, S . dS there,

    dg_t = E - sum_{s >= t} b_s + sum_{u >= t} a_u + sum_{s < t <= u} W_us,         E at its start = E + sum_u a_u - sum_s b_s

so that what a token gives itself, which may be far more than what decays leave of others, is nowhere in it, roundings of what passes
between chunks add up over a segment at most, and where a chunk forgets everything before it, over no more than one chunk.

Floor, K = V = D channels of two bytes, per token and head: 4 D numbers of 2 bytes (q, k, v, do in); 4 C D FLOP.
"""

import triton
from triton import language as tl

from zoo.kernels.fused import load_tile, segment_of

FORGOTTEN = tl.constexpr(-24.0)  # e^-24 is nothing beside one in float32


@triton.jit
def products(
    X, Y, i, x_t, y_t, left, D, BD: tl.constexpr, C: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Of all tokens of a chunk with one another, [C, C]."""
    p = tl.zeros((C, C), ACC)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        x, y = load_tile(X, i, d, x_t, left, D, False, TYPE), load_tile(Y, i, d, y_t, left, D, False, TYPE)
        p = tl.dot(x, tl.trans(y), p, input_precision=PRECISION, out_dtype=ACC)
    return p


@triton.jit
def load_parts(MET, at, inside, met_size, PARTS: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    total = tl.zeros((C,), ACC)
    for n in tl.static_range(PARTS):
        total += tl.load(MET + n * met_size + at, mask=inside, other=0.0)
    return total


@triton.jit
def gate_gradient(
    Q, K, V, DO, DG, READ, WRITTEN, SUMS, S, DS, TABLE,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, g_b, g_t, g_h, s_b, s_h, q_rep, k_rep, v_rep, met_size, scale, H, D, W,
    C: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, READS: tl.constexpr, WRITES: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. READ [READS, B, H, T], parts of a; WRITTEN [WRITES, B, H, T], parts of b; SUMS as `fused_scalar.prepare` has them;
    S and DS at the segments' ends. Programs: segments x heads."""
    h, segment = tl.program_id(0) % H, (tl.program_id(0) // H).to(tl.int64)
    row, start, stop = segment_of(TABLE, segment)
    if start == stop:
        return
    size = D * W
    at = (tl.load(TABLE + segment * 5 + 4) * H + h) * size
    both = tl.zeros((BLOCK,), ACC)
    for x in range(0, size, BLOCK):
        j = x + tl.arange(0, BLOCK)
        both += tl.load(S + at + j, mask=j < size, other=0.0).to(ACC) * tl.load(DS + at + j, mask=j < size, other=0.0)
    later = tl.sum(both, 0) * scale
    Q += row * q_b + (h // q_rep) * q_h
    K += row * k_b + (h // k_rep) * k_h
    V += row * v_b + (h // v_rep) * v_h
    DO += row * do_b + h * do_h
    own, i = row * s_b + h * s_h, tl.arange(0, C)
    chunks = tl.cdiv(stop - start, C)
    for n in range(0, chunks):
        t = start + (chunks - 1 - n) * C
        left = (stop - t).to(tl.int32)
        inside = i < left
        sums = tl.load(SUMS + own + t + i, mask=inside, other=0.0)
        total = tl.min(sums, 0)
        a = load_parts(READ, own + t + i, inside, met_size, READS, C, ACC)
        b = load_parts(WRITTEN, own + t + i, inside, met_size, WRITES, C, ACC)
        w = products(Q + t * q_t, K + t * k_t, i, q_t, k_t, left, D, BD, C, TYPE, ACC, PRECISION)
        w *= products(DO + t * do_t, V + t * v_t, i, do_t, v_t, left, W, BW, C, TYPE, ACC, PRECISION) * scale
        w = tl.where(i[:, None] > i[None, :], w * tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0)), 0.0)
        read, written = tl.sum(a, 0), tl.sum(b, 0)
        later = tl.where(total < FORGOTTEN, written, later)
        each = a - b + tl.sum(w, 1) - tl.sum(w, 0)
        dg = later + tl.sum(each, 0) - tl.cumsum(each, 0) + each
        tl.store(DG + row * g_b + (t + i) * g_t + h * g_h, dg, mask=inside)
        later += read - written

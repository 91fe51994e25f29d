"""One token of a matrix memory in one launch, for decoding: linear attention and both delta rules.

    S' = diag(exp(g)) S diag(exp(h)) + k v^T                                linear attention
    S' = diag(exp(g)) S + beta k (v - k diag(exp(g)) S)^T                   delta rule
    S' = diag(exp(g)) S + b (a S)^T + k v^T                                 general delta rule
    o  = scale q S', or before the token has come, with a bonus of its own

Columns of the state know nothing of one another: a program holds all rows of a few columns of one head, reads them once and writes
them once, to where they were if it is told so. No gradients.

Floor: the state in and out, 8 K V bytes a head.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from zoo.kernels.launch import launch, rows
from zoo.kernels.segments import cdiv, padded_size

TILE = 4096  # numbers of the state that a program holds
FILLED = 264  # programs that occupy a GPU
NARROWEST = 8  # columns: 32 bytes of a row


@triton.jit
def load_row(X, b, h, x_b, x_h, rep, c, inside):
    return tl.load(X + b * x_b + (h // rep) * x_h + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def step(
    Q, K, V, G, VALUE_G, BETA, A, B, BONUS, STATE, AFTER, OUT,
    q_b, q_h, q_rep, k_b, k_h, k_rep, v_b, v_h, v_rep, g_b, g_h, g_d, w_b, w_h, beta_b, beta_h, a_b, a_h, a_rep, b_b, b_h, b_rep,
    scale, H, D, W, DP: tl.constexpr, BW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """STATE and AFTER [B, H, D, W], and OUT [B, H, W]. With NORMALIZE the last column is the sum of weights, which every program reads
    and OUT has not; otherwise STATE and AFTER may be one. Programs: B x H x slices of W."""
    slices = tl.cdiv(W, BW)
    h, n = tl.program_id(0) // slices % H, (tl.program_id(0) // slices // H).to(tl.int64)
    d, w = tl.arange(0, DP), tl.program_id(0) % slices * BW + tl.arange(0, BW)
    row, values = d < D, W - 1 if NORMALIZE else W
    inside = row[:, None] & (w[None, :] < W)
    at = (n * H + h) * D * W + d[:, None] * W + w[None, :]
    s = tl.zeros((DP, BW), tl.float32)
    if STATE is not None:
        s += tl.load(STATE + at, mask=inside, other=0.0)
    q, k = load_row(Q, n, h, q_b, q_h, q_rep, d, row) * scale, load_row(K, n, h, k_b, k_h, k_rep, d, row)
    v = load_row(V, n, h, v_b, v_h, v_rep, w, w < values)
    if NORMALIZE:
        v = tl.where(w == values, 1.0, v)
    if BONUS is not None:
        bonus = tl.load(BONUS + h * D + d, mask=row, other=0.0).to(tl.float32)
        out = tl.sum(q[:, None] * s, 0) + tl.sum(q * k * bonus, 0) * v
    if NORMALIZE:
        z = tl.zeros((DP,), tl.float32)
        if STATE is not None:
            z += tl.load(STATE + (n * H + h) * D * W + d * W + values, mask=row, other=0.0)
        if BONUS is not None:
            total = tl.sum(q * (z + k * bonus), 0)
    if A is not None:
        moved = tl.sum(load_row(A, n, h, a_b, a_h, a_rep, d, row)[:, None] * s, 0)
    if G is not None:
        decay = tl.exp(tl.load(G + n * g_b + h * g_h + d * g_d, mask=row, other=0.0).to(tl.float32))
        s *= decay[:, None]
        if NORMALIZE:
            z *= decay
    if VALUE_G is not None:
        s *= tl.exp(load_row(VALUE_G, n, h, w_b, w_h, 1, w, w < W))[None, :]
    if A is not None:
        s += load_row(B, n, h, b_b, b_h, b_rep, d, row)[:, None] * moved[None, :]
    if BETA is not None:
        v = (v - tl.sum(k[:, None] * s, 0)) * tl.load(BETA + n * beta_b + h * beta_h).to(tl.float32)
    s += k[:, None] * v[None, :]
    if BONUS is None:
        out = tl.sum(q[:, None] * s, 0)
        if NORMALIZE:
            total = tl.sum(q * (z + k), 0)
    if NORMALIZE:
        out /= tl.where(total == 0, 1.0, total)
    tl.store(OUT + (n * H + h) * values + w, out.to(OUT.dtype.element_ty), mask=w < values)
    tl.store(AFTER + at, s, mask=inside)


def ends(x: Tensor | None) -> tuple[int, int]:
    """Strides of sequences and heads, `[B, 1, H, .]`."""
    return (0, 0) if x is None else (x.stride(0), x.stride(2))


def advance(q, k, v, log_decay, state, scale, into=None, *, value_log_decay=None, beta=None, a=None, b=None, bonus=None, normalize=False):
    """Output `[B, 1, H, V]` and the state behind a token, written to `into` if given, which may be the state before it."""
    q, k, v, a, b, value_log_decay = (None if x is None else rows(x) for x in (q, k, v, a, b, value_log_decay))
    heads = max(x.shape[2] for x in (q, k, v, a, b) if x is not None)
    keys, values = q.shape[3], v.shape[3]
    columns = values + normalize
    out = v.new_empty(v.shape[0], 1, heads, values)
    if state is not None and not state.is_contiguous():
        state = state.contiguous()
    after = torch.empty(q.shape[0], heads, keys, columns, dtype=torch.float32, device=q.device) if into is None or normalize else into
    decay = (0, 0, 0)
    if log_decay is not None:
        decay = (
            (0, log_decay.stride(0), 0) if log_decay.ndim == 1 else (*ends(log_decay), log_decay.stride(3) if log_decay.ndim == 4 else 0)
        )
    height, programs = padded_size(keys), q.shape[0] * heads
    width = max(NARROWEST, min(TILE // height, padded_size(columns)))
    while width > NARROWEST and programs * cdiv(columns, width) < FILLED:
        width //= 2
    launch(
        step, programs * cdiv(columns, width),
        q, k, v, log_decay, value_log_decay, beta, a, b, None if bonus is None else bonus.contiguous(), state, after, out,
        *(n for x in (q, k, v) for n in (*ends(x), heads // x.shape[2])), *decay, *ends(value_log_decay), *ends(beta),
        *(n for x in (a, b) for n in (*ends(x), 1 if x is None else heads // x.shape[2])),
        scale, heads, keys, columns, DP=height, BW=width, NORMALIZE=normalize, num_warps=min(16, 4 * cdiv(height * width, TILE)),
    )  # fmt: skip
    return out, after


def linear_attention(q, k, v, log_decay, bonus, value_log_decay, state, scale: float, normalize: bool, into: Tensor | None = None):
    """See `zoo.kernels.linear_attention.linear_attention`, for one token. Sums of weights keep their place until all have read them:
    with `normalize` the new state is another tensor."""
    more = {"bonus": bonus, "value_log_decay": value_log_decay, "normalize": normalize}
    return advance(q, k, v, log_decay, state, scale, into, **more)


def delta_rule(q, k, v, beta, log_decay, state, scale: float, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.delta_rule.delta_rule`, for one token."""
    return advance(q, k, v, log_decay, state, scale, into, beta=beta)


def general_delta_rule(q, k, v, a, b, log_decay, state, scale: float, into: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `zoo.kernels.delta_rule.general.general_delta_rule`, for one token."""
    return advance(q, k, v, log_decay, state, scale, into, a=a, b=b)

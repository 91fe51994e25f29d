"""The same by chunks, in plain torch.

Write the recurrence as `S_t = diag(exp(log_decay_t)) S_{t-1} + b_t u_t^T + k_t v_t^T`, where u_t is what a_t reads. With g the
cumulative log-decay inside a chunk of C tokens (inclusive), h_t the g in force when a_t reads, and S the state at its start,

    u_t = a_t exp(h_t) S + sum_{s < t} (a_t . exp(h_t - g_s) b_s) u_s + sum_{s < t} (a_t . exp(h_t - g_s) k_s) v_s

so that u is affine in S: the triangular system `(I - A) u = a exp(h) S + A_k v` is solved once per chunk, for all chunks
together, on the right-hand sides `a exp(h)` and `A_k v` (the WY form of arXiv:2406.06484, with decays). Substituting u leaves
every chunk as a map `S' = M S + N` with M `[K, K]`: these are applied one after another, and all the rest is matrix products
over all chunks. Every exponent is a difference that cannot be positive; g is summed in float64.

The delta rule reads after its decay (h = g) and writes the one key b = beta k: `b_t (v_t + u_t)^T`, so v itself is on the right.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import chunk_size, from_chunks, to_chunks
from zoo.kernels.linear_attention.chunked import chunk_scores, cumulative

CHUNK = 64


def delta_rule(q, k, v, beta, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    chunk = chunk_size(length, CHUNK)
    q, k, v, beta = (to_chunks(x.to(acc), chunk).contiguous() for x in (q, k, v, beta))
    q, b = q * scale, beta.unsqueeze(-1) * k
    after = cumulative(log_decay, length, chunk, q)
    reads, erased = scores(torch.stack([q, k]), b, after)
    mixed = solve(erased.tril(-1), torch.cat([v, decayed(-k, after)], dim=-1))
    out, state = chain(decayed(q, after), reads, retained(b, after), mixed, after, state)
    return from_chunks(out, length).to(dtype), state


def general_delta_rule(q, k, v, a, b, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    chunk = chunk_size(length, CHUNK)
    q, k, v, a, b = (to_chunks(x.to(acc), chunk).contiguous() for x in (q, k, v, a, b))
    q = q * scale
    after = cumulative(log_decay, length, chunk, q)
    # a_t reads S_{t-1}, as a query of the token before would: moved up one row it shares the decays of q
    early = torch.cat([a[..., 1:, :], torch.zeros_like(a[..., :1, :])], dim=-2)
    (reads, reads_k), (late, late_k) = scores(torch.stack([q, early]).unsqueeze(1), torch.stack([b, k]), after)
    moved, moved_k = down(late), down(late_k)
    before = down(after)
    mixed = solve(-moved, torch.cat([moved_k @ v, decayed(a, before)], dim=-1))
    # k and v join b and u as keys and values of one longer chunk
    reads, writes = torch.cat([reads, reads_k], dim=-1), torch.cat([retained(b, after), retained(k, after)], dim=-2)
    plain = torch.cat([v, torch.zeros_like(a)], dim=-1)
    out, state = chain(decayed(q, after), reads, writes, torch.cat([mixed, plain], dim=-2), after, state)
    return from_chunks(out, length).to(dtype), state


def scores(q: Tensor, k: Tensor, after: Tensor | None) -> Tensor:
    """`q_t . exp(g_t - g_s) k_s` for s <= t."""
    if after is None:
        return (q @ k.transpose(-1, -2)).tril()
    return chunk_scores(q, k, after, after)


def decayed(x: Tensor, log: Tensor | None) -> Tensor:
    return x if log is None else x * log.to(x.dtype).exp()


def retained(x: Tensor, after: Tensor | None) -> Tensor:
    """What is left of each key at the end of its chunk."""
    return x if after is None else x * (after[..., -1:, :] - after).to(x.dtype).exp()


def down(x: Tensor) -> Tensor:
    """Rows one later, the first zero."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], dim=-2)


def solve(lower: Tensor, right: Tensor) -> Tensor:
    """`(I + lower)^{-1} right`, `lower` strictly lower triangular."""
    return torch.linalg.solve_triangular(lower.double(), right.double(), upper=False, unitriangular=True).to(right.dtype)


def chain(q: Tensor, reads: Tensor, writes: Tensor, mixed: Tensor, after: Tensor | None, state: Tensor | None):
    """Outputs `[B, H, T / C, C, V]` and last state.

    Args:
        q: queries of the state at the chunk's start, `[B, H, T / C, C, K]`; reads: of the keys in it, `[..., C, R]`.
        writes: the keys as they stand at its end, `[..., R, K]`.
        mixed: their values as an affine map of the state at its start, `[..., R, V + K]`: constant, then slope.
    """
    values = mixed.shape[-1] - q.shape[-1]
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], values)
    step = writes.transpose(-1, -2) @ mixed
    change, slope = step[..., :values], step[..., values:]
    keep = torch.ones_like(q[..., -1, :]) if after is None else after[..., -1, :].to(q.dtype).exp().expand_as(q[..., -1, :])
    slope = slope + torch.diag_embed(keep)
    starts = []
    for n in range(q.shape[2]):
        starts.append(state)
        state = change[:, :, n] + slope[:, :, n] @ state
    starts = torch.stack(starts, dim=2)
    local = reads @ mixed
    return local[..., :values] + (q + local[..., values:]) @ starts, state

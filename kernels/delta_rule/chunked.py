"""The same by chunks, in plain torch.

Write the recurrence as `S_t = diag(exp(log_decay_t)) S_{t-1} + b_t u_t^T + k_t v_t^T`, where u_t is what a_t reads. With g the
cumulative log-decay inside a chunk of C tokens (inclusive), h_t the g in force when a_t reads, and S the state at its start,

    u_t = a_t exp(h_t) S + sum_{s < t} (a_t . exp(h_t - g_s) b_s) u_s + sum_{s < t} (a_t . exp(h_t - g_s) k_s) v_s

so that u is affine in S: the triangular system `(I - A) u = a exp(h) S + A_k v` is solved once per chunk, for all chunks
together, on the right-hand sides `a exp(h)` and `A_k v` (the WY form of arXiv:2406.06484, with decays). Then only S passes from
chunk to chunk, two products each, and the outputs are products over all chunks at once. Every exponent is a difference that
cannot be positive; g is summed in float64. So are the solve and the passing of the state: what is written depends on what was
erased, token after token, and in float32 those errors outgrow those of the recurrence itself when little decays.

The delta rule reads after its decay (h = g) and writes the one key b = beta k: `b_t (v_t + u_t)^T`, so v itself is on the right.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import chunk_size, from_chunks, to_chunks
from zoo.kernels.linear_attention.chunked import chunk_scores, cumulative

CHUNK = 32  # measured at 8192 tokens, 8 heads of 64, two cores: a little faster than 64
SEGMENT = 2048  # tokens worked on at a time: what lies between two products stays small enough to be reused, not returned


def delta_rule(q, k, v, beta, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    return by_segments(_delta_rule, (q, k, v, beta), log_decay, state, scale)


def general_delta_rule(q, k, v, a, b, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    return by_segments(_general_delta_rule, (q, k, v, a, b), log_decay, state, scale)


def by_segments(run: Callable, tensors: tuple, log_decay: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`run` on one segment of time after another, the state handed on in float64."""
    lead, outs = tensors[0], []
    for start in range(0, lead.shape[1], SEGMENT):
        piece = slice(start, start + SEGMENT)
        decay = log_decay[:, piece] if log_decay is not None and log_decay.ndim > 1 else log_decay
        out, state = run(*(x[:, piece] for x in tensors), decay, state, scale)
        outs.append(out)
    return torch.cat(outs, dim=1), state.to(accumulator(lead.dtype))


def _delta_rule(q, k, v, beta, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    chunk = chunk_size(length, CHUNK)
    q, k, v, beta = (to_chunks(x.to(acc), chunk).contiguous() for x in (q, k, v, beta))
    q, wide = q * scale, k.double()
    b = beta.double().unsqueeze(-1) * wide
    after = cumulative(log_decay, length, chunk, q)
    if after is None:
        reads, erased = (q @ b.to(acc).transpose(-1, -2)).tril(), wide @ b.transpose(-1, -2)
    elif after.shape[-1] > 1:
        reads, erased = chunk_scores(torch.stack([q, k]), b.to(acc), after, after)
    else:
        reads, erased = chunk_scores(q, b.to(acc), after, after), chunk_scores(wide, b, after, after, strict=True)
    const, slope = solve(erased, v, -decayed(wide, after))
    values, starts, state = chain(const, slope, retained(b, after), after, state)
    out = decayed(q, after) @ starts.to(acc) + reads @ values.to(acc)
    return from_chunks(out, length).to(dtype), state


def _general_delta_rule(q, k, v, a, b, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    chunk = chunk_size(length, CHUNK)
    q, k, v, a, b = (to_chunks(x.to(acc), chunk).contiguous() for x in (q, k, v, a, b))
    q = q * scale
    after = cumulative(log_decay, length, chunk, q)
    # a_t reads S_{t-1}, as a query of the token before would: moved up one row it shares the decays of q
    early = torch.cat([a[..., 1:, :], torch.zeros_like(a[..., :1, :])], dim=-2)
    scores = chunk_scores(torch.stack([q, early]).unsqueeze(1), torch.stack([b, k]), after, after)
    (reads, reads_k), (moved, moved_k) = scores[0], down(scores[1])
    const, slope = solve(-moved, moved_k @ v, decayed(a.double(), down(after)))
    added = (retained(k, after).transpose(-1, -2) @ v).double()
    values, starts, state = chain(const, slope, retained(b, after).double(), after, state, added)
    out = decayed(q, after) @ starts.to(acc) + reads @ values.to(acc) + reads_k @ v
    return from_chunks(out, length).to(dtype), state


def decayed(x: Tensor, log: Tensor | None) -> Tensor:
    return x if log is None else x * log.to(x.dtype).exp()


def retained(x: Tensor, after: Tensor | None) -> Tensor:
    """What is left of each key at the end of its chunk."""
    return x if after is None else x * (after[..., -1:, :] - after).to(x.dtype).exp()


def down(x: Tensor) -> Tensor:
    """Rows one later, the first zero."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], dim=-2)


def solve(lower: Tensor, *right: Tensor) -> tuple[Tensor, ...]:
    """`(I + lower)^{-1} right` in float64; what `lower` holds on its diagonal and above is not read."""
    joined = torch.cat([x.double() for x in right], dim=-1)
    solved = torch.linalg.solve_triangular(lower.double(), joined, upper=False, unitriangular=True)
    return solved.split([x.shape[-1] for x in right], dim=-1)


def chain(const, slope, keys, after, state, added=None) -> tuple[Tensor, Tensor, Tensor]:
    """Values written by every token, states at the start of every chunk, and the last one, all in float64.

    Args:
        const, slope: the values as an affine map of the chunk's starting state, `[B, H, T / C, C, V]` and `[..., C, K]`.
        keys: what is left at the chunk's end of the keys they are written under, `[..., C, K]`.
        after: cumulative log-decay, or None; added: what else the chunk writes, `[..., K, V]`.
    """
    if state is None:
        state = const.new_zeros(*const.shape[:2], slope.shape[-1], const.shape[-1])
    state, keys = state.double(), keys.transpose(-1, -2)
    keep = None if after is None else after[..., -1, :].exp().unsqueeze(-1)
    values, starts = [], []
    for n in range(const.shape[2]):
        starts.append(state)
        values.append(const[:, :, n] + slope[:, :, n] @ state)
        kept = state if keep is None else keep[:, :, n] * state
        state = kept + keys[:, :, n] @ values[-1]
        if added is not None:
            state = state + added[:, :, n]
    return torch.stack(values, dim=2), torch.stack(starts, dim=2), state

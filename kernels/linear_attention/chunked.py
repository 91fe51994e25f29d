"""The same by chunks, in plain torch.

With g the cumulative log-decay inside a chunk of C tokens and S the state at its start,

    o_t = exp(g_t) q_t S + sum_{s <= t} (q_t . exp(g_t - g_s) k_s) v_s
    S'  = exp(g_C) S + sum_s exp(g_C - g_s) k_s v_s^T

so a chunk costs matrix products, and only S passes from chunk to chunk. Every exponent is a difference that cannot be
positive; g is summed in float64 because a strong decay followed by gentle ones would otherwise lose the gentle ones.
With a bonus o_t reads S_{t-1}: the decay of its own step is left out and the diagonal is `q_t . bonus k_t`.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import chunk_size, from_chunks, to_chunks
from zoo.kernels.decay import decayed_scores
from zoo.kernels.linear_attention.reference import normalized

CHUNK = 64


def linear_attention(q, k, v, log_decay, bonus, state, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    chunk = chunk_size(length, CHUNK)
    q, k, v = (to_chunks(x.to(acc), chunk) for x in (q, k, v))
    q = q * scale
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[1], q.shape[-1], v.shape[-1])

    after = cumulative(log_decay, length, chunk, q)  # [B, H, T / C, C, K or 1], or None
    if after is None:
        scores = (q @ k.transpose(-1, -2)).tril(-1 if bonus is not None else 0)
        starts, state = carry(k.transpose(-1, -2) @ v, None, state)
        inter = q @ starts
    else:
        read = after if bonus is None else after - after.diff(dim=-2, prepend=torch.zeros_like(after[..., :1, :]))
        scores = chunk_scores(q, k, read, after, strict=bonus is not None)
        last = after[..., -1:, :]
        writes = (k * (last - after).to(acc).exp()).transpose(-1, -2) @ v
        starts, state = carry(writes, last.to(acc).exp().transpose(-1, -2), state)
        inter = (q * read.to(acc).exp()) @ starts
    out = inter + scores @ v
    if bonus is not None:
        own = (q * k * bonus.to(acc)[:, None, None]).sum(-1, keepdim=True)
        out = out + own * v
    if normalize:
        out = normalized(out)
    return from_chunks(out, length).to(dtype), state


def cumulative(log_decay: Tensor | None, length: int, chunk: int, q: Tensor) -> Tensor | None:
    """Inclusive cumulative log-decay inside each chunk, float64, `[B, H, T / C, C, K or 1]`."""
    if log_decay is None:
        return None
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(q.shape[0], length, -1)
    chunks = to_chunks(log_decay.double(), chunk)
    return (chunks if log_decay.ndim == 4 else chunks.unsqueeze(-1)).cumsum(-2)


def chunk_scores(q: Tensor, k: Tensor, q_log: Tensor, k_log: Tensor, *, strict: bool = False) -> Tensor:
    """`q_t . exp(q_log_t - k_log_s) k_s` for s <= t (s < t if strict): `[..., C, C]`."""
    if q_log.shape[-1] > 1:
        return decayed_scores(q, k, q_log, k_log, strict=strict)
    exponent = (q_log - k_log.transpose(-1, -2)).to(q.dtype)
    unseen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(0 if strict else 1)
    return (q @ k.transpose(-1, -2)) * exponent.masked_fill(unseen, -torch.inf).exp()


def carry(writes: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk `[B, H, T / C, K, V]` and after the last, from what each chunk writes and keeps."""
    starts = []
    for n in range(writes.shape[2]):
        starts.append(state)
        state = writes[:, :, n] + (state if decay is None else decay[:, :, n] * state)
    return torch.stack(starts, dim=2), state

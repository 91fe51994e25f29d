"""The same by chunks, in plain torch.

With D_{t,s} the product of the decays of the tokens after s up to t, and S the state at the start of a chunk of C tokens,

    o_t = D_{t,0} q_t S + sum_{s <= t} (q_t . D_{t,s} k_s) v_s
    S'  = D_{C,0} S + sum_s D_{C,s} k_s v_s^T

so a chunk costs matrix products, and only S passes from chunk to chunk. Decays are only ever multiplied (`zoo.kernels.decay`),
so one that forgets all is exact beside gentle ones. With a bonus o_t reads S_{t-1}: the decay of its own step is left out
and what it reads of itself is `q_t . bonus k_t`. Decays E of the values stand on the other side of S and of v, entry by entry:
`o_t = E_{t,0} (D_{t,0} q_t S) + sum_{s <= t} (q_t . D_{t,s} k_s) E_{t,s} v_s`.
"""

from functools import partial

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import by_segments, chunk_size, decay_chunks, from_chunks, plus_product, to_chunks
from zoo.kernels.decay import decay_matrix, decayed_scores, decayed_sums
from zoo.kernels.linear_attention.reference import every_head, normalized

CHUNK = 64


def linear_attention(q, k, v, log_decay, bonus, value_log_decay, state, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    q, k, v = every_head(q, k, v)
    run = partial(_linear_attention, bonus=bonus, scale=scale, normalize=normalize)
    return by_segments(run, (q, k, v, value_log_decay), log_decay, state, CHUNK)


def _linear_attention(q, k, v, value_log_decay, log_decay, state, bonus, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    chunk = chunk_size(length, CHUNK)
    q, k, v = (to_chunks(x.to(acc), chunk) for x in (q, k, v))
    q = q * scale
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[1], q.shape[-1], v.shape[-1])
    if log_decay is not None:
        decay = decay_chunks(log_decay, length, chunk, acc)
    else:
        decay = None if bonus is None else q.new_ones(1, q.shape[1], 1, chunk)
    scores, q, k, total = scored(q, k, decay, None if bonus is None else bonus.to(acc)[:, None, None])
    if value_log_decay is None:
        starts, state = carry(k.transpose(-1, -2) @ v, total, None, state)
        out = plus_product(scores @ v, q, starts)
    else:
        decay = decay_chunks(value_log_decay, length, chunk, acc)
        out, since, v, value_total = decayed_sums(scores, v, decay, inclusive=bonus is None)
        starts, state = carry(k.transpose(-1, -2) @ v, total, value_total, state)
        out = torch.addcmul(out, since, q @ starts)
    if normalize:
        out = normalized(out)
    return from_chunks(out, length).to(dtype), state


def scored(q: Tensor, k: Tensor, decay: Tensor | None, bonus: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scores `[..., C, C]`, queries as they meet the state at the chunk's start, keys as they enter the one at its end, and
    its decay `[..., K or 1]` over the chunk, if any."""
    if decay is None:
        return (q @ k.transpose(-1, -2)).tril_(), q, k, None
    if decay.ndim < q.ndim:
        between, since, until, total = decay_matrix(decay, inclusive=bonus is None)
        scores = q @ k.transpose(-1, -2) * between
        if bonus is not None:
            scores = scores + torch.diag_embed((q * k * bonus).sum(-1))
        return scores, q * since, k * until, total
    own = (q * k if bonus is None else q * k * bonus).sum(-1)[..., None, None]
    read = q * decay if bonus is None else q
    scores, q, k, total = decayed_scores(read.unsqueeze(-2), k.unsqueeze(-2), decay, own)
    return scores[..., 0, :, 0], q.squeeze(-2), k.squeeze(-2), total


def carry(writes: Tensor, total: Tensor | None, value_total: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """States at the start of every chunk `[B, H, T / C, K, V]` and after the last, from what each chunk writes and keeps."""
    starts, writes = [], writes.unbind(2)
    totals = None if total is None else total.expand(*total.shape[:2], len(writes), -1).unsqueeze(-1)
    if value_total is not None:
        totals = value_total.unsqueeze(-2) if totals is None else totals * value_total.unsqueeze(-2)
    totals = None if totals is None else totals.unbind(2)
    for n, write in enumerate(writes):
        starts.append(state)
        state = state + write if totals is None else torch.addcmul(write, totals[n], state)
    return torch.stack(starts, dim=2), state

"""The same by chunks, in plain torch.

Write the recurrence as `S_t = diag(exp(log_decay_t)) S_{t-1} + b_t u_t^T + k_t v_t^T`, where u_t is what a_t reads. With S the
state at the start of a chunk of C tokens, D_{t,s} the product of the decays of the tokens after s that are in force when a_t
reads, and D_{t,0} that of all of them,

    u_t = D_{t,0} a_t S + sum_{s < t} (a_t . D_{t,s} b_s) u_s + sum_{s < t} (a_t . D_{t,s} k_s) v_s

a triangular system `(I - A) u = A_k v + D a S`. `(I - A)^{-1}` does not depend on S and is found for all chunks together (the UT
transform of arXiv:2406.06484, with decays). Then S passes from chunk to chunk, three products each, and the outputs are
products over all chunks at once. Decays are only ever multiplied (`zoo.kernels.decay`). The inverse and its product are in
float64: what is written depends on what was erased, token after token, and in float32 those errors outgrow those of the
recurrence itself when little decays.

The delta rule is a = -k, reading after its decay, and writes the one key b = beta k: `b_t (v_t + u_t)^T`. With v_t + u_t for
u_t, v itself is on the right.
"""

from functools import partial

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.chunking import by_segments, chunk_size, decay_chunks, from_chunks, plus_product, to_chunks
from zoo.kernels.decay import decay_matrix, decayed_scores
from zoo.kernels.linear_attention.reference import every_head

CHUNK = 32


def delta_rule(q, k, v, beta, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    return by_segments(partial(_delta_rule, scale=scale), (*every_head(q, k, v), beta), log_decay, state, CHUNK)


def general_delta_rule(q, k, v, a, b, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    return by_segments(partial(_general_delta_rule, scale=scale), (q, k, v, a, b), log_decay, state, CHUNK)


def _delta_rule(q, k, v, beta, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    chunk = chunk_size(length, CHUNK)
    q, k, v, beta = (to_chunks(x.to(acc), chunk) for x in (q, k, v, beta))
    b = k * beta.unsqueeze(-1)
    decay = None if log_decay is None else decay_chunks(log_decay, length, chunk, acc)
    scores, readers, b, total = scored(torch.stack([q * scale, -k], dim=-2), b, decay)
    out, written, state = chain(readers, v, scores[..., 1, :], b, total, state)
    return from_chunks(plus_product(out, scores[..., 0, :], written), length).to(dtype), state


def _general_delta_rule(q, k, v, a, b, log_decay, state, scale: float) -> tuple[Tensor, Tensor]:
    length, dtype, acc = v.shape[1], v.dtype, accumulator(v.dtype)
    chunk = chunk_size(length, CHUNK)
    q, k, v, a, b = (to_chunks(x.to(acc), chunk) for x in (q, k, v, a, b))
    decay = decay_chunks(log_decay, length, chunk, acc)
    q, keys = q * scale, torch.stack([b, k], dim=-2)
    own = (q.unsqueeze(-2) * keys).sum(-1)
    own = torch.stack([own, torch.zeros_like(own)], dim=-2)  # a reads before its token writes
    scores, readers, keys, total = decayed_scores(torch.stack([q * decay, a], dim=-2), keys, decay, own)
    (b, k), (of_b, of_k) = keys.unbind(-2), (x.contiguous() for x in scores.unbind(-1))
    added = k.transpose(-1, -2) @ v
    out, written, state = chain(readers, of_k[..., 1, :] @ v, of_b[..., 1, :], b, total, state, added)
    out = plus_product(plus_product(out, of_k[..., 0, :], v), of_b[..., 0, :], written)
    return from_chunks(out, length).to(dtype), state


def scored(readers: Tensor, b: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `zoo.kernels.decay.decayed_scores`, for the two queries of a token, which read after its decay, and its one key.

    Args: readers: `[..., C, 2, K]`; b: `[..., C, K]`; decay: None, `[..., C]` or `[..., C, K]`.
    Returns: scores `[..., C, 2, C]`, readers and b with their decays, and the decay over the chunk, `[..., K or 1]`, if any.
    """
    if decay is not None and decay.ndim == b.ndim:
        own = (readers * b.unsqueeze(-2)).sum(-1, keepdim=True)
        scores, readers, b, total = decayed_scores(readers * decay.unsqueeze(-2), b.unsqueeze(-2), decay, own)
        return scores.squeeze(-1), readers, b.squeeze(-2), total
    scores = (readers.flatten(-3, -2) @ b.transpose(-1, -2)).unflatten(-2, (-1, 2))
    if decay is None:
        seen = torch.ones(b.shape[-2], b.shape[-2], dtype=b.dtype, device=b.device).tril()
        return scores * seen.unsqueeze(-2), readers, b, None
    between, since, until, total = decay_matrix(decay, inclusive=True)
    return scores * between.unsqueeze(-2), readers * since.unsqueeze(-2), b * until, total


def chain(readers, const, moved, keys, total, state, added=None) -> tuple[Tensor, Tensor, Tensor]:
    """What the outputs read of their chunks' starting states, the values written, both `[B, H, T / C, C, V]`, and the last state.

    Args:
        readers: q and a with the decays since the chunk's start, `[B, H, T / C, C, 2, K]`.
        const, moved: the values' part that no state enters, `[..., C, V]`, and A, `[..., C, C]`, read below its diagonal.
        keys: what is left at the chunk's end of the keys they are written under, `[..., C, K]`.
        total: decay over the chunk, `[..., K or 1]`, or None; added: what else the chunk writes, `[..., K, V]`.
    """
    lead = const.shape[:3]
    eye = torch.eye(moved.shape[-1], dtype=torch.float64, device=moved.device)
    inverse = torch.linalg.solve_triangular(-moved.double(), eye, upper=False, unitriangular=True)
    if total is not None:
        total = total.expand(*lead, -1).unsqueeze(-1)
    per_chunk = (readers.flatten(-3, -2), const.double(), inverse, keys.transpose(-1, -2), total, added)
    per_chunk = ([None] * lead[2] if x is None else x.flatten(0, 1).unbind(1) for x in per_chunk)
    state = const.new_zeros(lead[0] * lead[1], keys.shape[-1], const.shape[-1]) if state is None else state.flatten(0, 1)
    reads, values = [], []
    for reader, fixed, inverted, key, keep, other in zip(*per_chunk, strict=True):
        read = torch.bmm(reader, state)
        value = torch.bmm(inverted, fixed + read[:, 1::2]).to(read.dtype)
        kept = state if keep is None else keep * state if other is None else torch.addcmul(other, keep, state)
        state = torch.baddbmm(kept, key, value)
        reads.append(read)
        values.append(value)
    reads, values = (torch.stack(x, dim=1).unflatten(0, lead[:2]) for x in (reads, values))
    return reads[..., ::2, :], values, state.unflatten(0, lead[:2])

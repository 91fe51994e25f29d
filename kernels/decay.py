"""Products of decays over a chunk, with every exponent kept at or below zero."""

import torch
from torch import Tensor

BASE = 4  # below this block size the channels are multiplied out directly


def decayed_scores(q: Tensor, k: Tensor, q_log: Tensor, k_log: Tensor, *, strict: bool = False) -> Tensor:
    """`scores[t, s] = sum_c q[t, c] k[s, c] exp(q_log[t, c] - k_log[s, c])` for s <= t (s < t if strict), else 0.

    A plain product of `q exp(q_log)` and `k exp(-k_log)` overflows. Here each pair of neighbouring blocks is re-centred at
    the boundary between them, where q_log has only decreased since and k_log has yet to decrease: both factors are at most
    one. Blocks double in size, so a chunk of C costs `C log2(C) K` exponentials and matrix products.

    Args:
        q, k: `[..., C, K]`, C a power of two.
        q_log, k_log: `[..., C, K]`, float64 cumulative log-decays: non-increasing along C, and `q_log[t] <= k_log[s]`
            whenever s < t (and s = t unless strict).

    Returns:
        `[..., C, C]` in the dtype of q.
    """
    chunk = q.shape[-2]
    scores = q.new_zeros(*torch.broadcast_shapes(q.shape, k.shape)[:-1], chunk)
    block = min(BASE, chunk)
    _write(scores, _direct(q, k, q_log, k_log, block, strict), block, 0, 0)
    while block < chunk:
        q_right, log_right = (x.unflatten(-2, (-1, 2, block))[..., 1, :, :] for x in (q, q_log))
        k_left, log_left = (x.unflatten(-2, (-1, 2, block))[..., 0, :, :] for x in (k, k_log))
        boundary = log_left[..., -1:, :]
        decayed_q = q_right * (log_right - boundary).clamp(max=0).to(q.dtype).exp()
        decayed_k = k_left * (boundary - log_left).clamp(max=0).to(k.dtype).exp()
        _write(scores, decayed_q @ decayed_k.transpose(-1, -2), 2 * block, block, 0)
        block *= 2
    return scores


def _direct(q: Tensor, k: Tensor, q_log: Tensor, k_log: Tensor, block: int, strict: bool) -> Tensor:
    """Diagonal blocks `[..., C / block, block, block]`, channel by channel."""
    q, k, q_log, k_log = (x.unflatten(-2, (-1, block)) for x in (q, k, q_log, k_log))
    seen = torch.ones(block, block, dtype=torch.bool, device=q.device).tril(-1 if strict else 0)
    exponent = (q_log.unsqueeze(-2) - k_log.unsqueeze(-3)).to(q.dtype)
    weight = exponent.masked_fill(~seen.unsqueeze(-1), -torch.inf).exp()
    return torch.einsum("...tc,...sc,...tsc->...ts", q, k, weight)


def _write(scores: Tensor, blocks: Tensor, size: int, row: int, column: int) -> None:
    """Write `blocks` `[..., C / size, b, b]` at (row, column) inside each diagonal block of `size`."""
    b = blocks.shape[-1]
    tiles = scores.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(dim1=-4, dim2=-2)
    tiles[..., row : row + b, column : column + b, :] = blocks.movedim(-3, -1)

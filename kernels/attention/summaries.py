"""Sums of keys (or values) over windows of a sequence, kept as the sequence grows: what blocks are chosen by.

Window n holds the positions from `n * stride` to `n * stride + size - 1`. A sum is complete once its last token has come.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing


def windows(slots: int, stride: int) -> int:
    """Sums kept for so many slots of a cache."""
    return -(-slots // stride)


def empty(x: Tensor, rows: int, count: int) -> Tensor:
    """`[rows, count, ...]` sums of nothing, for tokens x `[B, T, ...]`."""
    return torch.zeros(rows, count, *x.shape[2:], dtype=accumulator(x.dtype), device=x.device)


def add(
    sums: Tensor | None, x: Tensor, positions: Tensor, slots: int, *, size: int, stride: int,
    weight: Tensor | None = None, packing: Packing | None = None,
) -> Tensor:  # fmt: skip
    """The sums after the tokens x: in place where gradients are disabled and the sums were long enough.

    Args:
        sums: `[B, S, ...]` as an earlier call returned them, in float32 (float64 for float64 tokens), or None.
        x: `[B, T, ...]`; `[1, total, ...]` with packing, which then feeds N rows.
        positions: `[B, T]` int64 (`[1, total]`), of the tokens in their sequences.
        slots: tokens there must be sums for.
        size, stride: of the windows; stride divides size.
        weight: `[size, ...]`, by which a token counts according to its place in the window; default 1.
    """
    count = windows(slots, stride)
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1) if packing is None else packing.seq_idx.unsqueeze(0)
    if sums is None:
        sums = empty(x, x.shape[0] if packing is None else packing.count, count)
    elif sums.shape[1] < count:
        sums = torch.cat([sums, empty(x, sums.shape[0], count - sums.shape[1])], dim=1)
    put = Tensor.index_put if torch.is_grad_enabled() else Tensor.index_put_
    exact = x.to(sums.dtype)
    for earlier in range(size // stride):  # every token lies in so many windows
        window = positions // stride - earlier
        part = exact if weight is None else exact * weight.to(sums.dtype)[positions - window * stride]
        there = (window >= 0).view(*window.shape, *[1] * (x.ndim - 2))
        sums = put(sums, (rows, window.clamp(min=0)), part.masked_fill(~there, 0), accumulate=True)
    return sums


def last_positions(count: int, *, size: int, stride: int, device) -> Tensor:
    """`[count]`: the position at which each window is complete."""
    return torch.arange(count, device=device) * stride + size - 1


def pairs(length: int, *, size: int, stride: int) -> int:
    """How many pairs there are of a token and a window complete by its position."""
    count = max(0, (length - size) // stride + 1)
    return count * (length - size + 1) - stride * count * (count - 1) // 2

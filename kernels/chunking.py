"""Cutting time into chunks, shared by every chunked recurrence."""

import torch
from torch import Tensor


def chunk_size(length: int, largest: int) -> int:
    """The smallest power of two that holds `length`, at most `largest`."""
    return min(largest, 1 << max(length - 1, 0).bit_length())


def to_chunks(x: Tensor, chunk: int, value: float = 0.0) -> Tensor:
    """`[B, T, H, ...]` -> `[B, H, T / C, C, ...]`, T padded at the end with `value`; `[B, T, H]` -> `[B, H, T / C, C]`."""
    pad = -x.shape[1] % chunk
    if pad:
        x = torch.cat([x, x.new_full((x.shape[0], pad, *x.shape[2:]), value)], dim=1)
    return x.unflatten(1, (-1, chunk)).movedim(3, 1)


def from_chunks(x: Tensor, length: int) -> Tensor:
    """`[B, H, T / C, C, ...]` -> `[B, T, H, ...]`, the inverse of `to_chunks`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]

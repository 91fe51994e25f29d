"""Sequences cut into pieces on which a kernel's programs work side by side, and sizes as tiles have them."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def cdiv(whole: int, part: int) -> int:
    """Rounded up."""
    return -(-whole // part)


def power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()


def padded_size(size: int) -> int:
    """As a tile has it."""
    return max(16, power_of_two(size))


class Segments(NamedTuple):
    """Pieces of sequences that programs work on side by side.

    table `[segments, 5]` int64: row, first token, end, and the places of the states before and after it. first `[sequences + 1]`: the
    first segment of each. With one segment a sequence, place n belongs to sequence n in the tensor of first or last states;
    otherwise `places` of boundaries exist, the last of sequence n at `last[n]`.
    """

    table: Tensor
    first: Tensor
    start: Tensor
    last: Tensor
    count: int
    places: int
    split: bool

    @classmethod
    def of(cls, batch: int, length: int, size: int, cu_seqlens: Tensor | None, device: torch.device) -> "Segments":
        if cu_seqlens is None:
            return _whole_rows(batch, length, size, device)
        return _packed_row(cu_seqlens, None if cu_seqlens.is_inference() else cu_seqlens._version, length, size)

    @classmethod
    def _packed(cls, cu: Tensor, length: int, size: int) -> "Segments":
        """Without waiting for the device: there are at most `length // size + sequences` segments, the rest are empty."""
        sequences, count = cu.numel() - 1, length // size + cu.numel() - 1
        first = torch.nn.functional.pad(((cu.diff() + size - 1) // size).cumsum(0), (1, 0))
        segment = torch.arange(count, device=cu.device)
        n = torch.searchsorted(first, segment, right=True) - 1  # `sequences` for the empty ones
        real = n.clamp(max=sequences - 1)
        start = cu[real] + (segment - first[real]) * size
        stop = torch.minimum(start + size, cu[real + 1])
        start, stop = (torch.where(n < sequences, x, 0) for x in (start, stop))
        return cls._laid(torch.zeros_like(n), start, stop, n, first, count)

    @classmethod
    def _laid(cls, row, start, stop, n, first, count) -> "Segments":
        place = torch.arange(count, device=n.device) + n
        own = torch.arange(first.numel() - 1, device=n.device)
        table = torch.stack([row, start, stop, place, place + 1], 1).contiguous()
        return cls(table, first, first[:-1] + own, first[1:] + own, count, count + first.numel(), True)


@lru_cache(maxsize=16)
def _packed_row(cu_seqlens: Tensor, version: int | None, length: int, size: int) -> Segments:
    """Made once for all layers, which share one packing, as long as nobody writes into it."""
    return Segments._packed(cu_seqlens, length, size)


@lru_cache(maxsize=64)
def _whole_rows(batch: int, length: int, size: int, device: torch.device) -> Segments:
    pieces = cdiv(length, size)
    first = torch.arange(batch + 1, device=device) * pieces
    n = torch.arange(batch, device=device).repeat_interleave(pieces)
    start = torch.arange(pieces, device=device).repeat(batch) * size
    stop = (start + size).clamp(max=length)
    if pieces > 1:
        return Segments._laid(n, start, stop, n, first, batch * pieces)
    return Segments(torch.stack([n, start, stop, n, n], 1).contiguous(), first, n, n, batch, batch, False)

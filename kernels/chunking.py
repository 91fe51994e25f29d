"""Cutting time into segments and chunks, shared by every chunked recurrence."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator

# numbers a tensor of one segment holds: on a CPU little enough to stay in its cache and be reused, not returned to the system
SEGMENT, SEGMENT_CPU = 2**24, 2**19


def by_segments(
    run: Callable, tensors: Sequence[Tensor | None], log_decay: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`run(*tensors, log_decay, state)` -> (out, state) on one segment of time after another, the state handed on.

    Args:
        tensors: `[B, T, H, ...]`, or None after the first; log_decay: `[B, T, H, ...]`, or `[H]`, which every segment is given whole.
        chunk: segments are multiples of it, but the last.
    """
    lead = tensors[0]
    size = max(segment_size(lead[:, 0]) // chunk, 1) * chunk
    length, out = lead.shape[1], Joined(lead.shape[1])
    for start in range(0, length, size):
        piece = slice(start, start + size)
        decay = log_decay[:, piece] if log_decay is not None and log_decay.ndim > 1 else log_decay
        part, state = run(*(None if x is None else x[:, piece] for x in tensors), decay, state)
        out.append(part)
    return out.whole(), state.to(accumulator(lead.dtype))


class Joined:
    """Pieces `[B, t, ...]` of a row of T tokens, one after another. Where no gradient is asked for each is copied to its place
    at once: pieces kept until the end would take as much memory again, and new memory costs a CPU more than the copy.
    """

    def __init__(self, length: int):
        self.length, self.filled, self.pieces = length, 0, []

    def append(self, piece: Tensor) -> None:
        if torch.is_grad_enabled() or piece.shape[1] == self.length:
            self.pieces.append(piece)
            return
        if not self.pieces:
            self.pieces.append(piece.new_empty(piece.shape[0], self.length, *piece.shape[2:]))
        self.pieces[0][:, self.filled : self.filled + piece.shape[1]] = piece
        self.filled += piece.shape[1]

    def whole(self) -> Tensor:
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=1)


def segment_size(token: Tensor) -> int:
    """How many tokens of the size of this one make a segment."""
    return max((SEGMENT_CPU if token.device.type == "cpu" else SEGMENT) // max(token.numel(), 1), 1)


def chunk_size(length: int, largest: int) -> int:
    """The smallest power of two that holds `length`, at most `largest`."""
    return min(largest, 1 << max(length - 1, 0).bit_length())


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, H, ...]` -> a copy `[B, H, T / C, C, ...]`, T padded at the end with zeros; `[B, T, H]` -> `[B, H, T / C, C]`."""
    pad = -x.shape[1] % chunk
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, chunk)).movedim(3, 1).clone(memory_format=torch.contiguous_format)


def from_chunks(x: Tensor, length: int) -> Tensor:
    """`[B, H, T / C, C, ...]` -> `[B, T, H, ...]`, the inverse of `to_chunks`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :length]


def decay_chunks(log_decay: Tensor, length: int, chunk: int, dtype: torch.dtype) -> Tensor:
    """Decays `[B, H, T / C, C]` or `[B, H, T / C, C, K]`; `[H]` gives `[1, H, 1, C]` where no chunk is padded, all alike."""
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(1, length if length % chunk else chunk, -1)
    return to_chunks(log_decay.to(dtype), chunk).exp()


def plus_product(base: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`base + x @ y` in one go, all of them `[B, H, T / C, ., .]`."""
    return torch.baddbmm(base.flatten(0, 2), x.flatten(0, 2), y.flatten(0, 2)).unflatten(0, base.shape[:3])

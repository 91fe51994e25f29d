"""Cutting time into segments and chunks, shared by every chunked recurrence."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator

# numbers a tensor of one segment holds: on a CPU little enough to stay in its cache and be reused, not returned to the system
SEGMENT, SEGMENT_CPU = 2**24, 2**18


def by_segments(
    run: Callable, tensors: Sequence[Tensor], log_decay: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """`run(*tensors, log_decay, state)` -> (out, state) on one segment of time after another, the state handed on.

    Args:
        tensors: `[B, T, H, ...]`; log_decay: `[B, T, H, ...]`, or `[H]`, which every segment is given whole.
        chunk: segments are multiples of it, but the last.
    """
    lead = tensors[0]
    size = max(segment_size(lead[:, 0]) // chunk, 1) * chunk
    outs = []
    for start in range(0, lead.shape[1], size):
        piece = slice(start, start + size)
        decay = log_decay[:, piece] if log_decay is not None and log_decay.ndim > 1 else log_decay
        out, state = run(*(x[:, piece] for x in tensors), decay, state)
        outs.append(out)
    return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0], state.to(accumulator(lead.dtype))


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

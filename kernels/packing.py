"""Several sequences laid end to end in one row, and the two other shapes they can take."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor


class Packing:
    """Where the sequences of a packed row `[1, total, ...]` begin and end.

    Args:
        cu_seqlens: `[N + 1]` integers, cumulative lengths: sequence n is `[cu_seqlens[n], cu_seqlens[n + 1])`.
            A sequence may be empty: its state passes through unchanged.

    Whatever belongs to a sequence rather than to a token (a state) has N as its first dimension.
    """

    def __init__(self, cu_seqlens: Tensor):
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
            raise ValueError(f"cu_seqlens: expected [N + 1] integers with N >= 1, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
        self.cu_seqlens = cu_seqlens.long()
        self.count = cu_seqlens.numel() - 1

    @classmethod
    def from_lengths(cls, lengths: list[int] | Tensor, device: torch.device | str | None = None) -> "Packing":
        """Packing of sequences with these lengths, in this order."""
        lengths = torch.as_tensor(lengths, dtype=torch.long, device=device)
        return cls(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Lengths on the host; the one place where packing waits for the device."""
        lengths = self.cu_seqlens.diff().tolist()
        if self.cu_seqlens[0] != 0 or min(lengths) < 0:
            raise ValueError(f"cu_seqlens: must start at 0 and never decrease, got {self.cu_seqlens.tolist()}")
        return tuple(lengths)

    @property
    def total(self) -> int:
        """Tokens in the row."""
        return sum(self.lengths)

    @cached_property
    def seq_idx(self) -> Tensor:
        """`[total]`: which sequence each token belongs to."""
        return torch.repeat_interleave(torch.arange(self.count, device=self.cu_seqlens.device), self.cu_seqlens.diff())

    @cached_property
    def positions(self) -> Tensor:
        """`[total]`: how many tokens of its own sequence precede each token."""
        return torch.arange(self.seq_idx.numel(), device=self.cu_seqlens.device) - self.cu_seqlens[self.seq_idx]

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """`[1, total, ...]` -> `[N, longest, ...]`, each sequence from the left, `value` behind it."""
        padded = x.new_full((self.count, max(self.lengths), *x.shape[2:]), value)
        return padded.index_put((self.seq_idx, self.positions), x[0])

    def unpad(self, x: Tensor) -> Tensor:
        """`[N, longest, ...]` -> `[1, total, ...]`, the inverse of `pad`."""
        return x[self.seq_idx, self.positions].unsqueeze(0)

    def split(self) -> Iterator[tuple[int, slice]]:
        """`(n, slice in the row)` of every sequence."""
        start = 0
        for n, length in enumerate(self.lengths):
            yield n, slice(start, start + length)
            start += length

    def check(self, op: str, name: str, x: Tensor) -> None:
        """Raise unless `x` is a packed row of this packing."""
        if x.shape[0] != 1 or x.shape[1] != self.seq_idx.numel():
            raise ValueError(
                f"{op}: {name} is {tuple(x.shape)}, but with packing it must be one row of "
                f"{self.seq_idx.numel()} tokens, [1, {self.seq_idx.numel()}, ...]"
            )

"""The definition, one token at a time: a direct sum over the taps. Slow on purpose."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator


def long_conv(u, kernel, skip, state, causal: bool, keep: int) -> tuple[Tensor, Tensor]:
    dtype, acc = u.dtype, accumulator(u.dtype)
    length, ahead = u.shape[1], look_ahead(kernel, causal)
    heard = joined(state, u)
    row, flipped = torch.nn.functional.pad(heard.to(acc), (0, 0, 0, ahead)), kernel.to(acc).flip(0)
    outs = []
    for end in range(row.shape[1] - length + 1, row.shape[1] + 1):
        window = row[:, max(end - kernel.shape[0], 0) : end]
        outs.append((window * flipped[flipped.shape[0] - window.shape[1] :]).sum(1))
    out = torch.stack(outs, dim=1)
    return (out if skip is None else out + skip.to(acc) * u.to(acc)).to(dtype), latest(heard, keep)


def look_ahead(kernel: Tensor, causal: bool) -> int:
    """How many future inputs an output hears."""
    return 0 if causal else kernel.shape[0] // 2


def joined(state: Tensor | None, u: Tensor) -> Tensor:
    """Past and new inputs in one row, `[B, P + T, D]`."""
    return u if state is None else torch.cat([state.to(u.dtype), u], dim=1)


def latest(heard: Tensor, keep: int) -> Tensor:
    """The last `keep` inputs, zeros before the first. Not a view: a cache must not keep the whole row alive."""
    short = max(keep - heard.shape[1], 0)
    return torch.nn.functional.pad(heard[:, heard.shape[1] - keep + short :], (0, 0, short, 0)).clone()

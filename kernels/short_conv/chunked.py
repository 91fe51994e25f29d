"""The same for all tokens at once, by torch's depthwise convolution.

It is called in two dimensions, as an image one pixel high with channels innermost: that layout is `[B, T, D]` itself, and
on a CPU it is several times faster than `conv1d`, which wants time innermost.

A packed row is given room before every sequence for the inputs that sequence carries over. One convolution over the
stretched row then serves all sequences, and their windows lie in it ready to be read.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.kernels.short_conv.reference import activate


def short_conv(x, weight, bias, state, activation: str | None) -> tuple[Tensor, Tensor]:
    history = weight.shape[1] - 1
    if state is None:
        state = x.new_zeros(x.shape[0], history, x.shape[2])
    x = torch.cat([state.to(x.dtype), x], dim=1)
    last = x[:, x.shape[1] - history :].clone()  # not a view: a cache must not keep the whole row alive
    return activate(convolve(x, weight, bias), activation).to(x.dtype), last


def packed(packing: Packing, x, weight, bias, state, activation: str | None) -> tuple[Tensor, Tensor]:
    """`short_conv` on a packed row; `state` holds one window per sequence."""
    history, dtype = weight.shape[1] - 1, x.dtype
    ends = packing.cu_seqlens[1:] + history * torch.arange(1, packing.count + 1, device=x.device)
    tokens = torch.arange(x.shape[1], device=x.device) + history * (packing.seq_idx + 1)
    room = torch.arange(history, device=x.device)
    starts = (ends - packing.cu_seqlens.diff()).unsqueeze(-1) + room - history  # [N, W - 1], before each sequence
    row = x.new_zeros(x.shape[1] + history * packing.count, x.shape[2]).index_put((tokens,), x[0])
    if state is not None:
        row = row.index_put((starts,), state.to(dtype))
    out = convolve(row.unsqueeze(0), weight, bias)[:, tokens - history]
    return activate(out, activation).to(dtype), row[ends.unsqueeze(-1) + room - history]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs wherever the window is full: `[B, T, D]` -> `[B, T - W + 1, D]`, in the accumulator's dtype."""
    acc = accumulator(x.dtype)
    image = x.to(acc).transpose(1, 2).unsqueeze(2)  # [B, D, 1, T] with channels innermost
    out = conv2d(image, weight.to(acc)[:, None, None], groups=weight.shape[0]).squeeze(2).transpose(1, 2)
    return out if bias is None else out + bias.to(acc)

"""The definition, one token at a time. Slow on purpose."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator


def short_conv(x, weight, bias, state, activation: str | None) -> tuple[Tensor, Tensor]:
    dtype, acc = x.dtype, accumulator(x.dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    window, weight = state.to(dtype), weight.to(acc)
    outs = []
    for t in range(x.shape[1]):
        window = torch.cat([window, x[:, t : t + 1]], dim=1)
        out = torch.einsum("bwd,dw->bd", window.to(acc), weight)
        out = out if bias is None else out + bias.to(acc)
        outs.append(activate(out, activation))
        window = window[:, 1:]
    return torch.stack(outs, dim=1).to(dtype), window


def activate(x: Tensor, activation: str | None) -> Tensor:
    return torch.nn.functional.silu(x) if activation == "silu" else x

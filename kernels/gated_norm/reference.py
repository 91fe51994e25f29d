"""The definition."""

import torch
from torch import Tensor

from zoo.kernels.checks import accumulator


def gated_norm(x, weight, gate, bias, kind: str, groups: int, activation: str, norm_before_gate: bool, eps: float) -> tuple[Tensor, None]:
    dtype, acc = x.dtype, accumulator(x.dtype)
    x = x.to(acc)
    if gate is not None and not norm_before_gate:
        x = x * activate(gate.to(acc), activation)
    x = x.unflatten(-1, (groups, -1))
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        x = x * weight.to(acc)
    if bias is not None:
        x = x + bias.to(acc)
    if gate is not None and norm_before_gate:
        x = x * activate(gate.to(acc), activation)
    return x.to(dtype), None


def activate(gate: Tensor, activation: str) -> Tensor:
    return gate * torch.sigmoid(gate) if activation == "silu" else torch.sigmoid(gate)

"""The same in torch's own fused norms, which read x once."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, silu

from zoo.kernels.checks import accumulator


def gated_norm(x, weight, gate, bias, kind: str, groups: int, activation: str, norm_before_gate: bool, eps: float) -> tuple[Tensor, None]:
    dtype, acc = x.dtype, accumulator(x.dtype)
    opening = None
    if gate is not None:
        opening = silu(gate.to(acc)) if activation == "silu" else torch.sigmoid(gate.to(acc))
    x = x.to(acc)
    if opening is not None and not norm_before_gate:
        x = x * opening
    x = x.unflatten(-1, (groups, -1))
    norm = layer_norm if kind == "layer" else rms_norm
    x = norm(x, x.shape[-1:], eps=eps).flatten(-2)
    if weight is not None:
        x = x * weight.to(acc)
    if bias is not None:
        x = x + bias.to(acc)
    if opening is not None and norm_before_gate:
        x = x * opening
    return x.to(dtype), None

"""The definition, rounded once at the end."""

from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.checks import accumulator


def linear(x, weight, bias, gate, gate_bias) -> tuple[Tensor, None]:
    wide, weight, bias, gate, gate_bias = (None if t is None else t.to(accumulator(x.dtype)) for t in (x, weight, bias, gate, gate_bias))
    y = F.linear(wide, weight, bias)
    return (y if gate is None else y * F.silu(F.linear(wide, gate, gate_bias))).to(x.dtype), None

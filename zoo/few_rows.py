"""Decode steps: linear maps of few rows by kernels that read a matrix as fast as memory gives it, and what all layers share made once.

Modules are called as ever: what an adapter or a quantised layer does with `torch.nn.functional.linear` is seen, what it does
otherwise is its own.
"""

import importlib
from collections.abc import Callable, Hashable

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zoo import ops
from zoo.kernels.linear import FEW

_entered: "list[FewRows]" = []


class FewRows(TorchFunctionMode):
    """Within it, around one step, products of at most `FEW` rows with a plain matrix run on the kernels of `ops.linear`, where these
    can run, and `once` remembers."""

    def __init__(self):
        super().__init__()
        self.made: dict[tuple, tuple] = {}

    def __enter__(self):
        _entered.append(self)
        return super().__enter__()

    def __exit__(self, *raised):
        _entered.pop()
        return super().__exit__(*raised)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.linear or not suits(*args, **kwargs):
            return func(*args, **kwargs)
        return product(*args, **kwargs)


def once(make: Callable, of: Tensor | None, *key: Hashable):
    """`make()`; within `FewRows` what it was at first for this very tensor and key."""
    if not _entered:
        return make()
    made, key = _entered[-1].made, (id(of), *key)
    if key not in made:
        made[key] = make(), of  # which keeps its id as long
    return made[key][0]


def suits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether this product is one of few rows with a plain matrix, and the kernels can run; arguments as `F.linear` has them."""
    given = [t for t in (input, weight, bias) if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != input.dtype for t in given) or not input.ndim:
        return False
    if weight.ndim != 2 or weight.stride(1) != 1:
        return False
    width = input.shape[-1]
    if not 0 < input.numel() <= FEW * width:
        return False
    tensors = dict.fromkeys(ops.OPS["linear"].names) | {"x": input.reshape(1, -1, width), "weight": weight, "bias": bias}
    return ops.OPS["linear"].resolve("auto", tensors) == "fused"


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None, *gate: Tensor | None) -> Tensor:
    """`ops.linear` of rows in any number of dimensions."""
    y = ops.linear(input.reshape(1, -1, input.shape[-1]), weight, bias, *gate, backend="fused")
    return y.view(*input.shape[:-1], -1)


def gated(x: Tensor, linear: nn.Module, gate: nn.Module) -> Tensor | None:
    """`linear(x) * silu(gate(x))` in one kernel; None: not within `FewRows`, or not of plain layers."""
    if not _entered or not (plain(linear) and plain(gate)):
        return None
    if not (suits(x, linear.weight, linear.bias) and suits(x, gate.weight, gate.bias)):
        return None
    return product(x, linear.weight, linear.bias, gate.weight, gate.bias)


def together(x: Tensor | tuple[Tensor, ...], *layers: nn.Module) -> tuple[Tensor, ...]:
    """What two to four layers make of one input, or each of its own of the same shape: within `FewRows` in one kernel, where all are
    plain, and else one by one."""
    xs = (x,) * len(layers) if isinstance(x, Tensor) else x
    pairs = list(zip(layers, xs, strict=True))
    alike = _entered and all(plain(one) and one.weight.is_contiguous() and one.in_features == layers[0].in_features for one in layers)
    if not alike or not all(suits(own, one.weight, one.bias) for one, own in pairs):
        return tuple(one(own) for one, own in pairs)
    several = importlib.import_module("zoo.kernels.linear.fused").several
    flat = [own.reshape(-1, own.shape[-1]) for own in xs]
    parts = several(flat, [one.weight for one in layers], [one.bias for one in layers])
    return tuple(part.unflatten(0, own.shape[:-1]) for part, own in zip(parts, xs, strict=True))


def plain(module: nn.Module) -> bool:
    """Whether calling it does what torch's linear layer does, and nothing else."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked

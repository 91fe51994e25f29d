"""Decode steps: arithmetic of a token put off and done in few launches, and what all layers share made once."""

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zoo.kernels.deferral import FLOATS, Deferral, is_plain
from zoo.kernels.dispatch import HAS_TRITON

DEVICE = "cuda"  # whose kernels are written
FEW = 8  # rows that one reading of a matrix is multiplied with

LIBRARIES = ("torch", "zoo", "transformers", "peft")

_local = threading.local()


class FewRows(TorchFunctionMode):
    """Within it, around one step, arithmetic and products of at most `FEW` rows with a plain matrix are put off and done together
    (`zoo.kernels.deferral`), and `once` remembers.

    Modules are called as ever, and what those of adapters do is put off too. Nothing is where `model` has modules, or methods set on
    them, that nobody knows here: these may hand memory to kernels past torch, which has not been written yet.
    """

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        self.made: dict[tuple, tuple] = {}
        self.deferral = Deferral(DEVICE) if HAS_TRITON and (model is None or known(model)) else None

    def __enter__(self):
        self.outer, _local.entered = getattr(_local, "entered", None), self
        if self.deferral is not None:
            self.deferral.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        _local.entered = self.outer
        if self.deferral is not None:
            self.deferral.__exit__(*raised)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.linear or self.deferral is None or not self.deferral.active or not suits(*args, **kwargs):
            return func(*args, **kwargs)
        return product(self.deferral, *args, **kwargs)


def known(model: nn.Module) -> bool:
    """Whether all of a model's modules, and the kinds of its tensors, are of libraries that compute by means of torch alone."""
    if not all(map(is_plain, (*model.parameters(), *model.buffers()))):
        return False
    makers = (maker for module in model.modules() for maker in (type(module), vars(module).get("forward", type(module))))
    return all(str(getattr(maker, "__module__", "")).partition(".")[0] in LIBRARIES for maker in makers)


def product(deferral: Deferral, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of rows in any number of dimensions; arguments as `F.linear` has them."""
    return deferral.product(input, weight, bias).view(*input.shape[:-1], -1)


def suits(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether this product is one of few rows with a plain matrix; arguments as `F.linear` has them."""
    given = [t for t in (input, weight, bias) if t is not None]
    if torch.is_autocast_enabled(DEVICE):  # which is about to choose another dtype
        return False
    if input.device.type != DEVICE or any(not is_plain(t) or t.dtype != input.dtype or t.device != input.device for t in given):
        return False
    few = input.ndim and 0 < input.numel() <= FEW * input.shape[-1] and input.dtype in FLOATS
    return bool(few) and weight.ndim == 2 and weight.numel() > 0 and weight.stride(1) == 1 and (bias is None or bias.stride(0) == 1)


def once(make: Callable, of: Tensor | None, *key: Hashable):
    """`make()`; within `FewRows` what it was at first for this very tensor and key."""
    entered = None if torch.compiler.is_compiling() else getattr(_local, "entered", None)
    if entered is None:
        return make()
    made, key = entered.made, (id(of), *key)
    if key not in made:
        made[key] = make(), of  # which keeps its id as long
    return made[key][0]

"""Arithmetic of few numbers, put off until somebody needs it and then done in few launches.

Within a `Deferral`, what torch computes number by number, sums along rows, and products with a matrix are not launched: results are
tensors whose memory is still to be written. Before anything else reads them or overwrites what they come from, all that is pending
is done by kernels written for it (`fused`): what waits for one another in one launch after the other, and the rest side by
side in one. What nobody can see any more is not written. Every result is rounded to its dtype, as torch would have rounded it.
"""

import importlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.kernels.deferral.plan import Node, Operand, launches, layout

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**20  # numbers of a result that is put off

_local = threading.local()


def number(x: float) -> str:
    """As kernels write it."""
    return repr(float(x)) if math.isfinite(x) else f'float("{x}")'


def comparison(sign: str) -> Callable:
    return lambda a, b: f"({a} {sign} {b})"


def clamped(x: str, low: str | None = None, high: str | None = None) -> str:
    x = x if low is None else f"tl.maximum({x}, {low})"
    return x if high is None else f"tl.minimum({x}, {high})"


def power(x: str, exponent: str) -> str | None:
    return {"2.0": f"({x} * {x})", "0.5": f"tl.sqrt({x})", "-0.5": f"tl.rsqrt({x})", "3.0": f"({x} * {x} * {x})"}.get(exponent)


def mixed(a: str, b: str, share: str) -> str:
    """From the nearer of both ends, as torch has it."""
    return f"tl.where(({share} < 0.5) & ({share} > -0.5), {a} + {share} * ({b} - {a}), {b} - ({b} - {a}) * (1.0 - {share}))"


VALUES: dict[str, Callable[..., str | None]] = {
    "add": lambda a, b, alpha="1.0": f"({a} + {b})" if alpha == "1.0" else f"({a} + {alpha} * {b})",
    "sub": lambda a, b, alpha="1.0": f"({a} - {b})" if alpha == "1.0" else f"({a} - {alpha} * {b})",
    "rsub": lambda a, b, alpha="1.0": f"({b} - {a})" if alpha == "1.0" else f"({b} - {alpha} * {a})",
    "mul": lambda a, b: f"({a} * {b})",
    "div": lambda a, b: f"({a} / {b})",
    "neg": lambda a: f"(-{a})",
    "abs": lambda a: f"tl.abs({a})",
    "exp": lambda a: f"tl.exp({a})",
    "expm1": lambda a: f"expm1({a})",
    "log": lambda a: f"tl.log({a})",
    "log1p": lambda a: f"log1p({a})",
    "sqrt": lambda a: f"tl.sqrt({a})",
    "rsqrt": lambda a: f"tl.rsqrt({a})",
    "reciprocal": lambda a: f"(1.0 / {a})",
    "sin": lambda a: f"tl.sin({a})",
    "cos": lambda a: f"tl.cos({a})",
    "pow": power,
    "sigmoid": lambda a: f"sigmoid({a})",
    "silu": lambda a: f"({a} * sigmoid({a}))",
    "tanh": lambda a: f"tanh({a})",
    "relu": lambda a: f"tl.maximum({a}, 0.0)",
    "gelu": lambda a, approximate="none": f"gelu_{approximate}({a})",
    "softplus": lambda a, beta="1.0", threshold="20.0": f"softplus({a})" if (beta, threshold) == ("1.0", "20.0") else None,
    "log_sigmoid_forward": lambda a: f"(-softplus(-{a}))",
    "maximum": lambda a, b: f"tl.maximum({a}, {b})",
    "minimum": lambda a, b: f"tl.minimum({a}, {b})",
    "clamp": clamped,
    "clamp_min": lambda a, b: f"tl.maximum({a}, {b})",
    "clamp_max": lambda a, b: f"tl.minimum({a}, {b})",
    "where": lambda c, a, b: f"tl.where({c}, {a}, {b})",
    "addcmul": lambda a, b, c, value="1.0": f"({a} + {b} * {c})" if value == "1.0" else f"({a} + {value} * {b} * {c})",
    "lerp": mixed,
    "eq": comparison("=="), "ne": comparison("!="), "lt": comparison("<"), "le": comparison("<="), "gt": comparison(">"),
    "ge": comparison(">="),
    "_to_copy": lambda a: a,
    "clone": lambda a: a,
}  # fmt: skip
REDUCTIONS = {"sum", "mean", "amax"}
IGNORED = ("memory_format", "layout", "non_blocking", "pin_memory", "device", "dtype")  # what the result's dtype and place say already
WIDEST = 8192  # a row that is summed


class Deferral(TorchDispatchMode):
    """Puts off what tensors of a kind of device are in for. device: its type."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.paused = device, False
        self._clear()

    def _clear(self) -> None:
        self.nodes: list[Node] = []
        self.writers: dict[int, list[Node]] = {}  # by storage
        self.held: Counter[int] = Counter()  # tensors of its own on each storage
        self.read: set[int] = set()

    def __enter__(self):
        self.outer, _local.current = current(), self
        return super().__enter__()

    def __exit__(self, kind, *raised):
        _local.current = self.outer
        super().__exit__(kind, *raised)
        if kind is None:
            self.flush()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.paused:
            result = self._put_off(func, args, kwargs)
            if result is not None:
                return result
            changes = func._schema.is_mutable
            if changes or not (_is_view(func) or func.overloadpacket.__name__.startswith(("empty", "new_"))):
                self.settle([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], changes)
        return func(*args, **kwargs)

    def takes(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether arithmetic with these is put off."""
        return not self.paused and all(x is None or self._suits(x) for x in tensors)

    def _suits(self, x: Tensor) -> bool:
        plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == self.device and x.layout is torch.strided
        return plain and x.dtype in (*FLOATS, torch.bool) and 0 < x.numel() <= LARGEST

    def settle(self, tensors: Iterable[Tensor | None], changes: bool = True) -> None:
        """Do what is pending if it writes these, or reads what is about to be changed."""
        keys = {_storage(t) for t in tensors if t is not None and t.device.type == self.device}
        if keys & self.writers.keys() or (changes and keys & self.read):
            self.flush()

    @contextmanager
    def pause(self, tensors: Iterable[Tensor | None]) -> Iterator[None]:
        """Within it nothing is put off, and these are what they should be."""
        self.settle(tensors)
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def flush(self) -> None:
        """Do what is pending."""
        for node in self.nodes:
            key = _storage(node.out)
            node.needed |= torch._C._storage_Use_Count(key) > self.held[key] + _spare()
        levels, before, self.paused = launches(self.nodes), self.paused, True
        if levels:
            importlib.import_module("zoo.kernels.deferral.fused").run(levels)
        self.paused = before
        self._clear()

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _put_off(self, func, args: tuple, kwargs: dict):
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func.namespace != "aten" or not tensors or not self.takes(tensors):
            return None
        if name == "copy_":
            return self._copy(*args[:2])
        if name in ("cat", "stack"):
            return self._join(func, args, kwargs)
        if name in REDUCTIONS:
            return self._reduce(func, name, args, kwargs)
        if name in VALUES and not func._schema.is_mutable:
            return self._value(func, name, args, kwargs)
        return None

    def _value(self, func, name: str, args: tuple, kwargs: dict):
        flat = tree_leaves((args, kwargs))
        operands = [x for x in flat if isinstance(x, Tensor)]
        if kwargs.get("device", operands[0].device) != operands[0].device or "rounding_mode" in kwargs:
            return None
        if any(x.dtype == torch.bool for x in (operands[1:] if name == "where" else operands)):
            return None
        places = iter(range(len(operands)))
        words = [_word(x, places) for x in args]
        text = VALUES[name](*words, **{n: _word(x, places) for n, x in kwargs.items() if n not in IGNORED})
        like = _like(func, args, kwargs)
        first = like[0] if isinstance(like, tuple) else like
        if text is None or first.dtype not in (*FLOATS, torch.bool) or not 0 < first.numel() <= LARGEST:
            return None
        out = self._add("value", operands, first.shape, first.dtype, text)
        return (out, out.new_empty(0)) if isinstance(like, tuple) else out

    def _reduce(self, func, name: str, args: tuple, kwargs: dict):
        x, dims = args[0], args[1] if len(args) > 1 else None
        if dims not in ([-1], [x.ndim - 1]) or x.dtype == torch.bool or x.shape[-1] > WIDEST:
            return None
        like = _like(func, args, kwargs)
        return self._add(name, [x], like.shape, like.dtype, width=x.shape[-1]) if like.dtype in FLOATS else None

    def _join(self, func, args: tuple, kwargs: dict):
        like = _like(func, args, kwargs)
        parts, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % like.ndim
        if like.dtype not in FLOATS or any(part.dtype != like.dtype or part.ndim != args[0][0].ndim for part in parts):
            return None
        out = torch.empty(like.shape, dtype=like.dtype, device=parts[0].device)
        if func.overloadpacket.__name__ == "stack":
            parts = [part.unsqueeze(dim) for part in parts]
        for part, own in zip(parts, out.split([part.shape[dim] for part in parts], dim), strict=True):
            self._add("value", [part], own.shape, own.dtype, "{0}", into=own)
        return out

    def _copy(self, old: Tensor, new: Tensor):
        if old.dtype == torch.bool or new.dtype == torch.bool or any(s == 0 < n - 1 for n, s in zip(old.shape, old.stride(), strict=True)):
            return None
        self.settle([old])
        self._add("value", [new], old.shape, old.dtype, "{0}", into=old)
        self.nodes[-1].needed = True
        return old

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear map of the rows of x, all of one dtype."""
        self.settle([weight, bias])
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(-1) == 1 else x.contiguous()
        return self._add("product", [x], (len(x), len(weight)), x.dtype, width=x.shape[-1], weight=weight, bias=bias)

    def _add(
        self, kind: str, tensors: list[Tensor], shape, dtype: torch.dtype, text: str = "", into: Tensor | None = None, **rest
    ) -> Tensor:
        """A node, and the result that it is to write."""
        out = torch.empty(shape, dtype=dtype, device=tensors[0].device) if into is None else into
        operands = [Operand(self._hold(x), layout(x, shape if kind == "value" else x.shape), self._writers(x)) for x in tensors]
        for x in (*tensors, *(t for t in (rest.get("weight"), rest.get("bias")) if t is not None)):
            self.read.add(_storage(x))
        self.nodes.append(Node(kind, operands, self._hold(out), text, **rest))
        self.writers.setdefault(_storage(out), []).append(self.nodes[-1])
        return out

    def _writers(self, x: Tensor) -> list[Node]:
        return list(self.writers.get(_storage(x), ()))

    def _hold(self, x: Tensor) -> Tensor:
        """Another tensor on the same memory, so that those that others hold can be told from our own."""
        self.held[_storage(x)] += 1
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def current() -> Deferral | None:
    """The one within which this thread computes."""
    return getattr(_local, "current", None)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@cache
def _spare() -> int:
    """Uses of a storage that are no tensors, but what Python keeps of it."""
    probe = torch.empty(1)
    return torch._C._storage_Use_Count(_storage(probe)) - 1


def _is_view(func) -> bool:
    return func.overloadpacket.__name__ == "_unsafe_view" or any(one.alias_info is not None for one in func._schema.returns)


def _word(x, places):
    """An argument as a part of an expression."""
    if isinstance(x, Tensor):
        return f"{{{next(places)}}}"
    return number(x) if isinstance(x, int | float) else x


def _like(func, args: tuple, kwargs: dict):
    """What the operation returns, without its numbers."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, empty, (args, {name: x for name, x in kwargs.items() if name != "device"}))
    return func(*args, **kwargs)

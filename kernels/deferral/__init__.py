"""Arithmetic of few numbers, put off until somebody needs it and then done in few launches.

Within a `Deferral`, what torch computes number by number (`operations`), sums along rows, and products with a matrix are not launched:
results are tensors whose memory is still to be written. Before anything else reads them or overwrites what they come from, all that
is pending is planned (`plan`), written as kernels (`fused`) and launched. What waits for one another's sums is one launch after the
other, the rest is side by side in one; what nobody can see any more is not written. Of a channel mixer in its block,

    n = x * (x * x).mean(-1, keepdim=True).add(eps).rsqrt() * weight    # made by every program of the two products that read it
    h = silu(linear(n, gate)) * linear(n, up)                           # launch 1: both products, and what follows them
    y = x + linear(h, down)                                             # launch 2: a sum over h, which others had to write

comes y by two launches, of which the first writes h alone. Results are rounded to their dtype, as torch would have rounded each.

Whoever asks torch for a result, in the same thread and on the same stream, finds it written, also after something failed. What is not
plain (gradients, tensors of another class, layout or device) is torch's, at once. Only who looks into memory past torch is not seen.
"""

import importlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.kernels.deferral.addresses import layout
from zoo.kernels.deferral.operations import REDUCTIONS, VALUES, expression
from zoo.kernels.deferral.plan import Node, Operand, launches

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**20  # numbers of a result that is put off
WIDEST = 8192  # a row that is summed

_local = threading.local()


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
        if self.outer is not None:
            self.outer.flush()
        return super().__enter__()

    def __exit__(self, *raised):
        _local.current = self.outer
        super().__exit__(*raised)
        self.flush()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_composite(func):
            return self._decompose(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = self._put_off(func, args, kwargs) if tensors and self.takes(tensors) else None
        if result is not None:
            return result
        changes = func._schema.is_mutable
        if changes or not (_is_view(func) or func.overloadpacket.__name__.startswith(("empty", "new_"))):
            self.settle(tensors, changes)
        return func(*args, **kwargs)

    def _decompose(self, func, args: tuple, kwargs: dict):
        """An operation made of others, which comes whole in inference mode only: each of them as if called."""
        super().__enter__()
        try:
            return func.decompose(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    # -- when ----------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether anything is put off here and now: in the innermost one of this thread, while nobody records gradients."""
        return not self.paused and current() is self and not torch.is_grad_enabled()

    def takes(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether arithmetic with these is put off."""
        given = [x for x in tensors if x is not None]
        return self.active and all(map(self._suits, given)) and len({x.device for x in given}) == 1

    def _suits(self, x: Tensor) -> bool:
        return is_plain(x) and x.device.type == self.device and x.dtype in (*FLOATS, torch.bool) and 0 < x.numel() <= LARGEST

    def settle(self, tensors: Iterable[Tensor | None], changes: bool = True) -> None:
        """Do what is pending if it writes these, or reads what is about to be changed, or if nobody knows what these are made of."""
        if not self.nodes:
            return
        given = [t for t in tensors if t is not None]
        keys = {_storage(t) for t in given if is_plain(t)}
        if not all(map(is_plain, given)) or keys & self.writers.keys() or (changes and keys & self.read):
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
        nodes, held = self.nodes, self.held
        self._clear()
        for node in nodes:
            key = _storage(node.out)
            node.needed |= torch._C._storage_Use_Count(key) > held[key] + _spare()
        levels = launches(nodes)
        if levels:
            with self.pause(()):
                importlib.import_module("zoo.kernels.deferral.fused").run(levels)

    # -- what ----------------------------------------------------------------------------------------------------------

    def _put_off(self, func, args: tuple, kwargs: dict):
        name = func.overloadpacket.__name__
        if func.namespace != "aten":
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
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if kwargs.get("device", operands[0].device) != operands[0].device or "rounding_mode" in kwargs:
            return None
        if any(x.dtype == torch.bool for x in (operands[1:] if name == "where" else operands)):
            return None
        text, like = expression(name, args, kwargs), _like(func, args, kwargs)
        first = like[0] if isinstance(like, tuple) else like
        if text is None or first.dtype not in (*FLOATS, torch.bool) or not 0 < first.numel() <= LARGEST:
            return None
        out = self._add("value", operands, _empty(first, operands[0]), text)
        return (out, out.new_empty(0)) if isinstance(like, tuple) else out

    def _reduce(self, func, name: str, args: tuple, kwargs: dict):
        x, dims = args[0], args[1] if len(args) > 1 else None
        if dims not in ([-1], [x.ndim - 1]) or x.dtype == torch.bool or x.shape[-1] > WIDEST:
            return None
        like = _like(func, args, kwargs)
        return self._add(name, [x], _empty(like, x), width=x.shape[-1]) if like.dtype in FLOATS else None

    def _join(self, func, args: tuple, kwargs: dict):
        like = _like(func, args, kwargs)
        parts, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % like.ndim
        if like.dtype not in FLOATS or any(part.dtype != like.dtype or part.ndim != args[0][0].ndim for part in parts):
            return None
        out = _empty(like, parts[0])
        if func.overloadpacket.__name__ == "stack":
            parts = [part.unsqueeze(dim) for part in parts]
        for part, own in zip(parts, out.split([part.shape[dim] for part in parts], dim), strict=True):
            self._add("value", [part], own, "{0}")
        return out

    def _copy(self, old: Tensor, new: Tensor):
        if old.dtype == torch.bool or new.dtype == torch.bool or any(s == 0 < n - 1 for n, s in zip(old.shape, old.stride(), strict=True)):
            return None
        if _storage(old) == _storage(new):
            return None
        self.settle([old])
        self._add("value", [new], old, "{0}")
        self.nodes[-1].needed = True
        return old

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear map of the rows of x, all of one dtype."""
        self.settle([weight, bias])
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(-1) == 1 else x.contiguous()
        return self._add("product", [x], x.new_empty(len(x), len(weight)), width=x.shape[-1], weight=weight, bias=bias)

    def _add(self, kind: str, tensors: list[Tensor], out: Tensor, text: str = "", **rest) -> Tensor:
        """A node that writes `out`."""
        if self.nodes and self.nodes[0].out.device != out.device:
            self.flush()
        operands = [self._operand(x, out.shape if kind == "value" else x.shape) for x in tensors]
        self.read.update(_storage(x) for x in (*tensors, rest.get("weight"), rest.get("bias")) if x is not None)
        self.nodes.append(Node(kind, operands, self._hold(out), text, **rest))
        self.writers.setdefault(_storage(out), []).append(self.nodes[-1])
        return out

    def _operand(self, x: Tensor, shape: torch.Size) -> Operand:
        return Operand(self._hold(x), layout(x, shape), list(self.writers.get(_storage(x), ())))

    def _hold(self, x: Tensor) -> Tensor:
        """Another tensor on the same memory, so that those that others hold can be told from our own."""
        self.held[_storage(x)] += 1
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def current() -> Deferral | None:
    """The one within which this thread computes."""
    return getattr(_local, "current", None)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is nothing but numbers at strides in a memory of its own kind."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@cache
def _spare() -> int:
    """Uses of a storage that are no tensors, but what Python keeps of it."""
    probe = torch.empty(1)
    return torch._C._storage_Use_Count(_storage(probe)) - 1


@cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _is_view(func) -> bool:
    return func.overloadpacket.__name__ == "_unsafe_view" or any(one.alias_info is not None for one in func._schema.returns)


def _like(func, args: tuple, kwargs: dict):
    """What the operation returns, without its numbers."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    args, kwargs = tree_map_only(Tensor, empty, (args, {name: x for name, x in kwargs.items() if name != "device"}))
    return func(*args, **kwargs)


def _empty(like: Tensor, beside: Tensor) -> Tensor:
    """As torch lays it out."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=beside.device)

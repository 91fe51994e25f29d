"""What is timed: an operator on inputs of a size at which it is used, and what other libraries offer for the same mathematics."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.evaluate.bench import families
from zoo.ops import OPS

ANYWHERE = ("torch.", "transformers.")  # words in the names of peers that need no GPU
SMALL = {"B": 2, "T": 256}  # sizes at which results are checked; the others, by which kernels are chosen, are those of the case


class Draw:
    """Random inputs on a device, the same for everyone who asks with the same seed."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0):
        self.generator, self.device, self.dtype = torch.Generator(device).manual_seed(seed), device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length one."""
        return F.normalize(self.normal(*shape, dtype=torch.float32), dim=-1).to(self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def forget(self, *shape: int, temperature: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Log-decays `logsigmoid(x) / temperature` of normal x."""
        return (F.logsigmoid(self.normal(*shape, dtype=torch.float32)) / temperature).to(dtype or self.dtype)


@dataclass(frozen=True)
class Peer:
    """A function of another library.

    Args:
        name: `package.function`.
        load: () -> the function of what `arrange` returns; ImportError where the package is missing.
        arrange: inputs by name -> its arguments. It is differentiable and not timed: layouts are each one's own affair.
        definition: inputs by name -> what it computes, where that is something else than the operator does: then it is an anchor,
            timed beside the others but not raced against.
        cuda: whether it needs a GPU although its package does not.
    """

    name: str
    load: Callable[[], Callable[..., Tensor]]
    arrange: Callable[..., tuple]
    definition: Callable[..., Tensor] | None = None
    cuda: bool = False

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.name.split(".")[0]) is not None and (torch.cuda.is_available() or not self.cuda)


@dataclass(frozen=True)
class Case:
    """An operator on inputs of one kind and size.

    Args:
        op: its name in `zoo.ops.OPS`, or that of what `apply` computes.
        name: of the kind of inputs.
        sizes: letter -> size.
        draw: `(draw, **sizes)` -> inputs by name, tensors all.
        peers: who else computes it.
        apply: `(backend, **inputs)` -> output; by default the first result of the operator's public function.
        fixed: inputs that are constants of the model, without a gradient.
        small: sizes at which it is checked.
        host: whether the time that the host spends on a call is of interest, as with problems too small to fill a GPU.
    """

    op: str
    name: str
    sizes: dict[str, int]
    draw: Callable[..., dict[str, Tensor]]
    peers: tuple[Peer, ...] = ()
    apply: Callable[..., Tensor] | None = None
    fixed: tuple[str, ...] = ()
    small: dict[str, int] = field(default_factory=lambda: SMALL)
    host: bool = False

    @property
    def label(self) -> str:
        return f"{self.op}, {self.name}, {' '.join(f'{letter}{size}' for letter, size in self.sizes.items())}"

    def call(self, backend: str, **inputs: Tensor) -> Tensor:
        """The output of our operator."""
        if self.apply is not None:
            return self.apply(backend, **inputs)
        out = OPS[self.op].call(**inputs, backend=backend)
        return out if isinstance(out, Tensor) else out[0]

    def inputs(self, device: str, dtype: torch.dtype, *, small: bool = False) -> dict[str, Tensor]:
        sizes = self.sizes | {letter: min(size, self.sizes[letter]) for letter, size in self.small.items() if small}
        drawn = self.draw(Draw(device, dtype), **sizes)
        return {name: x.requires_grad_(name not in self.fixed) for name, x in drawn.items()}

    def resized(self, sizes: dict[str, int]) -> "Case":
        """With other sizes for those of its letters that are named."""
        return replace(self, sizes={letter: sizes.get(letter, size) for letter, size in self.sizes.items()})


def peer(name: str, arrange: Callable[..., tuple], back: Callable[[Tensor], Tensor] | None = None, **options) -> Peer:
    """The function `package.module.function` of what `arrange` returns and of these options; `back` brings its output into our layout."""
    return Peer(f"{name.partition('.')[0]}.{name.rpartition('.')[2]}", partial(_load, name, back, options), arrange)


def fla(function: str, arrange: Callable[..., tuple], **options) -> Peer:
    """An operator of flash-linear-attention, whose tensors lie as ours do."""
    return peer(f"fla.ops.{function}", arrange, **options)


def _load(name: str, back: Callable[[Tensor], Tensor] | None, options: dict) -> Callable[..., Tensor]:
    module, _, function = name.rpartition(".")
    run = getattr(importlib.import_module(module), function)

    def call(*tensors: Tensor) -> Tensor:
        out = run(*tensors, **options)
        out = out[0] if isinstance(out, tuple) else out
        return out if back is None else back(out)

    return call


def lift_guard() -> None:
    """Let flash-linear-attention run the backward passes that it refuses on Hopper with Triton 3.4 to 3.7.0, where they are wrong."""
    importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, T, H, ...]` -> a copy `[B, H, T, ...]`."""
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def heads_last(x: Tensor) -> Tensor:
    """`[B, H, T, ...]` -> a view `[B, T, H, ...]`."""
    return x.transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **others: Tensor) -> Tensor:
    """Softmax attention over everything, or over what came before, `[B, T, H, .]`, by its definition."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def sdpa(causal: bool) -> Peer:
    """torch's attention to all pairs: beside other operators it shows what those cost."""
    name = "torch.nn.functional.scaled_dot_product_attention"
    whole = peer(name, lambda q, k, v, **others: heads_first(q, k, v), heads_last, is_causal=causal)
    return replace(whole, definition=partial(softmax_attention, causal=causal))


SDPA = sdpa(causal=True)


def all_cases() -> list[Case]:
    """Of every file in `families`."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return [case for name in names for case in importlib.import_module(f"{families.__name__}.{name}").CASES]


def chosen(patterns: list[str], sizes: dict[str, int] | None = None) -> list[Case]:
    """The cases whose label contains one of the patterns (all without any), in these sizes and each once.

    Raises:
        ValueError: a pattern or a letter that fits none.
    """
    cases = all_cases()
    for pattern in patterns:
        if not any(pattern in case.label for case in cases):
            kinds = ", ".join(dict.fromkeys(f"{case.op}, {case.name}" for case in cases))
            raise ValueError(f"no case is called {pattern!r}; there are: {kinds}")
    if unknown := set(sizes or ()) - {letter for case in cases for letter in case.sizes}:
        raise ValueError(f"no case has a size {min(unknown)!r}; write it as --sizes B=1 T=64")
    picked = [case for case in cases if not patterns or any(pattern in case.label for pattern in patterns)]
    return list({(resized := case.resized(sizes or {})).label: resized for case in picked}.values())


def read_sizes(texts: list[str]) -> dict[str, int]:
    """`["B=1", "T=64"]` -> `{"B": 1, "T": 64}`."""
    sizes = {}
    for text in texts:
        letter, _, size = text.partition("=")
        if not size.isdigit() or not int(size):
            raise ValueError(f"{text!r} is no size; write a letter and a number, as in T=64")
        sizes[letter] = int(size)
    return sizes

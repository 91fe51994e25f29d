"""How an operator finds its backend, and how the compiler sees it.

An operator has up to three backends: `reference` (the definition, a loop over time), `chunked` (parallel, plain torch) and
`fused` (Triton). `Op` owns everything they have in common: the choice among them, packed rows, and the `torch.library`
custom op through which `torch.compile` sees one node instead of a loop.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from zoo.kernels import deferral
from zoo.kernels.packing import Packing

Backend = Literal["auto", "reference", "chunked", "fused"]
BACKENDS = ("auto", "reference", "chunked", "fused")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
OPS: dict[str, "Op"] = {}
_preferred: str = "auto"
_in_place = False


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the context every operator called with `backend="auto"` runs on `backend` instead."""
    global _preferred
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    previous, _preferred = _preferred, backend
    try:
        yield
    finally:
        _preferred = previous


@contextmanager
def states_in_place() -> Iterator[None]:
    """Within the context a fused step of a single token may write the new state where the old one was, and then returns that tensor."""
    global _in_place
    previous, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = previous


@dataclass
class Op:
    """One operator: its backends, its arguments and how to draw inputs for it.

    A backend is a function `(**tensors, **options) -> (out, state)` on rows `[B, T, ...]` without packing. An operator that
    carries nothing returns something else of its own per token (attention: the log-sum-exp), or None, in the place of the state.

    Args:
        name: of the public function and of the custom op `zoo::<name>`.
        reference, chunked: the backends.
        tensors: argument names in order; a trailing `?` marks one that may be None. A recurrence calls its state `state`.
        options: names of the other arguments with their schema types, e.g. `{"scale": "float"}`.
        along_time: names of the tensors that are cut up when a row is packed (those of them with 3 dimensions or more,
            and integers and booleans with 2).
        meta: `(tensors, options, sequences) -> (out, state)` empty tensors of the right shapes and dtypes; None is as above.
        pad_values: what stands behind a sequence's end where 0 is not neutral, by argument name.
        packed: `chunked` on a packed row as it lies, `(packing, **tensors, **options)`; without it the row is padded.
        fused: the module with the Triton kernels, imported when they are first used; its function of the operator's name takes
            `(**tensors, **options, packing=packing)`.
        step: the module with the Triton kernel for a single token, of which nobody wants a gradient; its function of the operator's
            name takes `(**tensors, **options, into=state or None)`, real tensors only, and has no obstacle.
        defers: whether the definition of a single token is arithmetic that a `Deferral` puts off.
        complex_kernels: whether the fused kernels take complex tensors too.
        obstacle: `(tensors)` -> why the fused kernels do not take these, or None; float64 and CPUs need not be named.
        opaque: `torch.compile` sees one node (for loops over time); False lets it trace plain torch code and fuse it, for which
            `auto` takes the chunked backend.
        cases: name -> `(generator, batch, length, dtype) -> keyword arguments`; tests and benchmarks draw from these.
        call: the public function.
    """

    name: str
    reference: Callable
    chunked: Callable
    tensors: tuple[str, ...]
    options: dict[str, str]
    along_time: tuple[str, ...]
    meta: Callable
    pad_values: dict[str, float] = field(default_factory=dict)
    packed: Callable | None = None
    fused: str = ""
    step: str = ""
    defers: bool = False
    complex_kernels: bool = False
    obstacle: Callable[[dict[str, Tensor | None]], str | None] = lambda tensors: None
    opaque: bool = True
    cases: dict[str, Callable] = field(default_factory=dict)
    call: Callable | None = None

    def __post_init__(self):
        if self.name in OPS:
            raise ValueError(f"operator {self.name!r} is registered twice")
        OPS[self.name] = self
        self.names = tuple(t.rstrip("?") for t in self.tensors)
        self.recurrent = "state" in self.names  # otherwise the second result, if any, is per token
        self.custom_op = self._define()

    # -- choosing -----------------------------------------------------------------------------------------------------

    def fused_obstacle(self, tensors: dict[str, Tensor | None]) -> str | None:
        """Why `fused` cannot run on these tensors, or None."""
        if not self.fused:
            return "this version has no fused kernel for it"
        return self._unfit(tensors[self.names[0]]) or self.obstacle(tensors)

    def _unfit(self, lead: Tensor) -> str | None:
        """Why no Triton kernel can run on such tensors, or None."""
        if not HAS_TRITON:
            return "Triton is not installed"
        if lead.device.type != "cuda" and not interpreted():
            return f"the tensors are on {lead.device.type}, and Triton needs a CUDA device (or TRITON_INTERPRET=1 to try it slowly)"
        if lead.dtype not in KERNEL_DTYPES and not (self.complex_kernels and lead.dtype == torch.complex64):
            return f"Triton kernels take float32, bfloat16 and float16, not {lead.dtype}"
        return None

    def steps(self, tensors: dict[str, Tensor | None], packing: Packing | None) -> bool:
        """Whether `step` can run on these tensors: a single token of which nobody wants a gradient, real numbers all."""
        lead = tensors[self.names[0]]
        if not self.step or packing is not None or lead.shape[1] > 1 or self._unfit(lead):
            return False
        learning = torch.is_grad_enabled()
        return not any(t.is_complex() or (learning and t.requires_grad) for t in tensors.values() if t is not None)

    def resolve(self, backend: Backend, tensors: dict[str, Tensor | None], packing: Packing | None = None) -> str:
        """The backend that will run. One asked for by name is never replaced."""
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        backend = _preferred if backend == "auto" else backend
        obstacle = None if self.steps(tensors, packing) else self.fused_obstacle(tensors)
        if backend == "auto":
            lead = tensors[self.names[0]]
            slow = obstacle or lead.device.type == "cpu"  # where Triton would be interpreted
            slow = slow or (not self.opaque and torch.compiler.is_compiling())
            return "fused" if not slow else "reference" if lead.shape[1] == 1 and self.recurrent else "chunked"
        if backend == "fused" and obstacle:
            raise BackendError(f"{self.name}: fused cannot run: {obstacle}. Use backend='auto' or 'chunked'.")
        return backend

    def __call__(self, tensors: dict[str, Tensor | None], options: dict, packing: Packing | None, backend: Backend):
        """Run on the chosen backend; `tensors` and `options` are complete and checked by the caller."""
        lead = tensors[self.names[0]]
        if packing is not None:
            packing.check(self.name, self.names[0], lead)
        if torch.compiler.is_compiling() or (pending := deferral.current()) is None:
            return self._run(tensors, options, packing, backend)
        if self.defers and backend == _preferred == "auto" and pending.takes(tensors.values()):
            return self.reference(**tensors, **options)
        with pending.pause(tensors.values()):
            return self._run(tensors, options, packing, backend)

    def _run(self, tensors: dict[str, Tensor | None], options: dict, packing: Packing | None, backend: Backend):
        """On the chosen backend, as one node of what is compiled, or where states are."""
        backend = self.resolve(backend, tensors, packing)
        if (self.opaque or backend == "fused") and torch.compiler.is_compiling() and backend != "reference":
            cu_seqlens = None if packing is None else packing.cu_seqlens
            out, state = self.custom_op(*(tensors[n] for n in self.names), cu_seqlens, *options.values(), backend)
            return out, None if state.ndim == 1 else state  # as `_present` makes an absent one
        if _in_place and backend == "fused" and self.steps(tensors, packing):
            return self._step(tensors, options, tensors.get("state"))
        return self.execute(tensors, options, packing, backend)

    # -- running ------------------------------------------------------------------------------------------------------

    def execute(self, tensors: dict[str, Tensor | None], options: dict, packing: Packing | None, backend: str):
        """Run one backend, laying a packed row out as that backend wants it."""
        if backend == "fused" and self.steps(tensors, packing):
            return self._step(tensors, options, None)
        if backend == "fused":
            return getattr(importlib.import_module(self.fused), self.name)(**tensors, **options, packing=packing)
        run = getattr(self, backend)
        if packing is None:
            return run(**tensors, **options)
        if backend == "reference":
            return self._one_by_one(run, tensors, options, packing)
        if backend == "chunked" and self.packed is not None:
            return self.packed(packing, **tensors, **options)
        padded = {n: packing.pad(t, self.pad_values.get(n, 0.0)) if self._cut(n, t) else t for n, t in tensors.items()}
        out, state = run(**padded, **options)
        if not self.recurrent and state is not None:
            state = packing.unpad(state)
        return packing.unpad(out), state

    def _step(self, tensors: dict[str, Tensor | None], options: dict, into: Tensor | None):
        """A single token by its own kernel, which writes the new state to `into` if it can."""
        into = into if into is not None and into.is_contiguous() else None
        return getattr(importlib.import_module(self.step), self.name)(**tensors, **options, into=into)

    def _cut(self, name: str, tensor: Tensor | None) -> bool:
        return tensor is not None and name in self.along_time and tensor.ndim >= (3 if _differentiable(tensor) else 2)

    def _one_by_one(self, run: Callable, tensors: dict, options: dict, packing: Packing):
        """Sequence after sequence: what packing means. An empty sequence hands its state on."""
        outs, states = [], []
        blank = self.meta(tensors, options, 1)
        for n, piece in packing.split():
            own = {name: t[:, piece] if self._cut(name, t) else t for name, t in tensors.items()}
            if self.recurrent:
                own["state"] = None if tensors["state"] is None else tensors["state"][n : n + 1]
            if piece.start == piece.stop:
                if self.recurrent:
                    states.append(torch.zeros_like(blank[1]) if own["state"] is None else own["state"].to(blank[1].dtype))
                continue
            out, state = run(**own, **options)
            outs.append(out)
            states.append(state)
        return torch.cat(outs, dim=1), None if states[0] is None else torch.cat(states, dim=0 if self.recurrent else 1)

    # -- compiling ----------------------------------------------------------------------------------------------------

    def _unpack(self, args: tuple):
        """Arguments of the custom op -> tensors, options, packing, backend."""
        count = len(self.names)
        tensors, cu_seqlens = dict(zip(self.names, args[:count], strict=True)), args[count]
        options = dict(zip(self.options, args[count + 1 : -1], strict=True))
        return tensors, options, None if cu_seqlens is None else Packing(cu_seqlens), args[-1]

    def _define(self):
        """`zoo::<name>`, with its fake and its gradient."""
        inputs = [f"Tensor{'?' if t.endswith('?') else ''} {t.rstrip('?')}" for t in self.tensors]
        inputs += ["Tensor? cu_seqlens", *(f"{kind} {name}" for name, kind in self.options.items()), "str backend"]
        arguments = ", ".join(inputs)

        @torch.library.custom_op(f"zoo::{self.name}", mutates_args=(), schema=f"({arguments}) -> (Tensor, Tensor)")
        def forward(*args):
            tensors, options, packing, backend = self._unpack(args)
            out, state = self.execute(tensors, options, packing, backend)
            return _present(out, state)

        @torch.library.custom_op(
            f"zoo::{self.name}_backward",
            mutates_args=(),
            schema=f"(Tensor grad_out, Tensor grad_state, {arguments}) -> Tensor[]",
        )
        def backward(grad_out, grad_state, *args):
            tensors, options, packing, backend = self._unpack(args)
            # the body of a custom op runs below autograd; this one differentiates by recomputing, so it lifts itself back
            autograd = torch._C.DispatchKey.AutogradFunctionality
            with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(autograd, False):
                leaves = {n: t.detach().requires_grad_() if _differentiable(t) else t for n, t in tensors.items()}
                outs = self.execute(leaves, options, packing, backend)
                inputs = [t for t in leaves.values() if _differentiable(t)]
                outs = [(out, grad) for out, grad in zip(outs, (grad_out, grad_state), strict=True) if out is not None]
                outs, cotangents = zip(*outs, strict=True)
                grads = torch.autograd.grad(outs, inputs, cotangents, allow_unused=True, materialize_grads=True)
            return [_own(g) for g in grads]

        @forward.register_fake
        def _(*args):
            tensors, options, packing, _ = self._unpack(args)
            return _present(*self.meta(tensors, options, tensors[self.names[0]].shape[0] if packing is None else packing.count))

        @backward.register_fake
        def _(grad_out, grad_state, *args):
            return [_own(torch.empty_like(t)) for t in self._unpack(args)[0].values() if _differentiable(t)]

        def save(ctx, inputs, output):
            count = len(self.names) + 1
            ctx.save_for_backward(*inputs[:count])
            ctx.rest = inputs[count:]

        def gradient(ctx, grad_out, grad_state):
            saved = ctx.saved_tensors
            grads = iter(backward(grad_out, grad_state, *saved, *ctx.rest))
            return (*(next(grads) if _differentiable(t) else None for t in saved[:-1]), *[None] * (len(ctx.rest) + 1))

        forward.register_autograd(gradient, setup_context=save)
        return forward


def kept(out: Tensor, new: Tensor, state: Tensor) -> Tensor:
    """The one output of a step whose new state belongs where the old one was."""
    if new is not state:
        state.copy_(new)
    return out.squeeze(1)


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _differentiable(x: Tensor | None) -> bool:
    return x is not None and (x.is_floating_point() or x.is_complex())


def _present(out: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """A custom op returns tensors: an absent state is an empty one."""
    return _own(out), out.new_empty(0) if state is None else _own(state)


def _own(x: Tensor) -> Tensor:
    """A contiguous tensor of its own: a custom op may return neither an input nor a view."""
    return x.clone(memory_format=torch.contiguous_format)

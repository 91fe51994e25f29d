"""Scans: states that forget and are added to channel by channel.

`scan` serves HGRN, RG-LRU, minGRU, RWKV-4, S4D, S5 and LRU; `selective_scan` reads N states a channel out, as Mamba does.
"""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, float_dtype
from zoo.kernels.dispatch import Backend, Op, kept
from zoo.kernels.packing import Packing
from zoo.kernels.scan import chunked, reference
from zoo.kernels.scan.reference import carried_dtype
from zoo.kernels.scan.selective import selective_flops, selective_scan, selective_step, selective_summarize

__all__ = ["flops", "scan", "selective_flops", "selective_scan", "selective_step", "selective_summarize", "step", "summarize"]
NAME = "scan"


def scan(
    x: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    packing: Packing | None = None,
    reverse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """All states and the last one of a first-order linear recurrence, channel by channel.

        h_t = exp(log_decay_t) h_{t-1} + x_t
        h_t = exp(log_decay_t) h_{t+1} + x_t        if reverse

    Args:
        x: `[B, T, D]`, floating or complex.
        log_decay: natural logarithm of the decay, `[D]` or `[B, T, D]`, any floating or complex dtype; its real part is
            never positive. 0 keeps all, below -104 forgets all.
        state: h_0, `[B, D]`, float32 (float64 with double inputs), complex64 (complex128) if x or log_decay is complex.
            Default zeros. With packing the first dimension is the number of sequences.
        packing: sequences laid end to end in one row (B = 1); the state starts anew at each.
        reverse: run from the last token to the first; `state` then enters at the right end.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        h `[B, T, D]` in the dtype of x, or complex as the state is, and the state the scan ends with: h_T, or h_1 if
        reverse. Both are differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `2 B T D` FLOP for the recurrence itself (8 if complex); `chunked` reads x and log_decay twice.

    Source: LRU arXiv:2303.06349, S5 arXiv:2208.04933, RG-LRU arXiv:2402.19427, HGRN arXiv:2311.04823; the parallel form is
    that of Martin and Cundy, arXiv:1709.04057.
    """
    float_dtype(NAME, x=x)
    float_dtype(NAME, log_decay=log_decay)
    shapes = Shapes(NAME)
    shapes("x", x, "B T D")
    shapes.not_empty("B", "T", "D")
    shapes("log_decay", log_decay, "D", "B T D")
    shapes.sizes["N"] = shapes["B"] if packing is None else packing.count
    shapes("state", state, "N D", dtype=carried_dtype(x.dtype, x, log_decay))
    if packing is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(x.shape)  # per token, so that padding does not decay
    return OP({"x": x, "log_decay": log_decay, "state": state}, {"reverse": bool(reverse)}, packing, backend)


def step(x: Tensor, log_decay: Tensor, *, state: Tensor) -> Tensor:
    """One token, x `[B, D]`, log_decay `[D]` or `[B, D]` -> h `[B, D]`; `state` `[B, D]` is updated in place (no gradient)."""
    token = log_decay if log_decay.ndim == 1 else log_decay.unsqueeze(1)
    with torch.no_grad():
        out, new = scan(x.unsqueeze(1), token, state=state)
    return kept(out, new, state)


def summarize(x: Tensor, log_decay: Tensor, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """A segment as a map of states: `S_T = A * S_0 + S`.

    Args: x, log_decay and reverse as in `scan`.
    Returns: A `[B, D]`, the decay over the segment, and S `[B, D]`. Segments combine associatively:
    `(A2, S2) after (A1, S1) = (A2 * A1, A2 * S1 + S2)`; in a reverse scan the right segment comes first.
    """
    _, state = scan(x, log_decay, reverse=reverse)
    exact = log_decay.to(torch.complex128 if log_decay.is_complex() else torch.float64)
    return exact.expand(x.shape).sum(1).exp().to(state.dtype), state


def flops(length: int, width: int, *, complex_valued: bool = False) -> int:
    """Floating-point operations of the recurrence over one sequence."""
    return (8 if complex_valued else 2) * length * width


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor]:
    x = tensors["x"]
    acc = carried_dtype(x.dtype, x, tensors["log_decay"])
    return x.new_empty(x.shape, dtype=acc if acc.is_complex else x.dtype), x.new_empty(sequences, x.shape[2], dtype=acc)


def _case(*, per_token: bool = True, complex_x: bool = False, complex_decay: bool = False, reverse: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape, imaginary: bool = False, of: torch.dtype = dtype):
            values = torch.randn(*shape, generator=generator, dtype=torch.complex128 if imaginary else torch.float64)
            return values.to(carried_dtype(of, values) if imaginary else of)

        width = 6
        shape = (batch, length, width) if per_token else (width,)
        log_decay = -normal(*shape).abs()
        if complex_decay:
            log_decay = log_decay + 1j * normal(*shape, imaginary=True).real
        state = normal(batch, width, imaginary=complex_x or complex_decay, of=torch.float64)
        return {"x": normal(batch, length, width, imaginary=complex_x), "log_decay": log_decay, "reverse": reverse, "state": state}

    return draw


OP = Op(
    NAME,
    reference=reference.scan,
    chunked=chunked.scan,
    tensors=("x", "log_decay", "state?"),
    options={"reverse": "bool"},
    along_time=("x", "log_decay"),
    meta=_meta,
    fused="zoo.kernels.scan.fused",
    defers=True,
    complex_kernels=True,
    cases={
        "token": _case(),
        "channel": _case(per_token=False),
        "reverse": _case(reverse=True),
        "complex-channel": _case(per_token=False, complex_decay=True),
        "complex-token": _case(complex_x=True, complex_decay=True),
        "complex-reverse": _case(complex_x=True, reverse=True),
    },
    call=scan,
)

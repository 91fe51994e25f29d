"""Long convolution: every channel hears its whole past through a filter as long as the sequence.

It serves Hyena, H3, SGConv, and S4 in training.
"""

import math

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, float_dtype
from zoo.kernels.dispatch import Backend, Op
from zoo.kernels.long_conv import chunked, reference
from zoo.kernels.long_conv.reference import joined, latest
from zoo.kernels.packing import Packing

NAME = "long_conv"


def long_conv(
    u: Tensor,
    kernel: Tensor,
    *,
    skip: Tensor | None = None,
    causal: bool = True,
    state: Tensor | None = None,
    packing: Packing | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over time with a filter of any length, and the inputs it needs to go on.

        y_t = skip * u_t + sum_{j = 0}^{L - 1} kernel_j u_{t - j}                 causal
        y_t = skip * u_t + sum_{j = -R}^{R} kernel_{R + j} u_{t - j}              otherwise, with L = 2 R + 1

    Args:
        u: `[B, T, D]`, any floating dtype. Products are summed in float32 (float64 for float64 inputs).
        kernel: `[L, D]`, any floating dtype, shorter or longer than T: taps that reach no input are not used. The causal
            kernel begins with the tap of the current token; the other has it in the middle, so its L is odd.
        skip: `[D]`, weight of the current input beside the kernel. Default none.
        causal: no output hears the future.
        state: inputs before u, oldest first, `[B, P, D]` for any P; used in u's dtype. Zeros in front are as good as
            nothing. With packing the first dimension is the number of sequences. Only if causal. Default none.
        packing: sequences laid end to end in one row (B = 1); none hears its neighbour.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        y `[B, T, D]`, and the last `min(P + T, L - 1)` inputs `[B, ., D]`, all that can matter later; both in u's dtype and
        differentiable. With packing T is that of the longest sequence there, and the others have zeros in front. If not
        causal nothing can follow, and the state has no rows.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `O(B D n log n)` with n between `P + T` and `P + T + L`; the definition costs `2 B T L D` FLOP.

    Source: Hyena arXiv:2302.10866; H3 arXiv:2212.14052; SGConv arXiv:2210.09298.
    """
    for name, tensor in (("u", u), ("kernel", kernel), ("skip", skip), ("state", state)):
        if tensor is not None and float_dtype(NAME, **{name: tensor}).is_complex:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype}, expected a real dtype")
    shapes = Shapes(NAME)
    shapes("u", u, "B T D")
    shapes("kernel", kernel, "L D")
    shapes.not_empty("B", "T", "D", "L")
    shapes("skip", skip, "D")
    shapes.sizes["N"] = shapes["B"] if packing is None else packing.count
    shapes("state", state, "N P D")
    if not causal and shapes["L"] % 2 == 0:
        raise ValueError(f"{NAME}: kernel has {shapes['L']} taps; with causal=False it needs an odd number")
    if not causal and state is not None:
        raise ValueError(f"{NAME}: state goes with causal=True only; otherwise the outputs before would have heard u")
    longest = shapes["T"] if packing is None else max(packing.lengths)
    past = 0 if state is None else shapes["P"]
    options = {"causal": bool(causal), "keep": min(past + longest, shapes["L"] - 1) if causal else 0}
    return OP({"u": u, "kernel": kernel, "skip": skip, "state": state}, options, packing, backend)


def step(u: Tensor, kernel: Tensor, *, state: Tensor, skip: Tensor | None = None) -> Tensor:
    """One token, `[B, D]` -> `[B, D]`; `state` `[B, L - 1, D]` slides in place (no gradient). Begin with zeros."""
    if state.shape[1] != kernel.shape[0] - 1:
        raise ValueError(f"{NAME}: state holds {state.shape[1]} inputs; a step in place needs L - 1 = {kernel.shape[0] - 1} rows")
    with torch.no_grad():
        out, new = long_conv(u.unsqueeze(1), kernel, skip=skip, state=state, backend="reference")
        state.copy_(new)
    return out.squeeze(1)


def flops(length: int, taps: int, width: int) -> int:
    """Floating-point operations over one sequence by three real transforms of `5 / 2 n log2 n` and a product of spectra."""
    n = chunked.fft_length(length + min(taps, length) - 1)
    return round(width * (7.5 * n * math.log2(n) + 3 * n))


class LongConv(Op):
    """Its state is the past itself, which sequences of different lengths cannot hold in equally many padded rows."""

    def execute(self, tensors: dict[str, Tensor | None], options: dict, packing: Packing | None, backend: str):
        if packing is None:
            return super().execute(tensors, options, packing, backend)
        u, state = tensors["u"], tensors["state"]
        out, _ = super().execute(tensors | {"u": packing.pad(u)}, options | {"keep": 0}, None, backend)
        states = [latest(joined(None if state is None else state[n : n + 1], u[:, piece]), options["keep"]) for n, piece in packing.split()]
        return packing.unpad(out), torch.cat(states)


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor]:
    u = tensors["u"]
    return u.new_empty(u.shape), u.new_empty(sequences, options["keep"], u.shape[2])


def _case(taps: int, *, skip: bool = True, causal: bool = True):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        width = 5
        inputs = {"u": normal(batch, length, width), "kernel": normal(taps, width), "skip": normal(width) if skip else None}
        return inputs | {"causal": causal, "state": normal(batch, taps - 1, width) if causal else None}

    return draw


OP = LongConv(
    NAME,
    reference=reference.long_conv,
    chunked=chunked.long_conv,
    tensors=("u", "kernel", "skip?", "state?"),
    options={"causal": "bool", "keep": "SymInt"},
    along_time=("u",),
    meta=_meta,
    cases={
        "short": _case(9),
        "long": _case(200, skip=False),
        "centred": _case(31, causal=False),
        "centred-long": _case(301, skip=False, causal=False),
    },
    call=long_conv,
)

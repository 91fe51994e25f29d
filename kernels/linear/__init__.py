"""A linear map, alone or opened by another one of the same input: for decode steps, whose few rows wait for the weights alone."""

import torch
from torch import Tensor

from zoo.kernels import dispatch
from zoo.kernels.checks import Shapes, float_dtype
from zoo.kernels.dispatch import Backend, Op
from zoo.kernels.linear import chunked, reference

NAME = "linear"
FEW = 8  # rows, for which `auto` takes the fused kernel


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """A linear map of each row, and with a second matrix a gated linear unit.

        y = x W^T + b
        y = (x W^T + b) * silu(x G^T + c)        with a gate

    Args:
        x: `[B, T, D]`, any floating dtype, any strides.
        weight: W `[N, D]` in the dtype of x; bias: b `[N]`, default zero.
        gate: G `[N, D]`; gate_bias: c `[N]`. Default: no gate.
        backend: see `zoo.kernels.dispatch`; "auto" takes the fused kernel for at most 8 rows and torch's product for more.

    Returns:
        y `[B, T, N]` in the dtype of x, summed in float32 at the least, differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: one reading of the matrices for every 8 rows in the fused kernel.

    Source: gated units arXiv:2002.05202, eq. 6 (SwiGLU without its last map).
    """
    given = {"x": x, "weight": weight, "bias": bias, "gate": gate, "gate_bias": gate_bias}
    float_dtype(NAME, **{name: tensor for name, tensor in given.items() if tensor is not None})
    shapes = Shapes(NAME)
    shapes("x", x, "B T D")
    shapes("weight", weight, "N D")
    shapes("bias", bias, "N")
    shapes("gate", gate, "N D")
    shapes("gate_bias", gate_bias, "N")
    if gate is None and gate_bias is not None:
        raise ValueError(f"{NAME}: gate_bias belongs to a gate, and there is none; pass gate too")
    if backend == dispatch._preferred == "auto" and x.numel() > FEW * x.shape[-1]:
        backend = "chunked"
    return OP(given, {}, None, backend)[0]


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, None]:
    x = tensors["x"]
    return x.new_empty(*x.shape[:-1], tensors["weight"].shape[0]), None


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernel does not do."""
    return "there is nothing to multiply" if tensors["x"].numel() == 0 or tensors["weight"].numel() == 0 else None


def _case(width: int = 12, gated: bool = False, bias: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        inputs = {"x": normal(batch, length, width), "weight": normal(3, width) / width**0.5, "bias": normal(3) if bias else None}
        inputs |= {"gate": normal(3, width) / width**0.5 if gated else None}
        return inputs | {"gate_bias": normal(3) if gated and bias else None}

    return draw


OP = Op(
    NAME,
    reference=reference.linear,
    chunked=chunked.linear,
    tensors=("x", "weight", "bias?", "gate?", "gate_bias?"),
    options={},
    along_time=("x",),
    meta=_meta,
    fused="zoo.kernels.linear.fused",
    obstacle=_obstacle,
    opaque=False,
    cases={"plain": _case(), "wide": _case(1100, bias=True), "gated": _case(gated=True), "gated-wide": _case(530, gated=True, bias=True)},
    call=linear,
)

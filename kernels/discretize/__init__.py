"""From projected step sizes to decays and to what is written: what Mamba-2 and its relatives do before their recurrence."""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, accumulator, float_dtype
from zoo.kernels.discretize import reference
from zoo.kernels.dispatch import Backend, Op

NAME = "discretize"


def discretize(
    x: Tensor, A_log: Tensor, bias: Tensor, u: Tensor | None = None, *, floor: float = 0.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Step sizes, and with them a recurrence's decays and inputs.

        dt = max(softplus(x + bias), floor)
        log_decay = -exp(A_log) dt,    v = dt u

    Args:
        x: `[B, T, H]`, or `[B, T, H, K]` where every channel decays by itself; any floating dtype and strides.
        A_log: `[H]`, logarithm of the rates; bias: `[H]` or `[H, K]` as x has it; any floating dtype.
        u: `[B, T, H, P]` to be multiplied by the step sizes of heads, any floating dtype. Default: none.
        floor: no step is shorter.
        backend: see `zoo.kernels.dispatch`. A single token without gradients has a kernel.

    Returns:
        log_decay of the shape of x, float32 (float64 for float64 inputs), and v `[B, T, H, P]` in the dtype of u, or None.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Source: Mamba-2, arXiv:2405.21060, section 7, in the authors' code; Gated DeltaNet, arXiv:2412.06464.
    """
    given = {"x": x, "A_log": A_log, "bias": bias, "u": u}
    for name, tensor in given.items():
        if tensor is not None:
            float_dtype(NAME, **{name: tensor})
    shapes = Shapes(NAME)
    shapes("x", x, "B T H", "B T H K")
    shapes("A_log", A_log, "H")
    shapes("bias", bias, "H" if x.ndim == 3 else "H K")
    shapes("u", u, "B T H P")
    if u is not None and x.ndim == 4:
        raise ValueError(f"{NAME}: u is multiplied by the steps of heads, and x is {list(x.shape)}, one for each channel")
    return OP(given, {"floor": float(floor)}, None, backend)


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor | None]:
    x, u = tensors["x"], tensors["u"]
    return x.new_empty(x.shape, dtype=accumulator(x.dtype)), None if u is None else u.new_empty(u.shape)


def _case(channels: tuple[int, ...] = (), values: int = 0, floor: float = 0.0):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        inputs = {"x": 4 * normal(batch, length, 3, *channels) - 2, "A_log": normal(3), "bias": normal(3, *channels)}
        return inputs | {"u": normal(batch, length, 3, values) if values else None, "floor": floor}

    return draw


OP = Op(
    NAME,
    reference=reference.discretize,
    chunked=reference.discretize,  # plain torch has no better form of it
    tensors=("x", "A_log", "bias", "u?"),
    options={"floor": "float"},
    along_time=("x", "u"),
    meta=_meta,
    step="zoo.kernels.discretize.fused_step",
    defers=True,
    opaque=False,
    cases={"heads": _case(), "channels": _case((5,)), "inputs": _case(values=6), "floor": _case(values=6, floor=0.3)},
    call=discretize,
)

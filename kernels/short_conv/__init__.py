"""Short causal convolution: every channel sees its own last few inputs. Nearly all efficient mixers begin with one."""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, float_dtype
from zoo.kernels.dispatch import Backend, Op, kept, states_in_place
from zoo.kernels.packing import Packing
from zoo.kernels.short_conv import chunked, reference

NAME = "short_conv"
ACTIVATIONS = (None, "silu")
WIDEST = 16  # window that the fused kernels take


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    packing: Packing | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, and the inputs it needs to go on.

        y_t = act(bias + sum_w weight[:, w] * x_{t - W + 1 + w})

    Args:
        x: `[B, T, D]`, any floating dtype and strides.
        weight: `[D, W]`, the newest input last; bias: `[D]`. Any floating dtype; products are summed in float32
            (float64 for float64 inputs).
        activation: None or "silu".
        state: the last W - 1 inputs before x, oldest first, `[B, W - 1, D]`; used in x's dtype. Default zeros, as at
            the start of a sequence. With packing the first dimension is the number of sequences.
        packing: sequences laid end to end in one row (B = 1); none sees its neighbour.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        y `[B, T, D]`, and the last W - 1 inputs `[B, W - 1, D]`, both in x's dtype and differentiable. Where T < W - 1
        the new state still holds a part of the old one.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: `2 B T D W` FLOP, far less than the traffic of reading x and writing y once.

    Source: H3 arXiv:2212.14052 (the shift SSM); Mamba arXiv:2312.00752, section 3.4 (width 4 and SiLU).
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("state", state)):
        if tensor is not None:
            float_dtype(NAME, **{name: tensor})
    shapes = Shapes(NAME)
    shapes("x", x, "B T D")
    shapes("weight", weight, "D W")
    shapes.not_empty("B", "T", "W")
    shapes("bias", bias, "D")
    rows = shapes["B"] if packing is None else packing.count
    shapes.sizes.update(N=rows, S=shapes["W"] - 1)
    shapes("state", state, "N S D")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation {activation!r} is unknown; choose one of {ACTIVATIONS}")
    tensors = {"x": x, "weight": weight, "bias": bias, "state": state}
    return OP(tensors, {"activation": activation}, packing, backend)


def step(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor, activation: str | None = None) -> Tensor:
    """One token, `[B, D]` -> `[B, D]`; `state` `[B, W - 1, D]` is updated in place (no gradient)."""
    with torch.no_grad(), states_in_place():
        out, new = short_conv(x.unsqueeze(1), weight, bias, activation=activation, state=state)
    return kept(out, new, state)


def flops(length: int, width: int, channels: int) -> int:
    """Multiply-adds times two over one sequence, for a window of `width` inputs."""
    return 2 * length * width * channels


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, Tensor]:
    x, weight = tensors["x"], tensors["weight"]
    return x.new_empty(x.shape), x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    width = tensors["weight"].shape[1]
    return f"the window has {width} inputs, and its kernels keep up to {WIDEST} in registers" if width > WIDEST else None


def _case(width: int = 4, bias: bool = True, activation: str | None = "silu"):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        channels = 6
        inputs = {"x": normal(batch, length, channels), "weight": normal(channels, width)}
        inputs["bias"] = normal(channels) if bias else None
        return inputs | {"activation": activation, "state": normal(batch, width - 1, channels)}

    return draw


OP = Op(
    NAME,
    reference=reference.short_conv,
    chunked=chunked.short_conv,
    packed=chunked.packed,
    tensors=("x", "weight", "bias?", "state?"),
    options={"activation": "str?"},
    along_time=("x",),
    meta=_meta,
    fused="zoo.kernels.short_conv.fused",
    step="zoo.kernels.short_conv.fused",
    obstacle=_obstacle,
    cases={"silu": _case(), "linear": _case(bias=False, activation=None), "wide": _case(9), "pointwise": _case(1)},
    call=short_conv,
)

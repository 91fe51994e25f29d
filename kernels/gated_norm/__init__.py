"""A norm and a gate in one: what most mixers do to their output before projecting it back."""

import torch
from torch import Tensor

from zoo.kernels.checks import Shapes, float_dtype
from zoo.kernels.dispatch import Backend, Op
from zoo.kernels.gated_norm import chunked, reference

NAME = "gated_norm"
KINDS = ("rms", "layer")
ACTIVATIONS = ("silu", "sigmoid")
LARGEST = 16384  # bytes of a row that the fused kernels take


def gated_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    kind: str = "rms",
    groups: int = 1,
    activation: str = "silu",
    norm_before_gate: bool = True,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    """Normalise channels, scale them, and let a gate through.

        y = (norm(x) * weight + bias) * act(gate)          norm_before_gate
        y = norm(x * act(gate)) * weight + bias            otherwise, as in Mamba-2
        norm(x) = x / sqrt(mean(x^2) + eps)                kind "rms"
        norm(x) = (x - mean(x)) / sqrt(var(x) + eps)       kind "layer", with the biased variance

    Args:
        x: `[..., D]`, any floating dtype and strides.
        weight, bias: `[D]`, any floating dtype. Default one and zero.
        gate: of the shape of x, any floating dtype; its activation is "silu" or "sigmoid". Default: no gate.
        kind: "rms" or "layer".
        groups: each of D / groups neighbouring channels is normalised by itself; divides D.
        activation, norm_before_gate, eps: as above.
        backend: see `zoo.kernels.dispatch`.

    Returns:
        y `[..., D]` in the dtype of x; computed in float32 (float64 for float64 inputs), differentiable in every tensor.

    Raises:
        ValueError: a shape, dtype or device that breaks the contract, naming the argument.
        BackendError: the backend asked for cannot run here.

    Cost: one reading of x and gate, one writing of y.

    Source: RMSNorm arXiv:1910.07467, eq. 4; layer norm arXiv:1607.06450; gated output norms: RetNet arXiv:2307.08621,
    eq. 8, Mamba-2 arXiv:2405.21060, section 7.
    """
    for name, tensor in (("x", x), ("weight", weight), ("gate", gate), ("bias", bias)):
        if tensor is not None:
            float_dtype(NAME, **{name: tensor})
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x is a number, expected [..., D]")
    rows = " ".join(f"L{i}" for i in range(x.ndim - 1))
    shapes = Shapes(NAME)
    shapes("x", x, f"{rows} D")
    shapes("weight", weight, "D")
    shapes("bias", bias, "D")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"{NAME}: gate is {list(gate.shape)} but x is {list(x.shape)}; they must have one shape")
    shapes("gate", gate, f"{rows} D")
    for name, value, known in (("kind", kind, KINDS), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"{NAME}: {name} {value!r} is unknown; choose one of {', '.join(known)}")
    if groups < 1 or shapes["D"] % groups:
        raise ValueError(f"{NAME}: groups is {groups}, which does not divide the {shapes['D']} channels of x")
    options = {"kind": kind, "groups": groups, "activation": activation, "norm_before_gate": norm_before_gate, "eps": float(eps)}
    if x.ndim == 1:
        x, gate = x.unsqueeze(0), None if gate is None else gate.unsqueeze(0)
    out, _ = OP({"x": x, "weight": weight, "gate": gate, "bias": bias}, options, None, backend)
    return out if rows else out.squeeze(0)


def _meta(tensors: dict, options: dict, sequences: int) -> tuple[Tensor, None]:
    x = tensors["x"]
    return x.new_empty(x.shape), None


def _obstacle(tensors: dict) -> str | None:
    """What the fused kernels do not do."""
    size = tensors["x"].shape[-1] * tensors["x"].element_size()
    return f"rows have {size} bytes, and its kernels hold up to {LARGEST} of them in registers" if size > LARGEST else None


def _case(kind: str = "rms", groups: int = 1, activation: str = "silu", norm_before_gate: bool = True, bias: bool = False):
    def draw(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict:
        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        inputs = {"x": normal(batch, length, 12), "weight": normal(12), "gate": normal(batch, length, 12)}
        inputs |= {"bias": normal(12) if bias else None, "kind": kind, "groups": groups, "activation": activation}
        return inputs | {"norm_before_gate": norm_before_gate}

    return draw


OP = Op(
    NAME,
    reference=reference.gated_norm,
    chunked=chunked.gated_norm,
    tensors=("x", "weight?", "gate?", "bias?"),
    options={"kind": "str", "groups": "int", "activation": "str", "norm_before_gate": "bool", "eps": "float"},
    along_time=("x", "gate"),
    meta=_meta,
    fused="zoo.kernels.gated_norm.fused",
    defers=True,
    obstacle=_obstacle,
    opaque=False,
    cases={
        "rms": _case(),
        "layer-bias": _case("layer", bias=True),
        "groups": _case(groups=3, activation="sigmoid"),
        "gate-first": _case(groups=2, norm_before_gate=False),
    },
    call=gated_norm,
)

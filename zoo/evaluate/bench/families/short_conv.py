"""The short convolution with its activation."""

from torch import Tensor

from zoo.evaluate.bench.case import Case, Draw, peer
from zoo.ops import OPS


def inputs(draw: Draw, B: int, T: int, D: int, W: int) -> dict[str, Tensor]:
    return {"x": draw.normal(B, T, D), "weight": draw.normal(D, W), "bias": draw.normal(D)}


def with_silu(backend: str, **given: Tensor) -> Tensor:
    return OPS["short_conv"].call(**given, activation="silu", backend=backend)[0]


FLA = peer("fla.modules.causal_conv1d.causal_conv1d", lambda x, weight, bias: (x, weight, bias), activation="silu")
DAO = peer(
    "causal_conv1d.causal_conv1d_fn",
    lambda x, weight, bias: (x.transpose(1, 2), weight, bias),
    lambda y: y.transpose(1, 2),
    activation="silu",
)  # which takes tensors with the channels contiguous, seen with time last
SIZES = {"B": 4, "T": 8192, "D": 4096, "W": 4}

CASES = (Case("short_conv", "with SiLU", SIZES, inputs, (FLA, DAO), apply=with_silu),)

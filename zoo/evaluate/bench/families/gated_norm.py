"""The norm of a mixer's output and its gate, over the width and head by head."""

from torch import Tensor

from zoo.evaluate.bench.case import Case, Draw, peer


def wide(draw: Draw, B: int, T: int, D: int) -> dict[str, Tensor]:
    return {"x": draw.normal(B, T, D), "weight": draw.normal(D), "gate": draw.normal(B, T, D)}


def heads(draw: Draw, B: int, T: int, H: int, V: int) -> dict[str, Tensor]:
    """One weight for all heads."""
    return {"x": draw.normal(B, T, H, V), "weight": draw.normal(V), "gate": draw.normal(B, T, H, V)}


FLA = peer("fla.modules.fused_norm_gate.rms_norm_gated", lambda x, weight, gate: (x, gate, weight, None), activation="swish", eps=1e-5)

CASES = (
    Case("gated_norm", "width", {"B": 4, "T": 8192, "D": 2048}, wide, (FLA,)),
    Case("gated_norm", "heads", {"B": 4, "T": 8192, "H": 16, "V": 128}, heads, (FLA,)),
)

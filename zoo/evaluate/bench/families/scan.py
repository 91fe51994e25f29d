"""Scans by channel: HGRN's, and Mamba's with its states."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.evaluate.bench.case import Case, Draw, fla, peer


def gated(draw: Draw, B: int, T: int, D: int) -> dict[str, Tensor]:
    return {"x": draw.normal(B, T, D), "log_decay": draw.forget(B, T, D)}


def selective(draw: Draw, B: int, T: int, D: int, N: int) -> dict[str, Tensor]:
    """Steps after softplus."""
    steps = F.softplus(draw.normal(B, T, D, dtype=torch.float32) - 4).to(draw.dtype)
    rates = -1 - 15 * draw.uniform(D, N, dtype=torch.float32)
    return {"x": draw.normal(B, T, D), "dt": steps, "A": rates, "B": draw.normal(B, T, N), "C": draw.normal(B, T, N)}


def as_mamba(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """Time last."""
    x, dt, B, C = (y.transpose(1, 2).contiguous() for y in (x, dt, B, C))
    return x, dt, A, B.unsqueeze(1), C.unsqueeze(1)


HGRN = fla("hgrn.fused_recurrent_hgrn", lambda x, log_decay: (x, log_decay))
CHUNKED = fla("hgrn.chunk_hgrn", lambda x, log_decay: (x, log_decay))
MAMBA = peer("mamba_ssm.ops.selective_scan_interface.selective_scan_fn", as_mamba, lambda y: y.transpose(1, 2))

CASES = (
    Case("scan", "HGRN", {"B": 4, "T": 8192, "D": 2048}, gated, (HGRN, CHUNKED)),
    Case("selective_scan", "Mamba", {"B": 4, "T": 8192, "D": 4096, "N": 16}, selective, (MAMBA,)),
)

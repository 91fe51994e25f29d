"""Scans by channel: HGRN's, RWKV-4's sums, complex ones, and Mamba's with its states."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.evaluate.bench.case import Case, Draw, fla, peer
from zoo.ops import OPS


def gated(draw: Draw, B: int, T: int, D: int) -> dict[str, Tensor]:
    return {"x": draw.normal(B, T, D), "log_decay": draw.forget(B, T, D)}


def sums(draw: Draw, B: int, T: int, D: int) -> dict[str, Tensor]:
    """RWKV-4's weighted values, or weights, and the decays they share: all in float32."""
    return {"x": draw.normal(B, T, D, dtype=torch.float32), "log_decay": draw.forget(B, T, D, dtype=torch.float32)}


def turning(draw: Draw, B: int, T: int, D: int) -> dict[str, Tensor]:
    """LRU's: real and imaginary parts, the last dimension. A decay for each channel, of magnitude 0.9 to 0.999 and a tenth of a turn."""
    size, turn = 0.9 + 0.099 * draw.uniform(D, dtype=torch.float32), math.pi / 5 * draw.uniform(D, dtype=torch.float32)
    return {"x": draw.normal(B, T, D, 2, dtype=torch.float32), "log_decay": torch.stack((size.log(), turn), dim=-1)}


def turned(backend: str, x: Tensor, log_decay: Tensor) -> Tensor:
    """The scan of complex numbers, seen as pairs."""
    return torch.view_as_real(OPS["scan"].call(torch.view_as_complex(x), torch.view_as_complex(log_decay), backend=backend)[0])


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
    Case("scan", "RWKV-4's sums", {"B": 4, "T": 8192, "D": 2048}, sums),
    Case("scan", "LRU", {"B": 4, "T": 8192, "D": 1024}, turning, apply=turned),
    Case("selective_scan", "Mamba", {"B": 4, "T": 8192, "D": 4096, "N": 16}, selective, (MAMBA,)),
)

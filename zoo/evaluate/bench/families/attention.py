"""Softmax attention: full, in a window, with forget gates."""

import torch
from torch import Tensor

from zoo.evaluate.bench.case import SDPA, Case, Draw, fla
from zoo.evaluate.bench.families.linear_attention import qkv
from zoo.ops import OPS

WINDOW = 512


def forgetting(draw: Draw, B: int, T: int, H: int, **sizes: int) -> dict[str, Tensor]:
    return qkv(draw, B, T, H, **sizes) | {"log_forget": draw.forget(B, T, H, dtype=torch.float32)}


def within(backend: str, **inputs: Tensor) -> Tensor:
    return OPS["attention"].call(**inputs, window=WINDOW, backend=backend)[0]


SIZES = {"B": 4, "T": 8192, "H": 16, "K": 128, "V": 128}
SMALL = {"B": 1, "T": WINDOW + 128}  # long enough for the window to hide something
SLIDING = fla("parallel_attn", lambda q, k, v: (q, k, v), window_size=WINDOW)
FOX = fla("parallel_forgetting_attn", lambda q, k, v, log_forget: (q, k, v, log_forget))

CASES = (
    Case("attention", "full", SIZES, qkv, (SDPA,)),
    Case("attention", f"window {WINDOW}", SIZES, qkv, (SLIDING, SDPA), apply=within, small=SMALL),
    Case("attention", "forget gates", SIZES, forgetting, (FOX,)),
)

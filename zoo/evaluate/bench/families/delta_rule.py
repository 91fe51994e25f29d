"""The delta rule: every kind of decay, and RWKV-7's transitions."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.evaluate.bench.case import Case, Draw, Peer, fla, peer
from zoo.ops import OPS

LEAST = -1.0  # logarithm of FlashKDA's smallest decay, below all that are drawn here


def plain(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Keys of length one, as every model has them."""
    inputs = {"q": draw.unit(B, T, H, K), "k": draw.unit(B, T, H, K), "v": draw.normal(B, T, H, V)}
    return inputs | {"beta": draw.uniform(B, T, H)}


def token(draw: Draw, B: int, T: int, H: int, **sizes: int) -> dict[str, Tensor]:
    return plain(draw, B, T, H, **sizes) | {"log_decay": draw.forget(B, T, H, dtype=torch.float32)}


def grouped(draw: Draw, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Queries and keys of G groups, values of H heads."""
    inputs = {"q": draw.unit(B, T, G, K), "k": draw.unit(B, T, G, K), "v": draw.normal(B, T, H, V), "beta": draw.uniform(B, T, H)}
    return inputs | {"log_decay": draw.forget(B, T, H, dtype=torch.float32)}


def channel(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    return plain(draw, B, T, H, K, V) | {"log_decay": draw.forget(B, T, H, K, temperature=16)}


def general(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """RWKV-7's: what is read is what was written before, replaced at a rate of its own; decays between exp(-0.6065) and 1."""
    key, rate = draw.unit(B, T, H, K), draw.uniform(B, T, H, K)
    inputs = {"q": draw.normal(B, T, H, K), "k": draw.normal(B, T, H, K), "v": draw.normal(B, T, H, V)}
    return inputs | {"a": -key, "b": key * rate, "log_decay": -0.6065 * draw.uniform(B, T, H, K)}


def unscaled(backend: str, **inputs: Tensor) -> Tensor:
    return OPS["general_delta_rule"].call(**inputs, scale=1.0, backend=backend)[0]


def flash_kda() -> Callable[..., Tensor]:
    """FlashKDA, which reads but has no gradients."""
    forward = importlib.import_module("flash_kda").fwd

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, rate: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(v)
        forward(q, k, v, decay, beta, q.shape[3] ** -0.5, out, A_log=rate, dt_bias=bias, lower_bound=LEAST)
        return out

    return call


def logits(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """Gates before their activations, `LEAST sigmoid(exp(rate) (x + bias))` and `sigmoid(x)`; rate and bias are zero."""
    bias = torch.zeros(log_decay.shape[2:], device=q.device)
    return q, k, v, torch.logit(log_decay / LEAST), torch.logit(beta, eps=1e-3), bias[:, 0].contiguous(), bias


DELTA = fla("chunk_delta_rule", lambda q, k, v, beta: (q, k, v, beta))
GATED = fla("chunk_gated_delta_rule", lambda q, k, v, beta, log_decay: (q, k, v, log_decay, beta))
QLA = peer("flash_qla.chunk_gated_delta_rule", lambda q, k, v, beta, log_decay: (q, k, v, log_decay, beta))
KDA = fla("chunk_kda", lambda q, k, v, beta, log_decay: (q, k, v, log_decay, beta))
FLASH_KDA = Peer("flash_kda.fwd", flash_kda, logits)
RWKV7 = fla("chunk_rwkv7", lambda q, k, v, a, b, log_decay: (q, log_decay, k, v, a, b))
WIDE = ({"B": 4, "T": 8192}, {"B": 16, "T": 2048}, {"B": 1, "T": 32768})
HEADS = {"H": 16, "K": 128, "V": 128}
HALF = {"H": 32, "K": 64, "V": 64}
QWEN3_NEXT = {"G": 16, "H": 32, "K": 128, "V": 128}

CASES = (
    *(Case("delta_rule", "no decay", rows | HEADS, plain, (DELTA,)) for rows in WIDE),
    *(Case("delta_rule", "decay by token", rows | HEADS, token, (GATED, QLA)) for rows in WIDE),
    *(Case("delta_rule", "Qwen3-Next's heads", {"B": 1, "T": T} | QWEN3_NEXT, grouped, (GATED, QLA)) for T in (1024, 8192, 65536)),
    *(Case("delta_rule", "decay by channel", rows | HEADS, channel, (KDA, FLASH_KDA)) for rows in WIDE),
    *(Case("general_delta_rule", "RWKV-7", WIDE[0] | heads, general, (RWKV7,), apply=unscaled) for heads in (HALF, HEADS)),
)

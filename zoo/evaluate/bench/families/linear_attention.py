"""Linear attention: every kind of decay, at the sizes of published models."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.evaluate.bench.case import SDPA, Case, Draw, fla, heads_first, heads_last, peer
from zoo.ops import OPS


def qkv(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    return {"q": draw.normal(B, T, H, K), "k": draw.normal(B, T, H, K), "v": draw.normal(B, T, H, V)}


def head(draw: Draw, H: int, **sizes: int) -> dict[str, Tensor]:
    """RetNet's constants."""
    return qkv(draw, H=H, **sizes) | {"log_decay": torch.log1p(-torch.exp2(-5.0 - torch.arange(H, device=draw.device)))}


def token(draw: Draw, B: int, T: int, H: int, **sizes: int) -> dict[str, Tensor]:
    return qkv(draw, B, T, H, **sizes) | {"log_decay": draw.forget(B, T, H, dtype=torch.float32)}


def channel(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Gates as GLA's."""
    return qkv(draw, B, T, H, K, V) | {"log_decay": draw.forget(B, T, H, K, temperature=16)}


def bonus(draw: Draw, B: int, T: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Gates and bonus as RWKV-6's."""
    return qkv(draw, B, T, H, K, V) | {"log_decay": draw.forget(B, T, H, K), "bonus": draw.normal(H, K)}


def grouped(draw: Draw, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """Mamba-2's: queries and keys of G groups, values of H heads."""
    shared = {"q": draw.normal(B, T, G, K), "k": draw.normal(B, T, G, K), "v": draw.normal(B, T, H, V)}
    step = F.softplus(draw.normal(B, T, H, dtype=torch.float32) - 4)
    return shared | {"log_decay": -step * (1 + 15 * draw.uniform(H, dtype=torch.float32))}


def ssd(draw: Draw, B: int, T: int, G: int, H: int, K: int, V: int) -> dict[str, Tensor]:
    """All that Mamba-2's scan is given: inputs, steps, rates, and the projections of the state."""
    return {
        "x": draw.normal(B, T, H, V),
        "dt": F.softplus(draw.normal(B, T, H, dtype=torch.float32) - 4),
        "A": -1 - 15 * draw.uniform(H, dtype=torch.float32),
        "b": draw.normal(B, T, G, K),
        "c": draw.normal(B, T, G, K),
    }


def scan(backend: str, x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba-2's scan as linear attention, as its model calls it."""
    v = (x.to(dt.dtype) * dt.unsqueeze(-1)).to(x.dtype)
    return OPS["linear_attention"].call(c, b, v, dt * A, scale=1.0, backend=backend)[0]


def as_mlstm(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """An mLSTM with sigmoid gates whose input gate is open: the gate that forgets is a logit."""
    forget = log_decay - torch.log(-torch.expm1(log_decay))
    return heads_first(q, k, v, torch.full_like(log_decay, 30.0).detach(), forget)


def every_head(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
    """Groups written out, for those who take none."""
    return *(x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k)), v, log_decay


LINEAR = fla("chunk_linear_attn", lambda q, k, v: (q, k, v), normalize=False)
RETENTION = fla("chunk_retention", lambda q, k, v, log_decay: (q, k, v))
HEAD = fla("chunk_simple_gla", lambda q, k, v, log_decay: (q, k, v, None, log_decay))
TOKEN = fla("chunk_simple_gla", lambda q, k, v, log_decay: (q, k, v, log_decay))
MLSTM = peer(
    "mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging.mlstm_siging_chunkwise__xl_chunk",
    as_mlstm, heads_last, normalize=False, chunk_size=128, autocast_kernel_dtype=torch.bfloat16,
)  # fmt: skip
CHANNEL = fla("chunk_gla", lambda q, k, v, log_decay: (q, k, v, log_decay))
BONUS = fla("chunk_rwkv6", lambda q, k, v, log_decay, bonus: (q, k, v, log_decay, bonus))
REPEATED = fla("chunk_simple_gla", every_head)
MAMBA = peer("mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined", lambda x, dt, A, b, c: (x, dt, A, b, c), chunk_size=256)

KINDS = (  # name, inputs, peers, constants
    ("no decay", qkv, (LINEAR, SDPA), ()),
    ("decay by head", head, (RETENTION, HEAD), ("log_decay",)),
    ("decay by token", token, (TOKEN, MLSTM), ()),
    ("decay by channel", channel, (CHANNEL,), ()),
    ("decay by channel with bonus", bonus, (BONUS,), ()),
)
WIDE = ({"B": 4, "T": 8192}, {"B": 16, "T": 2048}, {"B": 1, "T": 32768})
HEADS = {"H": 16, "K": 128, "V": 128}
HALF = {"H": 32, "K": 64, "V": 64}
RETNET = {"B": 4, "T": 8192, "H": 8, "K": 256, "V": 512}
MAMBA2 = {"B": 4, "T": 8192, "G": 1, "H": 64, "K": 128, "V": 64}
LITTLE = {"B": 8, "T": 1024, "H": 8, "K": 64, "V": 64}


def case(kind: tuple, sizes: dict[str, int], **options) -> Case:
    name, draw, peers, fixed = kind
    return Case("linear_attention", name, sizes, draw, peers, fixed=fixed, **options)


CASES = (
    *(case(kind, rows | HEADS) for kind in KINDS for rows in WIDE),
    *(case(kind, rows | HALF) for kind in KINDS[3:4] for rows in WIDE),
    case(KINDS[1], RETNET),
    Case("linear_attention", "Mamba-2's heads", MAMBA2, grouped, (REPEATED,)),
    Case("linear_attention", "Mamba-2's scan", MAMBA2, ssd, (MAMBA,), apply=scan),
    *(case(kind, LITTLE, host=True) for kind in KINDS),
)

"""Softmax attention: full, in windows, with forget gates, with global tokens, over listed blocks."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.evaluate.bench.case import SDPA, Case, Draw, Peer, fla, heads_first, heads_last, sdpa
from zoo.evaluate.bench.families.linear_attention import qkv
from zoo.ops import OPS

WINDOW = 512
SIDE = 256  # tokens seen on either side, as in Longformer
BLOCK = 64  # tokens of a listed block
FLEX = 128  # tokens of FlexAttention's blocks


def forgetting(draw: Draw, B: int, T: int, H: int, **sizes: int) -> dict[str, Tensor]:
    return qkv(draw, B, T, H, **sizes) | {"log_forget": draw.forget(B, T, H, dtype=torch.float32)}


def marked(draw: Draw, B: int, T: int, M: int, **sizes: int) -> dict[str, Tensor]:
    """The first M tokens are global."""
    return qkv(draw, B, T, **sizes) | {"global_tokens": (torch.arange(T, device=draw.device) < M).expand(B, T)}


def listed(draw: Draw, B: int, T: int, **sizes: int) -> dict[str, Tensor]:
    """For every block of queries a tenth of the blocks of keys, none of them twice."""
    blocks = -(-T // BLOCK)
    order = draw.uniform(B, blocks, blocks, dtype=torch.float32).argsort(-1)
    return qkv(draw, B, T, **sizes) | {"chosen": order[..., : max(1, round(blocks / 10))]}


def within(backend: str, **inputs: Tensor) -> Tensor:
    return OPS["attention"].call(**inputs, window=WINDOW, backend=backend)[0]


def around(backend: str, **inputs: Tensor) -> Tensor:
    return OPS["attention"].call(**inputs, window=SIDE, causal=False, backend=backend)[0]


def in_blocks(backend: str, **inputs: Tensor) -> Tensor:
    return OPS["block_attention"].call(**inputs, size=BLOCK, backend=backend)[0]


def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's rule for a causal window."""
    return (key <= query) & (query - key < WINDOW)


def window_blocks(length: int, device: torch.device):
    """FlexAttention's block mask of a causal window, from the blocks' places: looking at all pairs would take a byte for each."""
    count = -(-length // FLEX)
    block = torch.arange(count, device=device)
    gap = FLEX * (block[:, None] - block)  # between the beginnings of a block of queries and of one of keys
    whole = (gap > 0) & (gap + FLEX - 1 < WINDOW) & (FLEX * (block[:, None] + 1) <= length)
    parts = (gap >= 0) & (gap - FLEX + 1 < WINDOW) & ~whole

    def lists(seen: Tensor) -> tuple[Tensor, Tensor]:
        order = seen.int().argsort(dim=-1, descending=True, stable=True)
        return seen.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    mask = importlib.import_module("torch.nn.attention.flex_attention").BlockMask
    return mask.from_kv_blocks(*lists(parts), *lists(whole), BLOCK_SIZE=FLEX, mask_mod=near, seq_lengths=(length, length))


def flex_attention() -> Callable[..., Tensor]:
    """FlexAttention, compiled anew."""
    torch.compiler.reset()
    run = torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=False)
    return lambda q, k, v, mask: heads_last(run(q, k, v, block_mask=mask))


class Given(nn.Module):
    """In the place of a projection: its input, or what is given `[B, T, D]`, time first."""

    def __init__(self, x: Tensor | None = None):
        super().__init__()
        self.x = x

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.clone() if self.x is None else self.x.transpose(0, 1)


def longformer() -> Callable[..., Tensor]:
    """transformers' self-attention of Longformer, of whose six projections the local and the global ones are alike and cost a copy
    of the queries: it scales them in place."""
    library = importlib.import_module("transformers.models.longformer.modeling_longformer")

    @functools.cache
    def layer(heads: int, width: int) -> nn.Module:
        config = library.LongformerConfig(
            hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, attention_window=[2 * SIDE], attention_probs_dropout_prob=0.0
        )
        return library.LongformerSelfAttention(config, 0)

    def call(q: Tensor, k: Tensor, v: Tensor, marks: Tensor, kind: Tensor, length: int) -> Tensor:
        run = layer(q.shape[2], q.shape[2] * q.shape[3])
        run.query = run.query_global = Given()
        run.key = run.key_global = Given(k.flatten(2))
        run.value = run.value_global = Given(v.flatten(2))
        out = run(q.flatten(2), attention_mask=kind, is_index_masked=kind < 0, is_index_global_attn=marks, is_global_attn=True)[0]
        return out.unflatten(2, q.shape[2:])[:, :length]

    return call


def whole_windows(q: Tensor, k: Tensor, v: Tensor, global_tokens: Tensor) -> tuple[Tensor, ...]:
    """Padded to whole windows; which tokens are global, their kind (above 0 global, below 0 padding), and how many there were."""
    length = q.shape[1]
    missing = -length % (2 * SIDE)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
    return q, k, v, F.pad(global_tokens, (0, missing)), F.pad(global_tokens.to(q.dtype), (0, missing), value=-1.0), length


SIZES = {"B": 4, "T": 8192, "H": 16, "K": 128, "V": 128}
ROWS = (SIZES, SIZES | {"B": 1}, SIZES | {"B": 1, "T": 65536})  # the last two show how time grows with length
LONGFORMER = {"B": 4, "T": 4096, "H": 12, "K": 64, "V": 64, "M": 64}
LONG = SIZES | {"B": 1, "T": 32768}
SMALL = {"B": 1, "T": WINDOW + 128}  # long enough for the window to hide something
SMALL_MARKED = {"B": 1, "T": 4 * SIDE}
SMALL_LISTED = {"B": 1, "T": 16 * BLOCK}  # two blocks on a list
SLIDING = fla("parallel_attn", lambda q, k, v: (q, k, v), window_size=WINDOW)
FOX = fla("parallel_forgetting_attn", lambda q, k, v, log_forget: (q, k, v, log_forget))
COMPILED = Peer(
    "torch.flex_attention", flex_attention, lambda q, k, v: (*heads_first(q, k, v), window_blocks(q.shape[1], q.device)), cuda=True
)
TRANSFORMERS = Peer("transformers.LongformerSelfAttention", longformer, whole_windows)

CASES = (
    Case("attention", "full", SIZES, qkv, (SDPA,)),
    *(Case("attention", f"window {WINDOW}", rows, qkv, (SLIDING, COMPILED, SDPA), apply=within, small=SMALL) for rows in ROWS),
    Case("attention", "forget gates", SIZES, forgetting, (FOX, SDPA)),
    Case(
        "attention", f"{SIDE} on either side and global tokens", LONGFORMER, marked, (TRANSFORMERS,),
        apply=around, fixed=("global_tokens",), small=SMALL_MARKED,
    ),
    Case(
        "block_attention", "a tenth of all blocks", LONG, listed, (sdpa(causal=False),),
        apply=in_blocks, fixed=("chosen",), small=SMALL_LISTED,
    ),
)  # fmt: skip

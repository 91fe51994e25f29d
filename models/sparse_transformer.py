"""The Sparse Transformer: softmax attention factorised into two sparse patterns, so that two steps reach every token before.

    strided    A1_t = { t - l, ..., t },                   A2_t = { j <= t : (t - j) mod l = 0 }
    fixed      A1_t = { j <= t : floor(j/l) = floor(t/l) },    A2_t = { j <= t : j mod l >= l - c }

for a stride l, near the square root of the length, and the last c places of every l, which tell later tokens what stood before
them. A strided pattern suits data with rows of l tokens, such as images, a fixed one text. The patterns are joined in one of
three ways: layers take turns, some heads take the one and some the other, or every head sees the union of both ("merged").
A token that a pattern shows nothing, such as the first ones in A2 of the fixed pattern, gets 0.

Paper: Child, Gray, Radford, Sutskever 2019, arXiv:1904.10509: patterns in section 4.3, ways to join them in section 5.1.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn.functional import pad

from zoo import ops
from zoo.attending import RotaryAttention, united
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops
from zoo.kernels.packing import Packing
from zoo.mixer import State, Traits
from zoo.registry import register

PATTERNS = ("strided", "fixed")
JOINED = ("layers", "heads", "merged")


@strict
class SparseTransformerConfig(ZooConfig):
    """Heads, the pattern and how its two parts are joined."""

    model_type = "zoo_sparse_transformer"

    channel_mixer: str | None = "mlp"
    norm: str = "layernorm"
    max_position_embeddings: int | None = 12288
    num_heads: int = 16  # H
    pattern: str = "strided"  # or "fixed"
    stride: int = 128  # l
    num_summaries: int = 32  # c, of the fixed pattern
    joined: str = "merged"  # or "layers", "heads"

    def validate_patterns(self):
        """Heads must divide the width; the pattern must be one."""
        self.divide("hidden_size", "num_heads")
        for field, known in (("pattern", PATTERNS), ("joined", JOINED)):
            if getattr(self, field) not in known:
                raise ValueError(f"SparseTransformerConfig: {field}={getattr(self, field)!r} is unknown; choose one of {', '.join(known)}")
        if not 1 <= self.num_summaries <= self.stride:
            raise ValueError(f"SparseTransformerConfig: num_summaries={self.num_summaries} must lie between 1 and stride={self.stride}")
        if self.joined == "heads" and self.num_heads < 2:
            raise ValueError("SparseTransformerConfig: joined='heads' needs num_heads of at least 2, some for either part")


class SparseTransformerMixer(RotaryAttention):
    """Sparse attention; the state is that of `AttentionMixer` without a window."""

    traits = Traits(constant_state=False)

    def __init__(self, config: SparseTransformerConfig, layer: int):
        keys = config.divide("hidden_size", "num_heads")
        super().__init__(config, layer, heads=config.num_heads, groups=config.num_heads, keys=keys, rope=None, qkv_bias=True, out_bias=True)
        self.fixed, self.merged = config.pattern == "fixed", config.joined == "merged"
        self.stride, self.last = config.stride, config.num_summaries
        first = {"merged": self.heads, "heads": self.heads // 2, "layers": 0 if layer % 2 else self.heads}[config.joined]
        self.near_heads = first  # how many heads see A1; where parts are not merged the rest see A2

    def operator_flops(self, length: int) -> int:
        near = far = 0
        for t in range(length):
            row, place = divmod(t, self.stride)
            own = self.merged  # then what A1 shows is left out of A2
            if self.fixed:
                near += place + 1
                far += row * self.last + (0 if own else max(place + 1 - self.stride + self.last, 0))
            else:
                near += min(t, self.stride - own) + 1
                far += row + (not own)
        far_heads = self.heads if self.merged else self.heads - self.near_heads
        return flops(near * self.near_heads + far * far_heads, 1, self.keys, self.values)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        after = cache.append(state, k, v, packing=packing)
        anew = state is None and packing is None
        if packing is not None:
            q, k, v, positions = packing.pad(q), packing.pad(k), packing.pad(v), packing.pad(positions, -1)
        keys, values, at = (k, v, positions) if state is None else (after["k"], after["v"], cache.positions(after))
        if self.merged:
            o = united([self.near(q, keys, values, positions, at, anew), self.far(q, keys, values, positions, at)]).to(v.dtype)
        else:
            count = self.near_heads
            parts = []
            if count:
                parts.append(self.near(q[:, :, :count], keys[:, :, :count], values[:, :, :count], positions, at, anew)[0])
            if count < self.heads:
                parts.append(self.far(q[:, :, count:], keys[:, :, count:], values[:, :, count:], positions, at)[0])
            o = torch.cat(parts, dim=2)
        return o if packing is None else packing.unpad(o), after

    def near(self, q: Tensor, k: Tensor, v: Tensor, asked: Tensor, at: Tensor, anew: bool) -> tuple[Tensor, Tensor]:
        """A1: outputs `[B, T, H, K]` and log-sum-exps `[B, T, H]`; merged, the strided one leaves `t - l` to A2.

        Args: asked, at: positions of queries `[B, T]` and keys `[B, L]`, -1 for none; anew: both count from 0.
        """
        size = self.stride
        if not self.fixed:
            places = {} if anew else {"q_positions": asked, "kv_positions": at}
            return ops.attention(q, k, v, window=size if self.merged else size + 1, **places, return_lse=True)
        if anew:
            batch, length = q.shape[:2]
            rows = (pad(x, (0, 0, 0, 0, 0, -length % size)).unflatten(1, (-1, size)).flatten(0, 1) for x in (q, k, v))
            o, lse = ops.attention(*rows, return_lse=True)
            return tuple(x.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length] for x in (o, lse))
        apart = {name: torch.where(p < 0, p, p + p // size * size) for name, p in (("q_positions", asked), ("kv_positions", at))}
        return ops.attention(q, k, v, window=size, **apart, return_lse=True)  # with a gap as wide as a block behind each

    def far(self, q: Tensor, k: Tensor, v: Tensor, asked: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """A2, likewise; merged, it leaves out what A1 shows."""
        size = self.stride
        if not self.fixed:
            before = torch.where(asked < size, -1, asked - size) if self.merged else asked  # whose column it is, less the token itself
            return ops.attention(q, k, v, dilation=size, q_positions=before, kv_positions=at, return_lse=True)
        blocks = torch.arange(-(-k.shape[1] // size), device=k.device).unsqueeze(1)
        chosen = (blocks * size + torch.arange(size - self.last, size, device=k.device)).flatten()  # slot p holds position p
        inside = chosen < k.shape[1]
        chosen = chosen.clamp(max=k.shape[1] - 1)
        seen = torch.where(inside, at[:, chosen], -1)
        if self.merged:  # from the next block on
            seen = torch.where(seen < 0, seen, seen // size * size + size)
        return ops.attention(q, k[:, chosen], v[:, chosen], q_positions=asked, kv_positions=seen, return_lse=True)


SIZES = dict(hidden_size=512, stride=128)

register(
    "sparse_transformer",
    config=SparseTransformerConfig,
    mixer=SparseTransformerMixer,
    title="Generating Long Sequences with Sparse Transformers",
    paper="arXiv:1904.10509",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, pattern="fixed", stride=5, num_summaries=2, vocab_size=256,
            max_position_embeddings=512,
        ),
        "enwik8": SIZES | dict(num_hidden_layers=30, num_heads=8, pattern="fixed", vocab_size=256),
        "imagenet64": SIZES | dict(num_hidden_layers=48, num_heads=16, vocab_size=256),
    },
)  # fmt: skip

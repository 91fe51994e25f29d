"""LongNet: dilated attention within segments, several lengths and dilations mixed by their softmax denominators.

    o_t = sum_i s_i,t o_i,t / sum_i s_i,t

o_i is softmax attention among every r_i-th token of a segment of w_i tokens, s_i its denominators; head h takes the tokens
h mod r_i, h mod r_i + r_i, ... of each segment, and says nothing about the others. Segments and dilations grow together, so
that a token sees its neighbours densely and the far past sparsely, at a cost in proportion to the length. Queries and keys
are rotated by their positions; the published models have xPos instead.

Paper: Ding et al. 2023, "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv:2307.02486, sections 2.2 and 2.3.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from zoo import ops
from zoo.attending import RotaryAttention, united
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops
from zoo.kernels.packing import Packing
from zoo.mixer import State
from zoo.registry import register


@strict
class LongNetConfig(ZooConfig):
    """Sizes of the heads, and the patterns."""

    model_type = "zoo_longnet"

    num_heads: int = 16  # H
    segments: list[int] = field(default_factory=lambda: [2048, 4096, 8192, 16384, 32768])  # w
    dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 12])  # r, one for each length of segments
    rope_theta: float | None = 10000.0  # base of the rotary angles; None: no rotary positions

    def validate_patterns(self):
        """Heads must divide the width, and every token must be seen by itself."""
        self.divide("hidden_size", "num_heads")
        if not self.segments or len(self.segments) != len(self.dilations) or min(*self.segments, *self.dilations) < 1:
            raise ValueError(f"LongNetConfig: segments={self.segments} and dilations={self.dilations} must be as many positive numbers")
        if 1 not in self.dilations:
            raise ValueError(f"LongNetConfig: dilations={self.dilations} leave tokens to which a head is blind; one of them must be 1")


class LongNetMixer(RotaryAttention):
    """Dilated attention; the state is that of `AttentionMixer` without a window."""

    def __init__(self, config: LongNetConfig, layer: int):
        keys = config.divide("hidden_size", "num_heads")
        rope = None if config.rope_theta is None else (keys // 2 * 2, config.rope_theta)
        super().__init__(config, layer, heads=config.num_heads, groups=config.num_heads, keys=keys, rope=rope)
        self.patterns = list(zip(config.segments, config.dilations, strict=True))

    def operator_flops(self, length: int) -> int:
        pairs = 0
        for size, step in self.patterns:
            for segment, count in ((size, length // size), (length % size, 1)):
                chosen = [-(-max(segment - head % step, 0) // step) for head in range(self.heads)]
                pairs += count * sum(n * (n + 1) // 2 if self.causal else n * n for n in chosen)
        return flops(pairs, 1, self.keys, self.values)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """Attention of these queries to the cached and the new keys, and the cache after."""
        after = cache.append(state, k, v, packing=packing) if self.causal else {}
        if packing is not None:
            q, k, v, positions = packing.pad(q), packing.pad(k), packing.pad(v), packing.pad(positions, -1)
        keys, values = (k, v) if state is None else (after["k"], after["v"])
        parts = [self.dilated(q, keys, values, positions, size, step, state is None) for size, step in self.patterns]
        o = united(parts).to(v.dtype)  # as if they shared no key: one of several patterns counts once for each
        return o if packing is None else packing.unpad(o), after

    def dilated(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, size: int, step: int, anew: bool) -> tuple[Tensor, Tensor]:
        """One pattern: outputs `[B, T, H, K]` and log-sum-exps `[B, T, H]`, 0 and -inf where a head skips a token.

        Each of R rows holds the tokens that one head takes in one segment.

        Args: q: `[B, T, H, K]` at consecutive positions `[B, T]`, behind them -1; k, v: `[B, L, H, K]`, in slot p the key at
            position p; anew: positions begin with 0.
        """
        batch, length, heads, _ = q.shape
        first, total = positions[:, :1], positions.amax(1)[:, None, None] + 1
        count = -(-length // size) if anew else (length + size - 2) // size + 1  # segments that so many tokens may touch
        rows = torch.arange(count * heads, device=q.device)
        head, offset = rows % heads, rows % heads % step
        start = first.clamp(min=0) // size * size + rows // heads * size  # [B, R]
        skipped = ((first - start).clamp(min=0) - offset + step - 1).clamp(min=0) // step  # of a row's tokens, those before

        def places(skip: Tensor, tokens: int) -> Tensor:
            """`[B, R, M]`: positions of the tokens taken, -1 for none."""
            taken = skip.unsqueeze(-1) + torch.arange(-(-min(tokens, size) // step), device=q.device)
            inside = offset.unsqueeze(-1) + taken * step
            place = start.unsqueeze(-1) + inside
            return torch.where((inside < size) & (place < total), place, -1)

        asked, seen = places(skipped, length), places(torch.zeros_like(skipped), k.shape[1])
        row, head = torch.arange(batch, device=q.device)[:, None, None], head.unsqueeze(-1)
        own = asked - first.unsqueeze(-1)
        pairs = ((q, own), (k, seen), (v, seen))
        parts = (x[row, index.clamp(min=0), head].flatten(0, 1).unsqueeze(2) for x, index in pairs)
        at = {"q_positions": asked.flatten(0, 1), "kv_positions": seen.flatten(0, 1)}
        o, lse = ops.attention(*parts, causal=self.causal, **at, return_lse=True)
        target = torch.where(asked >= 0, own, length)  # what nobody asked for goes behind the end
        out = o.new_zeros(batch, length + 1, heads, o.shape[-1]).index_put((row, target, head), o.view(*asked.shape, -1))
        sums = lse.new_full((batch, length + 1, heads), -torch.inf).index_put((row, target, head), lse.view(asked.shape))
        return out[:, :length], sums[:, :length]


register(
    "longnet",
    config=LongNetConfig,
    mixer=LongNetMixer,
    title="LongNet: Scaling Transformers to 1,000,000,000 Tokens",
    paper="arXiv:2307.02486",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, segments=[8, 20, 48], dilations=[1, 2, 3], vocab_size=256),
        "125m": dict(hidden_size=768, num_hidden_layers=12, num_heads=12, tie_word_embeddings=True),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16, tie_word_embeddings=True),
    },
)

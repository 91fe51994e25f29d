"""Attention with biases learned for buckets of distances, as T5 has it: causal, or to neighbours and to sums over blocks.

    logit_tj = q_t . k_j + b(j - t),    |t - j| <= r                           and with blocks of G tokens, in one softmax,
    logit_tg = q_t . k(s_g) + c(g - g(t)),    s_g = norm(sum of the x_j of block g)

There is no scale. Tokens behind the last whole block belong to it, and a sequence shorter than a block has no sums. Buckets hold
one distance each at first, then more and more, up to a largest one. The first layer of a stack has the biases of all.

Sources: T5, Raffel et al. 2019, arXiv:1910.10683, section 2.1; sums over blocks: LongT5, Guo et al. 2021, arXiv:2112.07916, section 3.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.functional import pad

from zoo.attending import AttentionMixer
from zoo.config import ZooConfig
from zoo.kernels.attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, merge_heads, split_heads, token_positions, wide
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register_part


@strict
class RelativeConfig(ZooConfig):
    """A block of the decoder that looks at what was written."""

    name = "relative_attention"

    num_heads: int = 12
    head_dim: int = 64
    num_buckets: int = 32
    max_distance: int = 128


@strict
class LocalConfig(RelativeConfig):
    """A block of the encoder."""

    name = "transient_global_attention"

    radius: int = 127
    global_block: int | None = None


def bucket(distance: Tensor, count: int, most: int) -> Tensor:
    """The number of each distance's bucket, of distances that are not negative."""
    exact = count // 2
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(most / exact) * (count - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=count - 1))


def signed_bucket(offset: Tensor, count: int, most: int) -> Tensor:
    """The same of offsets of either sign, positive ones in the upper half."""
    return bucket(offset.abs(), count // 2, most) + (offset > 0) * (count // 2)


@register_part("relative_attention")
class RelativeAttention(AttentionMixer):
    """Full causal attention with biases by distance; the state is that of `AttentionMixer`."""

    traits = Traits(constant_state=False)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: RelativeConfig, layer: int):
        heads, keys, width = config.num_heads, config.head_dim, config.hidden_size
        super().__init__(config, layer, heads=heads, groups=heads, keys=keys, scale=1.0)
        self.buckets = (config.num_buckets, config.max_distance)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * keys, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(heads * keys, width, bias=False)
        self.bias = nn.Embedding(config.num_buckets, heads) if layer == 0 else None
        self.first = (self,)

    def borrow(self, earlier: list[Mixer | None]) -> None:
        self.first = (next((mixer for mixer in earlier if isinstance(mixer, type(self))), self),)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        distances = torch.arange(self.buckets[1] + 1, device=x.device)
        by_distance = self.first[0].bias(bucket(distances, *self.buckets)).t().to(q.dtype).expand(*x.shape[:2], -1, -1)
        positions = token_positions(x, state["length"] if state else None, packing)
        o, state = self.attend(q, k, v, positions, state, packing, by_distance=by_distance)
        return self.out_proj(merge_heads(o)), state


@register_part("transient_global_attention")
class TransientGlobalAttention(Mixer):
    """Attention to neighbours and to sums over blocks; it sees its whole sequence at once and has no state."""

    traits = Traits(causal=False, bidirectional=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: LocalConfig, layer: int):
        super().__init__(config, layer)
        self.heads, self.keys, width = config.num_heads, config.head_dim, config.hidden_size
        self.size, self.block, self.buckets = config.radius + 1, config.global_block, (config.num_buckets, config.max_distance)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, self.heads * self.keys, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(self.heads * self.keys, width, bias=False)
        self.bias = nn.Embedding(config.num_buckets, self.heads) if layer == 0 else None
        self.global_bias = nn.Embedding(config.num_buckets, self.heads) if layer == 0 and self.block else None
        self.global_norm = RMSNorm(width, config.norm_eps) if self.block else None
        self.first = (self,)

    def borrow(self, earlier: list[Mixer | None]) -> None:
        self.first = (next((mixer for mixer in earlier if isinstance(mixer, type(self))), self),)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {}

    def operator_flops(self, length: int) -> int:
        side = min(self.size - 1, length - 1)
        near = length * (2 * side + 1) - side * (side + 1)
        return flops(near + (length * (length // self.block) if self.block else 0), self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        rows = x if packing is None else packing.pad(x)
        lengths = torch.full_like(rows[:, 0, 0], rows.shape[1], dtype=torch.long) if packing is None else packing.cu_seqlens.diff()
        q, k, v = (split_heads(p(rows), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        values, logits = self.near(q, k, v, lengths)
        if self.block and rows.shape[1] >= self.block:
            sums, biases = self.blocks(rows, lengths)
            far_k, far_v = (split_heads(p(sums), self.heads) for p in (self.k_proj, self.v_proj))
            far = self.cut(torch.einsum("bthk,bghk->bthg", q, far_k) + biases)
            weights = wide(torch.cat([logits, far], dim=-1)).softmax(-1).to(v.dtype)
            o = torch.einsum("bnthg,bghk->bnthk", weights[..., logits.shape[-1] :], far_v)
        else:
            weights, o = wide(logits).softmax(-1).to(v.dtype), 0
        o = o + torch.einsum("bnths,bnshk->bnthk", weights[..., : logits.shape[-1]], values)
        o = o.flatten(1, 2)[:, : rows.shape[1]]
        return self.out_proj(merge_heads(o if packing is None else packing.unpad(o))), {}

    def cut(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` in pieces of r + 1 tokens, `[B, N, r + 1, ...]`, filled up with zeros."""
        return pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % self.size)).unflatten(1, (-1, self.size))

    def near(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[B, N, S, H, K]` of each piece and its neighbours, S = 3 r + 3, and the logits `[B, N, r + 1, H, S]`."""
        present = torch.arange(k.shape[1], device=q.device) < lengths.unsqueeze(1)

        def three(x: Tensor) -> Tensor:
            around = pad(self.cut(x), (0, 0) * (x.ndim - 1) + (1, 1))
            return torch.cat([around[:, :-2], around[:, 1:-1], around[:, 2:]], dim=2)

        keys, values, seen = three(k), three(v), three(present.unsqueeze(-1)).squeeze(-1)
        own = torch.arange(self.size, device=q.device) + self.size
        offset = torch.arange(3 * self.size, device=q.device) - own.unsqueeze(1)
        biases = self.first[0].bias(signed_bucket(offset, *self.buckets)).transpose(1, 2)
        seen = (seen.unsqueeze(2) & (offset.abs() < self.size)).unsqueeze(3)
        logits = torch.einsum("bnthk,bnshk->bnths", self.cut(q), keys) + biases
        return values, logits.masked_fill(~seen, torch.finfo(logits.dtype).min)

    def blocks(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised sums `[B, M, D]` of all whole blocks, and their biases `[B, T, H, M]`, least where a sequence has no such."""
        count, at = x.shape[1] // self.block, torch.arange(x.shape[1], device=x.device)
        whole = (lengths // self.block).unsqueeze(1)
        own = torch.minimum(at // self.block, whole - 1)  # of tokens behind the last block that one
        taken = own.masked_fill((own < 0) | (at >= lengths.unsqueeze(1)), count)
        index = taken.unsqueeze(-1).expand_as(x)
        sums = x.new_zeros(x.shape[0], count + 1, x.shape[2]).scatter_add(1, index, x)[:, :count]
        each = torch.arange(count, device=x.device)
        biases = self.first[0].global_bias(signed_bucket(each - own.unsqueeze(-1), *self.buckets)).transpose(2, 3)
        hidden = (each >= whole)[:, None, None]
        return self.global_norm(sums), biases.masked_fill(hidden, torch.finfo(biases.dtype).min)

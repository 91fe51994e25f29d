"""Native sparse attention: three branches of each head read the past coarsely, by choice, and nearby, and gates add them up.

    c_n = sum_i w_i * k_{n d + i},  0 <= i < l,  and values alike         windows of l tokens, one begins every d
    p_tn = softmax_n(q_t c_n / sqrt(K)),  n complete by t
    s_tm = sum of p_tn over the group's heads and over windows n, as much as each overlaps block m
    o_t = g_t^c attn(q_t; c, c^v) + g_t^s attn(q_t; blocks of the largest s_t) + g_t^w attn(q_t; the last W tokens)

On every list are the first block, the token's own and the one before. Each branch has keys and values of its own.

Paper: Yuan et al. 2025, "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
arXiv:2502.11089, section 3. There an MLP with positions inside the window makes one key of l; here it is a learned mean, a
weight for each place and channel, which a step can sum up token by token. At first it is the plain mean, that of fla.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops, summaries
from zoo.kernels.packing import Packing
from zoo.layers import merge_heads, rotary_table, rotate, split_heads, token_positions
from zoo.listed import ListedAttention
from zoo.mixer import State
from zoo.registry import register

FIRST, NEAR = 1, 2  # blocks on every list: at the beginning, and up to the token's own


@strict
class NSAConfig(ZooConfig):
    """Heads, and what the three branches see."""

    model_type = "zoo_nsa"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    block_size: int = 64  # of the blocks that are chosen
    num_blocks: int = 16  # blocks on a list, the first, the own and the one before included
    pool_size: int = 32  # l
    pool_stride: int = 16  # d
    window: int = 512  # W, the own token included
    shared_kv: bool = False  # one set of keys and values for all branches, as in fla
    rope_theta: float = 10000.0  # base of the rotary angles
    qkv_bias: bool = False

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide_heads()

    def validate_blocks(self):
        """Windows begin where blocks do, and the blocks that are always seen fit on the list."""
        self.divide("block_size", "pool_stride")
        self.divide("pool_size", "pool_stride")
        if self.num_blocks < FIRST + NEAR:
            raise ValueError(f"NSAConfig: num_blocks={self.num_blocks} must be {FIRST + NEAR} or more, as so many are always seen")
        if self.window < 1:
            raise ValueError(f"NSAConfig: window={self.window} must be positive")


class NSAMixer(ListedAttention):
    """State: that of `ListedAttention` with `k` and `v` of the chosen blocks and `sums` of the coarse keys; `value_sums` of the
    coarse values, alike; and the ring `window_k`, `window_v` `[B, W, G, K]`."""

    lora_targets = (*ListedAttention.lora_targets, "gate_proj")

    def __init__(self, config: NSAConfig, layer: int):
        super().__init__(config, layer, firsts=FIRST, locals=NEAR, pool=(config.pool_size, config.pool_stride))
        self.reach, self.sets = config.window, 1 if config.shared_kv else 3
        if self.sets > 1:  # side by side: coarse, chosen, near
            self.k_proj, self.v_proj = (
                nn.Linear(config.hidden_size, self.sets * self.groups * self.keys, bias=config.qkv_bias) for _ in range(2)
            )
        self.gate_proj = nn.Linear(config.hidden_size, 3 * self.heads, bias=False)
        self.k_weight = nn.Parameter(torch.empty(config.pool_size, self.keys))
        self.v_weight = nn.Parameter(torch.empty(config.pool_size, self.keys))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.k_weight, self.v_weight):
            init.constant_(weight, 1 / self.pool["size"])

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        rows = self.groups * self.keys
        sets = [slice(first * rows, (first + 1) * rows) for first in range(self.sets)]
        return super().roles() | {name: (name, sets) for name in ("k_proj", "v_proj")}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = super().initial_state(batch, length, dtype, device)
        ring = [torch.zeros(batch, self.reach, self.groups, self.keys, dtype=dtype, device=device) for _ in range(2)]
        return state | {"value_sums": torch.zeros_like(state["sums"]), "window_k": ring[0], "window_v": ring[1]}

    def operator_flops(self, length: int) -> int:
        seen = min(length, self.reach)
        near = seen * (seen + 1) // 2 + (length - seen) * seen
        read = summaries.pairs(length, **self.pool)  # the products with keys count among the scores
        return super().operator_flops(length) + flops(near, self.heads, self.keys, self.keys) + flops(read, self.heads, 0, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        positions = token_positions(x, state["length"] if state else None, packing)
        table = rotary_table(positions, *self.rope)
        q, k = (rotate(split_heads(y, n), table) for y, n in ((self.q_proj(x), self.heads), (self.k_proj(x), self.sets * self.groups)))
        v = split_heads(self.v_proj(x), self.sets * self.groups)
        (coarse_k, chosen_k, near_k), (coarse_v, chosen_v, near_v) = ([y] * 3 if self.sets == 1 else y.chunk(3, dim=2) for y in (k, v))
        o_near, ring = self.attend_near(q, near_k, near_v, positions, state, packing)
        after = cache.append(state, chosen_k, chosen_v, packing=packing)
        places = positions
        if packing is not None:
            q, places = packing.pad(q), packing.pad(positions, -1)
        for name, y, weight in (("sums", coarse_k, self.k_weight), ("value_sums", coarse_v, self.v_weight)):
            after[name] = self.add(state, name, y, positions, after, packing, weight.unsqueeze(1))
        o_coarse = self.read_coarse(q, after, places)
        o_chosen = self.read(q, after, self.choose(q, after["sums"], places), places)
        if packing is not None:
            o_coarse, o_chosen = packing.unpad(o_coarse), packing.unpad(o_chosen)
        gates = torch.sigmoid(split_heads(self.gate_proj(x), self.heads)).split(1, dim=-1)
        o = sum(gate * part for gate, part in zip(gates, (o_coarse, o_chosen, o_near), strict=True))
        return self.out_proj(merge_heads(o)), after | ring

    def attend_near(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """Attention in the window, and its part of the state."""
        ring = {"k": state["window_k"], "v": state["window_v"], "length": state["length"].clone()} if state else None
        keys, values, at, ring = cache.ring_append(ring, k, v, self.reach, packing=packing)
        kept = {"window_k": ring["k"], "window_v": ring["v"]}
        if state is None:
            return ops.attention(q, k, v, window=self.reach, packing=packing)[0], kept
        if packing is not None:
            q, positions = packing.pad(q), packing.pad(positions, -1)
        o, _ = ops.attention(q, keys, values, window=self.reach, q_positions=positions, kv_positions=at)
        return o if packing is None else packing.unpad(o), kept

    def read_coarse(self, q: Tensor, kept: State, positions: Tensor) -> Tensor:
        """Attention to the windows that are complete."""
        k, v = (kept[name].to(q.dtype) for name in ("sums", "value_sums"))
        last = summaries.last_positions(k.shape[1], **self.pool, device=k.device).expand(k.shape[0], -1)
        return ops.attention(q, k, v, q_positions=positions, kv_positions=last)[0]

    def rank(self, q: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
        """Shares of windows, counted once for every stretch of `stride` tokens that a window and a block have in common."""
        parts, reach = self.block // self.pool["stride"], self.pool["size"] // self.pool["stride"]
        place = torch.arange(parts + reach - 1, device=q.device)
        common = torch.minimum(place + 1, parts + reach - 1 - place).clamp(max=min(parts, reach))
        return (self.relevance(q, sums, positions) * common).sum(-1)


register(
    "nsa",
    config=NSAConfig,
    mixer=NSAMixer,
    title="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
    paper="arXiv:2502.11089",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, block_size=4, num_blocks=6, pool_size=4, pool_stride=2,
            window=5, vocab_size=256,
        ),
        "340m": dict(hidden_size=1024, num_hidden_layers=25, num_heads=16, num_kv_heads=4, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=25, num_heads=16, num_kv_heads=2),
    },
)  # fmt: skip

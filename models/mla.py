"""Multi-head latent attention: keys and values of all heads are read from one small vector a token.

    c_t = rmsnorm(W_DKV x_t),    k_t^C = W_UK c_t,    v_t = W_UV c_t,    k_t^R = rotate(W_KR x_t), one for all heads
    o_t = sum_{j <= t} softmax_j(q_t [k_j^C, k_j^R] / sqrt(K)) v_j,    q_t = [q_t^C, rotate(q_t^R)]

Only c_t and k_t^R are kept. Queries may pass a small vector too. Without rotation, as in Kimi Linear, the recurrent layers
around it tell positions.

Papers: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2.1; Kimi Linear, arXiv:2510.26692.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, merge_heads, rotary_table, rotate, split_heads, token_positions
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register

EPS = 1e-6  # of the norms over the small vectors, in all published models


@strict
class MLAConfig(ZooConfig):
    """Sizes of the small vectors and of the heads."""

    model_type = "zoo_mla"

    num_heads: int = 16  # H
    kv_rank: int = 512  # width of c_t
    q_rank: int | None = None  # width of the queries' own small vector; None: projected at once
    key_dim: int = 128  # channels of a head read from c_t
    shared_key_dim: int = 64  # channels of the key all heads share, the ones that turn; K is the sum of both
    value_dim: int = 128  # V
    rope_theta: float | None = 10000.0  # base of the rotary angles; None: no rotary positions
    bias: bool = False  # of the projections to the small vectors, and of the output's


class MLAMixer(Mixer):
    """State: `k` `[B, L, 1, kv_rank]` the small vectors, `v` `[B, L, 1, shared_key_dim]` the shared keys, `length` `[B]`, `bound`.

    L grows in steps with the sequence; `bound` `[B, T, 0]` says by its shape how many tokens there may be.
    """

    traits = Traits(constant_state=False)
    lora_targets = ("q_proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "out_proj")

    def __init__(self, config: MLAConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.theta = config.hidden_size, config.num_heads, config.rope_theta
        self.rank, self.keys, self.turning, self.values = config.kv_rank, config.key_dim, config.shared_key_dim, config.value_dim
        inner = self.heads * (self.keys + self.turning)
        if config.q_rank is None:
            self.q_proj = nn.Linear(width, inner, bias=False)
            self.lora_targets = tuple(name for name in self.lora_targets if name not in ("q_down_proj", "q_up_proj"))
        else:
            self.q_proj = None
            self.q_down_proj = nn.Linear(width, config.q_rank, bias=config.bias)
            self.q_norm = RMSNorm(config.q_rank, EPS)
            self.q_up_proj = nn.Linear(config.q_rank, inner, bias=False)
            self.lora_targets = tuple(name for name in self.lora_targets if name != "q_proj")
        self.kv_down_proj = nn.Linear(width, self.rank + self.turning, bias=config.bias)
        self.kv_norm = RMSNorm(self.rank, EPS)
        self.kv_up_proj = nn.Linear(self.rank, self.heads * (self.keys + self.values), bias=False)
        self.out_proj = nn.Linear(self.heads * self.values, width, bias=config.bias)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        slots, sizes = cache.capacity(length), (self.rank, self.turning)
        k, v = (torch.zeros(batch, slots, 1, size, dtype=dtype, device=device) for size in sizes)
        return {"k": k, "v": v, "length": torch.zeros(batch, dtype=torch.long, device=device), "bound": k.new_empty(batch, 0, 0)}

    def operator_flops(self, length: int) -> int:
        return flops(length * (length + 1) // 2, self.heads, self.keys + self.turning, self.values)

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, T, H, K]` and values `[B, T, H, V]` from what is kept of the tokens."""
        k, v = split_heads(self.kv_up_proj(latent.squeeze(2)), self.heads).split([self.keys, self.values], dim=-1)
        return torch.cat([k, shared.expand(-1, -1, self.heads, -1)], dim=-1), v

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        positions = token_positions(x, state["length"] if state else None, packing)
        q = self.q_up_proj(self.q_norm(self.q_down_proj(x))) if self.q_proj is None else self.q_proj(x)
        q = split_heads(q, self.heads)
        latent, shared = self.kv_down_proj(x).unsqueeze(2).split([self.rank, self.turning], dim=-1)
        latent = self.kv_norm(latent)
        if self.theta is not None:
            table = rotary_table(positions, self.turning, self.theta)
            still, turning = q.split([self.keys, self.turning], dim=-1)
            q, shared = torch.cat([still, rotate(turning, table)], dim=-1), rotate(shared, table)
        after = cache.append(state, latent, shared, packing=packing)
        if state is None:
            o, _ = ops.attention(q, *self.expand(latent, shared), packing=packing)
            return self.out_proj(merge_heads(o)), after
        if packing is not None:
            q, positions = packing.pad(q), packing.pad(positions, -1)
        keys, values = self.expand(after["k"], after["v"])
        o, _ = ops.attention(q, keys, values, q_positions=positions, kv_positions=cache.positions(after))
        return self.out_proj(merge_heads(o if packing is None else packing.unpad(o))), after


register(
    "mla",
    config=MLAConfig,
    mixer=MLAMixer,
    title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    paper="arXiv:2405.04434",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, kv_rank=16, q_rank=16, key_dim=8, shared_key_dim=4, value_dim=8,
            vocab_size=256,
        ),
        "340m": dict(
            hidden_size=1024, num_hidden_layers=24, num_heads=16, kv_rank=256, key_dim=64, shared_key_dim=32, value_dim=64,
            tie_word_embeddings=True,
        ),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=23, num_heads=16),
    },
)  # fmt: skip

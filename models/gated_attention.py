"""Softmax attention whose output is gated, channel by channel, by the token that asks.

    o_t = sum_{j <= t} softmax_j(q_t k_j / sqrt(K)) v_j,    y_t = W_O (o_t * sigmoid(W_G x_t))

Each head of q and k is normalised, then its first channels are rotated. The gate lets a head say nothing, so that no token
has to serve as a sink of attention.

Paper: Qiu et al. 2025, "Gated Attention for Large Language Models", arXiv:2505.06708: the gate after the softmax, one number
for every channel, in section 2.2. Sizes and partial rotation as in Qwen3-Next.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo.attending import AttentionMixer
from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, check_rope_scaling, merge_heads, rotary_table, rotate, split_heads, token_positions
from zoo.mixer import State
from zoo.registry import register


@strict
class GatedAttentionConfig(ZooConfig):
    """Sizes of the heads, and the rotation."""

    model_type = "zoo_gated_attention"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_fraction: float = 1.0  # share of a head's channels that turn
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    bias: bool = False  # of the projections, the gate's too

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide_heads()

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class GatedAttentionMixer(AttentionMixer):
    """Gated softmax attention; the state is that of `AttentionMixer`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: GatedAttentionConfig, layer: int):
        keys = config.head_dim or config.divide("hidden_size", "num_heads")
        super().__init__(config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys)
        self.rope = int(keys * config.rope_fraction) // 2 * 2, config.rope_theta, config.rope_scaling
        width, own, shared = config.hidden_size, self.heads * keys, self.groups * keys
        self.q_proj = nn.Linear(width, own, bias=config.bias)
        self.k_proj = nn.Linear(width, shared, bias=config.bias)
        self.v_proj = nn.Linear(width, shared, bias=config.bias)
        self.gate_proj = nn.Linear(width, own, bias=config.bias)
        self.out_proj = nn.Linear(own, width, bias=config.bias)
        self.q_norm, self.k_norm = (RMSNorm(keys, config.norm_eps, config.norm == "unit_rmsnorm") for _ in range(2))

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        positions = token_positions(x, state["length"] if state else None, packing)
        table = rotary_table(positions, *self.rope)
        q = rotate(self.q_norm(split_heads(self.q_proj(x), self.heads)), table)
        k = rotate(self.k_norm(split_heads(self.k_proj(x), self.groups)), table)
        o, state = self.attend(q, k, split_heads(self.v_proj(x), self.groups), positions, state, packing)
        return self.out_proj(merge_heads(o) * torch.sigmoid(self.gate_proj(x))), state


register(
    "gated_attention",
    config=GatedAttentionConfig,
    mixer=GatedAttentionMixer,
    title="Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
    paper="arXiv:2505.06708",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=22, num_heads=16, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=21, num_heads=16),
    },
)

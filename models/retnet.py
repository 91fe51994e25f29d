"""RetNet: linear attention that decays at a fixed rate per head.

    S_t = gamma_h S_{t-1} + k_t v_t^T,    o_t = q_t S_t / sqrt(K),    gamma_h = 1 - 2^(-5 - h)
    y_t = (swish(W_G x_t) * groupnorm_h(o_t)) W_O

with q and k rotated by their positions (the factor exp(i n theta) of eq. 5).

Paper: Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei 2023, arXiv:2307.08621: recurrence eq. 6, heads, norm and gate eq. 8. The
factors of section 2.2 that rescale retention scores cancel in the norm over each head, but for its epsilon.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import GATED_MLP, SHELL, UNFUSED, fla_layout, layer
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, merge_heads, rotary_table, rotate, split_heads, token_positions
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class RetNetConfig(ZooConfig):
    """Sizes of the heads, and the two choices in which published weights differ."""

    model_type = "zoo_retnet"

    channel_mixer: str | None = "mlp"
    norm: str = "layernorm"

    num_heads: int = 8
    value_ratio: float = 2.0  # V = D * value_ratio / H; K = D / H
    rope_theta: float = 10000.0  # the slowest angle turns by 1 / rope_theta per token
    rope_inclusive: bool = True  # angles from 1 to 1 / rope_theta, both included (the authors' code); False: RoPE's, without the last
    norm_weight: bool = True  # a weight [V] in the norm over each head

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None and self.channel_mixer == "mlp":
            self.intermediate_size = 2 * self.hidden_size  # half as wide as usual: the values take the parameters
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly and have channels to turn."""
        keys = self.divide("hidden_size", "num_heads")
        if keys % 2 or keys < 4:
            raise ValueError(f"RetNetConfig: hidden_size / num_heads is {keys}; rotation needs an even number of 4 channels or more")
        if int(self.hidden_size * self.value_ratio) % self.num_heads:
            raise ValueError(f"RetNetConfig: hidden_size * value_ratio={self.value_ratio} is not divisible by num_heads={self.num_heads}")


class RetNetMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and `length` `[B]`, the tokens seen."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: RetNetConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads = config.hidden_size, config.num_heads
        self.keys, self.values = width // self.heads, int(width * config.value_ratio) // self.heads
        # angles theta^(-i / (K/2 - 1)) are RoPE's theta^(-i / (K/2)) of a larger theta
        self.theta = config.rope_theta ** (self.keys / (self.keys - 2)) if config.rope_inclusive else config.rope_theta
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, self.heads * self.values, bias=False)
        self.gate_proj = nn.Linear(width, self.heads * self.values, bias=False)
        self.norm = GatedNorm(self.values, eps=config.norm_eps, elementwise=config.norm_weight)
        self.out_proj = nn.Linear(self.heads * self.values, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)
        return {"memory": memory, "length": torch.zeros(batch, dtype=torch.long, device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v, gate = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj))
        seen = state["length"] if state else None
        table = rotary_table(token_positions(x, seen, packing), self.keys, self.theta)
        log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads, device=x.device)))
        memory = state["memory"] if state else None
        o, memory = ops.linear_attention(rotate(q, table), rotate(k, table), v, log_decay, state=memory, packing=packing)
        added = torch.full((x.shape[0],), x.shape[1], device=x.device) if packing is None else packing.cu_seqlens.diff()
        return self.out_proj(merge_heads(self.norm(o, gate))), {"memory": memory, "length": added if seen is None else seen + added}


LAYOUTS = (
    fla_layout(
        "retnet",
        "RetNet",
        (
            layer("attn.{q,k,v,g,o}_proj.weight", "mixer.{q,k,v,gate,out}_proj.weight"),
            layer("attn.g_norm_swish_gate.weight", "mixer.norm.weight"),
            *GATED_MLP,
            *SHELL,
        ),
        same={"num_heads": "num_heads", "value_ratio": "expand_v", "norm_weight": "elementwise_affine"},
        defaults={"num_heads": 8, "expand_v": 2.0, "elementwise_affine": True, "hidden_ratio": 2},
        only={
            "expand_k": (1.0,), "num_kv_heads": (None,), "feature_map": (None,), "use_short_conv": (False,),
            "use_output_gate": (True,),
        },
        read=lambda foreign: {"rope_inclusive": False},
        aliases=(UNFUSED,),
        trials={"plain": {"num_heads": 4, "expand_v": 1.5}, "weightless": {"num_heads": 2, "elementwise_affine": False}},
    ),
)  # fmt: skip


register(
    "retnet",
    config=RetNetConfig,
    mixer=RetNetMixer,
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    paper="arXiv:2307.08621",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=4, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_heads=8),
        "2.7b": dict(hidden_size=2560, num_hidden_layers=32, num_heads=10),
    },
    layouts=LAYOUTS,
)

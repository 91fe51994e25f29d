"""Gated Linear Attention: a matrix memory that forgets channel by channel.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = q_t S_t / sqrt(K)              (eq. 3)
    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau)
    y_t = (swish(W_r x_t) * rmsnorm(o_t)) W_O

Paper: Yang, Wang, Shen, Panda, Kim 2024, arXiv:2312.06635: recurrence eq. 3, gate and output in section 4.4.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import GATED_MLP, SHELL, UNFUSED, fla_layout, layer
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, LowRank, merge_heads, split_heads, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class GLAConfig(ZooConfig):
    """What the paper leaves open."""

    model_type = "zoo_gla"

    num_heads: int = 4
    key_ratio: float = 0.5  # K = D * key_ratio / H
    value_ratio: float = 1.0  # V = D * value_ratio / H
    gate_rank: int = 16  # rank of the decay's projection
    gate_temperature: float = 16.0  # tau; larger forgets slower


class GLAMixer(Mixer):
    """State: `memory` `[B, H, K, V]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: GLAConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.temperature = config.hidden_size, config.num_heads, config.gate_temperature
        keys, values = int(width * config.key_ratio), int(width * config.value_ratio)
        if keys % self.heads or values % self.heads:
            raise ValueError(f"GLAConfig: {keys} key and {values} value channels are not divisible by num_heads={self.heads}")
        self.keys, self.values = keys // self.heads, values // self.heads
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.decay_proj = LowRank(width, config.gate_rank, keys)
        self.gate_proj = nn.Linear(width, values, bias=False)
        self.norm = GatedNorm(self.values, eps=config.norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {"memory": torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v, gate = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj))
        log_decay = split_heads(F.logsigmoid(wide(self.decay_proj(x))) / self.temperature, self.heads)
        o, memory = ops.linear_attention(q, k, v, log_decay, state=state["memory"] if state else None, packing=packing)
        return self.out_proj(merge_heads(self.norm(o, gate))), {"memory": memory}


LAYOUTS = (
    fla_layout(
        "gla",
        "GLA",
        (
            layer("attn.{q,k,v,g,o}_proj.weight", "mixer.{q,k,v,gate,out}_proj.weight"),
            layer("attn.gk_proj.0.weight", "mixer.decay_proj.down.weight"),
            layer("attn.gk_proj.1.{weight,bias}", "mixer.decay_proj.up.{weight,bias}"),
            layer("attn.g_norm_swish_gate.weight", "mixer.norm.weight"),
            *GATED_MLP,
            *SHELL,
        ),
        same={"num_heads": "num_heads", "key_ratio": "expand_k", "value_ratio": "expand_v"},
        defaults={"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0},
        only={
            "num_kv_heads": (None,), "feature_map": (None,), "use_short_conv": (False,), "use_output_gate": (True,),
            "clamp_min": (None,), "elementwise_affine": (True,), "use_gk": (True,), "use_gv": (False,),
        },
        aliases=(UNFUSED,),
    ),
)  # fmt: skip


register(
    "gla",
    config=GLAConfig,
    mixer=GLAMixer,
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    paper="arXiv:2312.06635",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
    },
    layouts=LAYOUTS,
)

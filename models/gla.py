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
from zoo.fla import CONVOLUTION, GATED_MLP, SHELL, UNFUSED, convolutions, fla_layout, layer, read_convolution, write_convolution
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, LowRank, ShortConv, convolve_together, merge_heads, projected_sizes, split_heads, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class GLAConfig(ZooConfig):
    """What the paper leaves open."""

    model_type = "zoo_gla"

    num_heads: int = 4  # H
    num_kv_heads: int | None = None  # G, each with its decays shared by H / G query heads; None: one for each
    key_ratio: float = 0.5  # K = D * key_ratio / H
    value_ratio: float = 1.0  # V = D * value_ratio / H
    gate_rank: int = 16  # rank of the decay's projection
    gate_temperature: float = 16.0  # tau; larger forgets slower
    conv_kernel: int | None = None  # W, tokens the short convolution of q, k and v sees; None or 0: no convolution

    def validate_heads(self):
        """Heads must divide evenly."""
        projected_sizes(self)


class GLAMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and with a convolution `conv`, its last inputs."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: GLAConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups = config.hidden_size, config.num_heads, config.num_kv_heads or config.num_heads
        self.temperature, sizes = config.gate_temperature, projected_sizes(config)
        q, k, v = sizes
        self.keys, self.values = q // self.heads, v // self.groups
        self.q_proj = nn.Linear(width, q, bias=False)
        self.k_proj = nn.Linear(width, k, bias=False)
        self.v_proj = nn.Linear(width, v, bias=False)
        self.conv = ShortConv(sum(sizes), config.conv_kernel) if config.conv_kernel else None
        self.decay_proj = LowRank(width, config.gate_rank, k)
        self.gate_proj = nn.Linear(width, self.heads * self.values, bias=False)
        self.norm = GatedNorm(self.values, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.heads * self.values, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = {"memory": torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)}
        return state if self.conv is None else state | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        *parts, gate = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj))
        after = {}
        if self.conv is not None:
            parts, after = convolve_together(tuple(parts), self.conv, state, packing)
        q, k, v = (split_heads(part, heads) for part, heads in zip(parts, (self.heads, self.groups, self.groups), strict=True))
        log_decay = split_heads(F.logsigmoid(wide(self.decay_proj(x))) / self.temperature, self.groups)
        if self.groups < self.heads:
            log_decay = log_decay.repeat_interleave(self.heads // self.groups, dim=2)
        o, after["memory"] = ops.linear_attention(q, k, v, log_decay, state=state["memory"] if state else None, packing=packing)
        return self.out_proj(merge_heads(self.norm(o, split_heads(gate, self.heads)))), after


LAYOUTS = (
    fla_layout(
        "gla",
        "GLA",
        (
            layer("attn.{q,k,v,g,o}_proj.weight", "mixer.{q,k,v,gate,out}_proj.weight"),
            layer("attn.gk_proj.0.weight", "mixer.decay_proj.down.weight"),
            layer("attn.gk_proj.1.{weight,bias}", "mixer.decay_proj.up.{weight,bias}"),
            layer("attn.g_norm_swish_gate.weight", "mixer.norm.weight"),
            convolutions(projected_sizes),
            *GATED_MLP,
            *SHELL,
        ),
        same={"num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "key_ratio": "expand_k", "value_ratio": "expand_v"},
        defaults={"num_heads": 4, "num_kv_heads": None, "expand_k": 0.5, "expand_v": 1.0} | CONVOLUTION | {"use_short_conv": False},
        only={
            "feature_map": (None,), "use_output_gate": (True,),
            "clamp_min": (None,), "elementwise_affine": (True,), "use_gk": (True,), "use_gv": (False,),
        },
        read=read_convolution,
        write=write_convolution,
        aliases=(UNFUSED,),
        trials={
            "plain": {"num_heads": 2},
            "grouped": {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "use_short_conv": True, "conv_size": 3},
        },
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

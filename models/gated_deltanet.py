"""Gated DeltaNet: a matrix memory that decays as a whole and replaces what it holds under a key.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = q_t S_t / sqrt(K)     (eq. 10, transposed)
    log alpha_t = -exp(A) softplus(W_a x_t + b),    beta_t = sigmoid(W_b x_t)
    y_t = W_O (rmsnorm(o_t) * silu(W_g x_t))

Queries and keys pass a short convolution and SiLU and have length one, values pass the convolution and SiLU.

Paper: Yang, Kautz, Hatamizadeh 2024, arXiv:2412.06464: recurrence eq. 10, the block in figure 1. Grouped value heads as in
Qwen3-Next; beta up to two, for negative eigenvalues, after arXiv:2411.12537.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import CONVOLUTION, GATED_MLP, SHELL, SILU, convolutions, fla_layout, layer, read_convolution, write_convolution
from zoo.kernels.checks import accumulator
from zoo.kernels.delta_rule import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, ShortConv, SoftplusDecay, convolve_together, merge_heads, split_heads, unit_length, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class GatedDeltaNetConfig(ZooConfig):
    """Sizes of the heads, and the parts that published models leave out or add."""

    model_type = "zoo_gated_deltanet"

    num_heads: int = 6  # of queries and keys
    num_v_heads: int | None = None  # H, of values and memories; None: num_heads
    head_dim: int = 256  # K
    value_ratio: float = 2.0  # V = K * value_ratio
    conv_kernel: int | None = 4  # W, tokens the short convolution sees; None or 0: no convolution
    use_gate: bool = True  # gate the output
    allow_negative_eigenvalues: bool = False  # beta reaches 2 instead of 1
    output_norm_eps: float | None = None  # None: norm_eps

    def validate_heads(self):
        """Value heads must share query heads evenly, and have whole channels."""
        if self.num_v_heads is not None:
            self.divide("num_v_heads", "num_heads")
        if self.head_dim * self.value_ratio % 1:
            raise ValueError(f"GatedDeltaNetConfig: head_dim={self.head_dim} times value_ratio={self.value_ratio} is no whole number")


class GatedDeltaNetMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and `conv`, the last inputs of the convolution over q, k and v, `[B, W - 1, .]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: GatedDeltaNetConfig, layer: int):
        super().__init__(config, layer)
        width, self.groups, self.heads = config.hidden_size, config.num_heads, config.num_v_heads or config.num_heads
        self.keys, self.values = config.head_dim, int(config.head_dim * config.value_ratio)
        self.sizes = [self.groups * self.keys, self.groups * self.keys, self.heads * self.values]
        self.largest_beta = 2.0 if config.allow_negative_eigenvalues else 1.0
        self.q_proj = nn.Linear(width, self.sizes[0], bias=False)
        self.k_proj = nn.Linear(width, self.sizes[1], bias=False)
        self.v_proj = nn.Linear(width, self.sizes[2], bias=False)
        self.conv = ShortConv(sum(self.sizes), config.conv_kernel) if config.conv_kernel else None
        self.beta_proj = nn.Linear(width, self.heads, bias=False)
        self.decay_proj = nn.Linear(width, self.heads, bias=False)
        self.decay = SoftplusDecay(self.heads, least=1e-4)
        self.gate_proj = nn.Linear(width, self.sizes[2], bias=False) if config.use_gate else None
        self.norm = GatedNorm(self.values, eps=config.output_norm_eps or config.norm_eps)
        self.out_proj = nn.Linear(self.sizes[2], width, bias=False)
        if not config.use_gate:
            self.lora_targets = tuple(name for name in self.lora_targets if name != "gate_proj")

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = {"memory": torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)}
        return state if self.conv is None else state | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        beta = self.largest_beta * wide(self.beta_proj(x)).sigmoid()
        log_decay = self.decay(self.decay_proj(x))
        gate = None if self.gate_proj is None else split_heads(self.gate_proj(x), self.heads)
        (q, k, v), after = convolve_together(parts, self.conv, state, packing)
        q, k = (unit_length(split_heads(t, self.groups)) for t in (q, k))
        o, after["memory"] = ops.delta_rule(
            q, k, split_heads(v, self.heads), beta, log_decay, state=state["memory"] if state else None, packing=packing
        )
        return self.out_proj(merge_heads(self.norm(o, gate))), after


def conv_sizes(config: GatedDeltaNetConfig) -> list[int]:
    """Widths of queries, keys and values."""
    keys = config.num_heads * config.head_dim
    return [keys, keys, (config.num_v_heads or config.num_heads) * int(config.head_dim * config.value_ratio)]


LAYOUTS = (
    fla_layout(
        "gated_deltanet",
        "GatedDeltaNet",
        (
            layer("attn.{q,k,v,a,b,g,o}_proj.weight", "mixer.{q,k,v,decay,beta,gate,out}_proj.weight"),
            layer("attn.{A_log,dt_bias}", "mixer.decay.{A_log,dt_bias}"),
            layer("attn.o_norm.weight", "mixer.norm.weight"),
            convolutions(conv_sizes),
            *GATED_MLP,
            *SHELL,
        ),
        same={
            "num_heads": "num_heads", "num_v_heads": "num_v_heads", "head_dim": "head_dim", "value_ratio": "expand_v",
            "use_gate": "use_gate", "allow_negative_eigenvalues": "allow_neg_eigval",
        },
        defaults={
            "num_hidden_layers": 21, "num_heads": 6, "num_v_heads": None, "head_dim": 256, "expand_v": 2.0, "use_gate": True,
            "allow_neg_eigval": False,
        } | CONVOLUTION,
        only={"output_gate_activation": SILU, "share_conv_kernel": (False,)},
        read=read_convolution,
        write=write_convolution,
    ),
)  # fmt: skip


register(
    "gated_deltanet",
    config=GatedDeltaNetConfig,
    mixer=GatedDeltaNetMixer,
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    paper="arXiv:2412.06464",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, num_v_heads=4, head_dim=8, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=21, num_heads=3, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=21),
    },
    layouts=LAYOUTS,
)

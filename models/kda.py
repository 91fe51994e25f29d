"""Kimi Delta Attention: the delta rule on a matrix memory that forgets channel by channel.

    S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T,    o_t = q_t S_t / sqrt(K)     (eq. 1)
    log alpha_t = -exp(A) softplus(W_2 W_1 x_t + b),    beta_t = sigmoid(W_b x_t)
    y_t = W_O (rmsnorm(o_t) * sigmoid(W_4 W_3 x_t))

Queries and keys pass a short convolution and SiLU and have length one, values pass the convolution and SiLU; the decay and
the output gate come through projections of the rank of one head.

Paper: Kimi Team 2025, "Kimi Linear", arXiv:2510.26692: recurrence eq. 1, parameterisation in section 4. beta up to two, for
negative eigenvalues, after arXiv:2411.12537.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import CONVOLUTION, GATED_MLP, SHELL, convolutions, fla_layout, layer, read_convolution, write_convolution
from zoo.kernels.checks import accumulator
from zoo.kernels.delta_rule import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, LowRank, ShortConv, SoftplusDecay, convolve_together, merge_heads, split_heads, unit_length, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class KDAConfig(ZooConfig):
    """Sizes of the heads, and where published models differ."""

    model_type = "zoo_kda"

    num_heads: int = 16  # H
    head_dim: int = 128  # K
    value_ratio: float = 1.0  # V = K * value_ratio
    conv_kernel: int | None = 4  # W, tokens the short convolution sees; None or 0: no convolution
    gate_bias: bool = False  # a bias in the output gate
    allow_negative_eigenvalues: bool = False  # beta reaches 2 instead of 1
    decay_bound: float | None = None  # negative: log alpha = decay_bound sigmoid(exp(A) (W_2 W_1 x + b)), which stays above it

    def validate_heads(self):
        """Heads must have whole value channels, and decays forget."""
        if self.decay_bound is not None and self.decay_bound >= 0:
            raise ValueError(f"KDAConfig: decay_bound={self.decay_bound} must be negative, or None")
        if self.head_dim * self.value_ratio % 1:
            raise ValueError(f"KDAConfig: head_dim={self.head_dim} times value_ratio={self.value_ratio} is no whole number")


class BoundedDecay(SoftplusDecay):
    """Log-decay `bound sigmoid(exp(A_log) (x + dt_bias))`, never below `bound`; A starts at one."""

    def __init__(self, heads: int, channels: int, bound: float):
        self.bound = bound
        super().__init__(heads, channels)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.zeros_(self.A_log)

    def forward(self, x: Tensor) -> Tensor:
        step = split_heads(wide(x) + wide(self.dt_bias), self.heads)
        return self.bound * torch.sigmoid(wide(self.A_log).exp().unsqueeze(-1) * step)


class KDAMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and `conv`, the last inputs of the convolution over q, k and v, `[B, W - 1, .]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: KDAConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads = config.hidden_size, config.num_heads
        self.keys, self.values = config.head_dim, int(config.head_dim * config.value_ratio)
        keys, values = self.heads * self.keys, self.heads * self.values
        self.largest_beta = 2.0 if config.allow_negative_eigenvalues else 1.0
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.conv = ShortConv(2 * keys + values, config.conv_kernel) if config.conv_kernel else None
        self.beta_proj = nn.Linear(width, self.heads, bias=False)
        self.decay_proj = LowRank(width, self.values, keys, bias=False)
        bound = config.decay_bound
        self.decay = SoftplusDecay(self.heads, self.keys) if bound is None else BoundedDecay(self.heads, self.keys, bound)
        self.gate_proj = LowRank(width, self.values, values, bias=config.gate_bias)
        self.norm = GatedNorm(self.values, eps=config.norm_eps, activation="sigmoid")
        self.out_proj = nn.Linear(values, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = {"memory": torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)}
        return state if self.conv is None else state | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        parts, after = convolve_together(parts, self.conv, state, packing)
        q, k, v = (split_heads(t, self.heads) for t in parts)
        beta = self.largest_beta * wide(self.beta_proj(x)).sigmoid()
        log_decay = self.decay(self.decay_proj(x))
        memory = state["memory"] if state else None
        o, after["memory"] = ops.delta_rule(unit_length(q), unit_length(k), v, beta, log_decay, state=memory, packing=packing)
        return self.out_proj(merge_heads(self.norm(o, split_heads(self.gate_proj(x), self.heads)))), after


def conv_sizes(config: KDAConfig) -> list[int]:
    """Widths of queries, keys and values."""
    keys = config.num_heads * config.head_dim
    return [keys, keys, config.num_heads * int(config.head_dim * config.value_ratio)]


def read_kda(foreign: dict) -> dict:
    """Our fields of a KDA in flash-linear-attention, whose output gate has a bias."""
    if foreign["num_v_heads"] not in (None, foreign["num_heads"]):
        raise ValueError(f"a kda with num_v_heads={foreign['num_v_heads']} beside num_heads={foreign['num_heads']} is not supported")
    if foreign["safe_gate"] and foreign["lower_bound"] is None:
        raise ValueError("a kda with safe_gate=True has no lower_bound; give it one, -5 is usual")
    return {"gate_bias": True} | read_convolution(foreign)


def write_kda(config: KDAConfig) -> dict:
    """The inverse; `safe_gate` chooses kernels for bounds that they can take."""
    return {"safe_gate": config.decay_bound is not None and config.decay_bound >= -5} | write_convolution(config)


LAYOUTS = (
    fla_layout(
        "kda",
        "KDA",
        (
            layer("attn.{q,k,v,b,o}_proj.weight", "mixer.{q,k,v,beta,out}_proj.weight"),
            layer("attn.{f,g}_proj.{0,1}.weight", "mixer.{decay,gate}_proj.{down,up}.weight"),
            layer("attn.g_proj.1.bias", "mixer.gate_proj.up.bias"),
            layer("attn.{A_log,dt_bias}", "mixer.decay.{A_log,dt_bias}"),
            layer("attn.o_norm.weight", "mixer.norm.weight"),
            convolutions(conv_sizes),
            *GATED_MLP,
            *SHELL,
        ),
        same={
            "num_heads": "num_heads", "head_dim": "head_dim", "value_ratio": "expand_v",
            "allow_negative_eigenvalues": "allow_neg_eigval", "decay_bound": "lower_bound",
        },
        defaults={
            "num_heads": 16, "num_v_heads": None, "head_dim": 128, "expand_v": 1.0, "allow_neg_eigval": False, "safe_gate": False,
            "lower_bound": None,
        } | CONVOLUTION,
        only={"share_conv_kernel": (False,)},
        read=read_kda,
        write=write_kda,
        trials={
            "wide": {"num_heads": 2, "head_dim": 8, "expand_v": 1.5},
            "unconvolved": {"num_heads": 4, "head_dim": 8, "use_short_conv": False},
            "bounded": {"num_heads": 2, "head_dim": 8, "safe_gate": True, "lower_bound": -5.0},
        },
    ),
)  # fmt: skip


register(
    "kda",
    config=KDAConfig,
    mixer=KDAMixer,
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    paper="arXiv:2510.26692",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=8, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=8, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
    },
    layouts=LAYOUTS,
)

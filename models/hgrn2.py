"""HGRN2: a gated linear RNN whose state is expanded by outer products, its input gate being one minus the forget gate.

    f_t = gamma + (1 - gamma) sigmoid(W_f x_t),    k_t = 1 - f_t
    S_t = diag(f_t) S_{t-1} + k_t v_t^T,    o_t = swish(W_q x_t) S_t / sqrt(K)
    y_t = rmsnorm(o_t) W_O,    the norm over all heads at once

gamma is a learned lower bound of the forget gate, growing from layer to layer so that upper layers remember longer. The
authors tie the bounds of all layers by a cumulative softmax; here each layer owns the logit of its bound (the first, whose
bound is zero, has none). Any bounds of theirs can be written so, and initially layer l of L has l / L in both.

Papers: Qin, Yang, Sun, Shen, Li, Sun, Zhong 2024, arXiv:2404.07904, section 3; the bounds are those of HGRN,
arXiv:2311.04823, section 3.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import CONVOLUTION, GATED_MLP, SHELL, convolutions, fla_layout, layer, read_convolution, shared_bounds, write_convolution
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, ShortConv, bounded_gates, convolve_together, merge_heads, split_heads
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class HGRN2Config(ZooConfig):
    """How far the state is expanded, and the convolution before it."""

    model_type = "zoo_hgrn2"

    expansion: int = 128  # K = V: every channel of the width has this many numbers of state; H = D / K
    conv_kernel: int | None = None  # W, tokens the short convolution of q, the gates and v sees; None or 0: no convolution

    def validate_expansion(self):
        """The expansion must divide the width."""
        self.divide("hidden_size", "expansion")


class HGRN2Mixer(Mixer):
    """State: `memory` `[B, H, K, K]`, and with a convolution `conv`, its last inputs `[B, W - 1, 3 D]`."""

    lora_targets = ("q_proj", "forget_proj", "v_proj", "out_proj")

    def __init__(self, config: HGRN2Config, layer: int):
        super().__init__(config, layer)
        width, self.keys = config.hidden_size, config.expansion
        self.heads = config.divide("hidden_size", "expansion")
        self.first_bound = layer / config.num_hidden_layers
        self.q_proj = nn.Linear(width, width, bias=False)
        self.forget_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.conv = ShortConv(3 * width, config.conv_kernel, activation=None) if config.conv_kernel else None
        self.bound_logit = nn.Parameter(torch.empty(width)) if layer else None
        self.norm = RMSNorm(width, config.norm_eps)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bound_logit is not None:
            init.constant_(self.bound_logit, math.log(self.first_bound / (1 - self.first_bound)))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = {"memory": torch.zeros(batch, self.heads, self.keys, self.keys, dtype=accumulator(dtype), device=device)}
        return state if self.conv is None else state | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        parts, after = (self.q_proj(x), self.forget_proj(x), self.v_proj(x)), {}
        if self.conv is not None:
            parts, after = convolve_together(parts, self.conv, state, packing)
        log_forget, write = bounded_gates(parts[1], self.bound_logit)
        tensors = (F.silu(parts[0]), write.to(parts[2].dtype), parts[2], log_forget)
        q, k, v, log_decay = (split_heads(t, self.heads) for t in tensors)
        o, after["memory"] = ops.linear_attention(q, k, v, log_decay, state=state["memory"] if state else None, packing=packing)
        return self.out_proj(self.norm(merge_heads(o))), after


RULES = (
    layer("attn.{q,f,i,o}_proj.weight", "mixer.{q,forget,v,out}_proj.weight"),
    layer("attn.g_norm.weight", "mixer.norm.weight"),
    convolutions(lambda config: [config.hidden_size] * 3, "qfi"),
    *GATED_MLP,
    *SHELL,
)


def read_hgrn2(foreign: dict) -> dict:
    """Our fields of the state and of the convolution."""
    return {"expansion": foreign["expand_ratio"] or foreign["hidden_size"] // foreign["num_heads"]} | read_convolution(foreign)


def write_hgrn2(config: HGRN2Config) -> dict:
    """The inverse."""
    heads = config.divide("hidden_size", "expansion")
    return {"expand_ratio": config.expansion, "num_heads": heads} | write_convolution(config)


LAYOUTS = (
    fla_layout(
        "hgrn2",
        "HGRN2",
        lambda config: (*RULES, shared_bounds(config)),
        defaults={"num_heads": None, "expand_ratio": 128} | CONVOLUTION | {"use_short_conv": False},
        only={"use_lower_bound": (True,), "elementwise_affine": (True,)},
        read=read_hgrn2,
        write=write_hgrn2,
        trials={"plain": {"expand_ratio": 8}, "convolved": {"expand_ratio": 16, "use_short_conv": True, "conv_size": 3}},
    ),
)


register(
    "hgrn2",
    config=HGRN2Config,
    mixer=HGRN2Mixer,
    title="HGRN2: Gated Linear RNNs with State Expansion",
    paper="arXiv:2404.07904",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, expansion=16, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
        "2.7b": dict(hidden_size=2560, num_hidden_layers=32),
    },
    layouts=LAYOUTS,
)

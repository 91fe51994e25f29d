"""HGRN: an elementwise gated linear RNN whose forget gates are bounded from below, higher in upper layers.

    f_t = gamma + (1 - gamma) sigmoid(W_f x_t)
    h_t = f_t h_{t-1} + (1 - f_t) swish(W_i x_t)
    y_t = (rmsnorm(h_t) * swish(W_g x_t)) W_O

gamma is the layer's learned lower bound. The authors tie the bounds of all layers by a cumulative softmax; here each layer
owns the logit of its bound (the first, whose bound is zero, has none), which can express any bounds of theirs.

Paper: Qin, Yang, Zhong 2023, arXiv:2311.04823, section 3. The published language models use the real-valued recurrence.
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
from zoo.kernels.packing import Packing
from zoo.kernels.scan import flops
from zoo.layers import GatedNorm, ShortConv, bounded_gates, convolve_together, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class HGRNConfig(ZooConfig):
    """Width of the recurrence, and of the convolution before it."""

    model_type = "zoo_hgrn"

    expand: float = 1.0  # inner width = D * expand
    conv_kernel: int | None = None  # W, tokens the short convolution before the gates sees; None or 0: no convolution


class HGRNMixer(Mixer):
    """State: `hidden` `[B, inner]`, and with a convolution `conv`, its last inputs `[B, W - 1, 2 inner]`."""

    lora_targets = ("input_proj", "forget_proj", "gate_proj", "out_proj")

    def __init__(self, config: HGRNConfig, layer: int):
        super().__init__(config, layer)
        width, self.inner = config.hidden_size, int(config.hidden_size * config.expand)
        self.first_bound = layer / config.num_hidden_layers
        self.input_proj = nn.Linear(width, self.inner, bias=False)
        self.forget_proj = nn.Linear(width, self.inner, bias=False)
        self.gate_proj = nn.Linear(width, self.inner, bias=False)
        self.conv = ShortConv(2 * self.inner, config.conv_kernel, activation=None) if config.conv_kernel else None
        self.bound_logit = nn.Parameter(torch.empty(self.inner)) if layer else None
        self.norm = GatedNorm(self.inner, eps=config.norm_eps)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.bound_logit is not None:
            init.constant_(self.bound_logit, math.log(self.first_bound / (1 - self.first_bound)))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = {"hidden": torch.zeros(batch, self.inner, dtype=accumulator(dtype), device=device)}
        return state if self.conv is None else state | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.inner)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        parts, after = (self.input_proj(x), self.forget_proj(x)), {}
        if self.conv is not None:
            parts, after = convolve_together(parts, self.conv, state, packing)
        log_forget, write = bounded_gates(parts[1], self.bound_logit)
        candidate = F.silu(wide(parts[0]))
        h, after["hidden"] = ops.scan(write * candidate, log_forget, state=state["hidden"] if state else None, packing=packing)
        return self.out_proj(self.norm(h.to(x.dtype), self.gate_proj(x))), after


RULES = (
    layer("attn.{i,f,g,o}_proj.weight", "mixer.{input,forget,gate,out}_proj.weight"),
    layer("attn.g_norm.weight", "mixer.norm.weight"),
    convolutions(lambda config: [int(config.hidden_size * config.expand)] * 2, "if"),
    *GATED_MLP,
    *SHELL,
)
LAYOUTS = (
    fla_layout(
        "hgrn",
        "HGRN",
        lambda config: (*RULES, shared_bounds(config)),
        same={"expand": "expand_ratio"},
        defaults={"expand_ratio": 1.0} | CONVOLUTION | {"use_short_conv": False},
        only={"use_lower_bound": (True,), "elementwise_affine": (True,)},
        read=read_convolution,
        write=write_convolution,
        trials={"plain": {}, "convolved": {"expand_ratio": 2, "use_short_conv": True, "conv_size": 3}},
    ),
)


register(
    "hgrn",
    config=HGRNConfig,
    mixer=HGRNMixer,
    title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
    paper="arXiv:2311.04823",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
    },
    layouts=LAYOUTS,
)

"""Griffin's recurrent layer: a gated convolutional branch around the real-gated linear recurrent unit (RG-LRU).

    r_t = sigmoid(W_a x_t + b_a),    i_t = sigmoid(W_x x_t + b_x)                                   (eq. 1, 2)
    log a_t = -c r_t softplus(Lambda),    c = 8                                                     (eq. 3, as eq. 6 computes it)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)                                                   (eq. 4)

The gates' weights are block-diagonal. A sequence's first token enters unscaled, as in the released models. Alone this layer
makes Hawk; Griffin is a plan of two such layers and one of local attention (see `recurrent_gemma`).

Paper: De et al. 2024, arXiv:2402.19427: section 2.4, initialisation there and in appendix A; RecurrentGemma, arXiv:2404.07839.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.few_rows import once
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.kernels.scan import flops
from zoo.layers import BlockLinear, ShortConv, token_positions, wide
from zoo.mixer import Mixer, State
from zoo.registry import register

STRENGTH = 8.0  # c


@strict
class GriffinConfig(ZooConfig):
    """Width of the recurrence; the gated MLP of the paper, three times as wide as the model, is the default."""

    model_type = "zoo_griffin"

    channel_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    norm: str = "unit_rmsnorm"
    norm_eps: float = 1e-6
    lru_width: int | None = None  # None: D
    num_blocks: int = 10  # diagonal blocks of the gates' weights
    conv_kernel: int = 4  # W

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.intermediate_size = self.intermediate_size or 3 * self.hidden_size


class GriffinMixer(Mixer):
    """State: `hidden` `[B, lru_width]`, `conv` `[B, W - 1, lru_width]`, and `length` `[B]`, how many tokens were seen."""

    lora_targets = ("x_proj", "gate_proj", "out_proj")

    def __init__(self, config: GriffinConfig, layer: int):
        super().__init__(config, layer)
        width, self.inner = config.hidden_size, config.lru_width or config.hidden_size
        if self.inner % config.num_blocks:
            raise ValueError(f"GriffinConfig: lru_width={self.inner} is not divisible by num_blocks={config.num_blocks}")
        self.x_proj = nn.Linear(width, self.inner)
        self.gate_proj = nn.Linear(width, self.inner)
        self.conv = ShortConv(self.inner, config.conv_kernel, bias=True, activation=None)
        self.input_gate = BlockLinear(self.inner, config.num_blocks)
        self.recurrence_gate = BlockLinear(self.inner, config.num_blocks)
        self.decay = nn.Parameter(torch.empty(self.inner))  # Lambda
        self.out_proj = nn.Linear(self.inner, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.decay, 0.9**2, 0.999**2)  # a^2c, so that a^c lies between 0.9 and 0.999
        log_a = 0.5 * self.decay.detach().log() / STRENGTH
        init.copy_(self.decay, torch.log(torch.expm1(-log_a)))  # the inverse of softplus

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        hidden = torch.zeros(batch, self.inner, dtype=accumulator(dtype), device=device)
        seen = torch.zeros(batch, dtype=torch.long, device=device)
        return {"hidden": hidden, "conv": self.conv.initial_state(batch, dtype, device), "length": seen}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.inner) + 4 * length * self.input_gate.weight.numel()

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        state = state or {}
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        u, conv = self.conv(self.x_proj(x), state.get("conv"), packing)
        seen = state.get("length")
        positions = token_positions(x, seen, packing)
        first = once(lambda: (positions == 0).unsqueeze(-1), positions, "first")
        log_decay = -STRENGTH * wide(torch.sigmoid(self.recurrence_gate(u))) * F.softplus(wide(self.decay))
        # the floor keeps the root's gradient finite where the gate has closed
        scale = torch.sqrt((-torch.expm1(2 * log_decay)).clamp_min(torch.finfo(log_decay.dtype).tiny))
        entering = wide(u) * wide(torch.sigmoid(self.input_gate(u)))
        h, hidden = ops.scan(torch.where(first, entering, entering * scale), log_decay, state=state.get("hidden"), packing=packing)
        tokens = None if packing is None else packing.cu_seqlens.diff()
        if tokens is None:
            tokens = once(lambda: x.new_full(x.shape[:1], x.shape[1], dtype=torch.long), positions, "tokens")
        after = {"hidden": hidden, "conv": conv, "length": tokens if seen is None else seen + tokens}
        return self.out_proj(h.to(x.dtype) * gate), after


register(
    "griffin",
    config=GriffinConfig,
    mixer=GriffinMixer,
    title="Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models",
    paper="arXiv:2402.19427",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_blocks=2, vocab_size=256),
        "hawk-1.3b": dict(hidden_size=2048, num_hidden_layers=24, lru_width=2560, num_blocks=10, tie_word_embeddings=True),
    },
)

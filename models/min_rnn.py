"""minGRU and minLSTM: the classic gated RNNs, their gates freed from the hidden state so that they run as a scan.

    minGRU    z_t = sigmoid(W_z x_t),  c_t = g(W_h x_t),  h_t = (1 - z_t) h_{t-1} + z_t c_t                  (section 3.1)
    minLSTM   f_t = sigmoid(W_f x_t),  i_t = sigmoid(W_i x_t),  h_t = (f_t h_{t-1} + i_t c_t) / (f_t + i_t)  (section 3.2)

g keeps the candidate positive: `x + 1/2` for x >= 0, else `sigmoid(x)` (appendix B). A short convolution precedes the cell
and a projection follows it, as in the paper's language models.

Paper: Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024, arXiv:2410.01201.
"""

from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.kernels.scan import flops
from zoo.layers import ShortConv, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class MinRNNConfig(ZooConfig):
    """Which cell, and how wide."""

    model_type = "zoo_min_rnn"

    cell: Literal["gru", "lstm"] = "gru"
    expand: float = 2.0  # inner width = D * expand
    conv_kernel: int = 4  # W


class MinRNNMixer(Mixer):
    """State: `hidden` `[B, inner]`, and `conv`, the last inputs of the convolution, `[B, W - 1, D]`."""

    lora_targets = ("gate_proj", "forget_proj", "candidate_proj", "out_proj")

    def __init__(self, config: MinRNNConfig, layer: int):
        super().__init__(config, layer)
        width, self.inner = config.hidden_size, int(config.hidden_size * config.expand)
        self.conv = ShortConv(width, config.conv_kernel, bias=True, activation=None)
        self.gate_proj = nn.Linear(width, self.inner, bias=False)
        self.forget_proj = nn.Linear(width, self.inner, bias=False) if config.cell == "lstm" else None
        self.candidate_proj = nn.Linear(width, self.inner, bias=False)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        if self.forget_proj is None:
            self.lora_targets = ("gate_proj", "candidate_proj", "out_proj")

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        hidden = torch.zeros(batch, self.inner, dtype=accumulator(dtype), device=device)
        return {"hidden": hidden, "conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.inner)

    def logit(self, x: Tensor) -> Tensor:
        """Logit of the share that the candidate has in the new state; the old state has the rest."""
        gate = wide(self.gate_proj(x))
        if self.forget_proj is None:
            return gate
        return F.logsigmoid(gate) - F.logsigmoid(wide(self.forget_proj(x)))

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        state = state or {}
        x, conv = self.conv(x, state.get("conv"), packing)
        logit, raw = self.logit(x), wide(self.candidate_proj(x))
        candidate = torch.where(raw >= 0, raw + 0.5, torch.sigmoid(raw))
        h, hidden = ops.scan(torch.sigmoid(logit) * candidate, F.logsigmoid(-logit), state=state.get("hidden"), packing=packing)
        return self.out_proj(h.to(x.dtype)), {"hidden": hidden, "conv": conv}


register(
    "min_rnn",
    config=MinRNNConfig,
    mixer=MinRNNMixer,
    title="Were RNNs All We Needed?",
    paper="arXiv:2410.01201",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, cell="lstm", vocab_size=256),
        "shakespeare": dict(hidden_size=384, num_hidden_layers=3, channel_mixer="mlp", vocab_size=65),
        "350m": dict(hidden_size=1024, num_hidden_layers=20),
    },
)

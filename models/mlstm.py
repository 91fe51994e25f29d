"""mLSTM: the xLSTM's cell with a matrix memory, exponential input gates and a normaliser, in its block.

    C_t = f_t C_{t-1} + i_t v_t k_t^T,    n_t = f_t n_{t-1} + i_t k_t                (eq. 19, 20)
    h_t = C_t q_t / max(|n_t . q_t|, 1)                                              (eq. 21, without the output gate)
    i_t = exp(w_i . u_t + b_i),    f_t = sigmoid(w_f . u_t + b_f) or its exp         (eq. 25, 26), u_t = (q_t, k_t, v_t) of all heads

The block projects up to two branches a and z; q and k come from `c = silu(conv(a))`, v from a, by block-diagonal maps; then
`y_t = W_down ((layernorm_h(h_t) + skip * c_t) * silu(z_t))`, z being the output gate. Gates are kept at most one by eq. 15-17,
in which the lower bound 1 becomes `exp(-m_t)`.

Paper: Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter, Hochreiter 2024, arXiv:2405.04517: cell in
section 2.3, block in the appendix.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import BlockLinear, GatedNorm, ShortConv, merge_heads, mlstm_cell, split_heads, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class MLSTMConfig(ZooConfig):
    """Sizes of the block, and the kind of forget gate."""

    model_type = "zoo_mlstm"

    channel_mixer: str | None = None
    norm: str = "layernorm"

    num_heads: int = 4
    expand: float = 2.0  # inner width = D * expand; K = V = D * expand / H
    conv_kernel: int = 4  # tokens seen by the short convolution
    block_size: int = 4  # width of the blocks of the maps to q, k and v
    forget_gate: str = "sigmoid"  # sigmoid or exp, of the forget gate's pre-activation

    def validate_inner(self):
        """The inner width must be a whole number of heads and blocks, and the gate one of two."""
        inner = int(self.hidden_size * self.expand)
        if inner % self.num_heads or inner % self.block_size:
            raise ValueError(
                f"MLSTMConfig: the inner width {inner} must be divisible by num_heads={self.num_heads} and block_size={self.block_size}"
            )
        if self.forget_gate not in ("sigmoid", "exp"):
            raise ValueError(f"MLSTMConfig: forget_gate {self.forget_gate!r} is unknown; choose sigmoid or exp")


class MLSTMMixer(Mixer):
    """State: `conv` `[B, W - 1, D expand]`, `memory` `[B, H, K, V + 1]`, the last channel being n, and their unit `m` `[B, H]`.

    `memory` is `exp(-m)` times C and n; of nothing seen both are zero.
    """

    lora_targets = ("up_proj", "down_proj")

    def __init__(self, config: MLSTMConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.depth = config.hidden_size, config.num_heads, config.num_hidden_layers
        self.width, self.inner = width, int(width * config.expand)
        self.keys, self.forget_gate = self.inner // self.heads, config.forget_gate
        self.up_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv = ShortConv(self.inner, config.conv_kernel, bias=True)
        self.q_proj = BlockLinear(self.inner, self.inner // config.block_size, bias=False)
        self.k_proj = BlockLinear(self.inner, self.inner // config.block_size, bias=False)
        self.v_proj = BlockLinear(self.inner, self.inner // config.block_size, bias=False)
        self.input_gate_proj = nn.Linear(3 * self.inner, self.heads)
        self.forget_gate_proj = nn.Linear(3 * self.inner, self.heads)
        self.norm = GatedNorm(self.inner, groups=self.heads, kind="layer", eps=config.norm_eps)
        self.skip = nn.Parameter(torch.empty(self.inner))
        self.down_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors start: gates that do not depend on the input, remembering for long."""
        for gate in (self.input_gate_proj, self.forget_gate_proj):
            init.zeros_(gate.weight)
        init.normal_(self.input_gate_proj.bias, std=0.1)
        init.copy_(self.forget_gate_proj.bias, torch.linspace(3.0, 6.0, self.heads))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init.normal_(projection.weight, std=math.sqrt(2 / (5 * self.inner)))
        init.normal_(self.up_proj.weight, std=math.sqrt(2 / (5 * self.width)))
        init.normal_(self.down_proj.weight, std=2 / (self.depth * math.sqrt(self.width)))
        init.ones_(self.skip)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.keys + 1, dtype=accumulator(dtype), device=device)
        m = torch.zeros(batch, self.heads, dtype=accumulator(dtype), device=device)
        return {"conv": self.conv.initial_state(batch, dtype, device), "memory": memory, "m": m}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.keys + 1)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        inner, z = self.up_proj(x).chunk(2, dim=-1)
        convolved, conv = self.conv(inner, state["conv"] if state else None, packing)
        q, k, v = self.q_proj(convolved), self.k_proj(convolved), self.v_proj(inner)
        both = torch.cat([q, k, v], dim=-1)
        log_input, log_forget = wide(self.input_gate_proj(both)), wide(self.forget_gate_proj(both))
        if self.forget_gate == "sigmoid":
            log_forget = F.logsigmoid(log_forget)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        h, cell = mlstm_cell(q, k, v, log_forget, log_input, state, packing)
        y = self.norm(merge_heads(h)) + self.skip * convolved
        return self.down_proj(y * F.silu(z)), {"conv": conv} | cell


_PUBLISHED = dict(vocab_size=50304, tie_word_embeddings=True)

register(
    "mlstm",
    config=MLSTMConfig,
    mixer=MLSTMMixer,
    title="xLSTM: Extended Long Short-Term Memory",
    paper="arXiv:2405.04517",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "125m": dict(hidden_size=768, num_hidden_layers=24, **_PUBLISHED),
        "350m": dict(hidden_size=1024, num_hidden_layers=48, **_PUBLISHED),
        "760m": dict(hidden_size=1536, num_hidden_layers=48, **_PUBLISHED),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=48, **_PUBLISHED),
    },
)

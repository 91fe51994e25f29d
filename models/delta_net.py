"""DeltaNet: a matrix memory that replaces what it holds under a key instead of adding to it.

    S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T,    o_t = q_t S_t / sqrt(K),    y_t = W_O rmsnorm(o_t)
    q_t, k_t = unit_length(silu(conv(W x)_t)),    v_t = silu(conv(W_v x)_t),    beta_t = sigmoid(W_b x_t)

Paper: Yang, Wang, Zhang, Shen, Kim 2024, arXiv:2406.06484: the delta rule in section 2.2, the layer in section 3.3; the rule
itself as a transformer's memory is from Schlag, Irie, Schmidhuber 2021, arXiv:2102.11174. beta up to two, for negative
eigenvalues, after arXiv:2411.12537.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import BODY, CONVOLUTION, GATED_MLP, SHELL, convolutions, fla_layout, layer, read_convolution, write_convolution
from zoo.kernels.checks import accumulator
from zoo.kernels.delta_rule import flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, ShortConv, convolve_together, merge_heads, split_heads, unit_length, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class DeltaNetConfig(ZooConfig):
    """Sizes of the heads and of the convolution."""

    model_type = "zoo_delta_net"

    num_heads: int = 16  # H
    key_ratio: float = 1.0  # K = D * key_ratio / H
    value_ratio: float = 1.0  # V = D * value_ratio / H
    conv_kernel: int | None = 4  # W, tokens the short convolution sees; None or 0: no convolution
    allow_negative_eigenvalues: bool = False  # beta reaches 2 instead of 1


class DeltaNetMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and `conv`, the last inputs of the convolution over q, k and v, `[B, W - 1, .]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: DeltaNetConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads = config.hidden_size, config.num_heads
        keys, values = int(width * config.key_ratio), int(width * config.value_ratio)
        if keys % self.heads or values % self.heads:
            raise ValueError(f"DeltaNetConfig: {keys} key and {values} value channels are not divisible by num_heads={self.heads}")
        self.keys, self.values = keys // self.heads, values // self.heads
        self.largest_beta = 2.0 if config.allow_negative_eigenvalues else 1.0
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.conv = ShortConv(2 * keys + values, config.conv_kernel) if config.conv_kernel else None
        self.beta_proj = nn.Linear(width, self.heads, bias=False)
        self.norm = RMSNorm(self.values, config.norm_eps)
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
        memory = state["memory"] if state else None
        o, after["memory"] = ops.delta_rule(unit_length(q), unit_length(k), v, beta, state=memory, packing=packing)
        return self.out_proj(merge_heads(self.norm(o))), after


def conv_sizes(config: DeltaNetConfig) -> list[int]:
    """Widths of queries, keys and values."""
    keys = int(config.hidden_size * config.key_ratio)
    return [keys, keys, int(config.hidden_size * config.value_ratio)]


LAYOUTS = (
    fla_layout(
        "delta_net",
        "DeltaNet",
        (
            layer("attn.{q,k,v,b,o}_proj.weight", "mixer.{q,k,v,beta,out}_proj.weight"),
            layer("attn.o_norm.weight", "mixer.norm.weight"),
            convolutions(conv_sizes),
            *GATED_MLP,
            *SHELL,
        ),
        same={
            "num_heads": "num_heads", "key_ratio": "expand_k", "value_ratio": "expand_v",
            "allow_negative_eigenvalues": "allow_neg_eigval",
        },
        defaults={"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0, "allow_neg_eigval": False} | CONVOLUTION,
        only={
            "use_gate": (False,), "use_beta": (True,), "use_output_norm": (True,), "qk_norm": ("l2",), "qk_activation": ("silu",),
            "share_conv_kernel": (False,),
        },
        read=read_convolution,
        write=write_convolution,
        aliases=((BODY + "attn.norm.weight", BODY + "attn.o_norm.weight"),),
    ),
)  # fmt: skip


register(
    "delta_net",
    config=DeltaNetConfig,
    mixer=DeltaNetMixer,
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    paper="arXiv:2406.06484",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=8, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
    },
    layouts=LAYOUTS,
)

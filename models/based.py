"""Based: linear attention whose feature map is the Taylor expansion of the exponential, on small queries and keys.

    phi(q) . phi(k) = 1 + s + s^2 / 2,    s = q . k / sqrt(K'),  K' = feature_dim
    o_t = sum_{j <= t} phi(q_t) . phi(k_j) v_j / sum_{j <= t} phi(q_t) . phi(k_j)

Since 1 + s + s^2 / 2 >= 1/2 the weights are positive, though features are not. The published model is a hybrid: about one layer
in five is this mixer, one in five attends to a window, the others are gated short convolutions. Of 27 layers, with `repeat` of
models/hybrid.py and for `conv` the entry of any mixer of short range:

    repeat(conv, "based", {"mixer": "transformer", "window": 128}, conv, conv, layers=25) + [conv, conv]

Paper: Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Re 2024, arXiv:2402.18668, section 4.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import merge_heads, split_heads, wide
from zoo.mixer import Mixer, State
from zoo.registry import register


@strict
class BasedConfig(ZooConfig):
    """Sizes of the heads."""

    model_type = "zoo_based"

    num_heads: int = 16
    feature_dim: int = 16  # K', channels of q and k per head; they become K = (K' + 1) (K' + 2) / 2 features

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide("hidden_size", "num_heads")
        if self.feature_dim < 1:
            raise ValueError(f"BasedConfig: feature_dim is {self.feature_dim}, it must be positive")


def taylor(x: Tensor) -> Tensor:
    """`[..., K'] -> [..., (K' + 1) (K' + 2) / 2]`, features whose products are `1 + s + s^2 / 2`.

    Of the square only one triangle is kept: `x_i x_j` and `x_j x_i` are one feature of twice the weight.
    """
    width, dtype = x.shape[-1], x.dtype
    x = wide(x) * width**-0.25
    row, column = torch.triu_indices(width, width, 1, device=x.device).unbind(0)
    crossed = x[..., row] * x[..., column]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() * math.sqrt(0.5), crossed], dim=-1).to(dtype)


class BasedMixer(Mixer):
    """State: `memory` `[B, H, K, V + 1]`, the last channel being the sum of keys."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: BasedConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, small = config.hidden_size, config.num_heads, config.feature_dim
        self.keys, self.values = (small + 1) * (small + 2) // 2, config.divide("hidden_size", "num_heads")
        self.q_proj = nn.Linear(width, self.heads * small, bias=False)
        self.k_proj = nn.Linear(width, self.heads * small, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {"memory": torch.zeros(batch, self.heads, self.keys, self.values + 1, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values + 1)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        memory = state["memory"] if state else None
        o, memory = ops.linear_attention(taylor(q), taylor(k), v, normalize=True, scale=1.0, state=memory, packing=packing)
        return self.out_proj(merge_heads(o)), {"memory": memory}


register(
    "based",
    config=BasedConfig,
    mixer=BasedMixer,
    title="Simple linear attention language models balance the recall-throughput tradeoff",
    paper="arXiv:2402.18668",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, feature_dim=4, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=27),
        "1.3b": dict(hidden_size=1792, num_hidden_layers=36),
    },
)

"""Transformer-XL: attention to the last W tokens, across segments, by positions relative to the one that asks.

    o_t = sum_{t - W < j <= t} softmax_j(((q_t + u) k_j + (q_t + w) r_{t-j}) / sqrt(K)) v_j,    r_d = W_R [sin(d f), cos(d f)]

u and w are learned for each head, f are the frequencies of the sinusoids. What of earlier segments is remembered is their keys
and values, in a ring: segments may be cut anywhere without changing the result, as in the published evaluation, where every
token sees as many. Training on one segment after another stops gradients between them: detach the state.

Paper: Dai et al. 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv:1901.02860, sections
3.2 and 3.3. Norms follow the residual sums. Each layer has its own u and w.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.mixer import Layer, State, Traits
from zoo.registry import register


@strict
class TransformerXLConfig(ZooConfig):
    """Sizes of the heads, and the memory."""

    model_type = "zoo_transformer_xl"

    channel_mixer: str | None = "mlp"
    channel_args: dict | None = field(default_factory=lambda: {"act": "relu"})
    norm: str = "layernorm"
    post_norm: bool = True
    embedding_scale: float = 32.0  # sqrt(D)
    num_heads: int = 16  # H
    head_dim: int | None = None  # K; None: D / H
    memory: int = 512  # W, how many tokens are seen, the own included
    farthest: int | None = None  # distances beyond it count as this one; None: each by itself

    def validate_memory(self):
        """There must be a token to see, and heads of the same width."""
        if self.head_dim is None:
            self.divide("hidden_size", "num_heads")
        if self.hidden_size % 2:
            raise ValueError(f"TransformerXLConfig: hidden_size={self.hidden_size} must be even, half of it sines and half cosines")
        if self.memory < 1 or (self.farthest is not None and self.farthest < 0):
            raise ValueError(f"TransformerXLConfig: memory={self.memory} must be positive and farthest={self.farthest} not negative")


class Distances(Layer):
    """What queries `[B, T, H, K]` add to logits at each distance, `[B, T, H, reach]`: `(q + w) W_R [sin(d f), cos(d f)] / sqrt(K)`."""

    def __init__(self, width: int, heads: int, keys: int, reach: int, std: float):
        super().__init__()
        self.width, self.keys, self.reach, self.std = width, keys, reach, std
        self.weight = nn.Parameter(torch.empty(heads, keys, width))
        self.bias = nn.Parameter(torch.empty(heads, keys))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.weight, self.bias):
            init.normal_(parameter, std=self.std)

    def flops(self, length: int) -> int:
        """FLOPs for so many queries at once."""
        return 2 * self.reach * (self.weight.numel() + length * self.bias.numel())

    def forward(self, q: Tensor) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, self.width, 2, device=q.device, dtype=torch.float32) / self.width)
        angles = torch.outer(torch.arange(self.reach, device=q.device, dtype=torch.float32), frequencies)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(q.dtype)
        q = (q + self.bias.to(q.dtype)) * self.keys**-0.5
        if q.shape[1] == 1:  # one query is sooner taken to the waves than all of these to the keys
            return torch.einsum("bthk,hkd->bthd", q, self.weight) @ waves.T
        return torch.einsum("bthk,rhk->bthr", q, torch.einsum("rd,hkd->rhk", waves, self.weight))


class TransformerXLMixer(RotaryAttention):
    """State: a ring `k` and `v` `[B, W, H, K]`, and `length` `[B]`."""

    traits = Traits()

    def __init__(self, config: TransformerXLConfig, layer: int):
        keys = config.head_dim or config.divide("hidden_size", "num_heads")
        super().__init__(config, layer, heads=config.num_heads, groups=config.num_heads, keys=keys, rope=None, window=config.memory)
        reach = config.memory if config.farthest is None else min(config.memory, config.farthest + 1)
        self.distances = Distances(config.hidden_size, self.heads, keys, reach, config.initializer_range)
        self.std = config.initializer_range
        self.content_bias = nn.Parameter(torch.empty(self.heads, keys))  # u
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.content_bias, std=self.std)

    def operator_flops(self, length: int) -> int:
        return super().operator_flops(length) + self.distances.flops(length)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """As ever, with what the queries say of distances."""
        return super().attend(q + self.content_bias.to(q.dtype), k, v, positions, state, packing, by_distance=self.distances(q))


register(
    "transformer_xl",
    config=TransformerXLConfig,
    mixer=TransformerXLMixer,
    title="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
    paper="arXiv:1901.02860",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, memory=24, farthest=17, embedding_scale=32**0.5, vocab_size=256),
        "standard": dict(
            hidden_size=410, num_hidden_layers=16, num_heads=10, head_dim=41, intermediate_size=2100, memory=150,
            embedding_scale=410**0.5, vocab_size=267735, tie_word_embeddings=True,
        ),
        "large": dict(
            hidden_size=1024, num_hidden_layers=18, num_heads=16, intermediate_size=4096, memory=384, vocab_size=267735,
            tie_word_embeddings=True,
        ),
    },
)  # fmt: skip

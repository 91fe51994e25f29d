"""MoBA: a mixture of block attention; every head of every token attends to the few blocks whose mean key suits it best.

    s_n = q_t . mean(k_j : j in block n),    n before the block of t
    o_t = attention of q_t over { k_j, v_j : j <= t, block(j) = block(t) or s_block(j) among the M - 1 largest }

The choice has no parameters and passes no gradient, so that a layer can turn to full attention, or from it, with the same
weights: those of the transformer.

Paper: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189, section 2.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.listed import ListedAttention
from zoo.registry import register


@strict
class MoBAConfig(ZooConfig):
    """Heads, and the blocks they see."""

    model_type = "zoo_moba"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    block_size: int = 512
    num_blocks: int = 3  # M, blocks that a token sees, its own included
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    qkv_bias: bool = False

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide_heads()

    def validate_blocks(self):
        """A block holds something, and a token sees its own."""
        for field in ("block_size", "num_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"MoBAConfig: {field}={getattr(self, field)} must be positive")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class MoBAMixer(ListedAttention):
    """Attention to the blocks of the best mean keys; the state is that of `ListedAttention`, a sum for each block."""

    def __init__(self, config: MoBAConfig, layer: int):
        super().__init__(config, layer, rope_scaling=config.rope_scaling)

    def rank(self, q: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
        means = sums / self.block  # of blocks before the token's own, which are complete
        return torch.einsum("btgrk,bsgk->bgrts", q.to(means.dtype).unflatten(2, (self.groups, -1)), means).flatten(1, 2)


register(
    "moba",
    config=MoBAConfig,
    mixer=MoBAMixer,
    title="MoBA: Mixture of Block Attention for Long-Context LLMs",
    paper="arXiv:2502.13189",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, block_size=8, num_blocks=3, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=23, num_heads=16),
    },
)

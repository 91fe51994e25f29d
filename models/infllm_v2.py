"""InfLLM-V2: sparse attention whose heads of a group choose blocks together, by means of keys over short, overlapping windows.

    c_n = mean(k_j : n d <= j < n d + l)                                 windows of l keys, one begins every d
    p_tn = sum over a group's heads of softmax_n(q_t c_n / sqrt(K)),     n complete by t
    s_tm = max(p_tn : window n overlaps block m)
    o_t = attention of q_t over { k_j, v_j : j <= t, block(j) first, near, or of the largest s_t }

The choice has no parameters, so that one set of weights, the transformer's, attends sparsely or densely: up to a length of M
blocks both are the same.

Paper: Zhao et al. 2025, "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
arXiv:2509.24663. Their rule that leaves a whole sequence dense below a length of its own would make a token's output depend
on tokens after it; here it is each token that sees all until its list is full.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor

from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.listed import ListedAttention
from zoo.registry import register


@strict
class InfLLMV2Config(ZooConfig):
    """Heads, the windows that are scored, and the blocks that are seen."""

    model_type = "zoo_infllm_v2"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    block_size: int = 64
    num_blocks: int = 96  # M, blocks that a token sees, the first and the near ones included
    first_blocks: int = 1  # blocks at the beginning that all see
    near_blocks: int = 32  # the token's own block and those before it, which it sees
    pool_size: int = 32  # l
    pool_stride: int = 16  # d
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    qkv_bias: bool = False

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide_heads()

    def validate_blocks(self):
        """Windows begin where blocks do, and the blocks that are always seen fit on the list."""
        self.divide("block_size", "pool_stride")
        self.divide("pool_size", "pool_stride")
        if self.near_blocks < 1 or self.first_blocks < 0 or self.num_blocks < self.near_blocks + self.first_blocks:
            raise ValueError(
                f"InfLLMV2Config: num_blocks={self.num_blocks} must hold near_blocks={self.near_blocks}, at least the own, and "
                f"first_blocks={self.first_blocks}"
            )

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class InfLLMV2Mixer(ListedAttention):
    """Attention to blocks that a group chooses; the state is that of `ListedAttention`."""

    def __init__(self, config: InfLLMV2Config, layer: int):
        pool = (config.pool_size, config.pool_stride)
        super().__init__(config, layer, rope_scaling=config.rope_scaling, firsts=config.first_blocks, locals=config.near_blocks, pool=pool)

    def rank(self, q: Tensor, sums: Tensor, positions: Tensor) -> Tensor:
        return self.relevance(q, sums / self.pool["size"], positions).amax(-1)


register(
    "infllm_v2",
    config=InfLLMV2Config,
    mixer=InfLLMV2Mixer,
    title="InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
    paper="arXiv:2509.24663",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, block_size=4, num_blocks=6, near_blocks=2, pool_size=4,
            pool_stride=2, vocab_size=256,
        ),
        "340m": dict(hidden_size=1024, num_hidden_layers=25, num_heads=16, num_kv_heads=4, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=25, num_heads=16, num_kv_heads=2),
    },
)  # fmt: skip

"""SWAT: a sliding window of sigmoids, half of the heads with slopes that favour the near and half with slopes that favour the far.

    o_t = sum_{t - W < j <= t} sigmoid(q_t k_j / sqrt(K) + s_h (t - j)) v_j,    s_h = -2^-1, -2^-2, ... and 2^-1, 2^-2, ...

q and k are rotated by their positions. Keys do not compete for weight: each is weighed by itself, and nothing is divided by.

Paper: Fu et al. 2025, "Sliding Window Attention Training for Efficient Large Language Models", arXiv:2502.18845, eq. 4 and 5.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.mixer import Traits
from zoo.registry import register


@strict
class SWATConfig(ZooConfig):
    """Sizes of the heads, the window, and who looks where."""

    model_type = "zoo_swat"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    rope_theta: float = 10000.0  # base of the rotary angles
    window: int = 1024  # W, how many tokens are seen, the own included
    near_heads: int | None = None  # the first ones, whose slopes favour the near; None: half of them
    qk_norm: bool = False  # an RMSNorm over each head of q and k, before rotation

    def validate_heads(self):
        """Heads must divide evenly, and the window hold a token."""
        self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")
        if self.near_heads is not None and not 0 <= self.near_heads <= self.num_heads:
            raise ValueError(f"SWATConfig: near_heads={self.near_heads} must lie between 0 and num_heads={self.num_heads}")
        if self.window < 1:
            raise ValueError(f"SWATConfig: window={self.window} must be positive")


class SWATMixer(RotaryAttention):
    """State: a ring `k` and `v` `[B, W, G, K]`, and `length` `[B]`."""

    traits = Traits()

    def __init__(self, config: SWATConfig, layer: int):
        keys = config.divide("hidden_size", "num_heads")
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys,
            rope=(keys // 2 * 2, config.rope_theta), qk_norm=config.qk_norm, window=config.window,
        )  # fmt: skip
        self.near = config.num_heads // 2 if config.near_heads is None else config.near_heads

    def attend(self, q: Tensor, *args, **terms):
        """As ever, with sigmoids and slopes; what favours the near is a positive slope of `ops.attention`."""
        near = torch.exp2(-torch.arange(1, self.near + 1, dtype=torch.float32, device=q.device))
        far = torch.exp2(-torch.arange(1, self.heads - self.near + 1, dtype=torch.float32, device=q.device))
        return super().attend(q, *args, slopes=torch.cat([near, -far]), normaliser="sigmoid", **terms)


register(
    "swat",
    config=SWATConfig,
    mixer=SWATMixer,
    title="Sliding Window Attention Training for Efficient Large Language Models",
    paper="arXiv:2502.18845",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, window=24, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16, tie_word_embeddings=True),
        "760m": dict(hidden_size=1536, num_hidden_layers=24, num_heads=16),
    },
)

"""LFM2: a short convolution between two gates in most layers, grouped attention in the others.

    B_t, C_t, x_t = split(W_in u_t),    y_t = W_out (C_t * conv(B * x)_t)

The convolution is causal and depthwise and sees three tokens; there is no nonlinearity but the products. Alone, as a layer of
another hybrid, `lfm2` is this convolution; with `attention_layers` it is the published model, whose attention normalises each
head of queries and keys.

Paper: Liquid AI 2025, "LFM2 Technical Report", arXiv:2511.23404: the gated short convolution in section 2.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import ShortConv
from zoo.layout import Layout, rename, squeeze, within
from zoo.mixer import Mixer, State
from zoo.registry import get, register
from zoo.terms import inner_size, layers_of, rope_parameters, same_fields, shell, whole_rope


@strict
class LFM2Config(ZooConfig):
    """The convolution, and the layers that attend instead."""

    model_type = "zoo_lfm2"

    tie_word_embeddings: bool = True
    conv_kernel: int = 3  # W
    conv_bias: bool = False  # of the convolution and the projections around it
    attention_layers: list[int] | None = None  # None: none
    num_heads: int = 32  # of attention, as the fields below
    num_kv_heads: int = 8
    rope_theta: float = 1000000.0
    rope_scaling: dict | None = None

    def layer_configs(self) -> list[ZooConfig]:
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "qk_norm": True}
        rope = {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
        attending = set(self.attention_layers or [])
        attention = get("transformer").config(**self.shared_fields() | heads | rope) if attending else self
        return [attention if index in attending else self for index in range(self.num_hidden_layers)]


class LFM2Mixer(Mixer):
    """The convolution. State: `conv` `[B, W - 1, D]`, its last inputs."""

    lora_targets = ("in_proj", "out_proj")

    def __init__(self, config: LFM2Config, layer: int):
        super().__init__(config, layer)
        width = config.hidden_size
        self.in_proj = nn.Linear(width, 3 * width, bias=config.conv_bias)
        self.conv = ShortConv(width, config.conv_kernel, bias=config.conv_bias, activation=None)
        self.out_proj = nn.Linear(width, width, bias=config.conv_bias)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return 2 * length * self.conv.width * self.conv.kernel

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        before, after, x = self.in_proj(x).chunk(3, dim=-1)
        x, conv = self.conv(before * x, state["conv"] if state else None, packing)
        return self.out_proj(after * x), {"conv": conv}


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    inner = foreign["intermediate_size"]
    if foreign["block_auto_adjust_ff_dim"]:
        multiplier, multiple = foreign["block_ffn_dim_multiplier"], foreign["block_multiple_of"]
        inner = int((1 if multiplier is None else multiplier) * int(2 * inner / 3))
        inner = -(-inner // multiple) * multiple
    rope = whole_rope(foreign)
    return same_fields(foreign) | rope | {
        "intermediate_size": inner,
        "norm_eps": foreign["norm_eps"],
        "num_heads": foreign["num_attention_heads"],
        "num_kv_heads": foreign["num_key_value_heads"],
        "conv_kernel": foreign["conv_L_cache"],
        "conv_bias": foreign["conv_bias"],
        "attention_layers": layers_of(foreign["layer_types"], "full_attention") or None,
    }  # fmt: skip


def to_foreign(config: LFM2Config) -> dict:
    """The inverse; the width of the MLP is written as it is."""
    attending, layers = set(config.attention_layers or []), range(config.num_hidden_layers)
    rope = {"rope_theta": config.rope_theta, "rope_fraction": 1.0, "rope_scaling": config.rope_scaling}
    return same_fields(config) | {
        "intermediate_size": inner_size(config),
        "block_auto_adjust_ff_dim": False,
        "norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rope_parameters": rope_parameters(rope),
        "conv_L_cache": config.conv_kernel,
        "conv_bias": config.conv_bias,
        "layer_types": ["full_attention" if index in attending else "conv" for index in layers],
    }


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}."
RULES = (
    *shell("embedding_norm"),
    rename(THEIRS + "{operator,ffn}_norm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename(THEIRS + "feed_forward.{w1,w3,w2}.weight", "model.layers.{}.channel_mixer.{gate,up,down}_proj.weight"),
    *within(
        "transformer",
        rename(THEIRS + "self_attn.{q,k,v,out}_proj.weight", LAYER + "{q,k,v,out}_proj.weight"),
        rename(THEIRS + "self_attn.{q,k}_layernorm.weight", LAYER + "{q,k}_norm.weight"),
    ),
    *within(
        "lfm2",
        rename(THEIRS + "conv.{in,out}_proj.{weight,bias}", LAYER + "{in,out}_proj.{weight,bias}"),
        squeeze(THEIRS + "conv.conv.{weight,bias}", LAYER + "conv.{weight,bias}"),
    ),
)
_PUBLISHED = dict(num_hidden_layers=16, vocab_size=65536, attention_layers=[2, 5, 8, 10, 12, 14])


# the width of the MLPs is written as what it amounts to
FORGETS = ("full_attn_idxs", "intermediate_size", "block_auto_adjust_ff_dim", "block_multiple_of", "block_ffn_dim_multiplier")
TRIALS = {
    "plain": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "biased": {"layer_types": ["full_attention", "conv"], "conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False,
               "tie_word_embeddings": False},
}  # fmt: skip


register(
    "lfm2",
    config=LFM2Config,
    mixer=LFM2Mixer,
    title="LFM2 Technical Report",
    paper="arXiv:2511.23404",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, attention_layers=[1], num_heads=4, num_kv_heads=2
        ),
        "350m": dict(hidden_size=1024, intermediate_size=4608, num_heads=16, **_PUBLISHED),
        "700m": dict(hidden_size=1536, intermediate_size=6912, num_heads=24, **_PUBLISHED),
        "1.2b": dict(hidden_size=2048, intermediate_size=8192, **_PUBLISHED),
    },
    layouts=(Layout("lfm2", ("lfm2",), from_foreign, to_foreign, RULES, trials=TRIALS, forgets=FORGETS),),
)  # fmt: skip

"""RecurrentGemma: Griffin as released, two recurrent layers to one of attention over a window, each with a biased gated MLP.

The recurrence is `griffin`'s; attention rotates half of a head's channels and shares one set of keys and values. Embeddings are
multiplied by sqrt(D) rounded to bfloat16, weights of norms are stored as offsets from one, and logits are capped.

Papers: Botev et al. 2024, arXiv:2404.07839; Griffin: De et al. 2024, arXiv:2402.19427.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, Pattern, Rule, rename, squeeze, within
from zoo.registry import get, register
from zoo.terms import expect, inner_size, rope_fields, rope_parameters, same_fields, shell


def embedding_scale(width: int) -> float:
    """sqrt(D) as the released models have it, in bfloat16."""
    return torch.tensor(width**0.5, dtype=torch.bfloat16).item()


@strict
class RecurrentGemmaConfig(ZooConfig):
    """Sizes of both kinds of layers, and their order."""

    model_type = "zoo_recurrent_gemma"

    channel_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh", "bias": True})
    norm: str = "unit_rmsnorm"
    norm_eps: float = 1e-6
    embedding_scale: float = 50.5  # sqrt(D) in bfloat16
    logit_softcap: float | None = 30.0
    tie_word_embeddings: bool = True
    num_heads: int = 10  # H of attention, and the diagonal blocks of the recurrence's gates
    num_kv_heads: int = 1
    window: int = 2048  # tokens that attention sees, the own included
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_fraction: float = 0.5  # share of a head's channels that turn
    qkv_bias: bool = False
    lru_width: int | None = None  # of the recurrence; None: D
    conv_kernel: int = 4  # tokens the short convolution sees
    pattern: list[str] = field(default_factory=lambda: ["recurrent", "recurrent", "attention"])  # repeated over the layers

    def validate_pattern(self):
        """There are two kinds of layers."""
        if not self.pattern or set(self.pattern) - {"recurrent", "attention"}:
            raise ValueError(f"RecurrentGemmaConfig: pattern={self.pattern} must name recurrent and attention layers")

    def layer_configs(self) -> list[ZooConfig]:
        recurrent = {"lru_width": self.lru_width, "num_blocks": self.num_heads, "conv_kernel": self.conv_kernel}
        attention = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "window": self.window}
        attention |= {"rope_theta": self.rope_theta, "rope_fraction": self.rope_fraction}
        attention |= {"qkv_bias": self.qkv_bias, "out_bias": True}
        kinds = {
            "recurrent": get("griffin").config(**self.shared_fields() | recurrent),
            "attention": get("transformer").config(**self.shared_fields() | attention),
        }
        return [kinds[self.pattern[index % len(self.pattern)]] for index in range(self.num_hidden_layers)]


NAMES = {
    "norm_eps": "rms_norm_eps", "logit_softcap": "logits_soft_cap", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "window": "attention_window_size", "qkv_bias": "attention_bias", "lru_width": "lru_width", "conv_kernel": "conv1d_width",
}  # fmt: skip
APART = ("initializer_range",)  # theirs draws every matrix by a rule of its own


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_activation="gelu_pytorch_tanh")
    rope = rope_fields(foreign)
    if rope.pop("rope_scaling") is not None or foreign["intermediate_size"] % 2:
        raise ValueError("a recurrent_gemma with scaled rotary angles or an odd intermediate_size is not supported")
    return same_fields(foreign, but=APART) | {own: foreign[name] for own, name in NAMES.items()} | rope | {
        "intermediate_size": foreign["intermediate_size"] // 2,
        "embedding_scale": embedding_scale(foreign["hidden_size"]),
        "pattern": list(foreign["block_types"]),
    }  # fmt: skip


def to_foreign(config: RecurrentGemmaConfig) -> dict:
    """The inverse."""
    rope = {"rope_theta": config.rope_theta, "rope_fraction": config.rope_fraction, "rope_scaling": None}
    inner = inner_size(config)
    return same_fields(config, but=APART) | {name: getattr(config, own) for own, name in NAMES.items()} | {
        "intermediate_size": 2 * inner,
        "rope_parameters": rope_parameters(rope) | {"partial_rotary_factor": config.rope_fraction},
        "block_types": config.pattern,
    }  # fmt: skip


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}.temporal_block."
RULES = (
    *shell("final_norm"),
    rename("model.layers.{}.{temporal,channel}_pre_norm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename(
        "model.layers.{}.mlp_block.{gate,up,down}_proj.{weight,bias}", "model.layers.{}.channel_mixer.{gate,up,down}_proj.{weight,bias}"
    ),
    *within("transformer", rename(THEIRS + "{q,k,v,o}_proj.{weight,bias}", LAYER + "{q,k,v,out}_proj.{weight,bias}")),
    *within(
        "griffin",
        rename(THEIRS + "linear_{x,y,out}.{weight,bias}", LAYER + "{x,gate,out}_proj.{weight,bias}"),
        squeeze(THEIRS + "conv_1d.{weight,bias}", LAYER + "conv.{weight,bias}"),
        rename(THEIRS + "rg_lru.recurrent_param", LAYER + "decay"),
        rename(THEIRS + "rg_lru.{input,recurrent}_gate_weight", LAYER + "{input,recurrence}_gate.weight"),
        Rule(
            (Pattern(THEIRS + "rg_lru.{input,recurrent}_gate_bias"),),
            (Pattern(LAYER + "{input,recurrence}_gate.bias"),),
            lambda x, shapes, config: [x[0].flatten()],
            lambda x, config: [x[0].unflatten(0, (config.num_heads, -1))],
        ),
    ),
)


INITIAL = ("w_init_variance_scale",)
TRIALS = {
    "plain": {"num_hidden_layers": 3, "num_key_value_heads": 1, "attention_window_size": 8, "tie_word_embeddings": True},
    "wide": {"block_types": ["attention", "recurrent"], "lru_width": 32, "attention_window_size": 5, "attention_bias": True,
             "logits_soft_cap": 5.0, "conv1d_width": 3, "tie_word_embeddings": False},
}  # fmt: skip


register(
    "recurrent_gemma",
    config=RecurrentGemmaConfig,
    mixer=None,
    title="RecurrentGemma: Moving Past Transformers for Efficient Open Language Models",
    paper="arXiv:2404.07839",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=3, intermediate_size=48, vocab_size=256, num_heads=4, window=8,
            embedding_scale=embedding_scale(32),
        ),
        "2b": dict(hidden_size=2560, num_hidden_layers=26, intermediate_size=7680, vocab_size=256000),
        "9b": dict(
            hidden_size=4096, num_hidden_layers=38, intermediate_size=12288, vocab_size=256000, num_heads=16, embedding_scale=64.0,
        ),
    },
    layouts=(Layout("recurrent_gemma", ("recurrent_gemma",), from_foreign, to_foreign, RULES, trials=TRIALS, forgets=INITIAL),),
)  # fmt: skip

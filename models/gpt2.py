"""GPT-2: softmax attention with a learned table of positions, LayerNorm before each part, and a GELU MLP.

    x_0 = E[token] + P[position],    x' = x + attention(norm(x)),    x'' = x' + W_2 gelu(W_1 norm(x'))

Every linear map and norm has a bias; the head is the embedding. The layers are those of `transformer`.

Paper: Radford et al. 2019, Language Models are Unsupervised Multitask Learners (section 2.3).
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, drop, rename, split, transpose
from zoo.registry import get, register
from zoo.terms import expect, foreign_activation, own_activation


@strict
class GPT2Config(ZooConfig):
    """The shared fields with the defaults of GPT-2, and its heads."""

    model_type = "zoo_gpt2"

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    norm: str = "layernorm"
    channel_mixer: str | None = "mlp"
    max_position_embeddings: int | None = 1024
    tie_word_embeddings: bool = True
    num_heads: int = 12

    def __post_init__(self, **kwargs):
        if self.channel_args is None and self.channel_mixer == "mlp":
            self.channel_args = {"act": "gelu_tanh"}
        super().__post_init__(**kwargs)

    def layer_configs(self) -> list[ZooConfig]:
        heads = {"num_heads": self.num_heads, "rope_theta": None, "qkv_bias": True, "out_bias": True}
        return [get("transformer").config(**self.shared_fields() | heads)] * self.num_hidden_layers


RENAMED = {
    "vocab_size": "vocab_size", "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "norm_eps": "layer_norm_epsilon",
    "initializer_range": "initializer_range", "tie_word_embeddings": "tie_word_embeddings", "use_cache": "use_cache",
    "pad_token_id": "pad_token_id", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
}  # fmt: skip


def from_gpt2(foreign: dict) -> dict:
    """Fields of a GPT2Config for a config of transformers."""
    expect(foreign, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    act = {"act": own_activation(foreign["activation_function"])}
    return {own: foreign[name] for own, name in RENAMED.items()} | {"channel_args": act}


def to_gpt2(config: GPT2Config) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    act = foreign_activation((config.channel_args or {}).get("act", "gelu"), dated=True)
    return {name: getattr(config, own) for own, name in RENAMED.items()} | {"activation_function": act}


GPT2 = Layout(
    "gpt2", ("gpt2",), from_gpt2, to_gpt2, prefix="transformer.", forgets=("reorder_and_upcast_attn",),
    trials={
        "plain": {},
        "untied": {"n_inner": 52, "activation_function": "relu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    },
    rules=(
        rename("transformer.w{te,pe}.weight", "model.embed_{tokens,positions}.weight"),
        rename("transformer.h.{}.ln_{1,2}.{weight,bias}", "model.layers.{}.{mixer,channel}_norm.{weight,bias}"),
        split(
            "transformer.h.{}.attn.c_attn.{weight,bias}", [f"model.layers.{{}}.mixer.{name}_proj.{{weight,bias}}" for name in "qkv"],
            transposed=True,
        ),
        transpose("transformer.h.{}.attn.c_proj.{weight,bias}", "model.layers.{}.mixer.out_proj.{weight,bias}"),
        transpose("transformer.h.{}.mlp.c_{fc,proj}.{weight,bias}", "model.layers.{}.channel_mixer.{up,down}_proj.{weight,bias}"),
        rename("transformer.ln_f.{weight,bias}", "model.norm.{weight,bias}"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
        drop("transformer.h.{}.attn.{bias,masked_bias}", "a causal mask, which attention makes itself"),
    ),
)  # fmt: skip

register(
    "gpt2",
    config=GPT2Config,
    mixer=None,
    title="Language Models are Unsupervised Multitask Learners",
    paper="Radford et al. 2019",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, vocab_size=256),
        "124m": {},
        "355m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16),
        "774m": dict(hidden_size=1280, num_hidden_layers=36, num_heads=20),
        "1.5b": dict(hidden_size=1600, num_hidden_layers=48, num_heads=25),
    },
    layouts=(GPT2,),
)

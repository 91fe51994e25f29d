"""GPT-NeoX, and Pythia: softmax attention and a GELU MLP side by side, a quarter of each head's channels rotated.

    y = x + attention(norm(x)) + W_2 gelu(W_1 norm'(x))

Every linear map has a bias but the head, which is not tied to the embedding. The layers are those of `transformer`.

Papers: Black et al. 2022, arXiv:2204.06745 (section 2.1: rotary positions, parallel layers); Pythia, Biderman et al. 2023,
arXiv:2304.01373.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, drop, interleave, rename
from zoo.registry import get, register
from zoo.terms import foreign_activation, own_activation, rope_fields, rope_parameters, same_fields


@strict
class GPTNeoXConfig(ZooConfig):
    """The shared fields with the defaults of Pythia, its heads and its positions."""

    model_type = "zoo_gpt_neox"

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    norm: str = "layernorm"
    channel_mixer: str | None = "mlp"
    parallel_residual: bool = True
    num_heads: int = 12
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_fraction: float = 0.25  # share of a head's channels that turn
    rope_scaling: dict | None = None  # as in TransformerConfig
    bias: bool = True  # biases of the attention's projections

    def layer_configs(self) -> list[ZooConfig]:
        rope = {"rope_theta": self.rope_theta, "rope_fraction": self.rope_fraction, "rope_scaling": self.rope_scaling}
        fields = self.shared_fields() | rope | {"num_heads": self.num_heads, "qkv_bias": self.bias, "out_bias": self.bias}
        return [get("transformer").config(**fields)] * self.num_hidden_layers


RENAMED = {
    "norm_eps": "layer_norm_eps", "num_heads": "num_attention_heads", "bias": "attention_bias",
    "parallel_residual": "use_parallel_residual",
}  # fmt: skip


def from_neox(foreign: dict) -> dict:
    """Fields of a GPTNeoXConfig for a config of transformers."""
    act, rope = own_activation(foreign["hidden_act"]), rope_fields(foreign)
    turning = int(foreign["hidden_size"] // foreign["num_attention_heads"] * rope["rope_fraction"])
    if turning % 2:
        raise ValueError(f"partial_rotary_factor={rope['rope_fraction']} turns {turning} channels of a head; it must be an even number")
    fields = same_fields(foreign) | {own: foreign[name] for own, name in RENAMED.items()} | rope
    return fields if act == "gelu" else fields | {"channel_args": {"act": act}}


def to_neox(config: GPTNeoXConfig) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    fields = same_fields(config) | {name: getattr(config, own) for own, name in RENAMED.items()}
    rope = {name: getattr(config, name) for name in ("rope_theta", "rope_fraction", "rope_scaling")}
    return fields | {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "rope_parameters": rope_parameters(rope) | {"partial_rotary_factor": config.rope_fraction},
        "hidden_act": foreign_activation((config.channel_args or {}).get("act", "gelu")),
    }


NEOX = Layout(
    "gpt_neox", ("gpt_neox",), from_neox, to_neox, prefix="gpt_neox.",
    trials={
        "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
        "sequential": {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True,
                       "hidden_act": "gelu_pytorch_tanh"},
        "stretched": {"hidden_size": 36, "num_attention_heads": 6,
                      "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5, "partial_rotary_factor": 1.0}},
    },
    rules=(
        rename("gpt_neox.embed_in.weight", "model.embed_tokens.weight"),
        rename("gpt_neox.layers.{}.{input,post_attention}_layernorm.{weight,bias}", "model.layers.{}.{mixer,channel}_norm.{weight,bias}"),
        interleave(
            "gpt_neox.layers.{}.attention.query_key_value.{weight,bias}",
            [f"model.layers.{{}}.mixer.{name}_proj.{{weight,bias}}" for name in "qkv"],
            lambda config: config.num_heads,
        ),
        rename("gpt_neox.layers.{}.attention.dense.{weight,bias}", "model.layers.{}.mixer.out_proj.{weight,bias}"),
        rename(
            "gpt_neox.layers.{}.mlp.dense_{h_to_4h,4h_to_h}.{weight,bias}", "model.layers.{}.channel_mixer.{up,down}_proj.{weight,bias}"
        ),
        rename("gpt_neox.final_layer_norm.{weight,bias}", "model.norm.{weight,bias}"),
        rename("embed_out.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
        drop("gpt_neox.layers.{}.attention.{bias,masked_bias}", "a causal mask, which attention makes itself"),
        drop("gpt_neox.layers.{}.attention.rotary_emb.inv_freq", "follows from rope_theta"),
    ),
    aliases=(("lm_head.weight", "embed_out.weight"),),
)  # fmt: skip

register(
    "gpt_neox",
    config=GPTNeoXConfig,
    mixer=None,
    title="GPT-NeoX-20B: An Open-Source Autoregressive Language Model",
    paper="arXiv:2204.06745",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, vocab_size=256),
        "pythia-160m": {},
        "pythia-410m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16),
        "pythia-1.4b": dict(hidden_size=2048, num_hidden_layers=24, num_heads=16),
        "pythia-6.9b": dict(vocab_size=50432, hidden_size=4096, num_hidden_layers=32, num_heads=32),
        "20b": dict(vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_heads=64),
    },
    layouts=(NEOX,),
)

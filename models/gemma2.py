"""Gemma 2: layers with a sliding window and layers that see everything in turn, with caps on the logits of both softmaxes.

    o_t = sum_{j <= t} softmax_j(cap(s q_t k_j)) v_j,    cap(a) = c tanh(a / c),    q and k rotated by their positions
    x' = x + norm(attention(norm(x))),    x'' = x' + norm(mlp(norm(x')))

The norms' weights are offsets from one, the embeddings are multiplied by sqrt(D) and are the head, the MLP is gated by a GELU.

Paper: Gemma Team 2024, arXiv:2408.00118 (section 2: local and global attention, soft-capping, both norms).
"""

from huggingface_hub.dataclasses import strict

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.layout import Layout, drop, rename
from zoo.registry import register
from zoo.terms import foreign_activation, layers_of, own_activation, rope_parameters, same_fields, shell, whole_rope


@strict
class Gemma2Config(ZooConfig):
    """Sizes of the heads, and who sees how far."""

    model_type = "zoo_gemma2"

    vocab_size: int = 256000
    hidden_size: int = 2304
    num_hidden_layers: int = 26
    intermediate_size: int | None = 9216
    norm: str = "unit_rmsnorm"
    norm_eps: float = 1e-6
    output_norms: bool = True
    embedding_scale: float = 48.0  # sqrt(D)
    logit_softcap: float | None = 30.0
    tie_word_embeddings: bool = True
    num_heads: int = 8
    num_kv_heads: int = 4  # G, each shared by H / G query heads
    head_dim: int = 256  # K
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: dict | None = None  # as in TransformerConfig
    bias: bool = False  # biases of the attention's projections
    query_scalar: int = 256  # logits are multiplied by query_scalar^-1/2
    softcap: float | None = 50.0  # c tanh(logits / c) before the attention's softmax
    window: int = 4096  # tokens seen by the other layers, the own included
    full_layers: list[int] | None = None  # layers that see everything; None: every second

    def __post_init__(self, **kwargs):
        if self.channel_args is None and self.channel_mixer == "swiglu":
            self.channel_args = {"act": "gelu_tanh"}
        if self.full_layers is None:
            self.full_layers = list(range(1, self.num_hidden_layers, 2))
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly, and the window and the scale be positive."""
        self.divide("num_heads", "num_kv_heads")
        if self.window < 1 or self.query_scalar < 1:
            raise ValueError(f"Gemma2Config: window={self.window} and query_scalar={self.query_scalar} must be positive")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class Gemma2Mixer(RotaryAttention):
    """Softmax attention; the state is that of `AttentionMixer`, of constant size in the layers with a window."""

    def __init__(self, config: Gemma2Config, layer: int):
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads, keys=config.head_dim,
            rope=(config.head_dim, config.rope_theta, config.rope_scaling), qkv_bias=config.bias, out_bias=config.bias,
            window=config.window if config.causal and layer not in config.full_layers else None,
            softcap=config.softcap, scale=config.query_scalar**-0.5,
        )  # fmt: skip


RENAMED = {
    "norm_eps": "rms_norm_eps", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "bias": "attention_bias", "query_scalar": "query_pre_attn_scalar", "softcap": "attn_logit_softcapping", "window": "sliding_window",
    "logit_softcap": "final_logit_softcapping",
}  # fmt: skip
KINDS = ("sliding_attention", "full_attention")


def from_gemma2(foreign: dict) -> dict:
    """Fields of a Gemma2Config for a config of transformers."""
    if foreign["use_bidirectional_attention"]:
        raise ValueError("a gemma2 with use_bidirectional_attention=True is not supported, only a causal one")
    if unknown := set(foreign["layer_types"]) - set(KINDS):
        raise ValueError(f"layer_types has {sorted(unknown)}; a gemma2 has {' and '.join(KINDS)} only")
    rope = whole_rope(foreign)
    return (
        same_fields(foreign) | {own: foreign[name] for own, name in RENAMED.items()} | rope
        | {"channel_args": {"act": own_activation(foreign["hidden_activation"])}}
        | {"embedding_scale": foreign["hidden_size"] ** 0.5, "full_layers": layers_of(foreign["layer_types"], KINDS[1])}
    )  # fmt: skip


def to_gemma2(config: Gemma2Config) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    rope = {"rope_theta": config.rope_theta, "rope_fraction": 1.0, "rope_scaling": config.rope_scaling}
    return same_fields(config) | {name: getattr(config, own) for own, name in RENAMED.items()} | {
        "rope_parameters": rope_parameters(rope),
        "hidden_activation": foreign_activation((config.channel_args or {}).get("act", "silu")),
        "layer_types": [KINDS[index in config.full_layers] for index in range(config.num_hidden_layers)],
    }  # fmt: skip


RULES = (
    *shell(),
    rename("model.layers.{}.self_attn.{q,k,v,o}_proj.{weight,bias}", "model.layers.{}.mixer.{q,k,v,out}_proj.{weight,bias}"),
    rename("model.layers.{}.mlp.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.{gate,up,down}_proj.weight"),
    rename("model.layers.{}.{input,post_attention}_layernorm.weight", "model.layers.{}.mixer_{norm,output_norm}.weight"),
    rename("model.layers.{}.{pre,post}_feedforward_layernorm.weight", "model.layers.{}.channel_{norm,output_norm}.weight"),
    drop("model.layers.{}.self_attn.rotary_emb.inv_freq", "follows from rope_theta"),
)

TRIALS = {
    "plain": {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 5},
    "biased": {"head_dim": 10, "query_pre_attn_scalar": 5, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"],
               "attention_bias": True, "hidden_size": 48, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None,
               "tie_word_embeddings": False},
    "uncapped": {"head_dim": 8, "attn_logit_softcapping": None, "hidden_activation": "silu", "num_key_value_heads": 4},
}  # fmt: skip


register(
    "gemma2",
    config=Gemma2Config,
    mixer=Gemma2Mixer,
    title="Gemma 2: Improving Open Language Models at a Practical Size",
    paper="arXiv:2408.00118",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=256, num_heads=4, num_kv_heads=2, head_dim=8,
            query_scalar=8, window=8, embedding_scale=32**0.5,
        ),
        "2b": {},
        "9b": dict(
            hidden_size=3584, num_hidden_layers=42, intermediate_size=14336, num_heads=16, num_kv_heads=8, embedding_scale=3584**0.5
        ),
        "27b": dict(
            hidden_size=4608, num_hidden_layers=46, intermediate_size=36864, num_heads=32, num_kv_heads=16, head_dim=128,
            query_scalar=144, embedding_scale=4608**0.5,
        ),
    },
    layouts=(Layout("gemma2", ("gemma2",), from_gemma2, to_gemma2, RULES, trials=TRIALS),),
)  # fmt: skip

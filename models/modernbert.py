"""ModernBERT: an encoder whose layers see everything in every third place and a window in the others, each with its own rotation.

    o_t = sum_j softmax_j(q_t k_j / sqrt(K)) v_j,    over all j in a global layer, over |t - j| <= W / 2 in a local one

Queries and keys turn by angles of base 160000 in global layers and 10000 in local ones. Norms stand before the mixers; the first
one, which would follow the embeddings' norm, is left out. Channel mixers are gated by GELU, and no map but the decoder has a bias.

Paper: Warner et al. 2024, arXiv:2412.13663, section 2.1.
"""

from huggingface_hub.dataclasses import strict

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.layout import Layout, rename, split
from zoo.registry import register
from zoo.terms import expect, foreign_activation, layers_of, own_activation, rope_fields, rope_parameters, same_fields


@strict
class ModernBertConfig(ZooConfig):
    """Sizes of the heads, and who sees how far."""

    model_type = "zoo_modernbert"

    vocab_size: int = 50368
    hidden_size: int = 768
    num_hidden_layers: int = 22
    causal: bool = False
    intermediate_size: int | None = 1152
    norm: str = "biasless_layernorm"
    embedding_norm: bool = True
    first_norm: bool = False
    tie_word_embeddings: bool = True
    num_heads: int = 12
    bias: bool = False  # biases of the attention's projections
    window: int = 128  # W, neighbours that a local layer sees on both sides together, an even number
    full_layers: list[int] | None = None  # global layers; None: every third, the first included
    rope_theta: float = 160000.0  # base of the rotary angles in global layers
    rope_scaling: dict | None = None  # of these, as in TransformerConfig
    local_rope_theta: float = 10000.0  # base in local layers

    def __post_init__(self, **kwargs):
        if self.channel_args is None and self.channel_mixer == "swiglu":
            self.channel_args = {"act": "gelu"}
        if self.head_args is None:
            self.head_args = {"act": "gelu", "bias": False, "norm": self.norm}
        self.classifier_args = self.classifier_args or self.head_args  # every task begins with the same transform
        self.token_classifier_args = self.token_classifier_args or self.head_args
        if self.full_layers is None:
            self.full_layers = list(range(0, self.num_hidden_layers, 3))
        super().__post_init__(**kwargs)

    def validate_window(self):
        """Heads must divide the width, and the window have two equal sides."""
        self.divide("hidden_size", "num_heads")
        if self.window < 2 or self.window % 2:
            raise ValueError(f"ModernBertConfig: window={self.window} must be even and at least 2, half of it on either side")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class ModernBertMixer(RotaryAttention):
    """Softmax attention; if causal, the state is that of `AttentionMixer`, of constant size in local layers."""

    def __init__(self, config: ModernBertConfig, layer: int):
        keys, full = config.divide("hidden_size", "num_heads"), layer in config.full_layers
        rope = (config.rope_theta, config.rope_scaling) if full else (config.local_rope_theta,)
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_heads, keys=keys, rope=(keys, *rope), qkv_bias=config.bias,
            out_bias=config.bias, window=None if full else config.window // 2 + 1,
        )  # fmt: skip


RENAMED = {"norm_eps": "norm_eps", "num_heads": "num_attention_heads", "bias": "attention_bias", "window": "local_attention"}
KINDS = ("sliding_attention", "full_attention")


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, decoder_bias=True)
    rope, local = (rope_fields(foreign | {"rope_parameters": foreign["rope_parameters"][kind]}) for kind in ("full_attention", KINDS[0]))
    if local["rope_scaling"] is not None or rope["rope_fraction"] != 1.0 or local["rope_fraction"] != 1.0:
        raise ValueError("a modernbert with partial rotary angles, or scaled ones in its local layers, is not supported")
    norm = "layernorm" if foreign["norm_bias"] else "biasless_layernorm"
    head = {"act": own_activation(foreign["classifier_activation"]), "bias": foreign["classifier_bias"], "norm": norm}
    mlp = {"act": own_activation(foreign["hidden_activation"])} | ({"bias": True} if foreign["mlp_bias"] else {})
    return same_fields(foreign, but=("use_cache",)) | {own: foreign[name] for own, name in RENAMED.items()} | {
        "norm": norm,
        "channel_args": mlp,
        "head_args": head,
        "classifier_args": head,
        "classifier_mean": foreign["classifier_pooling"] == "mean",
        "token_classifier_args": head,
        "full_layers": layers_of(foreign["layer_types"], "full_attention"),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
        "local_rope_theta": local["rope_theta"],
    }  # fmt: skip


def to_foreign(config: ModernBertConfig) -> dict:
    """The inverse."""
    mlp, head = config.channel_args or {}, config.head_args
    rope = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling, "rope_fraction": 1.0}
    local = {"rope_theta": config.local_rope_theta, "rope_scaling": None, "rope_fraction": 1.0}
    return same_fields(config, but=("use_cache",)) | {name: getattr(config, own) for own, name in RENAMED.items()} | {
        "norm_bias": config.norm == "layernorm",
        "hidden_activation": foreign_activation(mlp.get("act", "silu")),
        "mlp_bias": mlp.get("bias", False),
        "classifier_activation": foreign_activation(head["act"]),
        "classifier_bias": head["bias"],
        "classifier_pooling": "mean" if config.classifier_mean else "cls",
        "layer_types": [KINDS[index in config.full_layers] for index in range(config.num_hidden_layers)],
        "rope_parameters": {"full_attention": rope_parameters(rope), KINDS[0]: rope_parameters(local)},
        "cls_token_id": config.bos_token_id,
        "sep_token_id": config.eos_token_id,
    }  # fmt: skip


THEIRS, OURS = "model.layers.{}.", "model.layers.{}."
RULES = (
    rename("model.embeddings.tok_embeddings.weight", "model.embed_tokens.weight"),
    rename("model.embeddings.norm.{weight,bias}", "model.embed_norm.{weight,bias}"),
    rename(THEIRS + "{attn,mlp}_norm.{weight,bias}", OURS + "{mixer,channel}_norm.{weight,bias}"),
    split(THEIRS + "attn.Wqkv.{weight,bias}", [OURS + f"mixer.{name}_proj.{{weight,bias}}" for name in "qkv"]),
    rename(THEIRS + "attn.Wo.{weight,bias}", OURS + "mixer.out_proj.{weight,bias}"),
    split(THEIRS + "mlp.Wi.{weight,bias}", [OURS + f"channel_mixer.{name}_proj.{{weight,bias}}" for name in ("gate", "up")]),
    rename(THEIRS + "mlp.Wo.{weight,bias}", OURS + "channel_mixer.down_proj.{weight,bias}"),
    rename("model.final_norm.{weight,bias}", "model.norm.{weight,bias}"),
    rename("head.{dense,norm}.{weight,bias}", "head.{dense,norm}.{weight,bias}"),
    rename("head.{dense,norm}.{weight,bias}", "classifier.{dense,norm}.{weight,bias}"),
    rename("decoder.{weight,bias}", "lm_head.{weight,bias}"),
    rename("classifier.{weight,bias}", "score.{weight,bias}"),
    rename("classifier.{weight,bias}", "answer.{weight,bias}"),
)
FORGETS = (
    "initializer_cutoff_factor", "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "cls_token_id",
    "sep_token_id",
)  # fmt: skip
SMALL = dict(num_hidden_layers=4, local_attention=6, cls_token_id=1, sep_token_id=2, architectures=["ModernBertForMaskedLM"])
TRIALS = {
    "plain": SMALL,
    "biases": SMALL | dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True, classifier_activation="silu"),
    "other_layers": SMALL | dict(
        layer_types=[KINDS[0], KINDS[1], KINDS[0], KINDS[0]], local_attention=10, tie_word_embeddings=False, num_attention_heads=2,
        hidden_activation="gelu_pytorch_tanh", norm_eps=1e-3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
        },
    ),
    "bare": SMALL | dict(architectures=None, num_hidden_layers=1),
    "sequences": SMALL | dict(architectures=["ModernBertForSequenceClassification"], classifier_pooling="mean"),
    "tokens": SMALL | dict(architectures=["ModernBertForTokenClassification"], num_labels=5),
    "answers": SMALL | dict(architectures=["ModernBertForQuestionAnswering"], classifier_activation="silu"),
}  # fmt: skip

register(
    "modernbert",
    config=ModernBertConfig,
    mixer=ModernBertMixer,
    title="Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory Efficient, and Long Context "
    "Finetuning and Inference",
    paper="arXiv:2412.13663",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, window=8, full_layers=[1], intermediate_size=48, vocab_size=256),
        "base": {},
        "large": dict(hidden_size=1024, num_hidden_layers=28, num_heads=16, intermediate_size=2624),
    },
    layouts=(Layout("modernbert", ("modernbert",), from_foreign, to_foreign, RULES, trials=TRIALS, forgets=FORGETS),),
)

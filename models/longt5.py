"""LongT5: T5 whose encoder attends locally, and with transient global tokens also to sums over blocks of the source.

    encoder    logit_tj = q_t . k_j + b(j - t),    |t - j| <= r
               logit_tg = q_t . k(s_g) + c(g - g(t)),    s_g = norm(sum of the x_j of block g)      transient-global
    decoder    logit_tj = q_t . k_j + b'(t - j),    j <= t;    then attention to the source without biases

all in one softmax, without a scale. Blocks have G tokens; tokens behind the last whole block belong to it, and a source shorter than
a block has no sums. b, c and b' are learned for buckets of distances, exact for near ones and logarithmic up to a largest
one, and the first layer of each stack has those of all. Norms are RMSNorms before the mixers, nothing has a bias.

Papers: Guo et al. 2021, LongT5, arXiv:2112.07916, section 3; T5: Raffel et al. 2019, arXiv:1910.10683, section 2.1.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, Rule, drop, rename
from zoo.registry import register
from zoo.relative import LocalConfig, RelativeConfig
from zoo.seq2seq import CrossAttentionConfig, Seq2SeqConfig, StackConfig
from zoo.terms import foreign_activation, inner_size, own_activation


@strict
class LongT5Config(Seq2SeqConfig):
    """The encoder's neighbourhood and blocks, and the buckets of distances."""

    model_type = "zoo_longt5"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    channel_mixer: str | None = "swiglu"
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = 0
    num_heads: int = 12
    head_dim: int | None = 64  # K; None: D / H
    radius: int = 127  # r, tokens seen on either side
    global_block: int | None = None  # G; None: no sums over blocks
    num_buckets: int = 32  # of distances, in the encoder half of them for either side
    max_distance: int = 128  # from which on all are alike

    def validate_buckets(self):
        """There must be buckets for either side, near and far."""
        if self.num_buckets < 4 or self.num_buckets % 2 or self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"LongT5Config: num_buckets={self.num_buckets} must be even, from 4 on and less than twice max_distance={self.max_distance}"
            )
        if self.radius < 1 or (self.global_block is not None and self.global_block < 1):
            raise ValueError(f"LongT5Config: radius={self.radius} and global_block={self.global_block} must be positive")

    def _sizes(self) -> dict:
        keys = self.head_dim or self.divide("hidden_size", "num_heads")
        return self.shared_fields() | {"num_heads": self.num_heads, "head_dim": keys}

    def encoder_config(self) -> ZooConfig:
        own = {"num_buckets": self.num_buckets, "max_distance": self.max_distance, "radius": self.radius, "global_block": self.global_block}
        layer = LocalConfig(**self._sizes() | own | {"causal": False})
        return StackConfig.of([layer] * self.num_hidden_layers)

    def decoder_layer(self, layer: int) -> list[ZooConfig]:
        own = {"num_buckets": self.num_buckets, "max_distance": self.max_distance, "channel_mixer": None}
        return [RelativeConfig(**self._sizes() | own), CrossAttentionConfig(**self._sizes(), bias=False, scale=1.0)]


RENAMED = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "head_dim": "d_kv", "intermediate_size": "d_ff", "norm_eps": "layer_norm_epsilon",
    "num_hidden_layers": "num_layers", "num_decoder_layers": "num_decoder_layers", "num_heads": "num_heads", "radius": "local_radius",
    "num_buckets": "relative_attention_num_buckets", "max_distance": "relative_attention_max_distance", "use_cache": "use_cache",
    "pad_token_id": "pad_token_id", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
}  # fmt: skip
GLOBAL = "transient-global"


def from_foreign(foreign: dict) -> dict:
    """Fields of a LongT5Config. What `tie_word_embeddings` says there is whether states are scaled: tables are always tied."""
    if foreign["encoder_attention_type"] not in ("local", GLOBAL):
        raise ValueError(f"encoder_attention_type={foreign['encoder_attention_type']!r} is unknown; it is 'local' or {GLOBAL!r}")
    *gate, act = foreign["feed_forward_proj"].split("-")
    start = foreign.get("decoder_start_token_id")
    scaled = foreign.get("scale_decoder_outputs", foreign["tie_word_embeddings"])
    return {own: foreign[name] for own, name in RENAMED.items()} | {
        "tie_word_embeddings": True,
        "global_block": foreign["global_block_size"] if foreign["encoder_attention_type"] == GLOBAL else None,
        "channel_mixer": "swiglu" if gate else "mlp",
        "channel_args": {"act": own_activation("gelu_new" if gate and act == "gelu" else act), "bias": False},
        "logit_scale": foreign["d_model"] ** -0.5 if scaled else 1.0,
        "decoder_start_token_id": foreign["pad_token_id"] if start is None else start,
    }  # fmt: skip


def to_foreign(config: LongT5Config) -> dict:
    """The inverse."""
    act = foreign_activation((config.channel_args or {}).get("act", "silu" if config.channel_mixer == "swiglu" else "gelu"), dated=True)
    gated = {"gelu_new": "gated-gelu"}.get(act, f"gated-{act}")
    kind = {"encoder_attention_type": "local"}
    if config.global_block:
        kind = {"encoder_attention_type": GLOBAL, "global_block_size": config.global_block}
    inner = inner_size(config) if config.channel_mixer == "swiglu" else config.intermediate_size or 4 * config.hidden_size
    return {name: getattr(config, own) for own, name in RENAMED.items()} | kind | {
        "d_ff": inner,
        "d_kv": config.head_dim or config.divide("hidden_size", "num_heads"),
        "feed_forward_proj": gated if config.channel_mixer == "swiglu" else act,
        "tie_word_embeddings": config.logit_scale != 1.0,
        "decoder_start_token_id": config.decoder_start_token_id,
    }  # fmt: skip


def rules(config: LongT5Config) -> tuple[Rule, ...]:
    """Two blocks of the decoder are one layer there."""
    kind = "TransientGlobalSelfAttention" if config.global_block else "LocalSelfAttention"
    listed = [
        rename("shared.weight", "model.encoder.embed_tokens.weight"),
        drop("{encoder,decoder}.embed_tokens.weight", "the table that both share"),
        drop("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "never read"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("{encoder,decoder}.final_layer_norm.weight", "model.{encoder,decoder}.norm.weight"),
        rename(f"encoder.block.0.layer.0.{kind}.relative_attention_bias.weight", "model.encoder.layers.0.mixer.bias.weight"),
        rename(f"encoder.block.0.layer.0.{kind}.global_relative_attention_bias.weight", "model.encoder.layers.0.mixer.global_bias.weight"),
        rename("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "model.decoder.layers.0.mixer.bias.weight"),
        rename(f"encoder.block.{{}}.layer.0.{kind}.global_input_layer_norm.weight", "model.encoder.layers.{}.mixer.global_norm.weight"),
        rename(f"encoder.block.{{}}.layer.0.{kind}.{{q,k,v,o}}.weight", "model.encoder.layers.{}.mixer.{q,k,v,out}_proj.weight"),
        rename("encoder.block.{}.layer.0.layer_norm.weight", "model.encoder.layers.{}.mixer_norm.weight"),
        *channel("encoder.block.{}.layer.1.", "model.encoder.layers.{}.", config),
    ]
    for layer in range(config.num_decoder_layers):
        for part, name in enumerate(("SelfAttention", "EncDecAttention")):
            there, here = f"decoder.block.{layer}.layer.{part}.", f"model.decoder.layers.{2 * layer + part}."
            listed.append(rename(there + f"{name}.{{q,k,v,o}}.weight", here + "mixer.{q,k,v,out}_proj.weight"))
            listed.append(rename(there + "layer_norm.weight", here + "mixer_norm.weight"))
        listed += channel(f"decoder.block.{layer}.layer.2.", f"model.decoder.layers.{2 * layer + 1}.", config)
    return tuple(listed)


def channel(there: str, here: str, config: LongT5Config) -> list[Rule]:
    """Rules for a channel mixer and the norm before it."""
    theirs, ours = ("{wi_0,wi_1,wo}", "{gate,up,down}") if config.channel_mixer == "swiglu" else ("{wi,wo}", "{up,down}")
    return [
        rename(there + f"DenseReluDense.{theirs}.weight", here + f"channel_mixer.{ours}_proj.weight"),
        rename(there + "layer_norm.weight", here + "channel_norm.weight"),
    ]


WRITES = dict(architectures=["LongT5ForConditionalGeneration"], decoder_start_token_id=0, d_ff=52, d_kv=8, local_radius=3)
LAYOUT = Layout(
    "longt5", ("longt5",), from_foreign, to_foreign, rules, prefix="",
    forgets=("initializer_factor", "dense_act_fn", "is_gated_act"),
    trials={
        "local": WRITES | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
        "global": WRITES | {"encoder_attention_type": GLOBAL, "global_block_size": 4, "feed_forward_proj": "gated-gelu", "d_kv": 6},
        "unscaled": WRITES | {
            "encoder_attention_type": GLOBAL, "global_block_size": 3, "tie_word_embeddings": False, "num_decoder_layers": 1,
            "feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9,
            "local_radius": 6,
        },
        "bare": WRITES | {"architectures": None, "num_decoder_layers": 1, "num_heads": 2, "layer_norm_epsilon": 1e-3},
    },
)  # fmt: skip
PUBLISHED = dict(
    intermediate_size=2048, channel_args={"act": "gelu_tanh", "bias": False}, vocab_size=32128, pad_token_id=0, eos_token_id=1,
)  # fmt: skip

register(
    "longt5",
    config=LongT5Config,
    mixer=None,
    title="LongT5: Efficient Text-To-Text Transformer for Long Sequences",
    paper="arXiv:2112.07916",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_decoder_layers=2, num_heads=2, head_dim=16, radius=3, global_block=4, vocab_size=256,
            num_buckets=8, max_distance=20, pad_token_id=0,
        ),
        "local-base": PUBLISHED,
        "tglobal-base": PUBLISHED | dict(global_block=16),
        "tglobal-large": PUBLISHED | dict(
            hidden_size=1024, num_hidden_layers=24, num_decoder_layers=24, num_heads=16, intermediate_size=2816, global_block=16,
        ),
    },
    layouts=(LAYOUT,),
)  # fmt: skip

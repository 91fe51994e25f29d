"""LED: Longformer's encoder and an ordinary decoder, for long documents that are to become short ones.

The encoder attends as a Longformer does, over a window and with global tokens. The decoder has full causal attention and looks at
all that the encoder made of the source; both have BART's blocks: learned positions, norms after the residual sums and after the
embedding, an MLP with GELU. Encoder, decoder and head share one table of embeddings.

Paper: Beltagy, Peters, Cohan 2020, arXiv:2004.05150, section 7; BART: Lewis et al. 2019, arXiv:1910.13461.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, Rule, drop, mapped, rename
from zoo.registry import get, register
from zoo.seq2seq import CrossAttentionConfig, Seq2SeqConfig
from zoo.terms import expect, foreign_activation, own_activation


@strict
class LEDConfig(Seq2SeqConfig):
    """The windows of the encoder, and the sizes of both stacks."""

    model_type = "zoo_led"

    hidden_size: int = 1024
    num_hidden_layers: int = 12
    channel_mixer: str | None = "mlp"
    norm: str = "layernorm"
    post_norm: bool = True
    embedding_norm: bool = True
    max_position_embeddings: int | None = 16384
    tie_word_embeddings: bool = True
    logits_bias: bool = True
    num_heads: int = 16
    num_decoder_heads: int = 16
    decoder_intermediate_size: int | None = None  # width inside the decoder's channel mixers; None: 4 D
    decoder_positions: int = 1024  # rows of the decoder's position table
    window: int | list[int] = 512  # W of the encoder, as in Longformer; a list has one for each layer
    num_global_tokens: int = 0  # first tokens of a source that are always global; a call chooses others by global_attention_mask

    def encoder_config(self) -> ZooConfig:
        own = {"num_heads": self.num_heads, "window": self.window, "num_global_tokens": self.num_global_tokens}
        return get("longformer").config(**self.shared_fields() | own | {"causal": False})

    def decoder_layer(self, layer: int) -> list[ZooConfig]:
        shared = self.shared_fields() | {
            "num_heads": self.num_decoder_heads, "intermediate_size": self.decoder_intermediate_size,
            "max_position_embeddings": self.decoder_positions,
        }  # fmt: skip
        alone = {"channel_mixer": None, "rope_theta": None, "qkv_bias": True, "out_bias": True}
        return [get("transformer").config(**shared | alone), CrossAttentionConfig(**shared)]


RENAMED = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "encoder_layers", "num_decoder_layers": "decoder_layers",
    "num_heads": "encoder_attention_heads", "num_decoder_heads": "decoder_attention_heads", "intermediate_size": "encoder_ffn_dim",
    "decoder_intermediate_size": "decoder_ffn_dim", "max_position_embeddings": "max_encoder_position_embeddings",
    "decoder_positions": "max_decoder_position_embeddings", "window": "attention_window", "initializer_range": "init_std",
    "decoder_start_token_id": "decoder_start_token_id", "use_cache": "use_cache", "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip


def from_foreign(foreign: dict) -> dict:
    """Fields of an LEDConfig. transformers makes tokens global by a mask at every call, and so do we."""
    expect(foreign, tie_word_embeddings=True)  # without, each stack would have a table of its own
    fields = {own: foreign[name] for own, name in RENAMED.items()}
    return fields | {"channel_args": {"act": own_activation(foreign["activation_function"])}}


def to_foreign(config: LEDConfig) -> dict:
    """The inverse."""
    fields = {name: getattr(config, own) for own, name in RENAMED.items()}
    return fields | {
        "encoder_ffn_dim": config.intermediate_size or 4 * config.hidden_size,
        "decoder_ffn_dim": config.decoder_intermediate_size or 4 * config.hidden_size,
        "activation_function": foreign_activation((config.channel_args or {}).get("act", "gelu"), dated=True),
    }


def rules(config: LEDConfig) -> tuple[Rule, ...]:
    """Two blocks of the decoder are one layer there."""
    theirs, ours, both = "led.encoder.layers.{}.", "model.encoder.layers.{}.", "{weight,bias}"
    listed = [
        rename("led.shared.weight", "model.encoder.embed_tokens.weight"),
        rename("led.{encoder,decoder}.embed_positions.weight", "model.{encoder,decoder}.embed_positions.weight"),
        rename(f"led.{{encoder,decoder}}.layernorm_embedding.{both}", f"model.{{encoder,decoder}}.embed_norm.{both}"),
        drop("led.{encoder,decoder}.embed_tokens.weight", "the table that both share"),
        rename("lm_head.weight", "lm_head.weight"),
        mapped("final_logits_bias", "logits_bias", lambda x: x[0].clone(), lambda x: x.unsqueeze(0).clone()),
        rename(theirs + f"self_attn.longformer_self_attn.{{query,key,value}}.{both}", ours + f"mixer.{{q,k,v}}_proj.{both}"),
        rename(theirs + f"self_attn.longformer_self_attn.{{query,key,value}}_global.{both}", ours + f"mixer.{{q,k,v}}_global.{both}"),
        rename(theirs + f"self_attn.output.{both}", ours + f"mixer.out_proj.{both}"),
        rename(theirs + f"{{self_attn,final}}_layer_norm.{both}", ours + f"{{mixer,channel}}_norm.{both}"),
        rename(theirs + f"{{fc1,fc2}}.{both}", ours + f"channel_mixer.{{up,down}}_proj.{both}"),
    ]
    for layer in range(config.num_decoder_layers):
        there = f"led.decoder.layers.{layer}."
        for place, name in ((2 * layer, "self_attn"), (2 * layer + 1, "encoder_attn")):
            here = f"model.decoder.layers.{place}."
            listed.append(rename(there + f"{name}.{{q,k,v,out}}_proj.{both}", here + f"mixer.{{q,k,v,out}}_proj.{both}"))
            listed.append(rename(there + f"{name}_layer_norm.{both}", here + f"mixer_norm.{both}"))
        listed.append(rename(there + f"final_layer_norm.{both}", here + f"channel_norm.{both}"))
        listed.append(rename(there + f"{{fc1,fc2}}.{both}", here + f"channel_mixer.{{up,down}}_proj.{both}"))
    return tuple(listed)


SIZES = dict(
    decoder_layers=2, decoder_attention_heads=4, encoder_ffn_dim=52, decoder_ffn_dim=52, max_encoder_position_embeddings=128,
    max_decoder_position_embeddings=128, decoder_start_token_id=2, attention_window=4,
)  # fmt: skip
LAYOUT = Layout(
    "led", ("led",), from_foreign, to_foreign, rules, prefix="led.",
    forgets=("encoder_layerdrop", "decoder_layerdrop"),
    trials={
        "writes": SIZES | {"architectures": ["LEDForConditionalGeneration"]},
        "uneven": SIZES | {
            "architectures": ["LEDForConditionalGeneration"], "attention_window": [8, 4], "decoder_layers": 3, "decoder_ffn_dim": 36,
            "decoder_attention_heads": 2, "activation_function": "relu", "decoder_start_token_id": 1, "pad_token_id": 1,
        },
        "bare": SIZES | {"decoder_layers": 1, "activation_function": "gelu_new", "encoder_attention_heads": 2},
    },
)  # fmt: skip

register(
    "led",
    config=LEDConfig,
    mixer=None,
    title="Longformer: The Long-Document Transformer",
    paper="arXiv:2004.05150",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_decoder_layers=2, num_heads=2, num_decoder_heads=2, window=8, vocab_size=256,
            max_position_embeddings=512, decoder_positions=128, pad_token_id=0,
        ),
        "base": dict(
            hidden_size=768, num_hidden_layers=6, num_decoder_layers=6, num_heads=12, num_decoder_heads=12, window=1024,
            vocab_size=50265, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        ),
        "large": dict(window=1024, vocab_size=50265, pad_token_id=1, bos_token_id=0, eos_token_id=2),
    },
    layouts=(LAYOUT,),
)  # fmt: skip

"""Bamba: Mamba-2 in nearly all layers, attention with half-rotated heads in a few, a gated MLP in each.

Published in 2024 by IBM, Princeton, CMU and UIUC without a paper of its own; its parts are Mamba-2 (Dao, Gu 2024,
arXiv:2405.21060), whose output norm here spans all groups, and Llama's attention (arXiv:2302.13971).
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, rename, squeeze, within
from zoo.registry import get, register
from zoo.terms import expect, expect_free_steps, rope_fields, rope_parameters, same_fields, shell

ATTENTION = dict(num_heads=32, num_kv_heads=8, rope_theta=10000.0, rope_fraction=0.5, rope_scaling=None, qkv_bias=False, out_bias=False)
MAMBA = dict(expand=2.0, head_dim=64, state_size=128, num_groups=1, conv_kernel=4, conv_bias=True, bias=False)


@strict
class BambaConfig(ZooConfig):
    """The two kinds of layers, and which is where."""

    model_type = "zoo_bamba"

    attention: dict | None = None  # fields of TransformerConfig that differ from the published model's
    mamba: dict | None = None  # the same of Mamba2Config
    attention_layers: list[int] | None = None  # None: no layer attends

    def __post_init__(self, **kwargs):
        self.attention, self.mamba = ATTENTION | (self.attention or {}), MAMBA | (self.mamba or {})
        super().__post_init__(**kwargs)

    def layer_configs(self) -> list[ZooConfig]:
        attention = get("transformer").config(**self.shared_fields() | self.attention)
        mamba = get("mamba2").config(**self.shared_fields() | {"norm_groups": 1} | self.mamba)
        return [attention if index in (self.attention_layers or []) else mamba for index in range(self.num_hidden_layers)]


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="silu")
    expect_free_steps(foreign)
    attention = {"num_heads": foreign["num_attention_heads"], "num_kv_heads": foreign["num_key_value_heads"]} | rope_fields(foreign)
    return same_fields(foreign) | {
        "norm_eps": foreign["rms_norm_eps"],
        "channel_args": {"bias": True} if foreign["mlp_bias"] else None,
        "attention": attention | {"qkv_bias": foreign["attention_bias"], "out_bias": foreign["attention_bias"]},
        "mamba": {
            "expand": float(foreign["mamba_expand"]),
            "head_dim": foreign["mamba_d_head"],
            "state_size": foreign["mamba_d_state"],
            "num_groups": foreign["mamba_n_groups"],
            "conv_kernel": foreign["mamba_d_conv"],
            "conv_bias": foreign["mamba_conv_bias"],
            "bias": foreign["mamba_proj_bias"],
        },
        "attention_layers": list(foreign["attn_layer_indices"]) if foreign["attn_layer_indices"] else None,
    }


def to_foreign(config: BambaConfig) -> dict:
    """The inverse."""
    attention, mamba = config.attention, config.mamba
    return same_fields(config) | {
        "rms_norm_eps": config.norm_eps,
        "mlp_bias": (config.channel_args or {}).get("bias", False),
        "num_attention_heads": attention["num_heads"],
        "num_key_value_heads": attention["num_kv_heads"],
        "rope_parameters": rope_parameters(attention),
        "attention_bias": attention["out_bias"],
        "mamba_n_heads": int(config.hidden_size * mamba["expand"]) // mamba["head_dim"],
        "mamba_d_head": mamba["head_dim"],
        "mamba_d_state": mamba["state_size"],
        "mamba_n_groups": mamba["num_groups"],
        "mamba_d_conv": mamba["conv_kernel"],
        "mamba_expand": int(mamba["expand"]),
        "mamba_conv_bias": mamba["conv_bias"],
        "mamba_proj_bias": mamba["bias"],
        "attn_layer_indices": config.attention_layers,
    }


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}."
RULES = (
    *shell("final_layernorm"),
    rename(THEIRS + "{input_layernorm,pre_ff_layernorm}.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename(THEIRS + "feed_forward.{gate,up,down}_proj.{weight,bias}", "model.layers.{}.channel_mixer.{gate,up,down}_proj.{weight,bias}"),
    *within("transformer", rename(THEIRS + "self_attn.{q,k,v,o}_proj.{weight,bias}", LAYER + "{q,k,v,out}_proj.{weight,bias}")),
    *within(
        "mamba2",
        rename(THEIRS + "mamba.{in_proj,norm,out_proj}.{weight,bias}", LAYER + "{in_proj,norm,out_proj}.{weight,bias}"),
        squeeze(THEIRS + "mamba.conv1d.{weight,bias}", LAYER + "conv.{weight,bias}"),
        rename(THEIRS + "mamba.{A_log,D,dt_bias}", LAYER + "{A_log,D,dt_bias}"),
    ),
)


FORGETS = ("mamba_n_heads", "num_logits_to_keep", "z_loss_coefficient")  # the first is the inner width by the head's
SMALL = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
TRIALS = {
    "plain": SMALL | {"mamba_n_groups": 2},
    "biased": SMALL | {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True, "mamba_n_groups": 1},
    "tied": SMALL
    | {"attn_layer_indices": [0], "mamba_n_groups": 2, "tie_word_embeddings": True, "mamba_conv_bias": False, "mamba_d_conv": 3},
}


register(
    "bamba",
    config=BambaConfig,
    mixer=None,
    title="Bamba: Inference-Efficient Hybrid Mamba2 Model",
    paper="arXiv:2405.21060",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, attention_layers=[1],
            attention=dict(num_heads=4, num_kv_heads=2), mamba=dict(head_dim=16, state_size=8, num_groups=2),
        ),
        "9b": dict(
            hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=128256, attention_layers=[9, 18, 27],
        ),
    },
    layouts=(Layout("bamba", ("bamba",), from_foreign, to_foreign, RULES, trials=TRIALS, forgets=FORGETS),),
)  # fmt: skip

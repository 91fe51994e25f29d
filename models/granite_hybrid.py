"""Granite 4 hybrid: Mamba-2 in nine layers of ten, attention without positions in the others, many small experts or one MLP.

    x' = x + m mixer(norm(x)),    x'' = x' + m channel(norm(x')),    logits = c W norm(x),    x_0 = e W_E[token]
    o_t = sum_{j <= t} softmax_j(a q_t k_j) v_j

The multipliers m, c, e and a keep activations and gradients at one scale when models grow. Where there are experts, one more is
shared by all tokens. Alone, as a layer of another hybrid, `granite_hybrid` is its attention.

Published in 2025 by IBM without a paper of its own; its parts are Mamba-2 (Dao, Gu 2024, arXiv:2405.21060), whose output norm
here spans all groups, and attention with grouped heads (arXiv:2305.13245), a mixture of experts (arXiv:2401.06066), and
multipliers after Tensor Programs V (arXiv:2203.03466).
"""

import math

from huggingface_hub.dataclasses import strict

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.layout import Layout, Rule, rename, split, squeeze, stack, within
from zoo.mixer import Traits
from zoo.registry import get, register
from zoo.terms import expect, expect_free_steps, inner_size, layers_of, rope_parameters, same_fields, shell, whole_rope

MAMBA = dict(expand=2.0, head_dim=64, state_size=128, num_groups=1, conv_kernel=4, conv_bias=True, bias=False)


@strict
class GraniteHybridConfig(ZooConfig):
    """Attention, the layers of Mamba-2, and which is where."""

    model_type = "zoo_granite_hybrid"

    num_heads: int = 32  # H
    num_kv_heads: int = 8  # G, each shared by H / G query heads
    attention_scale: float | None = None  # a; None: K^-1/2
    attention_bias: bool = False
    rope_theta: float | None = None  # base of the rotary angles; None: no rotary positions
    rope_scaling: dict | None = None  # as in TransformerConfig
    attention_layers: list[int] | None = None  # None: no layer attends
    mamba: dict | None = None  # fields of Mamba2Config that differ from the published models'

    def __post_init__(self, **kwargs):
        self.mamba = MAMBA | (self.mamba or {})
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide("hidden_size", "num_heads")
        self.divide("num_heads", "num_kv_heads")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)

    def layer_configs(self) -> list[ZooConfig]:
        mamba = get("mamba2").config(**self.shared_fields() | {"norm_groups": 1} | self.mamba)
        return [self if index in (self.attention_layers or []) else mamba for index in range(self.num_hidden_layers)]


class GraniteHybridMixer(RotaryAttention):
    """Softmax attention, causal like its neighbours; the state is that of `AttentionMixer`."""

    traits = Traits(constant_state=False)

    def __init__(self, config: GraniteHybridConfig, layer: int):
        keys = config.divide("hidden_size", "num_heads")
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads, keys=keys, scale=config.attention_scale,
            rope=None if config.rope_theta is None else (keys, config.rope_theta, config.rope_scaling),
            qkv_bias=config.attention_bias, out_bias=config.attention_bias,
        )  # fmt: skip


MAMBA_NAMES = {
    "head_dim": "mamba_d_head", "state_size": "mamba_d_state", "num_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv",
    "conv_bias": "mamba_conv_bias", "bias": "mamba_proj_bias",
}  # fmt: skip
NO_ROPE = (None, "nope")  # published configs say "nope"


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    inner = foreign["mamba_expand"] * foreign["hidden_size"]
    expect(foreign, hidden_act="silu", head_dim=foreign["hidden_size"] // foreign["num_attention_heads"])
    expect(foreign, mamba_n_heads=inner // foreign["mamba_d_head"])
    expect_free_steps(foreign)
    rope, positions, experts = whole_rope(foreign), foreign["position_embedding_type"], foreign["num_local_experts"]
    if positions not in ("rope", *NO_ROPE):
        raise ValueError(f"a granitemoehybrid with position_embedding_type={positions!r} is not supported, only 'rope' and None")
    residual, shared = float(foreign["residual_multiplier"]), foreign["shared_intermediate_size"]
    args = {"experts": experts, "top_k": foreign["num_experts_per_tok"], "shared_size": shared}
    return same_fields(foreign) | {
        "intermediate_size": foreign["intermediate_size"] if experts else shared,
        "norm_eps": foreign["rms_norm_eps"],
        "channel_mixer": "moe" if experts else "swiglu",
        "channel_args": args if experts else None,
        "residual_weights": [1.0, residual, 1.0, residual],
        "embedding_scale": float(foreign["embedding_multiplier"]),
        "logit_scale": 1 / foreign["logits_scaling"],
        "num_heads": foreign["num_attention_heads"],
        "num_kv_heads": foreign["num_key_value_heads"],
        "attention_scale": float(foreign["attention_multiplier"]),
        "attention_bias": foreign["attention_bias"],
        "rope_theta": None if positions in NO_ROPE else rope["rope_theta"],
        "rope_scaling": None if positions in NO_ROPE else rope["rope_scaling"],
        "attention_layers": layers_of(foreign["layer_types"], "full_attention") or None,
        "mamba": {own: foreign[name] for own, name in MAMBA_NAMES.items()} | {"expand": float(foreign["mamba_expand"])},
    }


def reciprocal(x: float) -> float:
    """The shortest number whose reciprocal is x, or where there is none the nearest to it."""
    near = 1 / x
    exact = [y for y in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if 1 / y == x]
    return min(exact, key=lambda y: len(repr(y)), default=near)


def to_foreign(config: GraniteHybridConfig) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    keys, mamba, attending = config.divide("hidden_size", "num_heads"), config.mamba, config.attention_layers or []
    args = {"experts": 0, "top_k": 0, "shared_size": inner_size(config)} | (config.channel_args or {})
    rope = {"rope_theta": config.rope_theta, "rope_fraction": 1.0, "rope_scaling": config.rope_scaling}
    return same_fields(config) | {name: mamba[own] for own, name in MAMBA_NAMES.items()} | {
        "intermediate_size": inner_size(config),
        "rms_norm_eps": config.norm_eps,
        "num_local_experts": args["experts"],
        "num_experts_per_tok": args["top_k"],
        "shared_intermediate_size": args["shared_size"],
        "residual_multiplier": (config.residual_weights or [1.0] * 4)[1],
        "embedding_multiplier": config.embedding_scale,
        "logits_scaling": reciprocal(config.logit_scale),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "attention_multiplier": keys**-0.5 if config.attention_scale is None else config.attention_scale,
        "attention_bias": config.attention_bias,
        "position_embedding_type": None if config.rope_theta is None else "rope",
        "layer_types": ["full_attention" if index in attending else "linear_attention" for index in range(config.num_hidden_layers)],
        "mamba_expand": int(mamba["expand"]),
        "mamba_n_heads": int(config.hidden_size * mamba["expand"]) // mamba["head_dim"],
    } | ({} if config.rope_theta is None else {"rope_parameters": rope_parameters(rope)})  # fmt: skip


def rules(config: GraniteHybridConfig) -> tuple[Rule, ...]:
    """Experts are stored one on the other."""
    ours, theirs = "model.layers.{}.", "model.layers.{}."
    moe, channel, shared = theirs + "block_sparse_moe.", ours + "channel_mixer.", ours + "channel_mixer."
    experts: tuple[Rule, ...] = ()
    if config.channel_mixer == "moe":
        shared, numbers = channel + "shared.", range((config.channel_args or {}).get("experts", 8))
        experts = (
            rename(moe + "router.layer.weight", channel + "router.weight"),
            stack(
                moe + "input_linear.weight",
                [[channel + f"experts.{number}.{part}_proj.weight" for part in ("gate", "up")] for number in numbers],
            ),
            stack(moe + "output_linear.weight", [[channel + f"experts.{number}.down_proj.weight"] for number in numbers]),
        )
    return (
        *shell(),
        rename(theirs + "{input,post_attention}_layernorm.weight", ours + "{mixer,channel}_norm.weight"),
        *experts,
        split(theirs + "shared_mlp.input_linear.weight", [shared + f"{part}_proj.weight" for part in ("gate", "up")]),
        rename(theirs + "shared_mlp.output_linear.weight", shared + "down_proj.weight"),
        *within("granite_hybrid", rename(theirs + "self_attn.{q,k,v,o}_proj.{weight,bias}", ours + "mixer.{q,k,v,out}_proj.{weight,bias}")),
        *within(
            "mamba2",
            rename(theirs + "mamba.{in_proj,norm,out_proj}.{weight,bias}", ours + "mixer.{in_proj,norm,out_proj}.{weight,bias}"),
            squeeze(theirs + "mamba.conv1d.{weight,bias}", ours + "mixer.conv.{weight,bias}"),
            rename(theirs + "mamba.{A_log,D,dt_bias}", ours + "mixer.{A_log,D,dt_bias}"),
        ),
    )


SCALES = {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 6, "attention_multiplier": 0.1}
PARTS = {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4, "mamba_d_state": 8}
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 52}
TRIALS = {
    "experts": PARTS | SCALES | {"num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 20}
    | {"tie_word_embeddings": True, "mamba_n_groups": 2},
    "rotary": PARTS | DENSE | SCALES | {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}
    | {"logits_scaling": 49.0, "mamba_n_groups": 4},
    "biased": PARTS | DENSE | {"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_conv": 3}
    | {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    "odd": PARTS | SCALES | {"layer_types": ["attention", "mamba"], "num_local_experts": 3, "num_experts_per_tok": 1}
    | {"shared_intermediate_size": 36, "mamba_n_heads": 3, "mamba_expand": 3, "mamba_d_state": 5},
}  # fmt: skip

_PUBLISHED = dict(
    num_hidden_layers=40, vocab_size=100352, tie_word_embeddings=True, attention_layers=[5, 15, 25, 35], embedding_scale=12.0,
    residual_weights=[1.0, 0.22, 1.0, 0.22],
)  # fmt: skip

register(
    "granite_hybrid",
    config=GraniteHybridConfig,
    mixer=GraniteHybridMixer,
    title="IBM Granite 4.0: Hybrid Mamba-2 and Transformer Models",
    paper="arXiv:2405.21060",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=24, vocab_size=256, num_heads=4, num_kv_heads=2, attention_layers=[0],
            mamba=dict(head_dim=16, state_size=8, num_groups=2), channel_mixer="moe", embedding_scale=2.0, logit_scale=0.5,
            channel_args=dict(experts=4, top_k=2, shared_size=16), residual_weights=[1.0, 0.5, 1.0, 0.5], attention_scale=0.25,
        ),
        "h-micro": dict(hidden_size=2048, intermediate_size=8192, logit_scale=1 / 8, attention_scale=1 / 64, **_PUBLISHED),
        "h-small": dict(
            hidden_size=4096, intermediate_size=768, logit_scale=1 / 16, attention_scale=1 / 128, channel_mixer="moe",
            channel_args=dict(experts=72, top_k=10, shared_size=1536), **_PUBLISHED,
        ),
    },
    layouts=(Layout("granitemoehybrid", ("granitemoehybrid",), from_foreign, to_foreign, rules, trials=TRIALS),),
)  # fmt: skip

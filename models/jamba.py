"""Jamba: seven layers of Mamba to one of attention, with a mixture of experts in every second layer.

Mamba normalises its step sizes, B and C; attention has grouped heads and no positions, for the recurrence before it tells them.

Papers: Lieber et al. 2024, arXiv:2403.19887: the block in section 2 (figure 1), the inner norms in section 6.4; Jamba-1.5,
arXiv:2408.12570.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, rename, squeeze, within
from zoo.registry import get, register
from zoo.terms import expect, same_fields, shell


@strict
class JambaConfig(ZooConfig):
    """Sizes of both kinds of layers; attention and experts are in layers i with `i % period == offset`."""

    model_type = "zoo_jamba"

    norm_eps: float = 1e-6
    num_heads: int = 32
    num_kv_heads: int = 8
    attention_every: int = 8  # period of attention
    attention_offset: int = 4
    state_size: int = 16  # N of Mamba
    expand: int = 2  # Mamba's inner width = D * expand
    conv_kernel: int = 4
    conv_bias: bool = True
    step_rank: int | None = None  # None: D / 16, rounded up
    mamba_bias: bool = False  # of Mamba's input and output projections
    experts: dict | None = None  # how many `experts`, the `top_k` in use, and the `every` and `offset` of their layers; None: none

    def __post_init__(self, **kwargs):
        if self.experts is not None:
            self.experts = {"experts": 16, "top_k": 2, "every": 2, "offset": 1} | self.experts
        super().__post_init__(**kwargs)

    def layer_configs(self) -> list[ZooConfig]:
        return [self._layer(index) for index in range(self.num_hidden_layers)]

    def _layer(self, index: int) -> ZooConfig:
        fields = self.shared_fields()
        if self.experts is not None and index % self.experts["every"] == self.experts["offset"]:
            args = {name: self.experts[name] for name in ("experts", "top_k")}
            fields |= {"channel_mixer": "moe", "channel_args": args | {"normalize": False}}
        if index % self.attention_every == self.attention_offset:
            return get("transformer").config(**fields, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, rope_theta=None)
        fields |= {"state_size": self.state_size, "expand": float(self.expand), "conv_kernel": self.conv_kernel}
        fields |= {"conv_bias": self.conv_bias, "step_rank": self.step_rank, "bias": self.mamba_bias}
        fields |= {"inner_norm": "weighted", "inner_norm_eps": self.norm_eps}
        return get("mamba").config(**fields)


NAMES = {
    "norm_eps": "rms_norm_eps", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "attention_every": "attn_layer_period", "attention_offset": "attn_layer_offset", "state_size": "mamba_d_state",
    "expand": "mamba_expand", "conv_kernel": "mamba_d_conv", "conv_bias": "mamba_conv_bias", "step_rank": "mamba_dt_rank",
    "mamba_bias": "mamba_proj_bias",
}  # fmt: skip
EXPERTS = {"experts": "num_experts", "top_k": "num_experts_per_tok", "every": "expert_layer_period", "offset": "expert_layer_offset"}


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="silu")
    experts = {own: foreign[name] for own, name in EXPERTS.items()} if foreign["num_experts"] > 1 else None
    return same_fields(foreign) | {own: foreign[name] for own, name in NAMES.items()} | {"experts": experts}


def to_foreign(config: JambaConfig) -> dict:
    """The inverse."""
    experts = {"experts": 1, "top_k": 1, "every": 2, "offset": 1} | (config.experts or {})
    fields = {name: getattr(config, own) for own, name in NAMES.items()} | {name: experts[own] for own, name in EXPERTS.items()}
    return same_fields(config) | fields | {"mamba_dt_rank": config.step_rank or -(-config.hidden_size // 16)}


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}."
EXPERT = "experts.{}.{gate,up,down}_proj.weight"
RULES = (
    *shell("final_layernorm"),
    rename(THEIRS + "{input_layernorm,pre_ff_layernorm}.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename(THEIRS + "feed_forward.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.{gate,up,down}_proj.weight"),
    rename(THEIRS + "feed_forward.router.weight", "model.layers.{}.channel_mixer.router.weight"),
    rename(THEIRS + "feed_forward." + EXPERT, "model.layers.{}.channel_mixer." + EXPERT),
    *within("transformer", rename(THEIRS + "self_attn.{q,k,v,o}_proj.weight", LAYER + "{q,k,v,out}_proj.weight")),
    *within(
        "mamba",
        rename(THEIRS + "mamba.{in_proj,x_proj,dt_proj,out_proj}.{weight,bias}", LAYER + "{in_proj,x_proj,dt_proj,out_proj}.{weight,bias}"),
        squeeze(THEIRS + "mamba.conv1d.{weight,bias}", LAYER + "conv.{weight,bias}"),
        rename(THEIRS + "mamba.{A_log,D}", LAYER + "{A_log,D}"),
        rename(THEIRS + "mamba.{dt,b,c}_layernorm.weight", LAYER + "{r,B,C}_norm.weight"),
    ),
)


FORGETS = ("use_mambapy", "use_associative_scan")
SMALL = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}
TRIALS = {
    "plain": SMALL | {"num_experts": 3, "mamba_dt_rank": 4},
    "biased": SMALL | {"num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 3},
    "tied": SMALL
    | {
        "num_hidden_layers": 3,
        "attn_layer_offset": 0,
        "num_experts": 4,
        "tie_word_embeddings": True,
        "mamba_expand": 3,
        "mamba_dt_rank": 4,
    },
}


register(
    "jamba",
    config=JambaConfig,
    mixer=None,
    title="Jamba: A Hybrid Transformer-Mamba Language Model",
    paper="arXiv:2403.19887",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, num_heads=4, num_kv_heads=2, state_size=8,
            attention_every=2, attention_offset=1, experts=dict(experts=4, top_k=2),
        ),
        "52b": dict(
            hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=65536, experts=dict(experts=16, top_k=2),
        ),
    },
    layouts=(Layout("jamba", ("jamba",), from_foreign, to_foreign, RULES, trials=TRIALS, forgets=FORGETS),),
)  # fmt: skip

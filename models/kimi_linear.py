"""Kimi Linear: three layers of Kimi Delta Attention to one of multi-head latent attention, with experts behind all but the first.

The latent attention has no rotary positions: the recurrent layers tell the order. Experts are rated by sigmoids and chosen with
a bias that balances their load, a shared one sees every token.

Paper: Kimi Team 2025, arXiv:2510.26692, section 4; experts as in DeepSeek-V3, arXiv:2412.19437.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, convolutions, mapped, rename, within
from zoo.registry import get, register
from zoo.terms import expect, layers_of, same_fields, shell

ATTENTION = dict(num_heads=32, kv_rank=512, q_rank=None, key_dim=128, shared_key_dim=64, value_dim=128, rope_theta=None, bias=False)
RECURRENCE = dict(num_heads=32, head_dim=128, conv_kernel=4)
EXPERTS = dict(experts=256, top_k=8, expert_size=1024, shared_size=1024, normalize=True, groups=1, top_groups=1, scale=2.446)


@strict
class KimiLinearConfig(ZooConfig):
    """The two kinds of layers, and which is where."""

    model_type = "zoo_kimi_linear"

    attention: dict | None = None  # fields of MLAConfig that differ from the published model's
    recurrence: dict | None = None  # the same of KDAConfig
    experts: dict | None = None  # arguments of the channel mixer "moe" that differ; None: every layer is dense
    attention_layers: list[int] | None = None  # None: every fourth
    dense_layers: list[int] | None = None  # those with a gated MLP of intermediate_size instead of experts; None: none

    def __post_init__(self, **kwargs):
        self.attention = ATTENTION | (self.attention or {})
        self.recurrence = RECURRENCE | (self.recurrence or {})
        if self.experts is not None:
            self.experts = EXPERTS | self.experts
        if self.attention_layers is None:
            self.attention_layers = list(range(3, self.num_hidden_layers, 4))
        super().__post_init__(**kwargs)

    def layer_configs(self) -> list[ZooConfig]:
        return [self._layer(index) for index in range(self.num_hidden_layers)]

    def _layer(self, index: int) -> ZooConfig:
        attends = index in self.attention_layers
        fields = self.shared_fields() | (self.attention if attends else self.recurrence)
        if self.experts is not None and index not in (self.dense_layers or []):
            fields |= {"channel_mixer": "moe", "channel_args": self.experts | {"scores": "sigmoid"}}
        return get("mla" if attends else "kda").config(**fields)


MLA = {
    "num_heads": "num_attention_heads", "kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank", "key_dim": "qk_nope_head_dim",
    "shared_key_dim": "qk_rope_head_dim", "value_dim": "v_head_dim", "bias": "attention_bias",
}  # fmt: skip
KDA = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim", "conv_kernel": "linear_conv_kernel_dim"}
EXPERT_NAMES = {
    "experts": "num_experts", "top_k": "num_experts_per_token", "expert_size": "moe_intermediate_size", "normalize": "moe_renormalize",
    "groups": "num_expert_group", "top_groups": "topk_group", "scale": "routed_scaling_factor",
}  # fmt: skip


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    # transformers ties no weights of this model, whatever its config says
    expect(foreign, hidden_act="silu", num_key_value_heads=foreign["num_attention_heads"], tie_word_embeddings=False)
    dense = layers_of(foreign["mlp_layer_types"], "dense")
    experts = {own: foreign[name] for own, name in EXPERT_NAMES.items()}
    experts["shared_size"] = foreign["num_shared_experts"] * foreign["moe_intermediate_size"]
    sparse = len(dense) < foreign["num_hidden_layers"]
    return same_fields(foreign) | {
        "norm_eps": foreign["rms_norm_eps"],
        "attention": {own: foreign[name] for own, name in MLA.items()} | {"rope_theta": None},
        "recurrence": {own: foreign[name] for own, name in KDA.items()},
        "experts": experts if sparse else None,
        "attention_layers": layers_of(foreign["layer_types"], "full_attention"),
        "dense_layers": (dense or None) if sparse else None,
    }


def to_foreign(config: KimiLinearConfig) -> dict:
    """The inverse."""
    layers, dense = range(config.num_hidden_layers), config.dense_layers or []
    experts = {"experts": 2, "top_k": 1, "expert_size": 1, "normalize": True, "groups": 1, "top_groups": 1, "scale": 1.0, "shared_size": 1}
    experts |= config.experts or {}
    fields = {name: config.attention[own] for own, name in MLA.items()} | {name: config.recurrence[own] for own, name in KDA.items()}
    return same_fields(config) | fields | {name: experts[own] for own, name in EXPERT_NAMES.items()} | {
        "rms_norm_eps": config.norm_eps,
        "num_key_value_heads": config.attention["num_heads"],
        "num_shared_experts": (experts["shared_size"] or 0) // experts["expert_size"],
        "layer_types": ["full_attention" if index in config.attention_layers else "linear_attention" for index in layers],
        "mlp_layer_types": ["dense" if config.experts is None or index in dense else "sparse" for index in layers],
    }  # fmt: skip


def conv_sizes(config: KimiLinearConfig) -> list[int]:
    """Widths of the convolutions over queries, keys and values."""
    return [config.recurrence["num_heads"] * config.recurrence["head_dim"]] * 3


OURS, THEIRS = "model.layers.{}.", "model.layers.{}."
MIXER, ATTN, MOE, CHANNEL = OURS + "mixer.", THEIRS + "self_attn.", THEIRS + "block_sparse_moe.", OURS + "channel_mixer."
RULES = (
    *shell(),
    rename(THEIRS + "{input,post_attention}_layernorm.weight", OURS + "{mixer,channel}_norm.weight"),
    rename(MOE + "{gate,up,down}_proj.weight", CHANNEL + "{gate,up,down}_proj.weight"),
    rename(MOE + "gate.weight", CHANNEL + "router.weight"),
    rename(MOE + "gate.e_score_correction_bias", CHANNEL + "choice_bias"),
    rename(MOE + "experts.{}.{w1,w3,w2}.weight", CHANNEL + "experts.{}.{gate,up,down}_proj.weight"),
    rename(MOE + "shared_experts.{gate,up,down}_proj.weight", CHANNEL + "shared.{gate,up,down}_proj.weight"),
    *within(
        "mla",
        rename(ATTN + "{q,o}_proj.{weight,bias}", MIXER + "{q,out}_proj.{weight,bias}"),
        rename(ATTN + "q_{a,b}_proj.{weight,bias}", MIXER + "q_{down,up}_proj.{weight,bias}"),
        rename(ATTN + "{q,kv}_a_layernorm.weight", MIXER + "{q,kv}_norm.weight"),
        rename(ATTN + "{kv_a_proj_with_mqa,kv_b_proj}.{weight,bias}", MIXER + "{kv_down_proj,kv_up_proj}.{weight,bias}"),
    ),
    *within(
        "kda",
        rename(ATTN + "{q,k,v,b,o}_proj.weight", MIXER + "{q,k,v,beta,out}_proj.weight"),
        rename(ATTN + "f_{a,b}_proj.weight", MIXER + "decay_proj.{down,up}.weight"),
        rename(ATTN + "g_{a,b}_proj.weight", MIXER + "gate_proj.{down,up}.weight"),
        rename(ATTN + "{o_norm.weight,dt_bias}", MIXER + "{norm.weight,decay.dt_bias}"),
        mapped(ATTN + "A_log", MIXER + "decay.A_log", lambda x: x.flatten(), lambda x: x.reshape(1, 1, -1, 1)),
        convolutions([ATTN + f"{name}_conv1d.weight" for name in "qkv"], MIXER + "conv.weight", conv_sizes),
    ),
)
# published checkpoints call a dense MLP so; transformers saves it like the experts
ALIASES = ((THEIRS + "mlp.{gate,up,down}_proj.weight", MOE + "{gate,up,down}_proj.weight"),)


SMALL = {
    "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4, "moe_intermediate_size": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "v_head_dim": 10, "qk_nope_head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4,
    "linear_head_dim": 8, "linear_num_heads": 3, "n_shared_experts": 2,
}  # fmt: skip
FORGETS = ("model_max_length",)
TRIALS = {
    "plain": SMALL,
    "grouped": SMALL
    | {"q_lora_rank": 12, "attention_bias": True, "num_local_experts": 6, "n_group": 3, "topk_group": 2, "norm_topk_prob": False},
    "dense": SMALL
    | {"mlp_layer_types": ["dense", "dense"], "linear_conv_kernel_dim": 3, "num_experts_per_tok": 1, "num_local_experts": 2}
    | {"moe_intermediate_size": 1, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
}


register(
    "kimi_linear",
    config=KimiLinearConfig,
    mixer=None,
    title="Kimi Linear: An Expressive, Efficient Attention Architecture",
    paper="arXiv:2510.26692",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, attention_layers=[1], dense_layers=[0],
            attention=dict(num_heads=4, kv_rank=16, key_dim=8, shared_key_dim=4, value_dim=8), recurrence=dict(num_heads=4, head_dim=8),
            experts=dict(experts=4, top_k=2, expert_size=16, shared_size=16, scale=2.446),
        ),
        "48b-a3b": dict(
            hidden_size=2304, num_hidden_layers=27, intermediate_size=9216, vocab_size=163840, dense_layers=[0],
            attention_layers=[3, 7, 11, 15, 19, 23, 26],
            experts=dict(experts=256, top_k=8, expert_size=1024, shared_size=1024, scale=2.446),
        ),
    },
    layouts=(
        Layout("kimi_linear", ("kimi_linear",), from_foreign, to_foreign, RULES, aliases=ALIASES, trials=TRIALS, forgets=FORGETS),
    ),
)  # fmt: skip

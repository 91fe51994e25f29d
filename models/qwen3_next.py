"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, each followed by a mixture of many small experts.

The recurrent layers have more heads of values than of queries and keys; attention has normalised queries and keys, rotates a
quarter of their channels and gates its output. Weights of norms are stored as offsets from one. A shared expert sees every
token, weighed by a sigmoid. Layers of multi-token prediction that published checkpoints carry are left out.

Published by the Qwen team in 2025 without a paper of its own; its parts are arXiv:2412.06464, arXiv:2505.06708 and
arXiv:2401.06066.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, drop, interleave, rename, squeeze, within
from zoo.registry import get, register
from zoo.terms import expect, layers_of, rope_fields, rope_parameters, same_fields, shell

ATTENTION = dict(
    num_heads=16, num_kv_heads=2, head_dim=256, rope_theta=10000.0, rope_fraction=0.25, rope_scaling=None, bias=False
)  # fmt: skip
RECURRENCE = dict(num_heads=16, num_v_heads=32, head_dim=128, value_ratio=1.0, conv_kernel=4)
EXPERTS = dict(experts=512, top_k=10, expert_size=512, shared_size=512, normalize=True)


@strict
class Qwen3NextConfig(ZooConfig):
    """The two kinds of layers, and which is where."""

    model_type = "zoo_qwen3_next"

    norm: str = "unit_rmsnorm"
    norm_eps: float = 1e-6
    attention: dict | None = None  # fields of GatedAttentionConfig that differ from the published model's
    recurrence: dict | None = None  # the same of GatedDeltaNetConfig
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
            fields |= {"channel_mixer": "moe", "channel_args": self.experts | {"shared_gate": True}}
        return get("gated_attention" if attends else "gated_deltanet").config(**fields)


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="silu")
    values = {f"linear_{name}": foreign[f"linear_{name}"] for name in ("key_head_dim", "value_head_dim")}
    step, layers = foreign["decoder_sparse_step"], range(foreign["num_hidden_layers"])
    dense = [index for index in layers if index in foreign["mlp_only_layers"] or (index + 1) % step]
    experts = {
        "experts": foreign["num_experts"],
        "top_k": foreign["num_experts_per_tok"],
        "expert_size": foreign["moe_intermediate_size"],
        "shared_size": foreign["shared_expert_intermediate_size"],
        "normalize": foreign["norm_topk_prob"],
    }
    attention = {"num_heads": foreign["num_attention_heads"], "num_kv_heads": foreign["num_key_value_heads"]}
    return same_fields(foreign) | {
        "norm_eps": foreign["rms_norm_eps"],
        "attention": attention | {"head_dim": foreign["head_dim"], "bias": foreign["attention_bias"]} | rope_fields(foreign),
        "recurrence": {
            "num_heads": foreign["linear_num_key_heads"],
            "num_v_heads": foreign["linear_num_value_heads"],
            "head_dim": values["linear_key_head_dim"],
            "value_ratio": values["linear_value_head_dim"] / values["linear_key_head_dim"],
            "conv_kernel": foreign["linear_conv_kernel_dim"],
        },
        "experts": experts if experts["experts"] else None,
        "attention_layers": layers_of(foreign["layer_types"], "full_attention"),
        "dense_layers": (dense or None) if experts["experts"] else None,
    }


def to_foreign(config: Qwen3NextConfig) -> dict:
    """The inverse."""
    attention, recurrence = config.attention, config.recurrence
    experts = {"experts": 0, "top_k": 1, "expert_size": 1, "shared_size": 1, "normalize": True} | (config.experts or {})
    layers = range(config.num_hidden_layers)
    return same_fields(config) | {
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": attention["num_heads"],
        "num_key_value_heads": attention["num_kv_heads"],
        "head_dim": attention["head_dim"],
        "attention_bias": attention["bias"],
        "rope_parameters": rope_parameters(attention),
        "linear_num_key_heads": recurrence["num_heads"],
        "linear_num_value_heads": recurrence["num_v_heads"],
        "linear_key_head_dim": recurrence["head_dim"],
        "linear_value_head_dim": int(recurrence["head_dim"] * recurrence["value_ratio"]),
        "linear_conv_kernel_dim": recurrence["conv_kernel"],
        "num_experts": experts["experts"],
        "num_experts_per_tok": experts["top_k"],
        "moe_intermediate_size": experts["expert_size"],
        "shared_expert_intermediate_size": experts["shared_size"],
        "norm_topk_prob": experts["normalize"],
        "mlp_only_layers": config.dense_layers or [],
        "layer_types": ["full_attention" if index in config.attention_layers else "linear_attention" for index in layers],
    }


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}."
EXTRA = "serves multi-token prediction"
RULES = (
    *shell(),
    rename(THEIRS + "{input,post_attention}_layernorm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename(THEIRS + "mlp.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.{gate,up,down}_proj.weight"),
    rename(THEIRS + "mlp.gate.weight", "model.layers.{}.channel_mixer.router.weight"),
    rename(THEIRS + "mlp.experts.{}.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.experts.{}.{gate,up,down}_proj.weight"),
    rename(THEIRS + "mlp.shared_expert.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.shared.{gate,up,down}_proj.weight"),
    rename(THEIRS + "mlp.shared_expert_gate.weight", "model.layers.{}.channel_mixer.shared_gate.weight"),
    *within(
        "gated_attention",
        interleave(
            THEIRS + "self_attn.q_proj.{weight,bias}",
            [LAYER + "q_proj.{weight,bias}", LAYER + "gate_proj.{weight,bias}"],
            lambda config: config.attention["num_heads"],
        ),
        rename(THEIRS + "self_attn.{k,v,o}_proj.{weight,bias}", LAYER + "{k,v,out}_proj.{weight,bias}"),
        rename(THEIRS + "self_attn.{q,k}_norm.weight", LAYER + "{q,k}_norm.weight"),
    ),
    *within(
        "gated_deltanet",
        interleave(
            THEIRS + "linear_attn.in_proj_qkvz.weight",
            [LAYER + name + "_proj.weight" for name in ("q", "k", "v", "gate")],
            lambda config: config.recurrence["num_heads"],
        ),
        interleave(
            THEIRS + "linear_attn.in_proj_ba.weight",
            [LAYER + "beta_proj.weight", LAYER + "decay_proj.weight"],
            lambda config: config.recurrence["num_heads"],
        ),
        squeeze(THEIRS + "linear_attn.conv1d.weight", LAYER + "conv.weight"),
        rename(THEIRS + "linear_attn.{A_log,dt_bias}", LAYER + "decay.{A_log,dt_bias}"),
        rename(THEIRS + "linear_attn.{norm,out_proj}.weight", LAYER + "{norm,out_proj}.weight"),
    ),
    drop("mtp.{fc,norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight", EXTRA),
    drop("mtp.layers.{}.{input,post_attention}_layernorm.weight", EXTRA),
    drop("mtp.layers.{}.self_attn.{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}.weight", EXTRA),
    drop("mtp.layers.{}.mlp.{gate,shared_expert_gate}.weight", EXTRA),
    drop("mtp.layers.{}.mlp.shared_expert.{gate,up,down}_proj.weight", EXTRA),
    drop("mtp.layers.{}.mlp.experts.{}.{gate,up,down}_proj.weight", EXTRA),
)


SMALL = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
TRIALS = {
    "plain": SMALL,
    "biased": SMALL | {"mlp_only_layers": [1], "attention_bias": True, "linear_value_head_dim": 12, "tie_word_embeddings": True},
    "odd": SMALL
    | {"num_experts": 3, "norm_topk_prob": False, "linear_num_key_heads": 3, "linear_num_value_heads": 3}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
}


register(
    "qwen3_next",
    config=Qwen3NextConfig,
    mixer=None,
    title="Qwen3-Next",
    paper="arXiv:2412.06464",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, attention_layers=[1],
            attention=dict(num_heads=4, num_kv_heads=2, head_dim=8), recurrence=dict(num_heads=2, num_v_heads=4, head_dim=8),
            experts=dict(experts=4, top_k=2, expert_size=16, shared_size=16),
        ),
        "80b-a3b": dict(
            hidden_size=2048, num_hidden_layers=48, intermediate_size=5120, vocab_size=151936, attention=dict(rope_theta=1e7),
            experts=dict(experts=512, top_k=10, expert_size=512, shared_size=512),
        ),
    },
    layouts=(Layout("qwen3_next", ("qwen3_next",), from_foreign, to_foreign, RULES, trials=TRIALS),),
)  # fmt: skip

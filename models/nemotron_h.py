"""Nemotron-H: every layer is one thing alone, by a letter of its pattern: M Mamba-2, * attention, - an MLP, E experts.

Attention has grouped heads and no positions, MLPs the squared ReLU (Primer, arXiv:2109.08668) and no gate. The experts of the
Nemotron 3 models are chosen as in DeepSeek-V3 (arXiv:2412.19437, eq. 12-16), and may work in a latent space narrower than D.

Paper: NVIDIA 2025, arXiv:2504.03624: the layers and their patterns in section 2.1.
"""

from huggingface_hub.dataclasses import strict

from zoo.config import ZooConfig
from zoo.layout import Layout, drop, rename, squeeze, within
from zoo.registry import get, register
from zoo.terms import expect, expect_free_steps, foreign_activation, own_activation, same_fields

ATTENTION = dict(num_heads=32, num_kv_heads=8, head_dim=128)
MAMBA = dict(expand=2.0, head_dim=64, state_size=128, num_groups=8, conv_kernel=4, conv_bias=True, bias=False,
             dt_min=1e-3, dt_max=1e-1, dt_floor=1e-3)  # fmt: skip
EXPERTS = dict(experts=8, top_k=2, expert_size=7688, shared_size=7688, latent_size=None, normalize=True, groups=1, top_groups=1, scale=1.0)
KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}  # letter -> transformers' word


@strict
class NemotronHConfig(ZooConfig):
    """The pattern, and the four kinds of layers."""

    model_type = "zoo_nemotron_h"

    channel_mixer: str | None = None  # of the layers that mix along time

    pattern: str | None = None  # a letter for each layer; None: Mamba-2 and MLPs in turn
    attention: dict | None = None  # fields of TransformerConfig that differ from the 8B model's
    mamba: dict | None = None  # the same of Mamba2Config
    experts: dict | None = None  # arguments of the channel mixer "moe" that differ from transformers' defaults
    activation: str = "relu2"  # in MLPs and experts
    mlp_bias: bool = False  # of the MLPs, of the shared expert and around the latent space

    def __post_init__(self, **kwargs):
        self.attention, self.mamba = ATTENTION | (self.attention or {}), MAMBA | (self.mamba or {})
        self.pattern = self.pattern or ("M-" * self.num_hidden_layers)[: self.num_hidden_layers]
        if "E" in self.pattern:
            self.experts = EXPERTS | (self.experts or {})
        super().__post_init__(**kwargs)

    def validate_pattern(self):
        """One known letter for each layer."""
        if len(self.pattern) != self.num_hidden_layers or set(self.pattern) - set(KINDS):
            raise ValueError(
                f"NemotronHConfig: pattern {self.pattern!r} needs one of the letters {', '.join(KINDS)} for each of "
                f"num_hidden_layers={self.num_hidden_layers}"
            )

    def layer_configs(self) -> list[ZooConfig]:
        shared, act = self.shared_fields(), {"act": self.activation, "bias": self.mlp_bias}
        kinds = {
            "M": lambda: get("mamba2").config(**shared | self.mamba),
            "*": lambda: get("transformer").config(**shared | {"rope_theta": None} | self.attention),
            "-": lambda: ZooConfig(**shared | {"channel_mixer": "mlp", "channel_args": act}),
            "E": lambda: ZooConfig(
                **shared | {"channel_mixer": "moe", "channel_args": act | {"gated": False, "scores": "sigmoid"} | self.experts}
            ),
        }
        made = {letter: kinds[letter]() for letter in set(self.pattern)}
        return [made[letter] for letter in self.pattern]


OURS = {  # group of fields -> ours -> theirs
    "attention": {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"},
    "mamba": {
        "head_dim": "mamba_head_dim", "state_size": "ssm_state_size", "num_groups": "n_groups", "conv_kernel": "conv_kernel",
        "conv_bias": "use_conv_bias", "bias": "use_bias", "dt_min": "time_step_min", "dt_max": "time_step_max",
    },
    "experts": {
        "experts": "n_routed_experts", "top_k": "num_experts_per_tok", "expert_size": "moe_intermediate_size",
        "shared_size": "moe_shared_expert_intermediate_size", "latent_size": "moe_latent_size", "normalize": "norm_topk_prob",
        "groups": "n_group", "top_groups": "topk_group", "scale": "routed_scaling_factor",
    },
}  # fmt: skip
APART = ("num_hidden_layers",)  # transformers counts the list of kinds


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(
        foreign, mamba_hidden_act="silu", attention_bias=False, mamba_proj_bias=False, sliding_window=None, n_shared_experts=1,
        tie_word_embeddings=False, residual_in_fp32=False,
    )  # fmt: skip
    expect_free_steps(foreign)
    letters = {kind: letter for letter, kind in KINDS.items()}
    fields = {group: {own: foreign[name] for own, name in names.items()} for group, names in OURS.items()}
    inner = foreign["mamba_num_heads"] * foreign["mamba_head_dim"]
    # transformers bounds the steps of a prefill from below by what they are first drawn from
    fields["mamba"] |= {"expand": inner / foreign["hidden_size"], "dt_floor": foreign["time_step_min"]}
    fields["experts"]["scale"] = float(foreign["routed_scaling_factor"])
    kinds = foreign["layers_block_type"]
    return same_fields(foreign, but=APART) | fields | {
        "num_hidden_layers": len(kinds),
        "pattern": "".join(letters[kind] for kind in kinds),
        "norm_eps": foreign["layer_norm_epsilon"],
        "activation": own_activation(foreign["mlp_hidden_act"]),
        "mlp_bias": foreign["mlp_bias"],
    }  # fmt: skip


def to_foreign(config: NemotronHConfig) -> dict:
    """The inverse."""
    groups = {"attention": config.attention, "mamba": config.mamba, "experts": EXPERTS | (config.experts or {})}
    fields = {name: groups[group][own] for group, names in OURS.items() for own, name in names.items()}
    inner = round(config.hidden_size * config.mamba["expand"])
    return same_fields(config, but=APART) | fields | {
        "mamba_num_heads": inner // config.mamba["head_dim"],
        "layers_block_type": [KINDS[letter] for letter in config.pattern],
        "layer_norm_epsilon": config.norm_eps,
        "mlp_hidden_act": foreign_activation(config.activation),
        "mlp_bias": config.mlp_bias,
    }  # fmt: skip


EXTRA, MORE = "layers of multi-token prediction are not built, as in transformers", "mtp.layers.{}."
THEIRS, MIXER, CHANNEL = "backbone.layers.{}.mixer.", "model.layers.{}.mixer.", "model.layers.{}.channel_mixer."
RULES = (
    rename("backbone.embeddings.weight", "model.embed_tokens.weight"),
    rename("backbone.norm_f.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename("score.{weight,bias}", "score.{weight,bias}"),
    rename("backbone.layers.{}.norm.weight", "model.layers.{}.mixer_norm.weight"),
    rename("backbone.layers.{}.norm.weight", "model.layers.{}.channel_norm.weight"),
    rename(THEIRS + "{up,down}_proj.{weight,bias}", CHANNEL + "{up,down}_proj.{weight,bias}"),
    rename(THEIRS + "gate.{weight,e_score_correction_bias}", CHANNEL + "{router.weight,choice_bias}"),
    rename(THEIRS + "experts.{}.{up,down}_proj.weight", CHANNEL + "experts.{}.{up,down}_proj.weight"),
    rename(THEIRS + "shared_experts.{up,down}_proj.{weight,bias}", CHANNEL + "shared.{up,down}_proj.{weight,bias}"),
    rename(THEIRS + "{fc1_latent_proj,fc2_latent_proj}.{weight,bias}", CHANNEL + "{latent_in,latent_out}.{weight,bias}"),
    *within("transformer", rename(THEIRS + "{q,k,v,o}_proj.weight", MIXER + "{q,k,v,out}_proj.weight")),
    *within(
        "mamba2",
        rename(THEIRS + "{in_proj,norm,out_proj}.{weight,bias}", MIXER + "{in_proj,norm,out_proj}.{weight,bias}"),
        squeeze(THEIRS + "conv1d.{weight,bias}", MIXER + "conv.{weight,bias}"),
        rename(THEIRS + "{A_log,D,dt_bias}", MIXER + "{A_log,D,dt_bias}"),
    ),
    drop(MORE + "{norm,enorm,hnorm,eh_proj,final_layernorm}.weight", EXTRA),
    drop(MORE + "mixer.{q_proj,k_proj,v_proj,o_proj,fc1_latent_proj,fc2_latent_proj}.{weight,bias}", EXTRA),
    drop(MORE + "mixer.{gate.weight,gate.e_score_correction_bias}", EXTRA),
    drop(MORE + "mixer.shared_experts.{up,down}_proj.{weight,bias}", EXTRA),
    drop(MORE + "mixer.experts.{}.{up,down}_proj.weight", EXTRA),
)
SMALL = {
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "head_dim": 8, "chunk_size": 8,
    "n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24,
}  # fmt: skip
TRIALS = {
    "all": SMALL | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "dense": SMALL
    | {"layers_block_type": ["linear_attention", "mlp", "mlp", "full_attention"], "use_bias": True, "mlp_bias": True}
    | {"mamba_num_heads": 3, "n_groups": 1, "use_conv_bias": False, "conv_kernel": 3, "head_dim": 6, "mlp_hidden_act": "gelu"},
    "latent": SMALL
    | {"layers_block_type": ["moe", "linear_attention", "full_attention", "moe"], "moe_latent_size": 12, "mlp_bias": True}
    | {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5, "time_step_min": 0.01},
}


register(
    "nemotron_h",
    config=NemotronHConfig,
    mixer=None,
    title="Nemotron-H: A Family of Accurate and Efficient Hybrid Mamba-Transformer Models",
    paper="arXiv:2504.03624",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=4, intermediate_size=48, vocab_size=256, pattern="M-*E",
            attention=dict(num_heads=4, num_kv_heads=2, head_dim=8), mamba=dict(head_dim=16, state_size=8, num_groups=2),
            experts=dict(experts=4, expert_size=16, shared_size=24),
        ),
        "8b": dict(
            hidden_size=4096, num_hidden_layers=52, intermediate_size=21504, vocab_size=131072,
            pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        ),
    },
    layouts=(
        Layout(
            "nemotron_h", ("nemotron_h",), from_foreign, to_foreign, RULES, prefix="backbone.", trials=TRIALS,
            forgets=(
                "expand", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "mtp_layers_block_type", "num_logits_to_keep",
                "num_nextn_predict_layers", "rescale_prenorm_residual", "time_step_floor",
            ),
        ),
    ),
)  # fmt: skip

"""Falcon-H1: attention and Mamba-2 side by side in every layer, their outputs added, and a constant before every projection.

    y_t = a_2 attention(a_1 x)_t + s_2 mamba(s_1 x)_t
    attention: o_t = sum_{j <= t} softmax_j(c q_t k_j / sqrt(K)) v_j,    q and k rotated by their positions
    mamba: z, x, B, C, dt = split(m * W_in u_t), m one constant for each part; the rest as Mamba-2 has it

The multipliers are those of a parametrization in which the best learning rate stays when the width grows (arXiv:2203.03466);
further ones are of the embeddings, the MLP's gate and output, and the logits.

Paper: Falcon-LLM Team 2025, arXiv:2507.22448. Mamba-2: Dao, Gu 2024, arXiv:2405.21060.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import initialization as init

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig, nearest
from zoo.kernels.packing import Packing
from zoo.layers import check_rope_scaling
from zoo.layout import Layout, rename, squeeze
from zoo.mixer import Layer, Mixer, State, Traits
from zoo.registry import register
from zoo.ssd import SSDMixer
from zoo.terms import expect, expect_free_steps, inner_size, rope_parameters, same_fields, shell, whole_rope

MAMBA = dict(
    inner=None, head_dim=64, state_size=256, num_groups=1, conv_kernel=4, conv_bias=True, in_bias=False, out_bias=False, norm=False,
    norm_before_gate=False,
)  # fmt: skip
PARTS = ("z", "x", "B", "C", "dt")
MULTIPLIERS = dict.fromkeys(("attention_in", "key", "attention_out", "ssm_in", *PARTS, "ssm_out"), 1.0)


@strict
class FalconH1Config(ZooConfig):
    """The heads of attention, the state space beside it, and the constants."""

    model_type = "zoo_falcon_h1"

    num_heads: int = 32  # H
    num_kv_heads: int = 8  # G, each shared by H / G query heads
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float = 1e11  # base of the rotary angles
    rope_scaling: dict | None = None  # as in TransformerConfig
    attention_bias: bool = False
    mamba: dict | None = None  # what differs from MAMBA: `inner` is the width (None: 2 D), `norm` whether there is one beside the gate
    multipliers: dict | None = None  # those of MULTIPLIERS that are not 1

    def __post_init__(self, **kwargs):
        for name, known in (("mamba", MAMBA), ("multipliers", MULTIPLIERS)):
            given = getattr(self, name) or {}
            if unknown := [key for key in given if key not in known]:
                raise ValueError(f"FalconH1Config: {name} has no field {unknown[0]!r}{nearest(unknown[0], known)}")
            setattr(self, name, known | given)
        self.mamba["inner"] = self.mamba["inner"] or 2 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide("num_heads", "num_kv_heads")
        if self.head_dim is None:
            self.divide("hidden_size", "num_heads")
        inner, width, groups = (self.mamba[name] for name in ("inner", "head_dim", "num_groups"))
        if inner % width or inner // width % groups:
            raise ValueError(
                f"FalconH1Config: mamba's inner={inner} must be whole heads of head_dim={width}, in num_groups={groups} groups"
            )

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class Scales(Layer):
    """Multiplies neighbouring parts of the channels, of these sizes, by a constant each."""

    def __init__(self, sizes: list[int], factors: list[float]):
        super().__init__()
        self.sizes, self.factors = sizes, factors
        self.register_buffer("vector", torch.empty(sum(sizes)), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.vector, torch.cat([torch.full((n,), factor) for n, factor in zip(self.sizes, self.factors, strict=True)]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.vector.to(x.dtype)


class ScaledSSD(SSDMixer):
    """Mamba-2's block with a constant for each part of what its first projection returns."""

    def __init__(self, config: FalconH1Config, layer: int):
        mamba = config.mamba
        super().__init__(
            config, layer, inner=mamba["inner"], values=mamba["head_dim"], keys=mamba["state_size"], groups=mamba["num_groups"],
            kernel=mamba["conv_kernel"], conv_bias=mamba["conv_bias"], in_bias=mamba["in_bias"], out_bias=mamba["out_bias"],
            norm_groups=mamba["num_groups"] if mamba["norm"] else None, norm_before_gate=mamba["norm_before_gate"],
        )  # fmt: skip
        shared = self.groups * self.keys
        self.scales = Scales([self.inner, self.inner, shared, shared, self.heads], [config.multipliers[part] for part in PARTS])

    def project(self, x: Tensor) -> Tensor:
        return self.scales(self.in_proj(x))


class FalconH1Mixer(Mixer):
    """State: that of `AttentionMixer` and that of `SSDMixer`."""

    traits = Traits(constant_state=False)
    lora_targets = ("q_proj", "k_proj", "v_proj", "in_proj", "out_proj")

    def __init__(self, config: FalconH1Config, layer: int):
        super().__init__(config, layer)
        keys, self.multipliers = config.head_dim or config.divide("hidden_size", "num_heads"), config.multipliers
        self.attention = RotaryAttention(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads, keys=keys, scale=config.multipliers["key"] * keys**-0.5,
            rope=(keys, config.rope_theta, config.rope_scaling), qkv_bias=config.attention_bias, out_bias=config.attention_bias,
        )  # fmt: skip
        self.mamba = ScaledSSD(config, layer)

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        return {role: (f"attention.{role}", [slice(None)]) for role in super().roles()}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        parts = (part.initial_state(batch, length, dtype, device) for part in (self.attention, self.mamba))
        return {name: tensor for part in parts for name, tensor in part.items()}

    def operator_flops(self, length: int) -> int:
        return self.attention.operator_flops(length) + self.mamba.operator_flops(length)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        scale, seen, memory = self.multipliers, None, None
        if state is not None:
            memory = {name: state[name] for name in ("conv", "memory")}
            seen = {name: tensor for name, tensor in state.items() if name not in memory}
        attended, seen = self.attention(x * scale["attention_in"], seen, packing)
        scanned, memory = self.mamba(x * scale["ssm_in"], memory, packing)
        return attended * scale["attention_out"] + scanned * scale["ssm_out"], seen | memory


NAMES = {
    "norm_eps": "rms_norm_eps", "logit_scale": "lm_head_multiplier", "embedding_scale": "embedding_multiplier",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "attention_bias": "attention_bias",
}  # fmt: skip
MAMBA_NAMES = {
    "inner": "mamba_d_ssm", "head_dim": "mamba_d_head", "state_size": "mamba_d_state", "num_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv", "conv_bias": "mamba_conv_bias", "in_bias": "mamba_proj_bias", "out_bias": "projectors_bias",
    "norm": "mamba_rms_norm", "norm_before_gate": "mamba_norm_before_gate",
}  # fmt: skip
SCALES = {
    "attention_in": "attention_in_multiplier", "key": "key_multiplier", "attention_out": "attention_out_multiplier",
    "ssm_in": "ssm_in_multiplier", "ssm_out": "ssm_out_multiplier",
}  # fmt: skip


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="silu")
    expect_free_steps(foreign)
    mamba = {own: foreign[name] for own, name in MAMBA_NAMES.items()}
    mamba["inner"] = mamba["inner"] or foreign["mamba_expand"] * foreign["hidden_size"]
    expect(foreign, mamba_n_heads=mamba["inner"] // mamba["head_dim"])
    if (len(foreign["mlp_multipliers"]), len(foreign["ssm_multipliers"])) != (2, len(PARTS)):
        raise ValueError(f"a falcon_h1 has 2 mlp_multipliers and {len(PARTS)} ssm_multipliers, not other numbers of them")
    rope, (gate, down) = whole_rope(foreign), map(float, foreign["mlp_multipliers"])
    args = ({"bias": True} if foreign["mlp_bias"] else {}) | ({} if gate == 1.0 else {"gate_scale": gate})
    return same_fields(foreign) | {own: foreign[name] for own, name in NAMES.items()} | rope | {
        "head_dim": foreign.get("head_dim"),
        "channel_args": args or None,
        "residual_weights": [1.0, 1.0, 1.0, down],
        "mamba": mamba,
        "multipliers": {own: foreign[name] for own, name in SCALES.items()} | dict(zip(PARTS, foreign["ssm_multipliers"], strict=True)),
    }  # fmt: skip


def to_foreign(config: FalconH1Config) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    args, scales = {"bias": False, "gate_scale": 1.0} | (config.channel_args or {}), config.multipliers
    rope = {"rope_theta": config.rope_theta, "rope_fraction": 1.0, "rope_scaling": config.rope_scaling}
    fields = {name: getattr(config, own) for own, name in NAMES.items()} | {name: config.mamba[own] for own, name in MAMBA_NAMES.items()}
    return same_fields(config) | fields | {name: scales[own] for own, name in SCALES.items()} | {
        "intermediate_size": inner_size(config),
        "rope_parameters": rope_parameters(rope),
        "mamba_n_heads": config.mamba["inner"] // config.mamba["head_dim"],
        "mlp_bias": args["bias"],
        "mlp_multipliers": [args["gate_scale"], (config.residual_weights or [1.0] * 4)[3]],
        "ssm_multipliers": [scales[part] for part in PARTS],
    } | ({} if config.head_dim is None else {"head_dim": config.head_dim})  # fmt: skip


OURS, THEIRS = "model.layers.{}.", "model.layers.{}."
RULES = (
    *shell("final_layernorm"),
    rename(THEIRS + "{input_layernorm,pre_ff_layernorm}.weight", OURS + "{mixer,channel}_norm.weight"),
    rename(THEIRS + "feed_forward.{gate,up,down}_proj.{weight,bias}", OURS + "channel_mixer.{gate,up,down}_proj.{weight,bias}"),
    rename(THEIRS + "self_attn.{q,k,v,o}_proj.{weight,bias}", OURS + "mixer.attention.{q,k,v,out}_proj.{weight,bias}"),
    rename(THEIRS + "mamba.{in_proj,norm,out_proj}.{weight,bias}", OURS + "mixer.mamba.{in_proj,norm,out_proj}.{weight,bias}"),
    squeeze(THEIRS + "mamba.conv1d.{weight,bias}", OURS + "mixer.mamba.conv.{weight,bias}"),
    rename(THEIRS + "mamba.{A_log,D,dt_bias}", OURS + "mixer.mamba.{A_log,D,dt_bias}"),
)
SIZES = {"mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_state": 5}
SCALED = {
    "embedding_multiplier": 5.66, "lm_head_multiplier": 0.4, "mlp_multipliers": [0.88, 0.59], "attention_in_multiplier": 1.2,
    "key_multiplier": 0.39, "attention_out_multiplier": 0.94, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.35, 0.25, 1.35, 0.5, 0.75],
}  # fmt: skip
TRIALS = {
    "scaled": SIZES | SCALED | {"mamba_norm_before_gate": False, "head_dim": 6},
    "normed": SIZES | SCALED | {"mamba_rms_norm": True, "mamba_n_groups": 3, "tie_word_embeddings": True},
    "biased": SIZES | SCALED | {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "projectors_bias": True}
    | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2, "mamba_d_conv": 3, "rms_norm_eps": 1e-3},
    "plain": SIZES | {"mamba_conv_bias": False, "projectors_bias": True, "num_key_value_heads": 4, "mamba_n_groups": 6}
    | {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}},
}  # fmt: skip

register(
    "falcon_h1",
    config=FalconH1Config,
    mixer=FalconH1Mixer,
    title="Falcon-H1: A Family of Hybrid-Head Language Models Redefining Efficiency and Performance",
    paper="arXiv:2507.22448",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, num_heads=4, num_kv_heads=2, embedding_scale=2.0,
            logit_scale=0.5, channel_args=dict(gate_scale=0.8), mamba=dict(head_dim=16, state_size=8, num_groups=2, norm=True),
            multipliers=dict(attention_in=0.9, key=0.7, attention_out=0.8, ssm_in=1.2, z=0.7, x=0.8, B=0.9, C=1.1, dt=1.2, ssm_out=0.6),
        ),
        "0.5b": dict(
            hidden_size=1024, num_hidden_layers=36, intermediate_size=2048, vocab_size=32784, num_heads=8, num_kv_heads=2, head_dim=64,
            embedding_scale=32**0.5, logit_scale=0.0390625, channel_args=dict(gate_scale=0.8838834764831844),
            residual_weights=[1.0, 1.0, 1.0, 0.5859375], mamba=dict(inner=1536, state_size=128),
            multipliers=dict(
                key=0.39062499999999994, attention_out=0.9375, ssm_in=1.25, z=0.3535533905932738, x=0.25, B=0.3535533905932738, C=0.5,
                dt=0.3535533905932738, ssm_out=0.23570226039551587,
            ),
        ),
    },
    layouts=(
        Layout(
            "falcon_h1", ("falcon_h1",), from_foreign, to_foreign, RULES, trials=TRIALS, forgets=("mamba_expand", "num_logits_to_keep")
        ),
    ),
)  # fmt: skip

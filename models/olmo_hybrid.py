"""OLMo Hybrid: three layers of Gated DeltaNet to one of attention, norms before the former and behind the latter.

    recurrent layer:  x + mixer(norm(x)), then x + mlp(norm(x)),    beta up to two, for negative eigenvalues
    attention layer:  x + norm(mixer(x)), then x + norm(mlp(x)),    RMSNorms over all of W_Q x and all of W_K x

Attention has no positions in the published models. Alone, as a layer of another hybrid, `olmo_hybrid` is this attention.

Published by Ai2 in 2025; its parts are Gated DeltaNet, arXiv:2412.06464, and the attention and norms of OLMo 2,
arXiv:2501.00656.
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo.attending import AttentionMixer
from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, merge_heads, rotary_table, rotate, split_heads, token_positions
from zoo.layout import Layout, convolutions, rename, within
from zoo.mixer import State, Traits
from zoo.registry import get, register
from zoo.terms import expect, layers_of, rope_fields, same_fields, shell

RECURRENCE = dict(
    num_heads=30, num_v_heads=30, head_dim=96, value_ratio=2.0, conv_kernel=4, allow_negative_eigenvalues=True, output_norm_eps=1e-5
)  # fmt: skip


@strict
class OlmoHybridConfig(ZooConfig):
    """Attention, and the layers that are recurrent instead."""

    model_type = "zoo_olmo_hybrid"

    norm_eps: float = 1e-6
    input_norms: bool = False
    output_norms: bool = True
    num_heads: int = 32  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    rope_theta: float | None = None  # base of the rotary angles; None: no rotary positions
    bias: bool = False  # of the four projections of attention
    recurrence: dict | None = None  # fields of GatedDeltaNetConfig that differ from the published model's
    recurrent_layers: list[int] | None = None  # None: none

    def __post_init__(self, **kwargs):
        self.recurrence = RECURRENCE | (self.recurrence or {})
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")

    def layer_configs(self) -> list[ZooConfig]:
        places = {"input_norms": True, "output_norms": False}
        recurrent = get("gated_deltanet").config(**self.shared_fields() | places | self.recurrence)
        return [recurrent if index in (self.recurrent_layers or []) else self for index in range(self.num_hidden_layers)]


class OlmoHybridMixer(AttentionMixer):
    """The attention; the state is that of `AttentionMixer`."""

    traits = Traits(constant_state=False)  # as causal as the layers beside it
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: OlmoHybridConfig, layer: int):
        width, keys = config.hidden_size, config.divide("hidden_size", "num_heads")
        super().__init__(config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys)
        self.theta, shared = config.rope_theta, self.groups * keys
        self.q_proj = nn.Linear(width, width, bias=config.bias)
        self.k_proj = nn.Linear(width, shared, bias=config.bias)
        self.v_proj = nn.Linear(width, shared, bias=config.bias)
        self.out_proj = nn.Linear(width, width, bias=config.bias)
        self.q_norm, self.k_norm = RMSNorm(width, config.norm_eps), RMSNorm(shared, config.norm_eps)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        positions = token_positions(x, state["length"] if state else None, packing)
        q, k = split_heads(self.q_norm(self.q_proj(x)), self.heads), split_heads(self.k_norm(self.k_proj(x)), self.groups)
        if self.theta is not None:
            table = rotary_table(positions, self.keys, self.theta)
            q, k = rotate(q, table), rotate(k, table)
        o, state = self.attend(q, k, split_heads(self.v_proj(x), self.groups), positions, state, packing)
        return self.out_proj(merge_heads(o)), state


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="silu")
    rope = rope_fields(foreign)
    if rope["rope_scaling"] is not None or rope["rope_fraction"] != 1.0:
        raise ValueError("an olmo_hybrid with scaled or partial rotary angles is not supported")
    return same_fields(foreign) | {
        "norm_eps": foreign["rms_norm_eps"],
        "num_heads": foreign["num_attention_heads"],
        "num_kv_heads": foreign["num_key_value_heads"],
        "rope_theta": rope["rope_theta"],
        "bias": foreign["attention_bias"],
        "recurrence": {
            "num_heads": foreign["linear_num_key_heads"],
            "num_v_heads": foreign["linear_num_value_heads"],
            "head_dim": foreign["linear_key_head_dim"],
            "value_ratio": foreign["linear_value_head_dim"] / foreign["linear_key_head_dim"],
            "conv_kernel": foreign["linear_conv_kernel_dim"],
            "allow_negative_eigenvalues": foreign["linear_allow_neg_eigval"],
            "output_norm_eps": 1e-5,
        },
        "recurrent_layers": layers_of(foreign["layer_types"], "linear_attention"),
    }


def to_foreign(config: OlmoHybridConfig) -> dict:
    """The inverse."""
    recurrence, recurrent = config.recurrence, config.recurrent_layers or []
    kinds = ("full_attention", "linear_attention")
    return same_fields(config) | {
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "linear_num_key_heads": recurrence["num_heads"],
        "linear_num_value_heads": recurrence["num_v_heads"],
        "linear_key_head_dim": recurrence["head_dim"],
        "linear_value_head_dim": int(recurrence["head_dim"] * recurrence["value_ratio"]),
        "linear_conv_kernel_dim": recurrence["conv_kernel"],
        "linear_allow_neg_eigval": recurrence["allow_negative_eigenvalues"],
        "layer_types": [kinds[index in recurrent] for index in range(config.num_hidden_layers)],
    }


def conv_sizes(config: OlmoHybridConfig) -> list[int]:
    """Widths of the convolutions over queries, keys and values."""
    fields = config.recurrence
    keys, values = fields["head_dim"], int(fields["head_dim"] * fields["value_ratio"])
    return [fields["num_heads"] * keys, fields["num_heads"] * keys, fields["num_v_heads"] * values]


OURS, THEIRS = "model.layers.{}.", "model.layers.{}."
RULES = (
    *shell(),
    rename(THEIRS + "mlp.{gate,up,down}_proj.weight", OURS + "channel_mixer.{gate,up,down}_proj.weight"),
    *within(
        "olmo_hybrid",
        rename(THEIRS + "self_attn.{q,k,v,o}_proj.{weight,bias}", OURS + "mixer.{q,k,v,out}_proj.{weight,bias}"),
        rename(THEIRS + "self_attn.{q,k}_norm.weight", OURS + "mixer.{q,k}_norm.weight"),
        rename(THEIRS + "feedforward_layer_norm.weight", OURS + "mixer_output_norm.weight"),
        rename(THEIRS + "post_feedforward_layernorm.weight", OURS + "channel_output_norm.weight"),
    ),
    *within(
        "gated_deltanet",
        rename(THEIRS + "linear_attn.{q,k,v,a,b,g,o}_proj.weight", OURS + "mixer.{q,k,v,decay,beta,gate,out}_proj.weight"),
        convolutions([THEIRS + f"linear_attn.{name}_conv1d.weight" for name in "qkv"], OURS + "mixer.conv.weight", conv_sizes),
        rename(THEIRS + "linear_attn.{A_log,dt_bias}", OURS + "mixer.decay.{A_log,dt_bias}"),
        rename(THEIRS + "linear_attn.o_norm.weight", OURS + "mixer.norm.weight"),
        rename(THEIRS + "{attention,feedforward}_layer_norm.weight", OURS + "{mixer,channel}_norm.weight"),
    ),
)
# the norm behind attention has a name of its own in published checkpoints, and another one when transformers saves
ALIASES = ((THEIRS + "post_attention_layernorm.weight", THEIRS + "feedforward_layer_norm.weight"),)


INITIAL = ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
SMALL = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": None},
}  # fmt: skip
TRIALS = {
    "plain": SMALL,
    "biased": SMALL | {"attention_bias": True, "linear_num_value_heads": 4, "linear_allow_neg_eigval": False, "tie_word_embeddings": True},
    "turned": SMALL
    | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "linear_value_head_dim": 12},
}


register(
    "olmo_hybrid",
    config=OlmoHybridConfig,
    mixer=OlmoHybridMixer,
    title="OLMo Hybrid",
    paper="arXiv:2412.06464",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, num_heads=4, num_kv_heads=2,
            recurrence=dict(num_heads=2, num_v_heads=2, head_dim=8), recurrent_layers=[1],
        ),
        "7b": dict(
            hidden_size=3840, num_hidden_layers=32, intermediate_size=11008, vocab_size=100352, num_heads=30,
            recurrent_layers=[index for index in range(32) if index % 4 != 3],
        ),
    },
    layouts=(
        Layout("olmo_hybrid", ("olmo_hybrid",), from_foreign, to_foreign, RULES, aliases=ALIASES, trials=TRIALS, forgets=INITIAL),
    ),
)  # fmt: skip

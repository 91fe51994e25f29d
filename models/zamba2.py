"""Zamba2: Mamba-2 in every layer, and before some of them a transformer whose weights several depths share.

    t = W block_s([x, e]),    y = x + mamba2(norm(x + t)),    e the embeddings, s = i mod blocks in the i-th such layer
    block([x, e]) = mlp(norm(attention(norm([x, e])))),    attention over 2 D channels, no residuals

Every depth has a W and low-rank adapters of its own, which are added to the shared projections.

Papers: Glorioso et al. 2024, Zamba2, arXiv:2411.15242 (figure 2); the shared block: Zamba, arXiv:2405.16712 (section 2).
"""

from dataclasses import replace

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import LowRank, check_rope_scaling, make_norm
from zoo.layout import Layout, Rule, drop, rename, squeeze
from zoo.mixer import Mixer, State, Traits
from zoo.registry import get, register
from zoo.terms import expect, layers_of, rope_fields, rope_parameters, same_fields, shell

MAMBA = dict(expand=2.0, head_dim=64, state_size=64, num_groups=1, conv_kernel=4, bias=False, dt_min=1e-3, dt_max=1e-1, dt_floor=1e-3)


@strict
class Zamba2Config(ZooConfig):
    """Where the shared transformers stand, their sizes, and Mamba-2's."""

    model_type = "zoo_zamba2"

    channel_mixer: str | None = None
    input_norms: bool = False  # the mixer normalises by itself, for its transformer reads x as it is
    attention_layers: list[int] | None = None  # layers with a transformer before Mamba-2; None: no layer
    blocks: int = 1  # how many transformers there are, which these layers take in turn
    num_heads: int = 32
    num_kv_heads: int | None = None  # None: one for each
    rope_theta: float | None = None  # None: no rotary positions
    rope_scaling: dict | None = None
    attention_adapters: bool = False  # adapters of queries, keys and values besides those of the MLP
    adapter_rank: int = 128
    bias: bool = False  # of the gated MLP
    mamba: dict | None = None  # fields of Mamba2Config that differ from the published models'

    def __post_init__(self, **kwargs):
        self.mamba, self.attention_layers = MAMBA | (self.mamba or {}), self.attention_layers or []
        super().__post_init__(**kwargs)

    def validate_shared(self):
        """Layers, heads and the scaling must be possible ones."""
        layers, width = self.attention_layers, 2 * self.hidden_size
        if layers != sorted(set(layers) & set(range(self.num_hidden_layers))) or self.blocks < 1:
            raise ValueError(f"Zamba2Config: attention_layers={layers} must rise within the model, and blocks={self.blocks} be positive")
        if width % self.num_heads or self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"Zamba2Config: num_heads={self.num_heads} must divide {width}, and num_kv_heads={self.num_kv_heads} that")
        check_rope_scaling(self.rope_scaling)

    def lender(self, layer: int) -> int | None:
        """The first layer with the transformer of this one; None for a layer without."""
        return self.attention_layers[self.attention_layers.index(layer) % self.blocks] if layer in self.attention_layers else None


class SharedBlock(RotaryAttention):
    """Attention over `[x, e]` and a gated MLP behind it; the state is that of `AttentionMixer`, one for every depth."""

    def __init__(self, config: Zamba2Config, layer: int):
        width, heads = config.hidden_size, config.num_heads
        keys = 2 * width // heads
        rope = None if config.rope_theta is None else (keys, config.rope_theta, config.rope_scaling)
        groups, scale = config.num_kv_heads or heads, (keys / 2) ** -0.5
        super().__init__(config, layer, heads=heads, groups=groups, keys=keys, rope=rope, inputs=2 * width, scale=scale)
        self.norm, self.mlp_norm = (make_norm(config.norm, size, config.norm_eps) for size in (2 * width, width))
        inner = config.intermediate_size or 4 * width
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, width, bias=config.bias)

    def forward(self, x: Tensor, adapters: nn.ModuleDict, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """`[B, T, 2 D]` to `[B, T, D]`, with this depth's adapters by the names of the projections, and its state."""

        def project(name: str, x: Tensor) -> Tensor:
            y = getattr(self, name + "_proj")(x)
            return y + adapters[name](x) if name in adapters else y

        x = self.norm(x)
        o, state = self.finish(*(project(name, x) for name in "qkv"), state, packing)
        gate, up = project("gate_up", self.mlp_norm(o)).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate) * up), state


class Zamba2Mixer(Mixer):
    """State: that of Mamba-2, and with a transformer that of its attention. The first such layer's input is carried along."""

    traits = Traits(carry=True, constant_state=False)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj", "gate_up_proj", "down_proj", "join_proj", "in_proj")

    def __init__(self, config: Zamba2Config, layer: int):
        super().__init__(config, layer)
        family, self.lender = get("mamba2"), config.lender(layer)
        self.norm = make_norm(config.norm, config.hidden_size, config.norm_eps)
        self.mamba = family.mixer(family.config(**config.shared_fields() | config.mamba), layer)
        self.block = SharedBlock(config, layer) if self.lender == layer else None
        self.borrowed: tuple[SharedBlock, ...] = ()  # another layer's
        if self.lender is None:
            self.traits = replace(self.traits, constant_state=True)
            return
        width, wide, rank = config.hidden_size, 2 * config.hidden_size, config.adapter_rank
        self.join_proj = nn.Linear(width, width, bias=False)
        self.adapters = nn.ModuleDict({"gate_up": LowRank(width, rank, 2 * (config.intermediate_size or 4 * width), bias=False)})
        if config.attention_adapters:
            few = wide // config.num_heads * (config.num_kv_heads or config.num_heads)
            self.adapters.update({name: LowRank(wide, rank, out, bias=False) for name, out in (("q", wide), ("k", few), ("v", few))})

    def borrow(self, earlier: list[Mixer | None]) -> None:
        if self.lender is not None and self.lender != self.layer:
            block = getattr(earlier[self.lender], "block", None)
            if block is None:
                raise ValueError(f"layer {self.layer} shares the transformer of layer {self.lender}, which has none; see attention_layers")
            self.borrowed = (block,)

    def shared(self) -> SharedBlock | None:
        """The transformer before Mamba-2."""
        if self.lender is None:
            return None
        return self.block if self.lender == self.layer else self.borrowed[0]

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state, block = self.mamba.initial_state(batch, length, dtype, device), self.shared()
        return state if block is None else state | block.initial_state(batch, length, dtype, device)

    def operator_flops(self, length: int) -> int:
        return sum(part.operator_flops(length) for part in (self.mamba, self.shared()) if part is not None)

    def flops(self, length: int) -> int:
        return super().flops(length) + sum(block.flops(length) - block.operator_flops(length) for block in self.borrowed)

    def forward(
        self, x: Tensor, state: State | None = None, packing: Packing | None = None, carry: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        carry, block, after = x if carry is None else carry, self.shared(), {}
        if block is not None:
            t, after = block(torch.cat([x, carry], dim=-1), self.adapters, state, packing)
            x = x + self.join_proj(t)
        y, memory = self.mamba(self.norm(x), state, packing)
        return y, memory | after, carry


OURS = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "blocks": "num_mem_blocks",
        "attention_adapters": "use_shared_attention_adapter", "adapter_rank": "adapter_rank", "bias": "add_bias_linear",
        "norm_eps": "rms_norm_eps"}  # fmt: skip
MAMBAS = {"state_size": "mamba_d_state", "num_groups": "mamba_ngroups", "conv_kernel": "mamba_d_conv", "bias": "add_bias_linear",
          "dt_min": "time_step_min", "dt_max": "time_step_max"}  # fmt: skip


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="gelu", use_conv_bias=True, use_long_context=False, rms_norm_eps=1e-5)  # the last is fixed in Mamba-2's norm
    attended, rope = layers_of(foreign["layers_block_type"], "hybrid"), rope_fields(foreign)
    if len(attended) > foreign["num_mem_blocks"]:
        expect(foreign, tie_word_embeddings=True)  # without, transformers shares no blocks
    if foreign["use_shared_attention_adapter"]:
        expect(foreign, num_key_value_heads=foreign["num_attention_heads"])  # its adapters have no others
    if rope.pop("rope_fraction") != 1.0:
        raise ValueError("a zamba2 with partial_rotary_factor other than 1 is not supported")
    mamba = {own: foreign[name] for own, name in MAMBAS.items()} | {"expand": float(foreign["mamba_expand"])}
    mamba["head_dim"] = foreign["mamba_expand"] * foreign["hidden_size"] // foreign["n_mamba_heads"]
    mamba["dt_floor"] = foreign["time_step_min"]  # transformers bounds the steps of a prefill by what they are first drawn from
    fields = {own: foreign[name] for own, name in OURS.items()} | {"mamba": mamba, "attention_layers": attended}
    return same_fields(foreign) | fields | (rope if foreign["use_mem_rope"] else {"rope_theta": None})


def to_foreign(config: Zamba2Config) -> dict:
    """The inverse."""
    fields = {name: getattr(config, own) for own, name in OURS.items()} | {name: config.mamba[own] for own, name in MAMBAS.items()}
    rope = {"rope_fraction": 1.0, "rope_theta": config.rope_theta or 10000.0, "rope_scaling": config.rope_scaling}
    return same_fields(config) | fields | {
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "layers_block_type": ["hybrid" if i in config.attention_layers else "linear_attention" for i in range(config.num_hidden_layers)],
        "use_mem_rope": config.rope_theta is not None,
        "rope_parameters": rope_parameters(rope),
        "mamba_expand": int(config.mamba["expand"]),
        "n_mamba_heads": int(config.hidden_size * config.mamba["expand"]) // config.mamba["head_dim"],
    }  # fmt: skip


BLOCK = "self_attn.{q,k,v,o}_proj.weight", "feed_forward.{gate_up,down}_proj.{weight,bias}", "{input,pre_ff}_layernorm.weight"
ADAPTERS = "{self_attn.linear_q,self_attn.linear_k,self_attn.linear_v,feed_forward.gate_up_proj}_adapter_list."
MAMBA_KEYS = "mamba.{A_log,D,dt_bias,norm.weight,in_proj.weight,in_proj.bias,out_proj.weight,out_proj.bias}"


def rules(config: Zamba2Config) -> tuple[Rule, ...]:
    """Keys differ where a layer has a transformer, and the adapters of every depth are stored with the shared block."""
    made = [*shell("final_layernorm")]
    for layer in range(config.num_hidden_layers):
        theirs, own, lender = f"model.layers.{layer}.", f"model.layers.{layer}.mixer.", config.lender(layer)
        mamba = theirs if lender is None else theirs + "mamba_decoder."
        made += [
            rename(mamba + "input_layernorm.weight", own + "norm.weight"),
            rename(mamba + MAMBA_KEYS, own + MAMBA_KEYS),
            squeeze(mamba + "mamba.conv1d.{weight,bias}", own + "mamba.conv.{weight,bias}"),
        ]
        if lender is None:
            continue
        block, place = f"model.layers.{lender}.shared_transformer.", config.attention_layers.index(layer)
        made += [
            rename(theirs + "linear.weight", own + "join_proj.weight"),
            rename(block + ADAPTERS + f"{place}.{{0,1}}.weight", own + "adapters.{q,k,v,gate_up}.{down,up}.weight"),
        ]
        if lender == layer:
            parts = "{q,k,v,out}_proj.weight", "{gate_up,down}_proj.{weight,bias}", "{norm,mlp_norm}.weight"
            made += [rename(block + foreign, own + "block." + part) for foreign, part in zip(BLOCK, parts, strict=True)]
        else:
            repeated = (theirs + "shared_transformer." + keys for keys in (*BLOCK, ADAPTERS + "{}.{0,1}.weight"))
            made += [drop(keys, "stored with the first layer that has the block") for keys in repeated]
    return tuple(made)


SMALL = {"n_mamba_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 2, "num_key_value_heads": 4, "adapter_rank": 4}
TRIALS = {
    "shared": SMALL | {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid"]},
    "adapted": SMALL
    | {"num_hidden_layers": 3, "layers_block_type": ["hybrid"] * 3, "num_mem_blocks": 2, "intermediate_size": None}
    | {"use_shared_attention_adapter": True, "use_mem_rope": True, "add_bias_linear": True, "mamba_ngroups": 1, "n_mamba_heads": 8},
    "untied": SMALL
    | {"layers_block_type": ["hybrid", "linear_attention"], "tie_word_embeddings": False, "num_key_value_heads": 2, "mamba_d_conv": 3}
    | {"use_mem_rope": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}},
}
FORGETS = ("num_logits_to_keep", "time_step_floor", "use_mem_eff_path")


register(
    "zamba2",
    config=Zamba2Config,
    mixer=Zamba2Mixer,
    title="The Zamba2 Suite: Technical Report",
    paper="arXiv:2411.15242",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=3, intermediate_size=48, vocab_size=256, attention_layers=[0, 2], num_heads=4,
            attention_adapters=True, adapter_rank=4, rope_theta=10000.0, mamba=dict(head_dim=16, state_size=8, num_groups=2),
        ),
        "2.7b": dict(
            hidden_size=2560, num_hidden_layers=54, tie_word_embeddings=True, blocks=2, attention_layers=[*range(6, 43, 6), 47, 51],
        ),
    },
    layouts=(Layout("zamba2", ("zamba2",), from_foreign, to_foreign, rules, trials=TRIALS, forgets=FORGETS),),
)  # fmt: skip

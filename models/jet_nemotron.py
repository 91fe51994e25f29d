"""Jet-Nemotron: JetBlock in most layers, attention over all tokens in a few and over a window in some others.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = q_t S_t / sqrt(K)
    v_t = silu(sum_w kernel_w(x_t) * (W_v x)_{t - W + 1 + w}),    kernel(x) = W_2 silu(W_1 x) + b
    log alpha_t = -exp(A) softplus(W_a x_t + b_a),    beta_t = sigmoid(W_b x_t)
    y_t = W_O (rmsnorm(o_t) * silu(W_g x_t))

JetBlock is Gated DeltaNet whose values pass a convolution with kernels that each token generates; queries and keys pass SiLU
only, and have length one. Alone, as a layer of another hybrid, `jet_nemotron` is this block.

Paper: Gu et al. 2025, arXiv:2508.15884 (JetBlock); the recurrence is arXiv:2412.06464, eq. 10. The generator of kernels starts like
the linear maps of other mixers, and b like their short convolutions.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, derived, read_teacher, write_teacher
from zoo.kernels.checks import accumulator
from zoo.kernels.delta_rule import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, SoftplusDecay, merge_heads, split_heads, unit_length, wide
from zoo.layout import Layout, rename, within
from zoo.mixer import Layer, Mixer, State
from zoo.registry import get, register
from zoo.terms import layers_of

ATTENTION = dict(num_heads=12, num_kv_heads=2, rope_theta=1000000.0, rope_scaling=None, qkv_bias=True)


@strict
class JetNemotronConfig(ZooConfig):
    """Sizes of JetBlock, the attention, and which is where."""

    model_type = "zoo_jet_nemotron"

    norm_eps: float = 1e-6
    num_heads: int = 12  # H
    head_dim: int = 96  # K
    value_dim: int = 256  # V, channels of a head's values
    conv_kernel: int = 4  # W, tokens seen by the convolution
    reduction: int = 8  # H V over the width inside the generator of kernels
    output_norm_eps: float = 1e-5
    attention: dict | None = None  # fields of TransformerConfig that differ from those of the smaller published model
    attention_layers: list[int] | None = None  # None: no layer sees all tokens
    window_layers: list[int] | None = None  # None: no layer attends within a window
    window: int = 1152  # of these

    def __post_init__(self, **kwargs):
        self.attention = ATTENTION | (self.attention or {})
        super().__post_init__(**kwargs)

    def layer_configs(self) -> list[ZooConfig]:
        return [self._layer(index) for index in range(self.num_hidden_layers)]

    def _layer(self, index: int) -> ZooConfig:
        windowed = index in (self.window_layers or [])
        if not windowed and index not in (self.attention_layers or []):
            return self
        return get("transformer").config(**self.shared_fields() | self.attention | {"window": self.window if windowed else None})


class DynamicConv(Layer):
    """Causal depthwise convolution over the last W tokens, with a kernel for every token; its state is the W - 1 inputs before."""

    def __init__(self, width: int, kernel: int, source: int, hidden: int):
        super().__init__()
        self.width, self.kernel = width, kernel
        self.down = nn.Linear(source, hidden, bias=False)
        self.up = nn.Linear(hidden, width * kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel)
        init.uniform_(self.up.bias, -bound, bound)

    def initial_state(self, batch: int, dtype: torch.dtype, device) -> Tensor:
        return torch.zeros(batch, self.kernel - 1, self.width, dtype=dtype, device=device)

    def forward(self, x: Tensor, source: Tensor, state: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        kernels = self.up(F.silu(self.down(source))).unflatten(-1, (self.width, self.kernel))
        places, y = torch.eye(self.kernel, dtype=x.dtype, device=x.device), torch.zeros_like(x)
        for place in range(self.kernel):
            before = None if state is None else state.clone()  # a step may write the new state over what it is given
            past, after = ops.short_conv(x, places[place].expand(self.width, -1), state=before, packing=packing)
            y = y + kernels[..., place] * past
        return F.silu(y), after


class JetNemotronMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and `conv`, the last inputs of the convolution over the values, `[B, W - 1, H V]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: JetNemotronConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.keys, self.values = config.hidden_size, config.num_heads, config.head_dim, config.value_dim
        inner = self.heads * self.values
        self.q_proj = nn.Linear(width, self.heads * self.keys, bias=False)
        self.k_proj = nn.Linear(width, self.heads * self.keys, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.conv = DynamicConv(inner, config.conv_kernel, width, inner // config.reduction)
        self.beta_proj = nn.Linear(width, self.heads, bias=False)
        self.decay_proj = nn.Linear(width, self.heads, bias=False)
        self.decay = SoftplusDecay(self.heads, least=1e-4)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.norm = GatedNorm(self.values, eps=config.output_norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)
        return {"memory": memory, "conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        state = state or {}
        q, k = (unit_length(split_heads(F.silu(project(x)), self.heads)) for project in (self.q_proj, self.k_proj))
        v, conv = self.conv(self.v_proj(x), x, state.get("conv"), packing)
        beta, log_decay = wide(self.beta_proj(x)).sigmoid(), self.decay(self.decay_proj(x))
        v = split_heads(v, self.heads)
        o, memory = ops.delta_rule(q, k, v, beta, log_decay, state=state.get("memory"), packing=packing)
        o = self.norm(o, split_heads(self.gate_proj(x), self.heads))
        return self.out_proj(merge_heads(o)), {"memory": memory, "conv": conv}


JET = {
    "mode": "chunk", "expand_v": 2.0, "num_heads": 6, "head_dim": 256, "norm_eps": 1e-5, "conv_size": 4,
    "dconv_generator_reduction": 8, "dconv_implementation": "triton",
}  # fmt: skip
KINDS = {"jet", "attn", "swa"}
OWN = ("layer_types", "efficient_attention_config")


def complete(foreign: dict) -> dict:
    """The config with what it leaves out."""
    efficient = foreign.get("efficient_attention_config") or {}
    rest = derived("qwen2")({name: value for name, value in foreign.items() if name not in OWN})
    own = {"layer_types": foreign.get("layer_types") or ["jet"] * rest["num_hidden_layers"]}
    return rest | own | {"efficient_attention_config": efficient | {"jet": JET | efficient.get("jet", {})}}


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    fields, kinds, efficient = read_teacher(foreign), foreign["layer_types"], foreign["efficient_attention_config"]
    jet = efficient["jet"]
    values = jet["head_dim"] * jet["expand_v"]
    if unknown := (set(kinds) | efficient.keys()) - KINDS:
        raise ValueError(f"a jet_nemotron with layers of type {sorted(unknown)} is not supported; known: {', '.join(sorted(KINDS))}")
    if unknown := jet.keys() - JET.keys():
        raise ValueError(f"efficient_attention_config of a jet_nemotron has the fields {sorted(unknown)}, which we do not know")
    if not math.isclose(values, round(values), rel_tol=1e-5):
        raise ValueError(f"a jet_nemotron with head_dim={jet['head_dim']} times expand_v={jet['expand_v']}, which is no whole number")
    attention = {name: fields.pop(name) for name in ("num_heads", "num_kv_heads", "rope_theta", "rope_scaling")}
    return fields | {
        "num_heads": jet["num_heads"],
        "head_dim": jet["head_dim"],
        "value_dim": round(values),
        "conv_kernel": jet["conv_size"],
        "reduction": jet["dconv_generator_reduction"],
        "output_norm_eps": float(jet["norm_eps"]),  # the published configs have it as a string
        "attention": attention | ({"head_dim": foreign["head_dim"]} if foreign.get("head_dim") else {}),
        "attention_layers": layers_of(kinds, "attn") or None,
        "window_layers": layers_of(kinds, "swa") or None,
        "window": efficient.get("swa", {}).get("window_size", 1152),
    }


def to_foreign(config: JetNemotronConfig) -> dict:
    """The inverse."""
    attention = get("transformer").config(**config.shared_fields() | config.attention)
    kinds = {index: kind for kind, layers in (("attn", config.attention_layers), ("swa", config.window_layers)) for index in layers or []}
    jet = {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "expand_v": math.ceil(config.value_dim / config.head_dim * 1e10) / 1e10,  # their library rounds the product down
        "conv_size": config.conv_kernel,
        "dconv_generator_reduction": config.reduction,
        "norm_eps": config.output_norm_eps,
    }
    return write_teacher(attention) | ({"head_dim": attention.head_dim} if attention.head_dim else {}) | {
        "layer_types": [kinds.get(index, "jet") for index in range(config.num_hidden_layers)],
        "efficient_attention_config": {"jet": JET | jet, "swa": {"window_size": config.window}},
    }  # fmt: skip


LAYER, THEIRS = "model.layers.{}.mixer.", "model.layers.{}.self_attn."
RULES = (
    *KEPT,
    *within("transformer", PROJECTIONS),
    *within(
        "jet_nemotron",
        rename(THEIRS + "{q,k,v,a,b,g,o}_proj.weight", LAYER + "{q,k,v,decay,beta,gate,out}_proj.weight"),
        rename(THEIRS + "dynamic_conv1d.kernel_generator.{w1,w2}.{weight,bias}", LAYER + "conv.{down,up}.{weight,bias}"),
        rename(THEIRS + "{A_log,dt_bias}", LAYER + "decay.{A_log,dt_bias}"),
        rename(THEIRS + "o_norm.weight", LAYER + "norm.weight"),
    ),
)


register(
    "jet_nemotron",
    config=JetNemotronConfig,
    mixer=JetNemotronMixer,
    title="Jet-Nemotron: Efficient Language Model with Post Neural Architecture Search",
    paper="arXiv:2508.15884",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=3, intermediate_size=48, vocab_size=256, num_heads=2, head_dim=6, value_dim=16,
            attention=dict(num_heads=4, num_kv_heads=2), attention_layers=[1], window_layers=[2], window=8,
        ),
        "2b": dict(
            hidden_size=1536, num_hidden_layers=28, intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True,
            attention_layers=[14, 19], window_layers=[20, 21],
        ),
        "4b": dict(
            hidden_size=2048, num_hidden_layers=36, intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True,
            num_heads=16, head_dim=128, attention=dict(num_heads=16), attention_layers=[17, 20, 32],
            window_layers=[5, 16, 19, 21, 22, 25, 27], window=2048,
        ),
    },
    layouts=(
        Layout("jet_nemotron", ("jet_nemotron",), from_foreign, to_foreign, RULES, complete=complete, classes="JetNemotron"),
    ),
)  # fmt: skip

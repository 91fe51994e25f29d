"""Llamba: Llama with its attention replaced by a discrete Mamba-2, whose heads set their own decay without a step size.

    x, B, C, z, a = split(W_in u_t);    x, B, C = conv(x, B, C)
    S_t = S_{t-1} / (1 + exp(a_t)) + B_t x_t^T,    y_t = C_t S_t + D_h x_t
    output: (y_t * silu(z_t + b)) W_out

Softplus of a is the negative logarithm of the decay, and x is written as it is: Mamba-2's dt scales both. Distilled weights
keep values, keys and queries of the attention they replace as x, B and C, so nothing is normalised, and the convolution
has no activation.

Papers: Bick et al. 2024, arXiv:2408.10189 (MOHAWK: the discrete Mamba-2, distilled in three stages); Bick et al. 2025,
arXiv:2502.14458 (Llamba).
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import ShortConv, laid_out, merge_heads, split_heads, wide
from zoo.layout import Layout, rename, squeeze
from zoo.mixer import Mixer, State
from zoo.registry import register
from zoo.terms import foreign_activation, inner_size, own_activation


@strict
class LlambaConfig(ZooConfig):
    """Sizes of the state."""

    model_type = "zoo_llamba"

    num_heads: int = 32  # H, of x
    num_groups: int = 32  # sets of B and C, each shared by H / num_groups heads
    state_size: int = 64  # N, the length of B and C (K)
    expand: float = 1.0  # inner width = D * expand
    conv_kernel: int = 4  # W, tokens seen by the short convolution
    conv_bias: bool = True
    conv_activation: str | None = None  # or "silu"
    bias: bool = False  # biases of the two projections; without them the gate has one of its own

    def validate_inner(self):
        """The inner width must be a whole number of heads, and heads of groups."""
        inner = int(self.hidden_size * self.expand)
        if inner % self.num_heads or self.num_heads % self.num_groups:
            raise ValueError(
                f"LlambaConfig: the inner width {inner} must be divisible by num_heads={self.num_heads}, "
                f"and that by num_groups={self.num_groups}"
            )


class LlambaMixer(Mixer):
    """State: `conv` `[B, W - 1, H P + 2 G N]`, inputs of the convolution, and `memory` `[B, H, N, P]`."""

    lora_targets = ("in_proj", "out_proj")

    def __init__(self, config: LlambaConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups, self.keys = config.hidden_size, config.num_heads, config.num_groups, config.state_size
        self.inner = int(width * config.expand)
        self.values, mixed = self.inner // self.heads, self.inner + 2 * self.groups * self.keys
        self.in_proj = nn.Linear(width, mixed + self.inner + self.heads, bias=config.bias)
        self.gate_bias = None if config.bias else nn.Parameter(torch.empty(self.inner))
        self.conv = ShortConv(mixed, config.conv_kernel, bias=config.conv_bias, activation=config.conv_activation)
        self.D = nn.Parameter(torch.empty(self.heads))
        self.out_proj = nn.Linear(self.inner, width, bias=config.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.ones_(self.D)
        if self.gate_bias is not None:
            init.zeros_(self.gate_bias)

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        shared = self.groups * self.keys
        return laid_out(("v_proj", self.inner), ("k_proj", shared), ("q_proj", shared), ("z", self.inner), ("decay", self.heads))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)
        return {"conv": self.conv.initial_state(batch, dtype, device), "memory": memory}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        shared = self.groups * self.keys
        mixed, z, a = self.in_proj(x).split([self.inner + 2 * shared, self.inner, self.heads], dim=-1)
        mixed, conv = self.conv(mixed, state["conv"] if state else None, packing)
        v, B, C = mixed.split([self.inner, shared, shared], dim=-1)
        v, B, C = split_heads(v, self.heads), split_heads(B, self.groups), split_heads(C, self.groups)
        memory = state["memory"] if state else None
        y, memory = ops.linear_attention(C, B, v, -F.softplus(wide(a)), scale=1.0, state=memory, packing=packing)
        y = merge_heads(y + self.D.to(v.dtype).unsqueeze(-1) * v)
        gate = F.silu(z if self.gate_bias is None else z + self.gate_bias)
        return self.out_proj(y * gate), {"conv": conv, "memory": memory}


# Checkpoints of the authors, whose config.json names no model type where their library wrote it.
SIZES = {  # ours -> theirs, in ssm_cfg
    "num_heads": "n_v_heads", "num_groups": "n_qk_heads", "state_size": "d_state", "conv_kernel": "d_conv", "conv_bias": "conv_bias",
    "bias": "bias",
}  # fmt: skip
SSM = {
    "d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "d_conv": 4, "expand": 1, "activation": "identity", "bias": False,
    "conv_bias": True, "chunk_size": 128,
}  # fmt: skip
MLP = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"}
DEFAULTS = {
    "model_type": "llamba", "tie_embeddings": False, "pad_vocab_size_multiple": 8, "lm_head_bias": False, "n_layer": 32,
    "norm_epsilon": 1e-5, "architectures": ["LlambaForCausalLM"], "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ACTIVATIONS = {"identity": None, "silu": "silu", "swish": "silu"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def matches(foreign: dict) -> bool:
    """Whether a config is theirs: it says so, or its state space has heads of its own for queries and keys."""
    return foreign.get("model_type") == "llamba" or "n_qk_heads" in (foreign.get("ssm_cfg") or {})


def complete(foreign: dict) -> dict:
    """The config with what it leaves out."""
    return DEFAULTS | foreign | {"ssm_cfg": SSM | (foreign.get("ssm_cfg") or {}), "mlp_cfg": foreign.get("mlp_cfg") or MLP}


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    ssm, mlp, multiple = foreign["ssm_cfg"], foreign["mlp_cfg"], foreign["pad_vocab_size_multiple"]
    for name, value in (("lm_head_bias", False), ("norm_epsilon", 1e-5)):
        if foreign[name] != value:
            raise ValueError(f"a llamba with {name}={foreign[name]!r} is not supported, only {name}={value!r}")
    if unknown := ssm.keys() - SSM.keys():
        raise ValueError(f"ssm_cfg of a llamba has the fields {sorted(unknown)}, which we do not know")
    if ssm["activation"] not in ACTIVATIONS:
        raise ValueError(f"a llamba with activation={ssm['activation']!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    args = {"act": own_activation(mlp["act_fn"]), "bias": mlp["bias"]}
    return {own: ssm[name] for own, name in SIZES.items()} | {name: foreign[name] for name in TOKENS} | {
        "vocab_size": -(-foreign["vocab_size"] // multiple) * multiple,
        "hidden_size": foreign["d_model"],
        "num_hidden_layers": foreign["n_layer"],
        "intermediate_size": mlp["intermediate_size"],
        "channel_args": {name: value for name, value in args.items() if value not in ("silu", False)} or None,
        "expand": float(ssm["expand"]),
        "conv_activation": ACTIVATIONS[ssm["activation"]],
        "tie_word_embeddings": foreign["tie_embeddings"],
    }  # fmt: skip


def to_foreign(config: LlambaConfig) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    args = {"act": "silu", "bias": False} | (config.channel_args or {})
    inner = inner_size(config)
    sizes = {name: getattr(config, own) for own, name in SIZES.items()}
    return {name: getattr(config, name) for name in TOKENS if getattr(config, name) is not None} | {
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 8 if config.vocab_size % 8 == 0 else 1,
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "tie_embeddings": config.tie_word_embeddings,
        "lm_head_bias": False,
        "norm_epsilon": 1e-5,
        "mlp_cfg": {"intermediate_size": inner, "bias": args["bias"], "act_fn": foreign_activation(args["act"])},
        "ssm_cfg": sizes | {"expand": int(config.expand), "activation": config.conv_activation or "identity", "chunk_size": 128},
    }


LAYER, THEIRS = "model.layers.{}.mixer.", "backbone.layers.{}.mixer."
RULES = (
    rename("backbone.embedding.weight", "model.embed_tokens.weight"),
    rename("backbone.layers.{}.{input,post_attention}_layernorm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename("backbone.layers.{}.mlp.{gate,up,down}_proj.{weight,bias}", "model.layers.{}.channel_mixer.{gate,up,down}_proj.{weight,bias}"),
    rename(THEIRS + "{in,out}_proj.{weight,bias}", LAYER + "{in,out}_proj.{weight,bias}"),
    rename(THEIRS + "{z_bias,D}", LAYER + "{gate_bias,D}"),
    squeeze(THEIRS + "conv1d.{weight,bias}", LAYER + "conv.{weight,bias}"),
    rename("backbone.final_layernorm.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename("score.{weight,bias}", "score.{weight,bias}"),
)


register(
    "llamba",
    config=LlambaConfig,
    mixer=LlambaMixer,
    title="Llamba: Scaling Distilled Recurrent Models for Efficient Language Processing",
    paper="arXiv:2502.14458",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_groups=2, state_size=8, vocab_size=256),
        "1b": dict(
            hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True,
        ),
        "8b": dict(hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=128256),
    },
    layouts=(
        Layout(
            "llamba", ("llamba", None), from_foreign, to_foreign, RULES, prefix="backbone.", matches=matches, complete=complete,
            classes="Llamba",
        ),
    ),
)  # fmt: skip

"""MiniMax-01: lightning attention in most layers, softmax attention in every eighth, many experts behind each.

    S_t = lambda_h S_{t-1} + k_t v_t^T,    o_t = q_t S_t,    q, k, v = silu(W x)
    lambda_h = exp(-2^(-8 h / H) (1 - l / (L - 1))) in layer l of L, h = 1 ... H
    y_t = W_O (sigmoid(W_G x_t) * rmsnorm(o_t))

Norms follow the residual sums, whose sides are weighted (DeepNorm), and one follows the embedding. Alone, as a layer of another
hybrid, `minimax` is lightning attention.

Papers: MiniMax 2025, arXiv:2501.08313, section 2; lightning attention, Qin et al. 2024, arXiv:2405.17381; DeepNorm,
arXiv:2203.00555.
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
from zoo.layers import RMSNorm, merge_heads, split_heads
from zoo.layout import Layout, Pattern, Rule, interleave, rename, within
from zoo.mixer import Mixer, State
from zoo.registry import get, register
from zoo.terms import expect, layers_of, rope_fields, rope_parameters, same_fields, shell

BLOCK = 256  # chunk for which transformers stores tables of decays


@strict
class MiniMaxConfig(ZooConfig):
    """Lightning attention, and the layers that attend by softmax instead."""

    model_type = "zoo_minimax"

    post_norm: bool = True
    embedding_norm: bool = True
    num_heads: int = 64  # H
    num_kv_heads: int = 8  # of softmax attention
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float = 1000000.0  # base of the rotary angles of softmax attention
    rope_fraction: float = 1.0  # share of its heads' channels that turn
    window: int | None = None  # how many tokens it sees; None: all
    attention_layers: list[int] | None = None  # None: none
    attention_weights: list[float] | None = None  # `residual_weights` of its layers, where they differ

    def validate_heads(self):
        """Heads must divide evenly."""
        if self.head_dim is None:
            self.divide("hidden_size", "num_heads")

    def layer_configs(self) -> list[ZooConfig]:
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim, "window": self.window}
        rope = {"rope_theta": self.rope_theta, "rope_fraction": self.rope_fraction}
        weights = {"residual_weights": self.attention_weights or self.residual_weights}
        attending = set(self.attention_layers or [])
        attention = get("transformer").config(**self.shared_fields() | heads | rope | weights) if attending else self
        return [attention if index in attending else self for index in range(self.num_hidden_layers)]


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """-log lambda of every head, `[H]`."""
    rate = (1 / 2 ** (8 / heads)) ** (torch.arange(heads) + 1)
    return rate * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


class MiniMaxMixer(Mixer):
    """Lightning attention. State: `memory` `[B, H, K, K]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: MiniMaxConfig, layer: int):
        super().__init__(config, layer)
        self.heads, self.keys = config.num_heads, config.head_dim or config.divide("hidden_size", "num_heads")
        self.layers, width, inner = config.num_hidden_layers, config.hidden_size, self.heads * self.keys
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (nn.Linear(width, inner, bias=False) for _ in range(4))
        self.norm = RMSNorm(inner, 1e-6)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.register_buffer("slopes", torch.empty(self.heads, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.slopes, slopes(self.heads, self.layer, self.layers))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {"memory": torch.zeros(batch, self.heads, self.keys, self.keys, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(F.silu(project(x)), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        memory = state["memory"] if state else None
        o, memory = ops.linear_attention(q, k, v, -self.slopes, scale=1.0, state=memory, packing=packing)
        return self.out_proj(torch.sigmoid(self.gate_proj(x)) * self.norm(merge_heads(o))), {"memory": memory}


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    expect(foreign, hidden_act="silu")
    rope = rope_fields(foreign)
    if rope.pop("rope_scaling") is not None:
        raise ValueError("a minimax with scaled rotary angles is not supported")
    sums = {name: [float(foreign[f"{name}_{side}_factor"]) for side in ("alpha", "beta")] for name in ("full_attn", "linear_attn", "mlp")}
    return same_fields(foreign) | rope | {
        "norm_eps": foreign["rms_norm_eps"],
        "num_heads": foreign["num_attention_heads"],
        "num_kv_heads": foreign["num_key_value_heads"],
        "head_dim": foreign["head_dim"],
        "window": foreign["sliding_window"],
        "attention_layers": layers_of(foreign["layer_types"], "full_attention") or None,
        "residual_weights": sums["linear_attn"] + sums["mlp"],
        "attention_weights": sums["full_attn"] + sums["mlp"],
        "channel_mixer": "moe",
        "channel_args": {"experts": foreign["num_local_experts"], "top_k": foreign["num_experts_per_tok"]},
    }  # fmt: skip


def to_foreign(config: MiniMaxConfig) -> dict:
    """The inverse."""
    weights = config.residual_weights or [1.0] * 4
    factors = {"linear_attn": weights[:2], "mlp": weights[2:], "full_attn": (config.attention_weights or weights)[:2]}
    rope = {"rope_theta": config.rope_theta, "rope_fraction": config.rope_fraction, "rope_scaling": None}
    kinds, attending = ("linear_attention", "full_attention"), config.attention_layers or []
    args = {"experts": 8, "top_k": 2} | (config.channel_args or {})
    sums = {f"{name}_{side}_factor": pair[at] for name, pair in factors.items() for at, side in enumerate(("alpha", "beta"))}
    return same_fields(config) | sums | {
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.window,
        "rope_parameters": rope_parameters(rope),
        "layer_types": [kinds[index in attending] for index in range(config.num_hidden_layers)],
        "num_local_experts": args["experts"],
        "num_experts_per_tok": args["top_k"],
        "block_size": BLOCK,
    }  # fmt: skip


def with_tables(layer: int) -> Rule:
    """The output norm of lightning attention, beside which transformers stores decays that follow from the config."""
    there = f"model.layers.{layer}.self_attn."
    names = ("norm.weight", "slope_rate", "query_decay", "key_decay", "diagonal_decay")

    def to_foreign(x: list[Tensor], config: MiniMaxConfig) -> list[Tensor]:
        rate, place = slopes(config.num_heads, layer, config.num_hidden_layers)[:, None, None], torch.arange(BLOCK) + 1
        distance = rate * (place[:, None] - place)[None, None]
        diagonal = torch.exp(torch.where(distance >= 0, -distance, float("-inf")))
        tables = rate, torch.exp(-rate * place[:, None]), torch.exp(-rate * (BLOCK - place[:, None])), diagonal
        return [x[0], *(table.to(x[0]) for table in tables)]

    own = (Pattern(f"model.layers.{layer}.mixer.norm.weight"),)
    return Rule(tuple(Pattern(there + name) for name in names), own, lambda x, shapes, config: x[:1], to_foreign)


def rules(config: MiniMaxConfig) -> tuple[Rule, ...]:
    """A norm before a layer is the one behind the layer before."""
    ours, theirs, last = "model.layers.{}.", "model.layers.{}.", config.num_hidden_layers - 1
    lightning = [index for index, layer in enumerate(config.layer_configs()) if layer is config]
    return (
        *(rule for rule in shell() if rule.own[0].text != "model.norm.weight"),
        rename("model.layers.0.input_layernorm.weight", "model.embed_norm.weight"),
        *(rename(f"model.layers.{i + 1}.input_layernorm.weight", f"model.layers.{i}.channel_norm.weight") for i in range(last)),
        rename("model.norm.weight", f"model.layers.{last}.channel_norm.weight"),
        rename(theirs + "post_attention_layernorm.weight", ours + "mixer_norm.weight"),
        rename(theirs + "block_sparse_moe.gate.weight", ours + "channel_mixer.router.weight"),
        rename(theirs + "block_sparse_moe.experts.{}.{w1,w3,w2}.weight", ours + "channel_mixer.experts.{}.{gate,up,down}_proj.weight"),
        *within("transformer", rename(theirs + "self_attn.{q,k,v,o}_proj.weight", ours + "mixer.{q,k,v,out}_proj.weight")),
        *within(
            "minimax",
            interleave(theirs + "self_attn.qkv_proj.weight", [ours + f"mixer.{name}_proj.weight" for name in "qkv"], lambda c: c.num_heads),
            rename(theirs + "self_attn.{output_gate,out_proj}.weight", ours + "mixer.{gate_proj,out_proj}.weight"),
        ),
        *(with_tables(index) for index in lightning),
    )


SMALL = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
TRIALS = {
    "plain": SMALL,
    "weighted": SMALL
    | {"full_attn_alpha_factor": 2.5, "linear_attn_alpha_factor": 3.5, "linear_attn_beta_factor": 0.5, "mlp_alpha_factor": 1.5}
    | {"sliding_window": 6, "num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": True},
}


register(
    "minimax",
    config=MiniMaxConfig,
    mixer=MiniMaxMixer,
    title="MiniMax-01: Scaling Foundation Models with Lightning Attention",
    paper="arXiv:2501.08313",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=24, vocab_size=256, num_heads=4, num_kv_heads=2, attention_layers=[1],
            channel_mixer="moe", channel_args=dict(experts=4, top_k=2),
        ),
        "text-456b": dict(
            hidden_size=6144, num_hidden_layers=80, intermediate_size=9216, vocab_size=200064, head_dim=128, rope_theta=1e7,
            rope_fraction=0.5, attention_layers=list(range(7, 80, 8)), channel_mixer="moe", channel_args=dict(experts=32, top_k=2),
            residual_weights=[3.5565588200778455, 1.0, 3.5565588200778455, 1.0],
        ),
    },
    layouts=(Layout("minimax", ("minimax",), from_foreign, to_foreign, rules, trials=TRIALS, forgets=("block_size",)),),
)  # fmt: skip

"""Artificial hippocampus networks: attention over a window and the first tokens, and a memory of what left the window.

    o_t = attention of q_t over { k_j, v_j : j < S or t - W < j <= t } + U_h m_t,    m_t = silu(g_t) * rmsnorm(q_t M_t)
    M_t = alpha_u (I - beta_u k_u k_u^T) M_{t-1} + beta_u k_u v_u^T,    u = t - W >= S

A token is written into M when it leaves the window, with its own gates, and read by the query of the token that displaces it;
the S first ones stay visible and are never written. Until then the layer is attention as it was. Queries, keys and values are
the attention's, turned by their positions; for M the first two have length one. g is one number per head and token.

M is Gated DeltaNet's as above, DeltaNet's without alpha, or Mamba-2's, `M_t = exp(-A dt_u) M_{t-1} + dt_u k_u v_u^T`, with the
gate before a norm over all heads. U starts at zero: a new layer equals its window.

Paper: Fang et al. 2025, arXiv:2510.07318 (Artificial Hippocampus Networks); the recurrences are arXiv:2412.06464, eq. 10,
arXiv:2406.06484 and arXiv:2405.21060.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, derived, read_teacher, write_teacher
from zoo.kernels.attention import cache
from zoo.kernels.checks import accumulator
from zoo.kernels.delta_rule import flops
from zoo.kernels.packing import Packing
from zoo.layers import BlockLinear, GatedNorm, SoftplusDecay, check_rope_scaling, merge_heads, token_positions, unit_length, wide
from zoo.layout import Delta, Layout, Pattern, Rule, drop, rename
from zoo.mixer import Layer, State, Traits
from zoo.registry import get, register
from zoo.terms import expect

MEMORIES = {"gated_deltanet": "GatedDeltaNet", "delta_net": "DeltaNet", "mamba2": "Mamba2"}  # ours -> theirs


@strict
class AHNConfig(ZooConfig):
    """Heads and positions of the attention, its window, and the kind of memory."""

    model_type = "zoo_ahn"

    norm_eps: float = 1e-6
    num_heads: int = 16  # H
    num_kv_heads: int = 2  # G, each shared by H / G query heads
    rope_theta: float = 1000000.0
    rope_scaling: dict | None = None  # as in TransformerConfig
    qkv_bias: bool = True
    window: int = 32640  # W, tokens seen exactly, the own included
    sinks: int = 128  # S, first tokens that stay visible
    memory: str = "gated_deltanet"  # or "delta_net", "mamba2"
    full_layers: list[int] | None = None  # those that see every token and have no memory

    def validate_heads(self):
        """Heads must divide evenly, and the window and the memory must be possible."""
        self.divide("hidden_size", "num_heads")
        self.divide("num_heads", "num_kv_heads")
        if self.window < 1 or self.sinks < 0:
            raise ValueError(f"AHNConfig: window={self.window} must be positive, and sinks={self.sinks} not negative")
        if self.memory not in MEMORIES:
            raise ValueError(f"AHNConfig: memory {self.memory!r} is unknown; choose one of {', '.join(MEMORIES)}")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)

    def layer_configs(self) -> list[ZooConfig]:
        if not self.full_layers:
            return super().layer_configs()
        same = {name: getattr(self, name) for name in ("num_heads", "num_kv_heads", "rope_theta", "rope_scaling", "qkv_bias")}
        full = get("transformer").config(**self.shared_fields() | same)
        return [full if index in self.full_layers else self for index in range(self.num_hidden_layers)]


class Hippocampus(Layer):
    """The memory `[B, H, K, K]` of one layer, and how tokens are written and read."""

    def __init__(self, width: int, heads: int, channels: int, kind: str):
        super().__init__()
        self.kind, self.heads, self.channels, space = kind, heads, channels, kind == "mamba2"
        self.step_proj = nn.Linear(width, heads, bias=space)  # of beta, or of dt
        self.decay = None if kind == "delta_net" else SoftplusDecay(heads, least=1.0 if space else 1e-4)
        self.decay_proj = nn.Linear(width, heads, bias=False) if kind == "gated_deltanet" else None
        self.gate_proj = nn.Linear(width, heads, bias=space)
        self.norm = GatedNorm(heads * channels, norm_before_gate=False) if space else GatedNorm(channels)
        self.mix = BlockLinear(heads * channels, heads, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.mix.weight)

    def gates(self, x: Tensor) -> Tensor:
        """How each token will be written, `[B, T, H, 2]`: beta or dt, and the logarithm of the decay."""
        step = wide(self.step_proj(x))
        if self.kind == "mamba2":
            dt = F.softplus(step + wide(self.decay.dt_bias))
            return torch.stack([dt, self.decay(step)], dim=-1)
        log_decay = torch.zeros_like(step) if self.decay is None else self.decay(self.decay_proj(x))
        return torch.stack([step.sigmoid(), log_decay], dim=-1)

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, gates: Tensor, memory: Tensor | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor]:
        """`[B, T, H K]`: what the tokens x read with q once k and v have been written, and the memory after."""
        step, log_decay = gates.unbind(-1)
        if self.kind == "mamba2":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            v = (wide(v.repeat_interleave(self.heads // v.shape[2], dim=2)) * step.unsqueeze(-1)).to(v.dtype)
            o, memory = ops.linear_attention(q, k, v, log_decay, scale=1.0, state=memory, packing=packing)
        else:
            log_decay = None if self.decay is None else log_decay
            o, memory = ops.delta_rule(unit_length(q), unit_length(k), v, step, log_decay, state=memory, packing=packing)
        gate = self.gate_proj(x).unsqueeze(-1).expand(o.shape)
        o = self.norm(merge_heads(o), merge_heads(gate)) if self.kind == "mamba2" else merge_heads(self.norm(o, gate))
        return self.mix(o), memory


class AHNMixer(RotaryAttention):
    """State: that of attention with a window; `gates` `[B, S + W, H, 2]` of the tokens in it; and `memory` `[B, H, K, K]`."""

    token_states = (*RotaryAttention.token_states, "gates")

    traits = Traits()

    def __init__(self, config: AHNConfig, layer: int):
        keys = config.divide("hidden_size", "num_heads")
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads, keys=keys, window=config.window, sinks=config.sinks,
            rope=(keys, config.rope_theta, config.rope_scaling), qkv_bias=config.qkv_bias,
        )  # fmt: skip
        self.memory = Hippocampus(config.hidden_size, self.heads, keys, config.memory)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        exact = {"dtype": accumulator(dtype), "device": device}
        gates = torch.zeros(batch, self.window + self.sinks, self.heads, 2, **exact)
        memory = torch.zeros(batch, self.heads, self.keys, self.keys, **exact)
        return super().initial_state(batch, length, dtype, device) | {"gates": gates, "memory": memory}

    def operator_flops(self, length: int) -> int:
        return super().operator_flops(length) + flops(length, self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        positions = token_positions(x, state["length"] if state else None, packing)
        q, k, v = self.project(x, positions)
        gates = self.memory.gates(x)
        ring = {"window": self.window, "sinks": self.sinks, "packing": packing}
        gone, there = cache.ring_leaving(state, {"k": k, "v": v, "gates": gates}, **ring)  # before they are overwritten
        gone["gates"] = torch.where(there[..., None, None], gone["gates"], 0.0)  # which writes and forgets nothing
        kept = {"k": state["gates"], "v": state["gates"][..., :0], "length": state["length"].clone()} if state else None
        kept = cache.ring_append(kept, gates, gates[..., :0], **ring)[-1]
        o, after = self.attend(q, k, v, positions, state, packing)
        recalled, memory = self.memory(x, q, **gone, memory=state["memory"] if state else None, packing=packing)
        return self.out_proj(merge_heads(o) + recalled), after | {"gates": kept["k"], "memory": memory}


# Checkpoints of the authors: the transformer's config with further fields, and tensors with or without the transformer's own.
DEFAULTS = {"num_attn_sinks": 0, "fa_layer_ids": "", "use_ahn_router": False, "use_q_proj": False}
CONSTANT = {"_layer_implementation": "Qwen2MemDecoderLayer"}
OWN = {*DEFAULTS, *CONSTANT, "_ahn_implementation", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def complete(foreign: dict) -> dict:
    """The config with what it leaves out."""
    rest = derived("qwen2")({name: value for name, value in foreign.items() if name not in OWN})
    return rest | DEFAULTS | {name: value for name, value in foreign.items() if name in OWN}


def from_foreign(foreign: dict) -> dict:
    """Our fields. What only steers training is passed over."""
    expect(foreign, use_ahn_router=False, use_q_proj=False)
    kind, full = foreign.get("_ahn_implementation"), str(foreign["fa_layer_ids"] or "")
    if kind not in MEMORIES.values():
        raise ValueError(f"_ahn_implementation={kind!r} is not supported; known: {', '.join(MEMORIES.values())}")
    if not foreign.get("sliding_window"):
        raise ValueError("the config of these artificial hippocampus networks has no sliding_window; say how many tokens are seen exactly")
    return read_teacher(foreign) | {
        "window": foreign["sliding_window"],
        "sinks": foreign["num_attn_sinks"],
        "memory": next(own for own, name in MEMORIES.items() if name == kind),
        "full_layers": [int(index) for index in full.split(",")] if full.strip() else None,
    }


def to_foreign(config: AHNConfig) -> dict:
    """The inverse."""
    return write_teacher(config) | CONSTANT | {
        "_ahn_implementation": MEMORIES[config.memory],
        "sliding_window": config.window,
        "num_attn_sinks": config.sinks,
        "fa_layer_ids": ",".join(map(str, config.full_layers or [])),
    }  # fmt: skip


LAYER, THEIRS = "model.layers.{}.mixer.memory.", "model.layers.{}.ahn.fn."
DELTA = (
    rename(THEIRS + "{b,a,g}_proj.weight", LAYER + "{step,decay,gate}_proj.weight"),
    rename(THEIRS + "o_norm.weight", LAYER + "norm.weight"),
    rename(THEIRS + "dt_bias", LAYER + "decay.dt_bias"),
    Rule(  # D is what their constructor left, ones: nothing reads it
        (Pattern(THEIRS + "A_log"), Pattern(THEIRS + "D")),
        (Pattern(LAYER + "decay.A_log"),),
        lambda x, shapes, config: x[:1],
        lambda x, config: [x[0], torch.ones_like(x[0])],
    ),
)
SPACE = (
    rename(THEIRS + "{dt,g}_proj.{weight,bias}", LAYER + "{step,gate}_proj.{weight,bias}"),
    rename(THEIRS + "norm.weight", LAYER + "norm.weight"),
    rename(THEIRS + "{A_log,dt_bias}", LAYER + "decay.{A_log,dt_bias}"),
)


def rules(config: AHNConfig) -> tuple[Rule, ...]:
    """Those of the attention and of one kind of memory; layers without one may have its tensors."""
    names, reason = ("{b,a,g,dt,o}_proj.{weight,bias}", "{o_norm,norm}.weight", "{A_log,D,dt_bias}"), "its layer sees every token"
    idle = [drop(f"model.layers.{index}.ahn.fn.{name}", reason) for index in config.full_layers or [] for name in names]
    kind = SPACE if config.memory == "mamba2" else DELTA
    return (*KEPT, PROJECTIONS, *kind, rename(THEIRS + "o_proj.weight", LAYER + "mix.weight"), *idle)


register(
    "ahn",
    config=AHNConfig,
    mixer=AHNMixer,
    title="Artificial Hippocampus Networks for Efficient Long-Context Modeling",
    paper="arXiv:2510.07318",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=256, num_heads=4, num_kv_heads=2, window=6, sinks=2,
        ),
        "qwen2.5-3b": dict(
            hidden_size=2048, num_hidden_layers=36, intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True,
        ),
        "qwen2.5-7b": dict(
            hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, vocab_size=152064, num_heads=28, num_kv_heads=4,
        ),
        "qwen2.5-14b": dict(
            hidden_size=5120, num_hidden_layers=48, intermediate_size=13824, vocab_size=152064, num_heads=40, num_kv_heads=8,
        ),
    },
    layouts=(
        Layout(
            "ahn", ("qwen2",), from_foreign, to_foreign, rules, matches=lambda foreign: CONSTANT.items() <= foreign.items(),
            complete=complete, classes="Qwen2", delta=Delta(own=lambda name: ".ahn." in name),
        ),
    ),
)  # fmt: skip

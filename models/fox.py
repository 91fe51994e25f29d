"""FoX, the forgetting transformer: softmax attention that forgets what lies behind a forget gate.

    o_t = sum_{j <= t} softmax_j(q_t k_j / sqrt(K) + sum_{j < l <= t} log f_l) v_j,    f_t = sigmoid(w x_t + b), one per head

There are no positions: the gates tell near from far. The block called Pro also normalises queries and keys by head, mixes keys
and values with those of the token before,

    k_t = a_t k'_{t-1} + (1 - a_t) k'_t,    a_t = sigmoid(u x_t), one per head,

and normalises and gates the output, `y_t = W_O (norm(o_t) * sigmoid(W_G x_t))`.

Paper: Lin, Nikishin, He, Courville 2025, "Forgetting Transformer: Softmax Attention with a Forget Gate", arXiv:2503.02130,
section 3.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import ops
from zoo.attending import AttentionMixer
from zoo.config import ZooConfig
from zoo.fla import GATED_MLP, SHELL, fla_layout, layer
from zoo.kernels.attention import cache
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, merge_heads, split_heads, token_positions, token_shift, wide
from zoo.mixer import State, Traits
from zoo.registry import register


@strict
class FoXConfig(ZooConfig):
    """Sizes of the heads, and which parts of the Pro block there are."""

    model_type = "zoo_fox"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    qkv_bias: bool = False
    qk_norm: bool | float = False  # queries and keys normalised by head; a number: with this epsilon, not norm_eps
    kv_shift: bool = False  # keys and values mixed with those of the token before
    output_gate: bool = False
    output_norm: bool = False  # of each head's output, before the gate

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")


class Shift(nn.Module):
    """`a_t x_{t-1} + (1 - a_t) x_t` for each of the heads of x, a being a sigmoid of the token."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(width, heads, bias=False)

    def forward(self, token: Tensor, x: Tensor, state: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        before, after = token_shift(x, state, packing)
        back = torch.sigmoid(wide(self.proj(token))).unsqueeze(-1)
        own, before = split_heads(x, self.heads), split_heads(before, self.heads)
        return merge_heads(torch.lerp(wide(own), wide(before), back).to(x.dtype)), after


class FoXMixer(AttentionMixer):
    """State: that of `AttentionMixer`; `forget` `[B, L, H]`, the logarithms of the gates; of a shift, `k_shift` and `v_shift`
    `[B, 1, G * K]`."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")
    token_states = (*AttentionMixer.token_states, "forget")
    traits = Traits(constant_state=False)

    def __init__(self, config: FoXConfig, layer: int):
        heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
        super().__init__(config, layer, heads=heads, groups=groups, keys=config.divide("hidden_size", "num_heads"))
        width, self.shared = config.hidden_size, groups * self.keys
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, self.shared, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, self.shared, bias=config.qkv_bias)
        self.forget_proj = nn.Linear(width, heads)
        self.gate_proj = nn.Linear(width, width, bias=False) if config.output_gate else None
        self.out_proj = nn.Linear(width, width, bias=False)
        self.shifts = nn.ModuleDict({name: Shift(width, groups) for name in "kv"} if config.kv_shift else {})
        eps = config.norm_eps if config.qk_norm is True else config.qk_norm
        self.q_norm = GatedNorm(width, groups=heads, eps=eps) if config.qk_norm else nn.Identity()
        self.k_norm = GatedNorm(self.shared, groups=groups, eps=eps) if config.qk_norm else nn.Identity()
        self.norm = GatedNorm(width, groups=heads, eps=config.norm_eps, activation="sigmoid") if config.output_norm else None

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = super().initial_state(batch, length, dtype, device)
        state["forget"] = torch.zeros(batch, cache.capacity(length), self.heads, dtype=accumulator(dtype), device=device)
        return state | {f"{name}_shift": torch.zeros(batch, 1, self.shared, dtype=dtype, device=device) for name in self.shifts}

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        parts, shifted = {"k": self.k_proj(x), "v": self.v_proj(x)}, {}
        for name, shift in self.shifts.items():
            last = state[f"{name}_shift"] if state else None
            parts[name], shifted[f"{name}_shift"] = shift(x, parts[name], last, packing)
        q, k = split_heads(self.q_norm(self.q_proj(x)), self.heads), split_heads(self.k_norm(parts["k"]), self.groups)
        log_forget = F.logsigmoid(wide(self.forget_proj(x)))
        o, after = self.forgetful(q, k, split_heads(parts["v"], self.groups), log_forget, state, packing)
        return self.out_proj(self.gate(merge_heads(o), x)), after | shifted

    def forgetful(
        self, q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """Attention of these queries to the cached and the new keys, and the cache after."""
        positions = token_positions(q, state["length"] if state else None, packing)  # before the cache is written in place
        after = cache.append(state, k, v, packing=packing, forget=log_forget)
        if state is None:
            return ops.attention(q, k, v, log_forget=log_forget, packing=packing)[0], after
        if packing is not None:
            q, positions = packing.pad(q), packing.pad(positions, -1)
        places = {"q_positions": positions, "kv_positions": cache.positions(after)}
        o, _ = ops.attention(q, after["k"], after["v"], log_forget=after["forget"], **places)
        return o if packing is None else packing.unpad(o), after

    def gate(self, o: Tensor, x: Tensor) -> Tensor:
        """The output `[B, T, D]`, normalised and gated by the tokens as far as the block does it."""
        gate = None if self.gate_proj is None else self.gate_proj(x)
        if self.norm is not None:
            return self.norm(o, gate)
        return o if gate is None else o * torch.sigmoid(gate)


def read_fla(foreign: dict) -> dict:
    """Further fields; its norms of queries and keys have an epsilon of their own."""
    return {"qk_norm": foreign["qk_norm"] and (True if foreign["norm_eps"] == 1e-5 else 1e-5)}


def write_fla(config: FoXConfig) -> dict:
    """The inverse. What it cannot say is left out, and noticed by mapping back."""
    return {"qk_norm": bool(config.qk_norm)}


FLA = fla_layout(
    "forgetting_transformer",
    "ForgettingTransformer",
    (
        layer("attn.{q,k,v,o}_proj.{weight,bias}", "mixer.{q,k,v,out}_proj.{weight,bias}"),
        layer("attn.{f,g}_proj.{weight,bias}", "mixer.{forget,gate}_proj.{weight,bias}"),
        layer("attn.{q,k}_norm.weight", "mixer.{q,k}_norm.weight"),
        *GATED_MLP,
        *SHELL,
    ),
    same={"num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "qkv_bias": "qkv_bias", "output_gate": "use_output_gate"},
    defaults={
        "num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False, "window_size": None, "use_output_gate": False,
    },
    only={"elementwise_affine": (True,), "window_size": (None,)},
    read=read_fla,
    write=write_fla,
    trials={
        "grouped": {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "use_output_gate": True},
        "normed": {"num_heads": 2, "qk_norm": True, "norm_eps": 1e-6},
    },
)  # fmt: skip

PRO = dict(qk_norm=True, kv_shift=True, output_gate=True, output_norm=True)
register(
    "fox",
    config=FoXConfig,
    mixer=FoXMixer,
    title="Forgetting Transformer: Softmax Attention with a Forget Gate",
    paper="arXiv:2503.02130",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, vocab_size=256, **PRO),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16, tie_word_embeddings=True),
        "pro-760m": dict(hidden_size=1536, num_hidden_layers=24, num_heads=24, intermediate_size=3584, vocab_size=50277, **PRO),
    },
    layouts=(FLA,),
)  # fmt: skip

"""Liger: each head of a transformer reads a window and a gated memory, with the same queries, keys and values, half from each.

    o_t = 1/2 sum_{t-W < j <= t} softmax_j(R q_t . R k_j / sqrt(K)) v_j + 1/2 phi(q_t) S_t,    R turns by position
    S_t = diag(sigmoid(k_t)^(1/16)) S_{t-1} + phi(k_t) v_t^T,    phi(x) = softmax(x) over a head's channels

It adds no parameter to the transformer it is made of: the gate is made of the key. `memory="hgrn2"` decays by `sigmoid(k_t)` itself
and writes `1 - sigmoid(k_t)` where the above writes `phi(k_t)`. `memory="gsa"` has slots instead, to which q attends by a softmax; the
gate of a slot is made of the mean of K / M channels of the key.

Paper: Lan, Sun, Hu, Du, Cheng 2025, arXiv:2503.01496. GLA: arXiv:2312.06635. HGRN2: arXiv:2404.07904. GSA: arXiv:2409.07146.
"""

from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn import functional as F

from zoo import ops
from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, derived, read_teacher, write_teacher
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import check_rope_scaling, merge_heads, rotary_table, rotate, slot_attention, split_heads, token_positions, wide
from zoo.layout import Layout
from zoo.mixer import State, Traits
from zoo.registry import register
from zoo.terms import expect

TEMPERATURE = 16.0  # of the gate; larger forgets slower
MEMORIES = ("gla", "hgrn2", "gsa")


@strict
class LigerConfig(ZooConfig):
    """Heads as the teacher has them, the window, and the kind of memory."""

    model_type = "zoo_liger"

    num_heads: int = 16
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float = 10000.0  # base of the rotary angles, within the window
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    qkv_bias: bool = False
    window: int = 64  # how many tokens are seen exactly, the own included
    memory: str = "gla"  # gla, hgrn2 or gsa
    num_slots: int | None = None  # M, of the memory gsa; None: K

    def validate_heads(self):
        """Heads must divide evenly, the window hold a token, and the memory be known and have slots where these are its."""
        keys = self.head_dim or self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")
        if self.window < 1:
            raise ValueError(f"LigerConfig: window={self.window} must be positive")
        if self.memory not in MEMORIES:
            raise ValueError(f"LigerConfig: memory {self.memory!r} is unknown; choose one of {', '.join(MEMORIES)}")
        if self.num_slots is not None and (self.memory != "gsa" or self.num_slots < 1 or keys % self.num_slots):
            raise ValueError(
                f"LigerConfig: num_slots={self.num_slots} must divide the {keys} channels of a head, and goes with memory='gsa'"
            )

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class LigerMixer(RotaryAttention):
    """State: `k`, `v` and `length` of the window, see `AttentionMixer`, and `memory` `[B, H, K, K]`, or `slot_keys` `[B, H, K, M]` and
    `slot_values` `[B, H, M, K]`."""

    traits = Traits()

    def __init__(self, config: LigerConfig, layer: int):
        keys = config.head_dim or config.divide("hidden_size", "num_heads")
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys, window=config.window,
            rope=(keys, config.rope_theta, config.rope_scaling), qkv_bias=config.qkv_bias,
        )  # fmt: skip
        self.memory, self.slots = config.memory, config.num_slots or keys

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.slots, dtype=accumulator(dtype), device=device)
        memories = {"memory": memory} if self.memory != "gsa" else {"slot_keys": memory, "slot_values": torch.zeros_like(memory.mT)}
        return super().initial_state(batch, length, dtype, device) | memories

    def operator_flops(self, length: int) -> int:
        return super().operator_flops(length) + (1 + (self.memory == "gsa")) * flops(length, self.heads, self.keys, self.slots)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q = split_heads(self.q_proj(x), self.heads)
        k, v = split_heads(self.k_proj(x), self.groups), split_heads(self.v_proj(x), self.groups)
        remembered, memories = self.remember(q, k, v, state, packing)
        positions = token_positions(x, state["length"] if state else None, packing)
        table = rotary_table(positions, *self.rope)
        seen = {name: tensor for name, tensor in state.items() if name not in memories} if state else None
        o, after = self.attend(rotate(q, table), rotate(k, table), v, positions, seen, packing)
        return self.out_proj(merge_heads(0.5 * o + 0.5 * remembered)), after | memories

    def remember(self, q: Tensor, k: Tensor, v: Tensor, state: State | None, packing: Packing | None) -> tuple[Tensor, State]:
        """What the memory answers, and its state."""
        if self.memory == "gsa":
            log_decay = F.logsigmoid(wide(k).unflatten(-1, (self.slots, -1)).mean(-1)) / TEMPERATURE
            return slot_attention(q, k, v, log_decay, state, packing)
        log_decay = F.logsigmoid(wide(k)).repeat_interleave(self.heads // self.groups, dim=2)
        if self.memory == "gla":
            written, log_decay = wide(k).softmax(-1), log_decay / TEMPERATURE
        else:
            written = torch.sigmoid(-wide(k))
        features, written = wide(q).softmax(-1).to(q.dtype), written.to(k.dtype)
        memory = state["memory"] if state else None
        remembered, memory = ops.linear_attention(features, written, v, log_decay, scale=1.0, state=memory, packing=packing)
        return remembered, {"memory": memory}


THEIR_WINDOW = 65  # their 64 counts the tokens before the own, as flash attention does
TEACHERS = {  # model type -> that of the teacher, prefix of the classes, memory
    "liger_gla": ("llama", "LigerGLA", "gla"),
    "liger_hgrn2": ("llama", "LigerHGRN2", "hgrn2"),
    "liger_gsa": ("llama", "LigerGSA", "gsa"),
    "liger_mistral_gla": ("mistral", "LigerMistralGLA", "gla"),
    "liger_qwen2_gla": ("qwen2", "LigerQwen2GLA", "gla"),
    "liger_qwen3_gla": ("qwen3", "LigerQwen3GLA", "gla"),
}


def read_liger(foreign: dict, teacher: str, memory: str) -> dict:
    """Our fields for a completed config of Liger. Made of a Qwen, heads share the width whatever the config says."""
    biased, keys = teacher in ("qwen2", "qwen3"), foreign["hidden_size"] // foreign["num_attention_heads"]
    if biased:
        expect(foreign, head_dim=keys)
    keys = foreign.get("head_dim") or keys
    if memory == "gsa" and keys % foreign["pool_size"]:
        raise ValueError(f"a liger_gsa with pool_size={foreign['pool_size']} is supported only where that divides head_dim={keys}")
    fields = {"head_dim": keys, "qkv_bias": biased, "window": THEIR_WINDOW, "memory": memory}
    return read_teacher(foreign) | fields | ({"num_slots": foreign["pool_size"]} if memory == "gsa" else {})


def write_liger(config: LigerConfig) -> dict:
    """The inverse; what it cannot say is noticed by mapping back."""
    keys = config.head_dim or config.divide("hidden_size", "num_heads")
    return write_teacher(config) | {"head_dim": keys} | ({"pool_size": config.num_slots or keys} if config.memory == "gsa" else {})


TRIALS = {
    "grouped": {"head_dim": 8, "pool_size": 4, "rope_theta": 500.0},
    "tied": {
        "head_dim": 8,
        "pool_size": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
}
LAYOUTS = tuple(
    Layout(
        kind, (kind,), partial(read_liger, teacher=teacher, memory=memory), write_liger, (PROJECTIONS, *KEPT),
        complete=derived(teacher, pool_size=64), classes=classes, trials=TRIALS,
    )
    for kind, (teacher, classes, memory) in TEACHERS.items()
)  # fmt: skip


register(
    "liger",
    config=LigerConfig,
    mixer=LigerMixer,
    title="Liger: Linearizing Large Language Models to Gated Recurrent Structures",
    paper="arXiv:2503.01496",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, window=8, vocab_size=256),
        "8b": dict(
            hidden_size=4096, num_hidden_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336, rope_theta=500000.0,
            vocab_size=128256,
        ),
    },
    layouts=LAYOUTS,
)  # fmt: skip

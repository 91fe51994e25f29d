"""RWKV in the place of attention: what the mixers have in common that RADLADS (arXiv:2505.03005) makes of a transformer."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.converted import read_teacher, write_teacher
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, LowRank, merge_heads, orthogonal, rotary_table, rotate, split_heads, token_positions
from zoo.mixer import Mixer, State
from zoo.terms import expect

GATES = {0: "none", 1: "full", 2: "low_rank"}  # gate_rank_type -> our name
FIELDS = {  # what their configs add to a Qwen2's; a rank of None follows the rule below
    "attention_bias": True, "attention_output_bias": False, "use_rope": False, "groupnorm_att": False, "balance_state": True,
    "num_attention_layers": 0, "lora_rank_decay": None, "lora_rank_gate": None,
}  # fmt: skip


def rank_of(width: int, given: int | None, factor: float, power: float = 0.5) -> int:
    """The rank given, or `factor D^power` as a multiple of 32."""
    return given or max(1, round(factor * width**power / 32)) * 32


def check(config: ZooConfig) -> None:
    """Raise ValueError unless heads divide evenly, can turn, and the gate is known."""
    keys = config.divide("hidden_size", "num_heads")
    if config.num_kv_heads is not None:
        config.divide("num_heads", "num_kv_heads")
    if config.rope_theta is not None and keys % 2:
        raise ValueError(f"{type(config).__name__}: hidden_size / num_heads is {keys}; rotation needs an even number of channels")
    if config.gate not in GATES.values():
        raise ValueError(f"{type(config).__name__}: gate {config.gate!r} is unknown; choose one of {', '.join(GATES.values())}")


class RADMixer(Mixer):
    """The teacher's projections around a recurrence of H heads; k and v are repeated for grouped queries, and a gate closes.

    State: `memory` `[B, H, K, K]`, with token shift `shift` `[B, 1, D]`, and with rotary positions `length` `[B]`.

    The config has the fields num_heads, num_kv_heads, rope_theta, qkv_bias, gate, gate_rank and head_norm_eps.
    """

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    shifts = False  # whether a token is mixed with the one before

    def __init__(self, config: ZooConfig, layer: int):
        super().__init__(config, layer)
        self.width, self.heads = config.hidden_size, config.num_heads
        self.groups, self.keys = config.num_kv_heads or config.num_heads, config.divide("hidden_size", "num_heads")
        width, self.theta = self.width, config.rope_theta
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, self.groups * self.keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, self.groups * self.keys, bias=config.qkv_bias)
        self.gate_proj = None
        if config.gate == "full":
            self.gate_proj = nn.Linear(width, width, bias=False)
        elif config.gate == "low_rank":
            self.gate_proj = LowRank(width, rank_of(width, config.gate_rank, 0.6, 0.8), width, activation=torch.sigmoid, bias=False)
        eps = config.head_norm_eps
        self.norm = None if eps is None else GatedNorm(width, groups=self.heads, kind="layer", eps=eps, bias=True)
        self.out_proj = nn.Linear(width, width, bias=False)

    def reset_parameters(self) -> None:
        """A full gate is one half at first, one of low rank small."""
        if isinstance(self.gate_proj, LowRank):
            small(self.gate_proj)
        elif self.gate_proj is not None:
            init.zeros_(self.gate_proj.weight)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        state = {"memory": torch.zeros(batch, self.heads, self.keys, self.keys, dtype=accumulator(dtype), device=device)}
        if self.shifts:
            state["shift"] = torch.zeros(batch, 1, self.width, dtype=dtype, device=device)
        if self.theta is not None:
            state["length"] = torch.zeros(batch, dtype=torch.long, device=device)
        return state

    def project(
        self, xr: Tensor, xk: Tensor, xv: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Receptances, keys and values `[B, T, H, K]` of what they read, and the positions' share of the state."""
        r = split_heads(self.q_proj(xr), self.heads)
        k, v = split_heads(self.k_proj(xk), self.groups), split_heads(self.v_proj(xv), self.groups)
        after = {}
        if self.theta is not None:
            seen = state["length"] if state else None
            table = rotary_table(token_positions(r, seen, packing), self.keys, self.theta)
            r, k = rotate(r, table), rotate(k, table)
            added = torch.full((r.shape[0],), r.shape[1], device=r.device) if packing is None else packing.cu_seqlens.diff()
            after["length"] = added if seen is None else seen + added
        return r, *(x.repeat_interleave(self.heads // self.groups, dim=2) for x in (k, v)), after

    def normed(self, o: Tensor) -> Tensor:
        """What was read, `[B, T, H, K] -> [B, T, D]`, each head normalised where there is a norm."""
        return merge_heads(o) if self.norm is None else self.norm(merge_heads(o))

    def close(self, y: Tensor, xg: Tensor) -> Tensor:
        """Gate and output projection; xg is what the gate reads."""
        if isinstance(self.gate_proj, LowRank):
            y = y * self.gate_proj(xg)
        elif self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(xg))
        return self.out_proj(y)


def small(low_rank: LowRank) -> None:
    """Initialise so that the map does not depend on its input at first."""
    init.zeros_(low_rank.down.weight)
    orthogonal(low_rank.up.weight, 0.1)


def read_fields(foreign: dict) -> dict:
    """Our fields for a completed config of RADLADS."""
    kind, width, heads = foreign["model_type"], foreign["hidden_size"], foreign["num_attention_heads"]
    fields = read_teacher(foreign)
    expect(foreign, attention_output_bias=False, num_attention_layers=0, head_dim=width // heads)
    if fields.pop("rope_scaling") is not None:
        raise ValueError(f"a {kind} with rope_scaling is not supported, only rope_scaling=None")
    if foreign["gate_rank_type"] not in GATES:
        raise ValueError(
            f"a {kind} with gate_rank_type={foreign['gate_rank_type']!r} is not supported; known: {', '.join(map(str, GATES))}"
        )
    return fields | {
        "rope_theta": fields["rope_theta"] if foreign["use_rope"] else None, "qkv_bias": foreign["attention_bias"],
        "gate": GATES[foreign["gate_rank_type"]], "balance": bool(foreign["balance_state"]),
        "head_norm_eps": width // heads * 1e-5 if foreign["groupnorm_att"] else None,
        "decay_rank": foreign["lora_rank_decay"], "gate_rank": foreign["lora_rank_gate"],
    }  # fmt: skip


def write_fields(config: ZooConfig) -> dict:
    """The inverse; what it cannot say is noticed by mapping back."""
    return write_teacher(config) | {
        "attention_bias": config.qkv_bias, "attention_output_bias": False, "use_rope": config.rope_theta is not None,
        "gate_rank_type": {own: kind for kind, own in GATES.items()}[config.gate], "balance_state": config.balance,
        "groupnorm_att": config.head_norm_eps is not None, "lora_rank_decay": config.decay_rank, "lora_rank_gate": config.gate_rank,
    }  # fmt: skip

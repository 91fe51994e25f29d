"""RWKV-6 (Finch): linear attention with data-dependent decay per channel, a bonus for the current token and token shift.

    x'_* = x_t + (x_{t-1} - x_t) * (mu_* + tanh(x''_t A_*) B_*)    for * in w, k, v, r, g; x''_t = x_t + (x_{t-1} - x_t) * mu_x
    r, k, v, g = W_r x'_r, W_k x'_k, W_v x'_v, silu(W_g x'_g)
    w_t = exp(-exp(omega + tanh(x'_w A) B))
    S_t = diag(w_t) S_{t-1} + k_t v_t^T,    o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)
    y_t = (g_t * groupnorm_h(o_t)) W_O

Paper: Peng et al. 2024, arXiv:2404.05892: token shift, decay and recurrence in section 4, eq. 19 the recurrence.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import RWKV_SHELL, fla_layout, layer, rounded_up
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, LowRank, merge_heads, split_heads, token_shift, wide
from zoo.layout import Pattern, Rule, mapped, transpose
from zoo.mixer import Mixer, State
from zoo.registry import register
from zoo.rwkv import BLOCK, as_vector, channel_mixes, file_layout, initial_bonus, initial_decay


@strict
class RWKV6Config(ZooConfig):
    """Sizes of the heads and ranks of what depends on the data."""

    model_type = "zoo_rwkv6"

    channel_mixer: str | None = "rwkv"
    channel_args: dict | None = field(default_factory=lambda: {"mix_back": True})
    norm: str = "layernorm"
    embedding_norm: bool = True

    head_dim: int = 64  # H = D / head_dim
    key_ratio: float = 1.0  # K = head_dim * key_ratio
    value_ratio: float = 1.0  # V = head_dim * value_ratio
    mix_rank: int = 32  # rank of each of the five token shifts
    decay_rank: int = 64  # rank of the decay's projection
    head_norm_eps: float = 64e-5  # of the norm over each head

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None and self.channel_mixer == "rwkv":
            self.intermediate_size = int(self.hidden_size * 3.5) // 32 * 32
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly, and have whole channels."""
        self.divide("hidden_size", "head_dim")
        for name in ("key_ratio", "value_ratio"):
            channels = self.head_dim * getattr(self, name)
            if channels < 1 or channels % 1:
                raise ValueError(
                    f"RWKV6Config: head_dim={self.head_dim} times {name}={getattr(self, name)} must be a positive whole number"
                )


class RWKV6Mixer(Mixer):
    """State: `shift` `[B, 1, D]`, the last token, and `memory` `[B, H, K, V]`."""

    lora_targets = ("r_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: RWKV6Config, layer: int):
        super().__init__(config, layer)
        width, self.depth, self.heads = config.hidden_size, config.num_hidden_layers, config.divide("hidden_size", "head_dim")
        self.width, self.keys = width, int(config.head_dim * config.key_ratio)
        self.values = int(config.head_dim * config.value_ratio)
        keys, values = self.heads * self.keys, self.heads * self.values
        self.mix = nn.Parameter(torch.empty(width))
        self.mix_down = nn.Linear(width, 5 * config.mix_rank, bias=False)
        self.mix_up = nn.ModuleList(nn.Linear(config.mix_rank, width) for _ in range(5))  # decay, k, v, r, gate; biases are mu
        self.decay_proj = LowRank(width, config.decay_rank, keys, activation=torch.tanh)
        self.bonus = nn.Parameter(torch.empty(self.heads, self.keys))
        self.r_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.gate_proj = nn.Linear(width, values, bias=False)
        self.norm = GatedNorm(values, groups=self.heads, kind="layer", eps=config.head_norm_eps, bias=True)
        self.out_proj = nn.Linear(values, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors start: channels ordered from those that look back to those that do not, from slow decay to fast."""
        rise, fall = self.layer / max(self.depth - 1, 1), 1 - self.layer / self.depth
        share = torch.arange(self.width) / self.width
        init.copy_(self.mix, 1 - share**fall)
        powers = (share**fall, share**fall, share**fall + 0.3 * rise, share ** (0.5 * fall), share ** (0.5 * fall))
        for up, power in zip(self.mix_up, powers, strict=True):
            init.copy_(up.bias, 1 - power)
            init.uniform_(up.weight, -0.01, 0.01)
        init.zeros_(self.mix_down.weight)
        init.zeros_(self.decay_proj.down.weight)
        init.uniform_(self.decay_proj.up.weight, -0.01, 0.01)
        init.copy_(self.decay_proj.up.bias, initial_decay(self.bonus.numel(), self.layer, self.depth))
        init.copy_(self.bonus, initial_bonus(self.bonus.numel(), self.layer, self.depth).view_as(self.bonus))

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        return super().roles() | {"q_proj": ("r_proj", [slice(None)])}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)
        return {"shift": torch.zeros(batch, 1, self.width, dtype=dtype, device=device), "memory": memory}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        before, shift = token_shift(x, state["shift"] if state else None, packing)
        back = before - x
        ranks = torch.tanh(self.mix_down(x + back * self.mix)).chunk(5, dim=-1)
        for_decay, for_k, for_v, for_r, for_gate = (torch.addcmul(x, back, up(low)) for up, low in zip(self.mix_up, ranks, strict=True))
        log_decay = -wide(self.decay_proj(for_decay)).exp()
        tensors = (self.r_proj(for_r), self.k_proj(for_k), self.v_proj(for_v), log_decay)
        r, k, v, log_decay = (split_heads(t, self.heads) for t in tensors)
        memory = state["memory"] if state else None
        o, memory = ops.linear_attention(r, k, v, log_decay, bonus=self.bonus, scale=1.0, state=memory, packing=packing)
        return self.out_proj(self.norm(merge_heads(o), self.gate_proj(for_gate))), {"shift": shift, "memory": memory}


def low_ranks(foreign: str, own: list[str], to_parts, to_whole) -> Rule:
    """A foreign tensor of a layer that holds something for each of the five mixtures, and what makes it from five and back."""
    names = [Pattern(name) for name in own]
    return Rule((Pattern(foreign),), tuple(names), lambda x, shapes, config: to_parts(x[0]), lambda x, config: [to_whole(x)])


FIVE = [f"model.layers.{{}}.mixer.mix_up.{index}" for index in range(5)]  # decay, k, v, r, gate
THEIRS = [1, 2, 3, 0, 4]  # where these five stand among r, decay, k, v, gate
OURS = [3, 0, 1, 2, 4]  # and the other way round


def reordered(x: Tensor, order: list[int]) -> Tensor:
    """Five equal parts along the first dimension in another order."""
    return torch.cat([x.chunk(5)[index] for index in order])


def read_fla(foreign: dict) -> dict:
    """Further fields for a config of flash-linear-attention."""
    width = foreign["hidden_size"]
    inner = foreign["intermediate_size"] or rounded_up(width * (foreign["hidden_ratio"] or 3.5), 32)
    return {"head_dim": width // foreign["num_heads"], "intermediate_size": inner, "head_norm_eps": foreign["norm_eps"]}


def write_fla(config: RWKV6Config) -> dict:
    """The inverse; what it cannot say is noticed by mapping back."""
    return {"num_heads": config.divide("hidden_size", "head_dim"), "intermediate_size": config.intermediate_size}


FLA = fla_layout(
    "rwkv6",
    "RWKV6",
    (
        layer("attn.{r,k,v,g}_proj.linear.weight", "mixer.{r,k,v,gate}_proj.weight"),
        layer("attn.o_proj.weight", "mixer.out_proj.weight"),
        layer("attn.x_proj.0.mu", "mixer.mix"),
        mapped(
            "model.layers.{}.attn.x_proj.0.linear.weight", "model.layers.{}.mixer.mix_down.weight",
            lambda x: reordered(x, THEIRS), lambda x: reordered(x, OURS),
        ),
        low_ranks(
            "model.layers.{}.attn.x_proj.2.weight", [name + ".weight" for name in FIVE],
            lambda x: [x.chunk(5, 1)[index].contiguous() for index in THEIRS],
            lambda x: torch.cat([x[index] for index in OURS], 1),
        ),
        low_ranks(
            "model.layers.{}.attn.x_bias", [name + ".bias" for name in FIVE],
            lambda x: [x[index].clone() for index in THEIRS], lambda x: torch.stack([x[index] for index in OURS]),
        ),
        layer("attn.w_proj.linear.lora.{0.weight,2.weight,2.bias}", "mixer.decay_proj.{down.weight,up.weight,up.bias}"),
        layer("attn.bonus", "mixer.bonus"),
        layer("attn.g_norm.{weight,bias}", "mixer.norm.{weight,bias}"),
        layer("ffn.{key,receptance}.mu", "channel_mixer.{key,receptance}_mix"),
        layer("ffn.{key,receptance}.linear.weight", "channel_mixer.{key,receptance}.weight"),
        layer("ffn.value.weight", "channel_mixer.value.weight"),
        *RWKV_SHELL,
    ),
    same={
        "mix_rank": "proj_low_rank_dim", "decay_rank": "gate_low_rank_dim", "key_ratio": "expand_k", "value_ratio": "expand_v",
    },
    defaults={
        "num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "norm_eps": 1e-5, "proj_low_rank_dim": 32, "gate_low_rank_dim": 64,
        "hidden_ratio": 3.5, "intermediate_size": None,
    },
    only={"hidden_act": ("sqrelu",), "norm_first": (True,), "norm_bias": (True,)},
    read=read_fla,
    write=write_fla,
    mlp=False,
    trials={
        "plain": {"num_heads": 2, "expand_k": 1.0, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6},
        "narrow": {"num_heads": 4, "proj_low_rank_dim": 3, "gate_low_rank_dim": 5},
        "wide": {"num_heads": 2, "expand_v": 1.5, "proj_low_rank_dim": 4, "gate_low_rank_dim": 6},
    },
)  # fmt: skip


def read_file(shapes: dict) -> dict:
    """The size of the heads and the ranks."""
    attention = "blocks.0.att."
    return {
        "head_dim": shapes[attention + "time_faaaa"][1], "mix_rank": shapes[attention + "time_maa_w2"][1],
        "decay_rank": shapes[attention + "time_decay_w2"][0],
    }  # fmt: skip


ATTENTION, MIXER = BLOCK + "att.", "model.layers.{}.mixer."
FILE = (
    layer("{receptance,key,value,gate,output}.weight", "mixer.{r,k,v,gate,out}_proj.weight", ATTENTION),
    layer("time_faaaa", "mixer.bonus", ATTENTION),
    layer("ln_x.{weight,bias}", "mixer.norm.{weight,bias}", ATTENTION),
    as_vector(ATTENTION + "time_maa_x", MIXER + "mix"),
    *(as_vector(f"{ATTENTION}time_maa_{letter}", name + ".bias") for letter, name in zip("wkvrg", FIVE, strict=True)),
    transpose(ATTENTION + "time_maa_w1", MIXER + "mix_down.weight"),
    low_ranks(
        ATTENTION + "time_maa_w2", [name + ".weight" for name in FIVE],
        lambda x: [part.t().contiguous() for part in x], lambda x: torch.stack([part.t() for part in x]),
    ),
    as_vector(ATTENTION + "time_decay", MIXER + "decay_proj.up.bias"),
    transpose(ATTENTION + "time_decay_w{1,2}", MIXER + "decay_proj.{down,up}.weight"),
    channel_mixes("time_maa"),
)  # fmt: skip
PTH = file_layout("rwkv6", lambda shapes: "blocks.0.att.time_maa_w2" in shapes, read_file, FILE)


register(
    "rwkv6",
    config=RWKV6Config,
    mixer=RWKV6Mixer,
    title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    paper="arXiv:2404.05892",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, head_dim=16, mix_rank=4, decay_rank=8, vocab_size=256),
        "1.6b": dict(hidden_size=2048, num_hidden_layers=24, vocab_size=65536),
        "3b": dict(hidden_size=2560, num_hidden_layers=32, vocab_size=65536),
        "7b": dict(hidden_size=4096, num_hidden_layers=32, mix_rank=64, decay_rank=128, vocab_size=65536),
    },
    layouts=(FLA, PTH),
)

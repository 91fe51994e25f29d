"""QRWKV7: RWKV-7 in the place of a transformer's attention, with its projections, grouped heads and block (RAD-RWKV7).

    r, k, v = W_q x_t, W_k x_t, W_v x_t,    r and k turned by their positions, k and v shared by groups of heads
    w_t = exp(-e^(-1/2) sigmoid(w_0 + W_2 tanh(W_1 x_t))),    a_t = sigmoid(a_0 + A_2 A_1 x_t)
    kappa_t = unit_length(k_t),    k~_t = k_t * (1 - w_t + a_t)
    v_t = lerp(v_t, v_t of the first layer, sigmoid(v_0 + V_2 V_1 x_t))                          after the first layer
    S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T
    y_t = W_o (G_2 sigmoid(G_1 x_t) * (r_t S_t / sqrt(K)))

`native` is RWKV-7 as it is, in the same place: token shift, a bonus for the current token, and instead of the balance
`kappa_t = unit_length(k_t * k_k)`, `k~_t = k_t * (1 + (a_t - 1) * k_a)`; nothing is divided by sqrt(K). So are ARWKV and the
first QRWKV7.

Papers: Goldstein et al. 2025, RADLADS, arXiv:2505.03005, appendix A.2, eq. 17-27; Lin et al. 2025, ARWKV, arXiv:2501.15570.
RWKV-7: Peng et al. 2025, arXiv:2503.14456, section 4.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, derived, read_teacher, write_teacher
from zoo.kernels.packing import Packing
from zoo.layers import LowRank, merge_heads, mixtures, split_heads, token_shift, unit_length, wide
from zoo.layout import Layout, Rule, drop, mapped, rename, transpose
from zoo.mixer import State, Traits
from zoo.radlads import FIELDS, RADMixer, check, rank_of, read_fields, small, write_fields
from zoo.registry import register
from zoo.terms import expect

DECAY = math.exp(-0.5)  # the fastest log-decay of a channel
READERS = "rwkvag"  # what reads a mixture of its own


@strict
class QRWKV7Config(ZooConfig):
    """Heads as the teacher has them, and the parts of RWKV-7 that are kept."""

    model_type = "zoo_qrwkv7"

    num_heads: int = 16
    num_kv_heads: int | None = None  # G, each shared by H / G heads; None: one for each
    rope_theta: float | None = 1000000.0  # base of the rotary angles of r and k; None: no rotary positions
    qkv_bias: bool = True
    native: bool = False  # token shift and bonus as in RWKV-7
    balance: bool = True  # keys are weighed by 1 - w + a; False: RWKV-7's k_k and k_a
    gate: str = "low_rank"  # full, low_rank, or none
    head_norm_eps: float | None = None  # of a norm over each head; None: no norm
    decay_rank: int | None = None  # ranks of None: about 1.8 sqrt(D)
    rate_rank: int | None = None
    value_rank: int | None = None  # about 1.3 sqrt(D)
    gate_rank: int | None = None  # about 0.6 D^0.8

    def validate_heads(self):
        """Heads must divide evenly, and the gate be known."""
        check(self)


class QRWKV7Mixer(RADMixer):
    """State: see `RADMixer`. Carried to later layers: the values of the first, `[B, T, D]`."""

    traits = Traits(carry=True)

    def __init__(self, config: QRWKV7Config, layer: int):
        super().__init__(config, layer)
        width, self.depth, self.balance, self.native = config.hidden_size, config.num_hidden_layers, config.balance, config.native
        self.shifts = config.native
        self.shift_mix = nn.ParameterDict({name: torch.empty(width) for name in self.readers}) if self.shifts else None
        self.r_k = nn.Parameter(torch.empty(self.heads, self.keys)) if config.native else None
        self.k_k = None if config.balance else nn.Parameter(torch.empty(width))
        self.k_a = None if config.balance else nn.Parameter(torch.empty(width))
        self.decay_proj = LowRank(width, rank_of(width, config.decay_rank, 1.8), width, activation=torch.tanh)
        self.rate_proj = LowRank(width, rank_of(width, config.rate_rank, 1.8), width)
        self.residual_proj = LowRank(width, rank_of(width, config.value_rank, 1.3), width) if layer > 0 else None
        self.scale = 1.0 if config.native or self.norm is not None else self.keys**-0.5
        self.reset_parameters()

    @property
    def readers(self) -> str:
        return READERS if self.gate_proj is not None else READERS.removesuffix("g")

    def reset_parameters(self) -> None:
        """No token shift at first, decays from slow to fast; the projections are the teacher's."""
        super().reset_parameters()
        for name in self.readers if self.shifts else ():
            init.zeros_(self.shift_mix[name])
        if self.native:
            init.zeros_(self.r_k)
        if not self.balance:
            init.constant_(self.k_k, 0.85)
            init.ones_(self.k_a)
        for low_rank in (self.decay_proj, self.rate_proj, self.residual_proj):
            if low_rank is not None:
                small(low_rank)
        ramp, rise = torch.linspace(0, 1, self.width), self.layer / max(self.depth - 1, 1)
        init.copy_(self.decay_proj.up.bias, -6.5 + 5 * ramp ** (0.85 + rise**0.5))
        init.zeros_(self.rate_proj.up.bias)
        if self.residual_proj is not None:
            init.ones_(self.residual_proj.up.bias)

    def operator_flops(self, length: int) -> int:
        return 8 * length * self.width * self.keys

    def forward(
        self, x: Tensor, state: State | None = None, packing: Packing | None = None, carry: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        mixed, after = dict.fromkeys(READERS, x), {}
        if self.shifts:
            before, after["shift"] = token_shift(x, state["shift"] if state else None, packing)
            mixed |= zip(self.readers, mixtures(x, before, [self.shift_mix[name] for name in self.readers]), strict=True)
        r, k, v, seen = self.project(mixed["r"], mixed["k"], mixed["v"], state, packing)
        log_decay = split_heads(-DECAY * wide(self.decay_proj(mixed["w"])).sigmoid(), self.heads)
        rate = split_heads(wide(self.rate_proj(mixed["a"])).sigmoid().to(k.dtype), self.heads)
        if carry is None:
            carry = merge_heads(v)
        elif self.residual_proj is not None:
            share = wide(self.residual_proj(mixed["v"])).sigmoid().to(v.dtype)
            v = v + (split_heads(carry, self.heads) - v) * split_heads(share, self.heads)
        if self.balance:
            removal, k = k, k * (rate - torch.expm1(log_decay).to(k.dtype))
        else:
            k_k, k_a = (split_heads(weight, self.heads) for weight in (self.k_k, self.k_a))
            removal, k = k * k_k, k + k * (rate - 1) * k_a
        removal = unit_length(removal, eps=1e-12)
        memory = state["memory"] if state else None
        o, memory = ops.general_delta_rule(
            r, k, v, -removal, removal * rate, log_decay, state=memory, packing=packing, scale=self.scale
        )  # fmt: skip
        y = self.normed(o)
        if self.native:
            y = y + merge_heads((r * k * self.r_k).sum(-1, keepdim=True) * v)
        return self.close(y, mixed["g"]), {"memory": memory} | after | seen, carry


RANKS = {"rate_rank": "lora_rank_iclr", "value_rank": "lora_rank_value_residual_mix"}
FIRST = {"gate_rank_type": 2, "balance_state": False, "groupnorm_att": True}  # the first models, which name none of these


def read_qwen(foreign: dict) -> dict:
    """Our fields for a completed config of RADLADS."""
    return read_fields(foreign) | {own: foreign[name] for own, name in RANKS.items()} | {"native": foreign["native"]}


def write_qwen(config: QRWKV7Config) -> dict:
    """The inverse. The first models say nothing of what distinguishes the later ones."""
    fields = write_fields(config) | {name: getattr(config, own) for own, name in RANKS.items()}
    return {name: value for name, value in fields.items() if name not in FIRST} if config.native else fields


def complete(foreign: dict) -> dict:
    """The config with what it leaves out, and whether it is of the first models."""
    native = "gate_rank_type" not in foreign
    return derived("qwen2", **FIELDS | dict.fromkeys(RANKS.values()) | (FIRST if native else {}))(foreign) | {"native": native}


ARWKV = {"decay_rank": 64, "rate_rank": 64, "value_rank": 32, "gate_rank": 128, "num_kv_heads": None, "rope_theta": None}
ARWKV_FIELDS = {"head_size": 64, "head_size_divisor": 8, "wkv_version": 7, "wkv_has_gate": True, "wkv_has_group_norm": True}


def read_arwkv(foreign: dict) -> dict:
    """Our fields for a completed config of ARWKV, whose ranks are fixed."""
    expect(foreign, wkv_version=7)
    width, size = foreign["hidden_size"], foreign["head_size"]
    if foreign["wkv_layers"] not in (None, "full", list(range(foreign["num_hidden_layers"]))):
        raise ValueError(f"an rwkv_hybrid with wkv_layers={foreign['wkv_layers']!r} is not supported, only wkv_layers of all layers")
    fields = read_teacher(foreign) | ARWKV | {"num_heads": width // size, "qkv_bias": False, "native": True, "balance": False}
    del fields["rope_scaling"]
    eps = 1e-5 * foreign["head_size_divisor"] ** 2 if foreign["wkv_has_group_norm"] else None
    return fields | {"gate": "low_rank" if foreign["wkv_has_gate"] else "none", "head_norm_eps": eps}


def write_arwkv(config: QRWKV7Config) -> dict:
    """The inverse; what it cannot say is noticed by mapping back."""
    divisor = 8 if config.head_norm_eps is None else (config.head_norm_eps / 1e-5) ** 0.5
    return write_teacher(config) | {
        "head_size": config.divide("hidden_size", "num_heads"), "head_size_divisor": round(divisor), "wkv_version": 7,
        "wkv_has_gate": config.gate != "none", "wkv_has_group_norm": config.head_norm_eps is not None, "wkv_layers": None,
    }  # fmt: skip


def rules(config: QRWKV7Config, names: Rule, attention: str) -> tuple[Rule, ...]:
    """Rules for a model; `names` those of its projections, `attention` where its other tensors lie."""
    theirs, ours = f"model.layers.{{}}.{attention}.", "model.layers.{}.mixer."

    def vectors(foreign: str, own: str) -> Rule:
        return mapped(theirs + foreign, ours + own, torch.flatten, lambda x: x[None, None])

    unused = (
        drop(theirs + "{k_k,k_a,r_k}", "keys are balanced, and there is no bonus") if config.balance else vectors("{k_k,k_a}", "{k_k,k_a}")
    )
    bonus = rename(theirs + "r_k", ours + "r_k") if config.native else drop(theirs + "r_k", "there is no bonus")
    return (
        names,
        vectors("x_{r,w,k,v,a,g}", "shift_mix.{r,w,k,v,a,g}"),
        vectors("{w,a,v}0", "{decay,rate,residual}_proj.up.bias"),
        transpose(theirs + "{w,a,v,g}{1,2}", ours + "{decay,rate,residual,gate}_proj.{down,up}.weight"),
        drop(f"model.layers.0.{attention}.v{{0,1,2}}", "the first layer has no earlier values to mix in"),
        drop(theirs + "x_g", "there is no gate to read it"),
        rename(theirs + "gate.weight", ours + "gate_proj.weight"),
        unused,
        bonus,
        rename(theirs + "ln_x.{weight,bias}", ours + "norm.{weight,bias}"),
        *KEPT,
    )  # fmt: skip


RECEPTANCE = rename(
    "model.layers.{}.self_attn.time_mixer.{receptance,key,value,output}.weight", "model.layers.{}.mixer.{q,k,v,out}_proj.weight"
)
LAYOUTS = (
    Layout(
        "rwkv7qwen2", ("rwkv7qwen2",), read_qwen, write_qwen, lambda config: rules(config, PROJECTIONS, "self_attn"),
        complete=complete, classes="RWKV7Qwen2",
        trials={
            "rotary": {"use_rope": True, "gate_rank_type": 2, "lora_rank_gate": 6, "lora_rank_decay": 5, "lora_rank_iclr": 4},
            "normed": {"gate_rank_type": 1, "balance_state": False, "groupnorm_att": True, "num_key_value_heads": 4},
            "first": {"tie_word_embeddings": True, "lora_rank_value_residual_mix": 3},
        },
    ),
    Layout(
        "rwkv_hybrid", ("rwkv_hybrid",), read_arwkv, write_arwkv, lambda config: rules(config, RECEPTANCE, "self_attn.time_mixer"),
        complete=derived("qwen2", wkv_layers=None, **ARWKV_FIELDS), classes="RwkvHybrid",
        trials={"gated": {"head_size": 8}, "plain": {"head_size": 16, "wkv_has_gate": False, "wkv_has_group_norm": False}},
    ),
)  # fmt: skip


register(
    "qrwkv7",
    config=QRWKV7Config,
    mixer=QRWKV7Mixer,
    title="RADLADS: Rapid Attention Distillation to Linear Attention Decoders at Scale (RAD-RWKV7)",
    paper="arXiv:2505.03005, arXiv:2501.15570 (ARWKV)",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, vocab_size=256),
        "7b": dict(
            hidden_size=3584, num_hidden_layers=28, num_heads=28, num_kv_heads=4, intermediate_size=18944, norm_eps=1e-6,
            vocab_size=152064,
        ),
    },
    layouts=LAYOUTS,
)  # fmt: skip

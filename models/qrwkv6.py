"""QRWKV6: RWKV-6 in the place of a transformer's attention, with its projections, grouped heads and block (RAD-RWKV6).

    x'_* = x_t + (x_{t-1} - x_t) * (mu_* + tanh(x''_t A) B_*)    for * in r, k, v, w, g; x''_t = x_t + (x_{t-1} - x_t) * mu_x
    r, k, v = W_q x'_r, W_k x'_k, W_v x'_v,    k and v shared by groups of heads
    w_t = exp(max(-exp(omega + tanh(x'_w C) E), -5)),    k~_t = (1 - w_t) * k_t
    S_t = diag(w_t) S_{t-1} + k~_t v_t^T,    y_t = W_o (sigmoid(W_g x'_g) * (r_t S_t / sqrt(K)))

As much is written as is forgotten, which takes the place of RWKV-6's norm over each head; its bonus is gone.

Paper: Goldstein et al. 2025, RADLADS, arXiv:2505.03005, appendix A.1, eq. 1-14. RWKV-6: Peng et al. 2024, arXiv:2404.05892.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, derived
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import LowRank, split_heads, token_shift, wide
from zoo.layout import Layout, Pattern, Rule, mapped, rename, transpose
from zoo.mixer import State
from zoo.radlads import FIELDS, RADMixer, check, rank_of, read_fields, write_fields
from zoo.registry import register

FASTEST = 5.0  # the largest decay of one step, as a logarithm
READERS = "rkvwg"  # what reads a mixture of its own, in the order of the low-rank maps


@strict
class QRWKV6Config(ZooConfig):
    """Heads as the teacher has them, and the parts of RWKV-6 that are kept."""

    model_type = "zoo_qrwkv6"

    num_heads: int = 16
    num_kv_heads: int | None = None  # G, each shared by H / G heads; None: one for each
    rope_theta: float | None = None  # base of the rotary angles of r and k; None: no rotary positions
    qkv_bias: bool = True
    token_shift: bool = True  # each projection reads its own mixture of a token and the one before
    balance: bool = True  # keys are weighed by 1 - w
    gate: str = "full"  # full, low_rank, or none
    head_norm_eps: float | None = None  # of a norm over each head; None: no norm
    mix_rank: int | None = None  # of each token shift; ranks of None: about 1.8 sqrt(D), the gate's 0.6 D^0.8
    decay_rank: int | None = None
    gate_rank: int | None = None

    def validate_heads(self):
        """Heads must divide evenly, and the gate be known."""
        check(self)


class QRWKV6Mixer(RADMixer):
    """State: see `RADMixer`."""

    def __init__(self, config: QRWKV6Config, layer: int):
        super().__init__(config, layer)
        width, self.depth, self.shifts, self.balance = config.hidden_size, config.num_hidden_layers, config.token_shift, config.balance
        self.mix = self.mix_down = self.mix_up = None
        if self.shifts:
            rank = rank_of(width, config.mix_rank, 1.8)
            self.mix = nn.Parameter(torch.empty(width))
            self.mix_down = nn.Linear(width, len(READERS) * rank, bias=False)
            self.mix_up = nn.ModuleList(nn.Linear(rank, width) for _ in READERS)  # biases are mu
        self.decay_proj = LowRank(width, rank_of(width, config.decay_rank, 1.8), width, activation=torch.tanh)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No token shift at first, decays from slow to fast; the projections are the teacher's."""
        super().reset_parameters()
        if self.shifts:
            init.ones_(self.mix)
            init.zeros_(self.mix_down.weight)
            for up in self.mix_up:
                init.zeros_(up.bias)
                init.uniform_(up.weight, -0.01, 0.01)
        ramp, rise = torch.linspace(0, 1, self.width), self.layer / max(self.depth - 1, 1)
        init.zeros_(self.decay_proj.down.weight)
        init.uniform_(self.decay_proj.up.weight, -0.01, 0.01)
        init.copy_(self.decay_proj.up.bias, -6 + 5 * ramp ** (0.7 + 1.3 * rise))

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        mixtures, after = [x] * len(READERS), {}
        if self.shifts:
            before, after["shift"] = token_shift(x, state["shift"] if state else None, packing)
            back = before - x
            ranks = torch.tanh(self.mix_down(x + back * self.mix)).chunk(len(READERS), dim=-1)
            mixtures = [x + back * up(low) for up, low in zip(self.mix_up, ranks, strict=True)]
        xr, xk, xv, xw, xg = mixtures
        r, k, v, seen = self.project(xr, xk, xv, state, packing)
        # bounded before exp, so that no gradient is lost in an overflow
        log_decay = -split_heads(wide(self.decay_proj(xw)).clamp(max=math.log(FASTEST)).exp(), self.heads)
        if self.balance:
            k = k * -torch.expm1(log_decay).to(k.dtype)
        o, memory = ops.linear_attention(r, k, v, log_decay, state=state["memory"] if state else None, packing=packing)
        return self.close(self.normed(o), xg), {"memory": memory} | after | seen


OLD_RANKS = {"lora_rank_tokenshift": (32, 64), "lora_rank_decay": (64, 128)}  # where a config has no such field: below width 4096, above


def complete(foreign: dict) -> dict:
    """The config with what it leaves out; the first models have fixed ranks and name none."""
    ranks = {name: small if foreign.get("hidden_size", 4096) < 4096 else large for name, (small, large) in OLD_RANKS.items()}
    return derived("qwen2", **FIELDS | {"gate_rank_type": 1, "use_tokenshift": True} | ranks)(foreign)


def vector(foreign: str, own: str) -> Rule:
    """A vector of a layer, stored as `[1, 1, D]`."""
    return mapped(ATTENTION + foreign, MIXER + own, torch.flatten, lambda x: x[None, None])


ATTENTION, MIXER = "model.layers.{}.self_attn.", "model.layers.{}.mixer."
LAYOUT = Layout(
    "rwkv6qwen2",
    ("rwkv6qwen2",),
    lambda foreign: read_fields(foreign) | {"token_shift": bool(foreign["use_tokenshift"]), "mix_rank": foreign["lora_rank_tokenshift"]},
    lambda config: write_fields(config) | {"use_tokenshift": config.token_shift, "lora_rank_tokenshift": config.mix_rank},
    complete=complete,
    classes="RWKV6Qwen2",
    trials={
        "rotary": {"use_rope": True, "lora_rank_tokenshift": 4, "lora_rank_decay": 6},
        "normed": {"gate_rank_type": 2, "lora_rank_gate": 6, "groupnorm_att": True, "use_tokenshift": False, "tie_word_embeddings": True},
        "plain": {"gate_rank_type": 0, "balance_state": False, "num_key_value_heads": 4, "attention_bias": False},
    },
    rules=(
        PROJECTIONS,
        vector("time_maa_x", "mix"),
        *(vector(f"time_maa_{reader}", f"mix_up.{index}.bias") for index, reader in enumerate(READERS)),
        transpose(ATTENTION + "time_maa_w1", MIXER + "mix_down.weight"),
        Rule(
            (Pattern(ATTENTION + "time_maa_w2"),),
            tuple(Pattern(f"{MIXER}mix_up.{index}.weight") for index in range(len(READERS))),
            lambda x, shapes, config: [part.t().contiguous() for part in x[0]],
            lambda x, config: [torch.stack([part.t() for part in x])],
        ),
        vector("time_decay", "decay_proj.up.bias"),
        transpose(ATTENTION + "time_decay_w{1,2}", MIXER + "decay_proj.{down,up}.weight"),
        rename(ATTENTION + "gate.weight", MIXER + "gate_proj.weight"),
        transpose(ATTENTION + "g{1,2}", MIXER + "gate_proj.{down,up}.weight"),
        rename(ATTENTION + "ln_x.{weight,bias}", MIXER + "norm.{weight,bias}"),
        *KEPT,
    ),
)  # fmt: skip


register(
    "qrwkv6",
    config=QRWKV6Config,
    mixer=QRWKV6Mixer,
    title="RADLADS: Rapid Attention Distillation to Linear Attention Decoders at Scale (RAD-RWKV6)",
    paper="arXiv:2505.03005",
    presets={
        "tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, mix_rank=4, decay_rank=8, rope_theta=1e4, vocab_size=256,
        ),
        "7b": dict(
            hidden_size=3584, num_hidden_layers=28, num_heads=28, num_kv_heads=4, intermediate_size=18944, norm_eps=1e-6,
            vocab_size=152064,
        ),
        "32b": dict(
            hidden_size=5120, num_hidden_layers=64, num_heads=40, num_kv_heads=8, intermediate_size=27648, norm_eps=1e-6,
            mix_rank=64, decay_rank=128, vocab_size=152064,
        ),
    },
    layouts=(LAYOUT,),
)  # fmt: skip

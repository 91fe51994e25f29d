"""RWKV-7 "Goose": a matrix memory whose decay, erasure and writing are each set channel by channel.

    S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k~_t v_t^T,    o_t = r_t S_t
    w_t = exp(-e^(-1/2) sigmoid(w_0 + W_2 tanh(W_1 x_t))),    a_t = sigmoid(a_0 + A_2 A_1 x_t)
    kappa_t = unit_length(k_t * k_k),    k~_t = k_t * (1 + (a_t - 1) * k_a)
    v_t = lerp(v_t, v_t of the first layer, sigmoid(v_0 + V_2 V_1 x_t))                          after the first layer
    y_t = W_O (G_2 sigmoid(G_1 x_t) * (groupnorm(o_t) + (r_t . (r_k * k~_t)) v_t))

Each projection reads its own mixture of a token and the token before it.

Paper: Peng et al. 2025, arXiv:2503.14456: time mixing in section 4, initialisation as in the authors' training code.
"""

import math
from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import RWKV_SHELL, fla_layout, layer, rounded_up
from zoo.kernels.checks import accumulator
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, LowRank, merge_heads, mixtures, orthogonal, split_heads, token_shift, unit_length, wide
from zoo.layout import drop, transpose
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register
from zoo.rwkv import BLOCK, as_vector, file_layout

DECAY = math.exp(-0.5)  # the fastest log-decay of a channel
SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # what reads a mixture -> exponent at initialisation


@strict
class RWKV7Config(ZooConfig):
    """Size of the heads, and ranks of the four low-rank maps; ranks of None follow the authors' rule."""

    model_type = "zoo_rwkv7"

    vocab_size: int = 65536
    norm: str = "layernorm"
    embedding_norm: bool = True
    channel_mixer: str | None = "rwkv"
    channel_args: dict | None = field(default_factory=lambda: {"receptance": False, "mix_back": True})
    head_dim: int = 64  # K = V = D / H
    decay_rank: int | None = None  # about 1.8 sqrt(D)
    rate_rank: int | None = None  # about 1.8 sqrt(D)
    value_rank: int | None = None  # about 1.3 sqrt(D)
    gate_rank: int | None = None  # about 0.6 D^0.8

    def validate_heads(self):
        """Heads must divide the width."""
        self.divide("hidden_size", "head_dim")

    def rank(self, name: str, factor: float, power: float = 0.5) -> int:
        """The rank given, or `factor D^power` as a multiple of 32."""
        return getattr(self, name) or max(32, round(factor * self.hidden_size**power / 32) * 32)


class RWKV7Mixer(Mixer):
    """State: `memory` `[B, H, K, K]`, and `shift` `[B, 1, D]`, the last token. Carries the first layer's value `[B, T, D]`."""

    traits = Traits(carry=True)
    lora_targets = ("r_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__(config, layer)
        self.width, self.keys, self.layers = config.hidden_size, config.head_dim, config.num_hidden_layers
        width, self.heads = self.width, self.width // self.keys
        self.shift_mix = nn.ParameterDict({name: torch.empty(width) for name in SHIFTS})
        self.k_k = nn.Parameter(torch.empty(width))
        self.k_a = nn.Parameter(torch.empty(width))
        self.r_k = nn.Parameter(torch.empty(self.heads, self.keys))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.decay_proj = LowRank(width, config.rank("decay_rank", 1.8), width, activation=torch.tanh)
        self.rate_proj = LowRank(width, config.rank("rate_rank", 1.8), width)
        self.residual_proj = LowRank(width, config.rank("value_rank", 1.3), width) if layer > 0 else None
        self.gate_proj = LowRank(width, config.rank("gate_rank", 0.6, 0.8), width, activation=torch.sigmoid, bias=False)
        self.norm = GatedNorm(width, groups=self.heads, kind="layer", eps=self.keys * config.norm_eps, bias=True)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channel = torch.arange(self.width, device=self.k_k.device, dtype=torch.float32)
        depth, left = self.layer / max(1, self.layers - 1), 1 - self.layer / self.layers
        line = channel / max(1, self.width - 1) - 0.5
        zigzag = 2 * (channel % self.keys) / max(1, self.keys - 1) - 1  # from -1 to 1 within each head
        zigzag = zigzag * zigzag.abs()
        for name, power in SHIFTS.items():
            init.copy_(self.shift_mix[name], 1 - (channel / self.width) ** (power * left))
        init.copy_(self.k_k, 0.71 - 0.1 * line)
        init.constant_(self.k_a, 1.02)
        init.constant_(self.r_k, -0.04)
        init.constant_(self.norm.weight, ((self.layer + 1) / self.layers) ** 0.7)
        for projection, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            orthogonal(projection.weight, gain)
        init.zeros_(self.out_proj.weight)
        for low_rank in (self.decay_proj, self.rate_proj, self.residual_proj, self.gate_proj):
            if low_rank is not None:
                init.zeros_(low_rank.down.weight)
                orthogonal(low_rank.up.weight, 0.1)
        init.copy_(self.decay_proj.up.bias, 6 * (line + 0.5) ** (1 + depth**0.3) - 5.5 + 2.5 * zigzag)
        init.copy_(self.rate_proj.up.bias, 0.3 * zigzag + 0.4 * line - 0.19)
        if self.residual_proj is not None:
            init.copy_(self.residual_proj.up.bias, 0.73 - 0.4 * line)

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        return super().roles() | {"q_proj": ("r_proj", [slice(None)])}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {
            "memory": torch.zeros(batch, self.heads, self.keys, self.keys, dtype=accumulator(dtype), device=device),
            "shift": torch.zeros(batch, 1, self.width, dtype=dtype, device=device),
        }

    def operator_flops(self, length: int) -> int:
        return 8 * length * self.width * self.keys

    def forward(
        self, x: Tensor, state: State | None = None, packing: Packing | None = None, carry: Tensor | None = None
    ) -> tuple[Tensor, State, Tensor]:
        before, shift = token_shift(x, state["shift"] if state else None, packing)
        xr, xw, xk, xv, xa, xg = mixtures(x, before, [self.shift_mix[name] for name in SHIFTS])
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        decay, rate, gate = self.decay_proj(xw), self.rate_proj(xa), self.gate_proj(xg)
        log_decay, rate = -DECAY * wide(decay).sigmoid(), rate.sigmoid()
        if carry is None:
            carry = v
        elif self.residual_proj is not None:
            v = torch.lerp(v, carry, self.residual_proj(xv).sigmoid())
        removal, k = k * self.k_k.to(k.dtype), torch.addcmul(k, k * (rate - 1), self.k_a.to(k.dtype))
        r, k, v, rate, removal, log_decay = (split_heads(t, self.heads) for t in (r, k, v, rate, removal, log_decay))
        removal = unit_length(removal, eps=1e-12)
        o, memory = ops.general_delta_rule(
            r, k, v, -removal, removal * rate, log_decay, state=state["memory"] if state else None, packing=packing, scale=1.0
        )
        seen = split_heads(self.norm(merge_heads(o)), self.heads)
        y = merge_heads(torch.addcmul(seen, (r * k * self.r_k).sum(-1, keepdim=True), v))
        return self.out_proj(gate * y), {"memory": memory, "shift": shift}, carry


def read_fla(foreign: dict) -> dict:
    """Further fields for a config of flash-linear-attention, which names the size of the heads or their number."""
    width, values = foreign["hidden_size"], foreign["value_dim"]
    if values not in (None, width, [width] * foreign["num_hidden_layers"]):
        raise ValueError(f"an rwkv7 with value_dim={values} other than hidden_size={width} is not supported")
    inner = foreign["intermediate_size"] or rounded_up(width * (foreign["hidden_ratio"] or 4), 32)
    return {"head_dim": foreign["head_dim"] or width // foreign["num_heads"], "intermediate_size": inner}


def write_fla(config: RWKV7Config) -> dict:
    """The inverse, with the ranks and the width that our rules give."""
    return {
        "head_dim": config.head_dim, "num_heads": config.hidden_size // config.head_dim,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "decay_low_rank_dim": config.rank("decay_rank", 1.8), "a_low_rank_dim": config.rank("rate_rank", 1.8),
        "v_low_rank_dim": config.rank("value_rank", 1.3), "gate_low_rank_dim": config.rank("gate_rank", 0.6, 0.8),
    }  # fmt: skip


LORA = "{0.weight,2.weight,2.bias}", "{down.weight,up.weight,up.bias}"
FLA = fla_layout(
    "rwkv7",
    "RWKV7",
    (
        layer("attn.{r,k,v,o}_proj.weight", "mixer.{r,k,v,out}_proj.weight"),
        as_vector("model.layers.{}.attn.x_{r,w,k,v,a,g}", "model.layers.{}.mixer.shift_mix.{r,w,k,v,a,g}"),
        layer("attn.{k_k,k_a,r_k}", "mixer.{k_k,k_a,r_k}"),
        layer(f"attn.{{w,a,v,g}}_lora.lora.{LORA[0]}", f"mixer.{{decay,rate,residual,gate}}_proj.{LORA[1]}"),
        layer("attn.g_norm.{weight,bias}", "mixer.norm.{weight,bias}"),
        layer("ffn.x_k", "channel_mixer.key_mix"),
        layer("ffn.{key,value}.weight", "channel_mixer.{key,value}.weight"),
        *RWKV_SHELL,
    ),
    same={
        "decay_rank": "decay_low_rank_dim", "rate_rank": "a_low_rank_dim", "value_rank": "v_low_rank_dim",
        "gate_rank": "gate_low_rank_dim",
    },
    defaults={
        "head_dim": 64, "num_heads": None, "value_dim": None, "norm_eps": 1e-5, "hidden_ratio": 4, "intermediate_size": None,
        "decay_low_rank_dim": 64, "a_low_rank_dim": 64, "v_low_rank_dim": 16, "gate_low_rank_dim": 128,
    },
    only={"hidden_act": ("sqrelu",), "norm_first": (True,), "norm_bias": (True,)},
    read=read_fla,
    write=write_fla,
    mlp=False,
)  # fmt: skip


def read_file(shapes: dict) -> dict:
    """The size of the heads and the ranks."""
    ranks = {"decay_rank": "w2", "rate_rank": "a2", "value_rank": "v2", "gate_rank": "g2"}
    fields = {own: next((s[0] for n, s in shapes.items() if n.endswith(f".att.{name}")), None) for own, name in ranks.items()}
    return fields | {"head_dim": shapes["blocks.0.att.r_k"][1]}


ATTENTION, MIXER = BLOCK + "att.", "model.layers.{}.mixer."
FILE = (
    layer("{receptance,key,value,output}.weight", "mixer.{r,k,v,out}_proj.weight", ATTENTION),
    layer("ln_x.{weight,bias}", "mixer.norm.{weight,bias}", ATTENTION),
    as_vector(ATTENTION + "x_{r,w,k,v,a,g}", MIXER + "shift_mix.{r,w,k,v,a,g}"),
    as_vector(ATTENTION + "{k_k,k_a}", MIXER + "{k_k,k_a}"),
    layer("r_k", "mixer.r_k", ATTENTION),
    as_vector(ATTENTION + "{w,a,v}0", MIXER + "{decay,rate,residual}_proj.up.bias"),
    transpose(ATTENTION + "{w,a,v,g}{1,2}", MIXER + "{decay,rate,residual,gate}_proj.{down,up}.weight"),
    drop("blocks.0.att.v{0,1,2}", "the first layer has no earlier values to mix in"),
    as_vector(BLOCK + "ffn.x_k", "model.layers.{}.channel_mixer.key_mix"),
)
PTH = file_layout("rwkv7", lambda shapes: "blocks.0.att.x_a" in shapes, read_file, FILE)


register(
    "rwkv7",
    config=RWKV7Config,
    mixer=RWKV7Mixer,
    title='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
    paper="arXiv:2503.14456",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, head_dim=16, vocab_size=256),
        "191m": dict(hidden_size=768, num_hidden_layers=12),
        "450m": dict(hidden_size=1024, num_hidden_layers=24, gate_rank=128),
        "1.5b": dict(hidden_size=2048, num_hidden_layers=24),
        "2.9b": dict(hidden_size=2560, num_hidden_layers=32),
    },
    layouts=(FLA, PTH),
)

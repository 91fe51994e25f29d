"""RWKV-5 (Eagle): linear attention that decays at a learned rate per channel, with a bonus for the current token.

    x'_* = x_{t-1} + (x_t - x_{t-1}) * mu_*    for * in r, k, v, g
    r, k, v, g = W_r x'_r, W_k x'_k, W_v x'_v, silu(W_g x'_g)
    S_t = diag(w) S_{t-1} + k_t v_t^T,    o_t = r_t (S_{t-1} + diag(u) k_t v_t^T),    w = exp(-exp(omega))
    y_t = (g_t * groupnorm_h(o_t)) W_O

Paper: Peng et al. 2024, arXiv:2404.05892, section 4.1; initialisation as in the authors' training code. It describes version 5.2.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import layer
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, merge_heads, split_heads, token_shift, wide
from zoo.mixer import Mixer, State
from zoo.registry import register
from zoo.rwkv import BLOCK, as_vector, channel_mixes, file_layout, initial_bonus, initial_decay

EPS = 64e-5  # of the norm over each head: 1e-5 for heads divided by 8


@strict
class RWKV5Config(ZooConfig):
    """The size of the heads."""

    model_type = "zoo_rwkv5"

    vocab_size: int = 65536
    channel_mixer: str | None = "rwkv"
    norm: str = "layernorm"
    embedding_norm: bool = True

    head_dim: int = 64  # K = V; H = D / K

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None and self.channel_mixer == "rwkv":
            self.intermediate_size = int(self.hidden_size * 3.5) // 32 * 32
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly."""
        self.divide("hidden_size", "head_dim")


class RWKV5Mixer(Mixer):
    """State: `shift` `[B, 1, D]`, the last token, and `memory` `[B, H, K, K]`."""

    lora_targets = ("r_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: RWKV5Config, layer: int):
        super().__init__(config, layer)
        width, self.keys = config.hidden_size, config.head_dim
        self.width, self.heads, self.depth = width, config.divide("hidden_size", "head_dim"), config.num_hidden_layers
        self.shift_mix = nn.ParameterDict({name: torch.empty(width) for name in "rkvg"})
        self.decay = nn.Parameter(torch.empty(self.heads, self.keys))  # omega
        self.bonus = nn.Parameter(torch.empty(self.heads, self.keys))  # u
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.norm = GatedNorm(width, groups=self.heads, kind="layer", eps=EPS, bias=True)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors start: channels ordered from those that look back to those that do not, from slow decay to fast."""
        rise, fall = self.layer / max(self.depth - 1, 1), 1 - self.layer / self.depth
        share = torch.arange(self.width) / self.width
        for name, power in {"r": 0.5, "k": 1.0, "v": 1.0, "g": 0.5}.items():
            init.copy_(self.shift_mix[name], share ** (power * fall) + (0.3 * rise if name == "v" else 0.0))
        init.copy_(self.decay, initial_decay(self.width, self.layer, self.depth).view(self.heads, self.keys))
        init.copy_(self.bonus, initial_bonus(self.width, self.layer, self.depth).view(self.heads, self.keys))

    def roles(self) -> dict[str, tuple[str, list[slice]]]:
        return super().roles() | {"q_proj": ("r_proj", [slice(None)])}

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.keys, dtype=accumulator(dtype), device=device)
        return {"shift": torch.zeros(batch, 1, self.width, dtype=dtype, device=device), "memory": memory}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        before, shift = token_shift(x, state["shift"] if state else None, packing)
        for_r, for_k, for_v, for_gate = (before + (x - before) * self.shift_mix[name] for name in "rkvg")
        r, k, v = (split_heads(t, self.heads) for t in (self.r_proj(for_r), self.k_proj(for_k), self.v_proj(for_v)))
        log_decay = -wide(self.decay).exp().expand(r.shape)
        memory = state["memory"] if state else None
        o, memory = ops.linear_attention(r, k, v, log_decay, bonus=self.bonus, scale=1.0, state=memory, packing=packing)
        return self.out_proj(self.norm(merge_heads(o), self.gate_proj(for_gate))), {"shift": shift, "memory": memory}


def is_file(shapes: dict) -> bool:
    """Whether these are the tensors of this version: the one before has no norm over the heads, the next none of these mixes."""
    return "blocks.0.att.time_mix_k" in shapes and "blocks.0.att.ln_x.weight" in shapes


def read_file(shapes: dict) -> dict:
    """The size of the heads, if this is version 5.2."""
    if "blocks.0.att.gate.weight" not in shapes:
        raise ValueError("this is a file of RWKV-5.0, which has no gate; only RWKV-5.2 is supported")
    heads, *channels = shapes["blocks.0.att.time_decay"]
    if channels in ([], [1]):
        raise ValueError(f"this is a file of RWKV-5.1, whose {heads} heads decay as a whole; only RWKV-5.2 is supported")
    return {"head_dim": channels[0]}


ATTENTION = BLOCK + "att."
RULES = (
    as_vector(ATTENTION + "time_mix_{r,k,v,g}", "model.layers.{}.mixer.shift_mix.{r,k,v,g}"),
    layer("time_{decay,faaaa}", "mixer.{decay,bonus}", ATTENTION),
    layer("{receptance,key,value,gate,output}.weight", "mixer.{r,k,v,gate,out}_proj.weight", ATTENTION),
    layer("ln_x.{weight,bias}", "mixer.norm.{weight,bias}", ATTENTION),
    channel_mixes("time_mix"),
)


register(
    "rwkv5",
    config=RWKV5Config,
    mixer=RWKV5Mixer,
    title="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    paper="arXiv:2404.05892",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, head_dim=16, vocab_size=256),
        "0.4b": dict(hidden_size=1024, num_hidden_layers=24),
        "1.5b": dict(hidden_size=2048, num_hidden_layers=24),
        "3b": dict(hidden_size=2560, num_hidden_layers=32),
        "7b": dict(hidden_size=4096, num_hidden_layers=32),
    },
    layouts=(file_layout("rwkv5", is_file, read_file, RULES),),
)

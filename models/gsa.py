"""Gated Slot Attention: softmax attention to a fixed number of slots, whose keys and values forget slot by slot.

    K_t = diag(alpha_t) K_{t-1} + (1 - alpha_t) phi(k_t)^T,    V_t = diag(alpha_t) V_{t-1} + (1 - alpha_t) swish(v_t)^T
    o_t = softmax(phi(q_t) K_t^T) V_t,    alpha_t = sigmoid(W_alpha x_t)^(1 / tau),    y_t = rmsnorm(swish(o_t)) W_O

K `[M, K]` and V `[M, V]` are the slots of one head. Both passes are linear attention: the first with slots in the place of values,
which therefore decay, the second with slots in the place of keys. phi is swish, relu, or relu of a learned map.

Paper: Zhang, Yang, Zhu, Zhang, Cui, Wang, Wang, Shi, Wang, Bi, Zhou, Fu 2024, arXiv:2409.07146. The learned map is that of
arXiv:2103.13076.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import ZooConfig
from zoo.fla import CONVOLUTION, GATED_MLP, SHELL, convolutions, fla_layout, layer, read_convolution, write_convolution
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, ShortConv, convolve_together, merge_heads, projected_sizes, slot_attention, split_heads, wide
from zoo.mixer import Mixer, State
from zoo.registry import register

FEATURE_MAPS = ("silu", "relu", "learned")


@strict
class GSAConfig(ZooConfig):
    """Slots and heads, and where published models differ."""

    model_type = "zoo_gsa"

    num_heads: int = 4  # H
    num_kv_heads: int | None = None  # G, each with its slots shared by H / G query heads; None: one for each
    key_ratio: float = 1.0  # K = D * key_ratio / H
    value_ratio: float = 1.0  # V = D * value_ratio / H
    num_slots: int = 64  # M
    gate_temperature: float = 8.0  # tau; larger forgets slower
    feature_map: str = "silu"  # phi: silu, relu, or learned, which is the relu of a linear map of each head's channels
    conv_kernel: int | None = None  # W, tokens the short convolution of q, k and v sees; None or 0: no convolution
    out_norm_eps: float = 1e-5  # of the norm of the output

    def validate_heads(self):
        """Heads must divide evenly, and there must be slots."""
        projected_sizes(self)
        if self.num_slots < 1:
            raise ValueError(f"GSAConfig: num_slots is {self.num_slots}, it must be positive")

    def validate_feature_map(self):
        """The feature map must be known."""
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"GSAConfig: feature_map {self.feature_map!r} is unknown; choose one of {', '.join(FEATURE_MAPS)}")


class GSAMixer(Mixer):
    """State: `slot_keys` `[B, H, K, M]`, `slot_values` `[B, H, M, V]`, and with a convolution `conv`, its last inputs."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "slot_proj", "out_proj")

    def __init__(self, config: GSAConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups = config.hidden_size, config.num_heads, config.num_kv_heads or config.num_heads
        self.slots, self.temperature = config.num_slots, config.gate_temperature
        sizes = q, k, v = projected_sizes(config)
        self.keys, self.values = q // self.heads, v // self.groups
        self.q_proj = nn.Linear(width, q, bias=False)
        self.k_proj = nn.Linear(width, k, bias=False)
        self.v_proj = nn.Linear(width, v, bias=False)
        self.conv = ShortConv(sum(sizes), config.conv_kernel) if config.conv_kernel else None
        self.features = nn.Linear(self.keys, self.keys, bias=False) if config.feature_map == "learned" else nn.Identity()
        self.activation = F.silu if config.feature_map == "silu" else F.relu
        self.slot_proj = nn.Linear(width, self.groups * self.slots, bias=False)
        self.norm = RMSNorm(self.heads * self.values, config.out_norm_eps)
        self.out_proj = nn.Linear(self.heads * self.values, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        def zeros(*sizes: int) -> Tensor:
            return torch.zeros(batch, self.heads, *sizes, dtype=accumulator(dtype), device=device)

        state = {"slot_keys": zeros(self.keys, self.slots), "slot_values": zeros(self.slots, self.values)}
        return state if self.conv is None else state | {"conv": self.conv.initial_state(batch, dtype, device)}

    def operator_flops(self, length: int) -> int:
        maps = 0 if isinstance(self.features, nn.Identity) else (self.heads + self.groups - 1) * self.keys**2  # it is used per head
        return 2 * length * maps + flops(length, self.heads, self.keys + self.values, self.slots)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        parts, after = (self.q_proj(x), self.k_proj(x), self.v_proj(x)), {}
        if self.conv is not None:
            parts, after = convolve_together(parts, self.conv, state, packing)
        q, k, v = (split_heads(part, heads) for part, heads in zip(parts, (self.heads, self.groups, self.groups), strict=True))
        q, k, v = self.activation(self.features(q)), self.activation(self.features(k)), F.silu(v)
        log_decay = split_heads(F.logsigmoid(wide(self.slot_proj(x))) / self.temperature, self.groups)
        o, slots = slot_attention(q, k, v, log_decay, state, packing)
        return self.out_proj(self.norm(F.silu(merge_heads(o)))), after | slots


MAPS = {"swish": "silu", "relu": "relu", "t2r": "learned"}  # theirs -> ours


def read_gsa(foreign: dict) -> dict:
    """Our fields for what has no field of the same meaning; the norm of the output keeps its epsilon whatever the config says."""
    if foreign["feature_map"] not in MAPS:
        raise ValueError(f"a gsa with feature_map={foreign['feature_map']!r} is not supported, only {', '.join(MAPS)}")
    slots = foreign["num_slots"] or round(foreign["hidden_size"] * foreign["expand_k"]) // foreign["num_heads"]
    return {"num_slots": slots, "feature_map": MAPS[foreign["feature_map"]], "out_norm_eps": 1e-5} | read_convolution(foreign)


def write_gsa(config: GSAConfig) -> dict:
    """The inverse."""
    name = {own: theirs for theirs, own in MAPS.items()}[config.feature_map]
    return {"num_slots": config.num_slots, "feature_map": name} | write_convolution(config)


LAYOUTS = (
    fla_layout(
        "gsa",
        "GSA",
        (
            layer("attn.{q,k,v,f,o}_proj.weight", "mixer.{q,k,v,slot,out}_proj.weight"),
            layer("attn.feature_map.layer.weight", "mixer.features.weight"),
            layer("attn.g_norm.weight", "mixer.norm.weight"),
            convolutions(projected_sizes),
            *GATED_MLP,
            *SHELL,
        ),
        same={
            "num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "key_ratio": "expand_k", "value_ratio": "expand_v",
            "gate_temperature": "gate_logit_normalizer",
        },
        defaults={
            "num_heads": 4, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 1.0, "num_slots": 64, "feature_map": "swish",
            "gate_logit_normalizer": 8.0,
        } | CONVOLUTION | {"use_short_conv": False},
        only={"expand_v": (1.0,), "clamp_min": (None,), "clamp_max": (None,), "elementwise_affine": (True,)},
        read=read_gsa,
        write=write_gsa,
        trials={
            "grouped": {"num_heads": 4, "num_kv_heads": 2, "num_slots": 6, "expand_k": 0.5},
            "convolved": {"num_heads": 2, "feature_map": "t2r", "use_short_conv": True, "conv_size": 3, "num_slots": 5},
        },
    ),
)  # fmt: skip


register(
    "gsa",
    config=GSAConfig,
    mixer=GSAMixer,
    title="Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
    paper="arXiv:2409.07146",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, num_slots=8, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
        "7b": dict(hidden_size=4096, num_hidden_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336),
    },
    layouts=LAYOUTS,
)

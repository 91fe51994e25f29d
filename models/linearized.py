"""Linear attention in the place of a transformer's: its projections and positions, and a choice of features, decay and normaliser.

    S_t = D_t S_{t-1} + phi_k(k_t) v_t^T,    o_t = phi_q(q_t) S_t / (phi_q(q_t) . z_t),    z like S for values of one
    D_t = 1, gamma_h, sigmoid(W x_t)^(1/16), or that for each feature

Queries and keys may pass a short convolution; they turn by their positions before the features or behind them. Behind them weights have
either sign: a norm over each head then takes the place of z. What this makes:

    Hedgehog    features learned to mimic softmax, read at turned queries and keys               arXiv:2402.04347
    SUPRA       relu features that queries and keys share, turned afterwards, gamma_h, a norm    arXiv:2405.06640
    LAWCAT      convolved queries and keys that do not turn, a decay for each feature            arXiv:2509.18467
    Lizard      Hedgehog's features, a scalar decay, no positions                                arXiv:2507.09025
    HALO        queries and keys as they are, turned, gamma_h, a norm                            arXiv:2601.22156

gamma_h = 1 - 2^(-5 - h) is RetNet's (arXiv:2307.08621, eq. 8), the other decays are GLA's (arXiv:2312.06635, section 4.4).
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import (
    HedgehogFeatures,
    LowRank,
    ReluFeatures,
    RMSNorm,
    ShortConv,
    check_rope_scaling,
    merge_heads,
    rotary_table,
    rotate,
    split_heads,
    token_positions,
    wide,
)
from zoo.mixer import Mixer, State
from zoo.registry import register

FEATURES = {"identity": 1, "relu": 1, "shared_relu": 1, "hedgehog": 2}  # a channel
DECAYS = ("none", "fixed", "scalar", "channel")
RANK = 16  # of the projection of a decay for each feature


@strict
class LinearizedConfig(ZooConfig):
    """Heads and positions as the teacher has them, and the choices."""

    model_type = "zoo_linearized"

    num_heads: int = 16
    num_kv_heads: int | None = None  # G, each with its decays shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float | None = 10000.0  # base of the rotary angles; None: no rotary positions
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    rope_last: bool = False  # features turn, instead of what they are made of
    qkv_bias: bool = False
    feature_map: str = "hedgehog"  # hedgehog, relu (of a learned map, shared_relu: the same for q and k), or identity
    decay: str = "none"  # none, fixed, scalar (one of a head's, from the token), or channel (one for each feature)
    conv_kernel: int | None = None  # W, tokens that the short convolution of q and k sees; None: no convolution
    head_norm: bool = False  # an RMSNorm over each head of the output instead of the sum of weights

    def validate_heads(self):
        """Heads must divide evenly, and turn where they have positions."""
        keys = self.head_dim or self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")
        if self.rope_theta is not None and keys % 2:
            raise ValueError(f"LinearizedConfig: head_dim={keys}; rotation needs an even number of channels")

    def validate_choices(self):
        """Features and decay must be known, and weights that are summed up non-negative."""
        if self.feature_map not in FEATURES:
            raise ValueError(f"LinearizedConfig: feature_map {self.feature_map!r} is unknown; choose one of {', '.join(FEATURES)}")
        if self.decay not in DECAYS:
            raise ValueError(f"LinearizedConfig: decay {self.decay!r} is unknown; choose one of {', '.join(DECAYS)}")
        if not self.head_norm and (self.feature_map == "identity" or (self.rope_last and self.rope_theta is not None)):
            raise ValueError("LinearizedConfig: features that may be negative give weights of either sign; set head_norm=True")
        if self.rope_last and FEATURES[self.feature_map] > 1:
            raise ValueError(f"LinearizedConfig: rope_last turns as many features as there are channels, not those of {self.feature_map!r}")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class LinearizedMixer(Mixer):
    """State: `memory` `[B, H, F, V + 1]`, F features of a key, the last channel being z (`[B, H, F, V]` with a norm); with positions
    `length` `[B]`, and with a convolution `conv`, its last inputs."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")
    temperature = 16.0  # of the learned decays; larger forgets slower

    def __init__(self, config: LinearizedConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups = config.hidden_size, config.num_heads, config.num_kv_heads or config.num_heads
        self.keys = config.head_dim or config.divide("hidden_size", "num_heads")
        self.rope = None if config.rope_theta is None else (config.rope_theta, config.rope_scaling)
        self.rope_last, self.kind, self.features = config.rope_last, config.decay, self.keys * FEATURES[config.feature_map]
        self.q_proj = nn.Linear(width, self.heads * self.keys, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, self.groups * self.keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, self.groups * self.keys, bias=config.qkv_bias)
        self.conv = None
        if config.conv_kernel:
            self.conv = ShortConv((self.heads + self.groups) * self.keys, config.conv_kernel, activation=None)
        self.q_features, self.k_features = self._features(config.feature_map, self.heads), self._features(config.feature_map, self.groups)
        if config.feature_map == "shared_relu":
            self.k_features = None
        self.decay_channels = self.features if self.kind == "channel" else 1
        self.decay_proj = None
        if self.kind == "scalar":
            self.decay_proj = nn.Linear(width, self.groups)
        elif self.kind == "channel":
            self.decay_proj = LowRank(width, RANK, self.groups * self.features)
        self.norm = RMSNorm(self.keys, config.norm_eps) if config.head_norm else None
        self.out_proj = nn.Linear(self.heads * self.keys, width, bias=False)

    def _features(self, kind: str, heads: int) -> nn.Module:
        if kind == "identity":
            return nn.Identity()
        return HedgehogFeatures(heads, self.keys, self.keys) if kind == "hedgehog" else ReluFeatures(self.keys)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        channels = self.keys + (self.norm is None)
        state = {"memory": torch.zeros(batch, self.heads, self.features, channels, dtype=accumulator(dtype), device=device)}
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, dtype, device)
        if self.rope is not None:
            state["length"] = torch.zeros(batch, dtype=torch.long, device=device)
        return state

    def operator_flops(self, length: int) -> int:
        uses = counted = 0  # of maps that are the same for all heads, `flops` counts one
        for side, heads in ((self.q_features, self.heads), (self.k_features or self.q_features, self.groups)):
            uses += side.weight.numel() if isinstance(side, HedgehogFeatures) else 0
            uses += heads * side.layer.weight.numel() if isinstance(side, ReluFeatures) else 0
        for side in (self.q_features, self.k_features):
            counted += side.layer.weight.numel() if isinstance(side, ReluFeatures) else 0
        return 2 * length * (uses - counted) + flops(length, self.heads, self.features, self.keys + (self.norm is None))

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v, after = self.q_proj(x), self.k_proj(x), split_heads(self.v_proj(x), self.groups), {}
        if self.conv is not None:
            both, after["conv"] = self.conv(torch.cat([q, k], dim=-1), state["conv"] if state else None, packing)
            q, k = both.split([q.shape[-1], k.shape[-1]], dim=-1)
        q, k = split_heads(q, self.heads), split_heads(k, self.groups)
        turn = self._turning(x, state, packing, after)
        if not self.rope_last:
            q, k = turn(q), turn(k)
        dtype = v.dtype
        q, k = self.q_features(q).to(dtype), (self.q_features if self.k_features is None else self.k_features)(k).to(dtype)
        if self.rope_last:
            q, k = turn(q), turn(k)
        o, after["memory"] = ops.linear_attention(
            q, k, v, self._log_decay(x), normalize=self.norm is None, state=state["memory"] if state else None, packing=packing
        )
        return self.out_proj(merge_heads(o if self.norm is None else self.norm(o))), after

    def _turning(self, x: Tensor, state: State | None, packing: Packing | None, after: State):
        """What turns queries and keys by their positions; the positions' share of the state goes to `after`."""
        if self.rope is None:
            return lambda y: y
        seen = state["length"] if state else None
        added = torch.full((x.shape[0],), x.shape[1], device=x.device) if packing is None else packing.cu_seqlens.diff()
        after["length"] = added if seen is None else seen + added
        table = rotary_table(token_positions(x, seen, packing), self.keys, *self.rope)
        return lambda y: rotate(y, table)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """`[H]`, `[B, T, H]` or `[B, T, H, F]`."""
        if self.kind == "none":
            return None
        if self.kind == "fixed":
            return torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads, device=x.device)))
        log_decay = F.logsigmoid(wide(self.decay_proj(x))) / self.temperature
        log_decay = split_heads(log_decay, self.groups) if self.kind == "channel" else log_decay
        return log_decay.repeat_interleave(self.heads // self.groups, dim=2)


register(
    "linearized",
    config=LinearizedConfig,
    mixer=LinearizedMixer,
    title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
    paper="arXiv:2402.04347",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, vocab_size=256),
        "lawcat-tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, rope_theta=None, decay="channel", conv_kernel=4,
            vocab_size=256,
        ),
        "supra-tiny": dict(
            hidden_size=32, num_hidden_layers=2, num_heads=4, feature_map="shared_relu", rope_last=True, decay="fixed", head_norm=True,
            vocab_size=256,
        ),
        "hedgehog-8b": dict(
            hidden_size=4096, num_hidden_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336, rope_theta=500000.0,
            vocab_size=128256,
        ),
    },
)  # fmt: skip

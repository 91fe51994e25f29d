"""Linear attention: softmax replaced by a product of features, so that attention becomes a recurrence.

    S_t = S_{t-1} + phi(k_t) v_t^T,    z_t = z_{t-1} + phi(k_t),    phi(x) = elu(x) + 1
    o_t = phi(q_t) S_t / (phi(q_t) . z_t)

Without causality all queries read the same sums, S and z of the whole sequence.

Paper: Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv:2006.16236: feature map eq. 7, recurrence eq. 18-20.
"""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import GATED_MLP, SHELL, fla_layout, layer
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import ReluFeatures, RMSNorm, merge_heads, projected_sizes, split_heads, wide
from zoo.mixer import Layer, Mixer, State, Traits
from zoo.registry import register

ROLLS = 4  # nu of dpfp


def rectified_products(x: Tensor) -> Tensor:
    """`[B, T, H, K] -> [B, T, H, 2 K ROLLS]`: products of `r = relu([x, -x])` with r rolled by 1, 2, ... (DPFP, arXiv:2102.11174)."""
    r = F.relu(torch.cat([x, -x], dim=-1))
    return torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, ROLLS + 1)], dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: wide(x).softmax(-1).to(x.dtype),  # Efficient Attention, arXiv:1812.01243, section 3.2
    "dpfp": rectified_products,
    "identity": lambda x: x,
}


class ProductFeatures(nn.Module):
    """`first(x) * second(x)`, two affine maps of each head's channels `[B, T, H, K]`, the same for all heads."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Linear(channels, channels)
        self.second = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


class SoftmaxFeatures(Layer):
    """`[B, T, H, K] -> [B, T, H, 2 K]`, `softmax([2 y, -2 y])` with an affine y, the same for all heads: Hedgehog's map
    (arXiv:2402.04347) with one sum over both halves. W starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.layer = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.copy_(self.layer.weight, torch.eye(len(self.layer.weight)))
        init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * wide(self.layer(x))
        return torch.cat([y, -y], dim=-1).softmax(-1).to(x.dtype)


LEARNED = {"product": ProductFeatures, "linear_relu": ReluFeatures, "paired_softmax": SoftmaxFeatures}
FEATURES_PER_CHANNEL = {"paired_softmax": 2, "dpfp": 2 * ROLLS}  # 1 of the others


@strict
class LinearAttentionConfig(ZooConfig):
    """The feature map, and whether the weights sum to one."""

    model_type = "zoo_linear_attention"

    num_heads: int = 16  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    key_ratio: float = 1.0  # K = D * key_ratio / H
    value_ratio: float = 1.0  # V = D * value_ratio / H
    feature_map: str = "elu"  # phi: elu (elu(x) + 1), relu, softmax (over a head's channels), dpfp, identity, or one of `LEARNED`
    normalize: bool = True  # divide by the sum of weights
    bias: bool = False  # biases of the four projections
    output_norm: bool = False  # an RMSNorm over each head of the output

    def validate_heads(self):
        """Heads must divide evenly."""
        projected_sizes(self)

    def validate_feature_map(self):
        """The feature map must be known, and non-negative if its products are to be weights."""
        if self.feature_map not in (known := (*FEATURE_MAPS, *LEARNED)):
            raise ValueError(f"LinearAttentionConfig: feature_map {self.feature_map!r} is unknown; choose one of {', '.join(known)}")
        if self.feature_map in ("identity", "product") and self.normalize:
            raise ValueError(f"LinearAttentionConfig: feature_map {self.feature_map!r} gives weights of either sign; set normalize=False")


class LinearAttentionMixer(Mixer):
    """State: `memory` `[B, H, F, V + 1]`, F features of a key, the last channel being z (`[B, H, F, V]` without the normaliser).
    None if not causal."""

    traits = Traits(bidirectional=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: LinearAttentionConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups = config.hidden_size, config.num_heads, config.num_kv_heads or config.num_heads
        self.causal, self.normalize, self.feature_map = config.causal, config.normalize, config.feature_map
        q, k, v = projected_sizes(config)
        keys, self.values = q // self.heads, v // self.groups
        self.features = keys * FEATURES_PER_CHANNEL.get(config.feature_map, 1)
        learned = LEARNED.get(config.feature_map)
        self.q_features = learned(keys) if learned else None
        self.k_features = learned(keys) if learned else None
        self.q_proj = nn.Linear(width, q, bias=config.bias)
        self.k_proj = nn.Linear(width, k, bias=config.bias)
        self.v_proj = nn.Linear(width, v, bias=config.bias)
        self.norm = RMSNorm(self.values, config.norm_eps) if config.output_norm else nn.Identity()
        self.out_proj = nn.Linear(self.heads * self.values, width, bias=config.bias)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        if not self.causal:
            return {}
        channels = self.values + self.normalize
        return {"memory": torch.zeros(batch, self.heads, self.features, channels, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        pairs = ((self.q_features, self.heads), (self.k_features, self.groups)) if self.q_features is not None else ()
        maps = sum((heads - 1) * m.weight.numel() for side, heads in pairs for m in side.modules() if isinstance(m, nn.Linear))
        return 2 * length * maps + flops(length, self.heads, self.features, self.values + self.normalize)  # a map is used per head

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q = split_heads(self.q_proj(x), self.heads)
        k, v = (split_heads(p(x), self.groups) for p in (self.k_proj, self.v_proj))
        if self.q_features is None:
            q, k = FEATURE_MAPS[self.feature_map](q), FEATURE_MAPS[self.feature_map](k)
        else:
            q, k = self.q_features(q), self.k_features(k)
        if not self.causal:
            return self.out_proj(merge_heads(self.norm(attend_all(q, k, v, self.normalize, packing)))), {}
        o, memory = ops.linear_attention(q, k, v, normalize=self.normalize, state=state["memory"] if state else None, packing=packing)
        return self.out_proj(merge_heads(self.norm(o))), {"memory": memory}


def attend_all(q: Tensor, k: Tensor, v: Tensor, normalize: bool, packing: Packing | None = None) -> Tensor:
    """`q S / (q . z)` with S and z of the whole sequence: `[B, T, H, V]`, summed in float32; `q S / sqrt(K)` if not normalised."""
    dtype = v.dtype
    q, k, v = wide(q), *(wide(t).repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    if packing is not None:
        q, k, v = (packing.pad(t) for t in (q, k, v))
    out = torch.einsum("bthk,bhkv->bthv", q, torch.einsum("bthk,bthv->bhkv", k, v))
    if normalize:
        total = torch.einsum("bthk,bhk->bth", q, k.sum(1)).unsqueeze(-1)
        out = out / total.masked_fill(total == 0, 1.0)
    else:
        out = out * q.shape[-1] ** -0.5
    return (out if packing is None else packing.unpad(out)).to(dtype)


MAPS = {  # theirs -> ours
    "elementwise_product": "product", "hedgehog": "paired_softmax", "t2r": "linear_relu",
} | {name: name for name in ("elu", "relu", "dpfp", "identity")}  # fmt: skip


def read_fla(foreign: dict) -> dict:
    """Further fields for a config of flash-linear-attention."""
    if foreign["feature_map"] not in MAPS:
        raise ValueError(f"a linear_attn with feature_map={foreign['feature_map']!r} is not supported, only {', '.join(MAPS)}")
    return {"feature_map": MAPS[foreign["feature_map"]], "output_norm": True}


FLA = fla_layout(
    "linear_attn",
    "LinearAttention",
    (
        layer("attn.{q,k,v,o}_proj.weight", "mixer.{q,k,v,out}_proj.weight"),
        layer("attn.feature_map_{q,k}.layer{1,2}.{weight,bias}", "mixer.{q,k}_features.{first,second}.{weight,bias}"),
        layer("attn.feature_map_{q,k}.layer.{weight,bias}", "mixer.{q,k}_features.layer.{weight,bias}"),
        layer("attn.norm.weight", "mixer.norm.weight"),
        *GATED_MLP,
        *SHELL,
    ),
    same={
        "num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "key_ratio": "expand_k", "value_ratio": "expand_v",
        "normalize": "norm_feature_map",
    },
    defaults={
        "num_heads": 4, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 1.0, "feature_map": "elementwise_product",
        "norm_feature_map": False,
    },
    only={"tie_feature_map_qk": (False,), "norm_q": (False,), "norm_k": (False,), "elementwise_affine": (True,)},
    read=read_fla,
    write=lambda config: {"feature_map": {own: name for name, own in MAPS.items()}.get(config.feature_map)},
    trials={
        "learned": {},
        "elu": {"num_heads": 2, "feature_map": "elu", "norm_feature_map": True},
        "grouped": {"num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5, "feature_map": "hedgehog", "norm_feature_map": True},
        "wide": {"num_heads": 2, "expand_v": 1.5, "feature_map": "t2r"},
    },
)  # fmt: skip


register(
    "linear_attention",
    config=LinearAttentionConfig,
    mixer=LinearAttentionMixer,
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    paper="arXiv:2006.16236",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24),
    },
    layouts=(FLA,),
)

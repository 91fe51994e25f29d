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

from zoo import ops
from zoo.config import ZooConfig
from zoo.fla import GATED_MLP, SHELL, fla_layout, layer
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import RMSNorm, merge_heads, split_heads, wide
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: wide(x).softmax(-1).to(x.dtype),  # Efficient Attention, arXiv:1812.01243, section 3.2
    "identity": lambda x: x,
}
LEARNED = "product"


@strict
class LinearAttentionConfig(ZooConfig):
    """The feature map, and whether the weights sum to one."""

    model_type = "zoo_linear_attention"

    num_heads: int = 16
    feature_map: str = "elu"  # phi: elu (elu(x) + 1), relu, softmax (over a head's channels), identity, or product (learned)
    normalize: bool = True  # divide by the sum of weights
    bias: bool = False  # biases of the four projections
    output_norm: bool = False  # an RMSNorm over each head of the output

    def validate_feature_map(self):
        """The feature map must be known, and non-negative if its products are to be weights."""
        if self.feature_map not in (known := (*FEATURE_MAPS, LEARNED)):
            raise ValueError(f"LinearAttentionConfig: feature_map {self.feature_map!r} is unknown; choose one of {', '.join(known)}")
        if self.feature_map in ("identity", LEARNED) and self.normalize:
            raise ValueError(f"LinearAttentionConfig: feature_map {self.feature_map!r} gives weights of either sign; set normalize=False")


class ProductFeatures(nn.Module):
    """`first(x) * second(x)`, two affine maps of each head's channels `[B, T, H, K]`, the same for all heads."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Linear(channels, channels)
        self.second = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


class LinearAttentionMixer(Mixer):
    """State: `memory` `[B, H, K, V + 1]`, the last channel being z (`[B, H, K, V]` without the normaliser). None if not causal."""

    traits = Traits(bidirectional=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: LinearAttentionConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.causal = config.hidden_size, config.num_heads, config.causal
        self.keys, self.normalize, self.feature_map = config.divide("hidden_size", "num_heads"), config.normalize, config.feature_map
        learned = config.feature_map == LEARNED
        self.q_features = ProductFeatures(self.keys) if learned else None
        self.k_features = ProductFeatures(self.keys) if learned else None
        self.q_proj = nn.Linear(width, width, bias=config.bias)
        self.k_proj = nn.Linear(width, width, bias=config.bias)
        self.v_proj = nn.Linear(width, width, bias=config.bias)
        self.norm = RMSNorm(self.keys, config.norm_eps) if config.output_norm else nn.Identity()
        self.out_proj = nn.Linear(width, width, bias=config.bias)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        if not self.causal:
            return {}
        return {"memory": torch.zeros(batch, self.heads, self.keys, self.keys + self.normalize, dtype=accumulator(dtype), device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.keys + self.normalize)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
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
    q, k, v = wide(q), wide(k), wide(v)
    if packing is not None:
        q, k, v = (packing.pad(t) for t in (q, k, v))
    out = torch.einsum("bthk,bhkv->bthv", q, torch.einsum("bthk,bthv->bhkv", k, v))
    if normalize:
        total = torch.einsum("bthk,bhk->bth", q, k.sum(1)).unsqueeze(-1)
        out = out / total.masked_fill(total == 0, 1.0)
    else:
        out = out * q.shape[-1] ** -0.5
    return (out if packing is None else packing.unpad(out)).to(dtype)


MAPS = {"elementwise_product": LEARNED} | {name: name for name in ("elu", "relu", "identity")}  # theirs -> ours


def read_fla(foreign: dict) -> dict:
    """Further fields for a config of flash-linear-attention."""
    name = MAPS.get(foreign["feature_map"])
    if name is None or foreign["num_kv_heads"] not in (None, foreign["num_heads"]):
        asked = {key: foreign[key] for key in ("feature_map", "num_heads", "num_kv_heads")}
        raise ValueError(f"a linear_attn with {asked} is not supported, only feature_map {', '.join(MAPS)} and a key for each query head")
    return {"feature_map": name, "output_norm": True}


FLA = fla_layout(
    "linear_attn",
    "LinearAttention",
    (
        layer("attn.{q,k,v,o}_proj.weight", "mixer.{q,k,v,out}_proj.weight"),
        layer("attn.feature_map_{q,k}.layer{1,2}.{weight,bias}", "mixer.{q,k}_features.{first,second}.{weight,bias}"),
        layer("attn.norm.weight", "mixer.norm.weight"),
        *GATED_MLP,
        *SHELL,
    ),
    same={"num_heads": "num_heads", "normalize": "norm_feature_map"},
    defaults={"num_heads": 4, "num_kv_heads": None, "feature_map": "elementwise_product", "norm_feature_map": False},
    only={
        "expand_k": (1.0,), "expand_v": (1.0,), "tie_feature_map_qk": (False,), "norm_q": (False,), "norm_k": (False,),
        "elementwise_affine": (True,),
    },
    read=read_fla,
    write=lambda config: {"feature_map": {own: name for name, own in MAPS.items()}.get(config.feature_map)},
    trials={"learned": {}, "elu": {"num_heads": 2, "feature_map": "elu", "norm_feature_map": True}},
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

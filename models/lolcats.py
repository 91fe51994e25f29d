"""LoLCATs: softmax over a window and linear attention over all before it, under one normaliser.

    o_t = (gamma sum_{s <= j <= t} e_tj v_j + sum_{j < s} phi_q(q_t) . phi_k(k_j) v_j) / (the same sums without v)
    e_tj = exp(q_t . k_j / sqrt(K) - max_{s <= i <= t} q_t . k_i / sqrt(K)),    q and k turned by their positions
    phi(x) = softmax(x W) beside softmax(-x W), W one matrix a head    (Hedgehog's)

The window starts at `s = t - W + 1`; `terraced`, where the block of W tokens before t's own begins. gamma is one number a head.

Papers: Zhang et al. 2024, arXiv:2410.10254 (section 3); Hedgehog: Zhang et al. 2024, arXiv:2402.04347.
"""

from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo import ops
from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.converted import KEPT, PROJECTIONS, derived, read_teacher, with_adapters, write_teacher
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import HedgehogFeatures, check_rope_scaling, merge_heads, token_positions, wide
from zoo.layout import Delta, Layout, Pattern, Rule, mapped, rename
from zoo.mixer import State, Traits
from zoo.registry import register
from zoo.terms import expect

FIRST_LOGIT = -2.1972245773362196  # of gamma: 0.1


@strict
class LolcatsConfig(ZooConfig):
    """Heads as the teacher has them, the window and the features."""

    model_type = "zoo_lolcats"

    num_heads: int = 16
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    feature_dim: int | None = None  # columns of W, which make twice as many features; None: K / 2
    window: int = 64  # W
    terraced: bool = True  # windows start at whole blocks
    eps: float = 0.0  # added to the sum of the weights

    def validate_heads(self):
        """Heads must divide evenly, and the window hold a token."""
        self.divide_heads()
        if self.window < 1 or (self.feature_dim is not None and self.feature_dim < 1):
            raise ValueError(f"LolcatsConfig: window={self.window} and feature_dim={self.feature_dim} must be positive")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class LolcatsMixer(RotaryAttention):
    """State: `k` and `v` `[B, S, G, K]`, the last tokens; `length` `[B]`; and of what lies before them `memory` `[B, H, 2 F, K + 1]`,
    the last channel being the sum of the features. S is W, terraced 2 W."""

    traits = Traits()

    def __init__(self, config: LolcatsConfig, layer: int):
        keys = config.head_dim or config.divide("hidden_size", "num_heads")
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys, window=config.window,
            rope=(keys, config.rope_theta, config.rope_scaling),
        )  # fmt: skip
        self.terraced, self.eps = config.terraced, config.eps
        self.span = 2 * self.window if self.terraced else self.window
        self.features = config.feature_dim or max(1, keys // 2)
        self.q_features = HedgehogFeatures(self.heads, keys, self.features)
        self.k_features = HedgehogFeatures(self.heads, keys, self.features)
        self.window_logit = nn.Parameter(torch.empty(self.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.constant_(self.window_logit, FIRST_LOGIT)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        k, v = (torch.zeros(batch, self.span, self.groups, self.keys, dtype=dtype, device=device) for _ in "kv")
        memory = torch.zeros(batch, self.heads, 2 * self.features, self.keys + 1, dtype=accumulator(dtype), device=device)
        return {"k": k, "v": v, "length": torch.zeros(batch, dtype=torch.long, device=device), "memory": memory}

    def operator_flops(self, length: int) -> int:
        mapping = 4 * length * self.heads * self.keys * self.features
        return super().operator_flops(length) + mapping + flops(length, self.heads, 2 * self.features, self.keys + 1)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        positions = token_positions(x, state["length"] if state else None, packing)
        q, k, v = self.project(x, positions)
        if packing is not None:
            q, k, v = packing.pad(q), packing.pad(k), packing.pad(v)
        rows, length = k.shape[:2]
        if state is None:
            state = self.initial_state(rows, length, k.dtype, k.device)
        new = torch.full((rows,), length, device=k.device) if packing is None else packing.cu_seqlens.diff()
        k, v = torch.cat([state["k"], k], dim=1), torch.cat([state["v"], v], dim=1)
        features = self.q_features(q), self.k_features(self._repeated(k if self.terraced else k[:, :length]))
        far, memory = self._far(*features, v, state, new)
        near = self._near(q, k, v, features, state["length"])
        total = far + near
        o = (total[..., :-1] / (total[..., -1:] + self.eps)).to(v.dtype)
        if packing is None:
            kept = {"k": k[:, length:], "v": v[:, length:]}
        else:
            o = packing.unpad(o)
            row, last = torch.arange(rows, device=k.device).unsqueeze(1), new.unsqueeze(1) + torch.arange(self.span, device=k.device)
            kept = {"k": k[row, last], "v": v[row, last]}
        return self.out_proj(merge_heads(o)), kept | {"length": state["length"] + new, "memory": memory}

    def _repeated(self, x: Tensor) -> Tensor:
        """`[B, T, G, K] -> [B, T, H, K]`."""
        return x.repeat_interleave(self.heads // self.groups, dim=2)

    def _blocks(self, x: Tensor, block: int) -> Tensor:
        """`[B, T, H, K] -> [B, N, C, G, R, K]`, N blocks of C queries."""
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % block))
        return x.unflatten(2, (self.groups, -1)).unflatten(1, (-1, block))

    def _far(self, q: Tensor, k: Tensor, v: Tensor, state: State, new: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted values, and beside them the sum of weights, `[B, T, H, K + 1]`, of tokens S and more before each; the memory after.

        A token enters the memory S steps late; those that were none (before a sequence, or behind the end of a shorter one) are
        blanked.
        """
        length = q.shape[1]
        index = torch.arange(length, device=q.device)
        entering = (index >= self.span - state["length"].unsqueeze(1)) & (index < new.unsqueeze(1))
        k = k[:, :length] * entering[..., None, None]
        v = with_ones(self._repeated(wide(v[:, :length])))
        return ops.linear_attention(q, k, v, scale=1.0, state=state["memory"])

    def _near(self, q: Tensor, k: Tensor, v: Tensor, features: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """The same of the last S tokens, by blocks of W queries which see S + W keys; `k` and `v` start S tokens before `q`."""
        length, block = q.shape[1], self.window if q.shape[1] > 1 else 1
        rest = -length % block
        keys, values = (F.pad(wide(x), (0, 0, 0, 0, 0, rest)).unfold(1, block + self.span, block) for x in (k, with_ones(v)))
        scores = torch.einsum("bncgrk,bngks->bngrcs", self._blocks(wide(q), block), keys) * self.keys**-0.5
        first = torch.arange(0, length + rest, block, device=q.device) + seen.unsqueeze(1)  # [B, N], where blocks begin
        at = (first.unsqueeze(2) + torch.arange(block, device=q.device)).unsqueeze(3)
        key_at = (first.unsqueeze(2) + torch.arange(-self.span, block, device=q.device)).unsqueeze(2)
        start = (at // self.window - 1) * self.window if self.terraced else at - self.window + 1
        visible = (key_at <= at) & (key_at >= start) & (key_at >= 0)  # [B, N, C, S + C]
        scores = scores.masked_fill(~visible[:, :, None, None], -torch.inf)
        gamma = torch.sigmoid(wide(self.window_logit)).view(self.groups, -1, 1, 1)
        weights = gamma * torch.exp(scores - scores.amax(-1, keepdim=True))
        if self.terraced:
            linear = (key_at > at - self.span) & (key_at < start) & (key_at >= 0)
            k_own = F.pad(features[1], (0, 0, 0, 0, 0, rest)).unfold(1, block + self.span, block).unflatten(2, (self.groups, -1))
            own = torch.einsum("bncgrf,bngrfs->bngrcs", self._blocks(features[0], block), k_own)
            weights = weights + own * linear[:, :, None, None]
        out = torch.einsum("bngrcs,bngvs->bncgrv", weights, values)
        return out.flatten(3, 4).flatten(1, 2)[:, :length]


def with_ones(x: Tensor) -> Tensor:
    """One more channel, of ones, whose weighted sum is the sum of weights."""
    return F.pad(x, (0, 1), value=1.0)


LAYER, MIXER = "model.layers.{}.self_attn.", "model.layers.{}.mixer."
FACTORS = mapped(LAYER + "window_factors", MIXER + "window_logit", torch.flatten, lambda x: x[None, :, None, None])
OWN = "feature_map_q.mlp.layer"
ADDED = ("feature_map", "window_factors", "lora_")
REBUILT = {"feature_map": "lolcats_hedgehog"}
ALPHA = 16.0  # of their adapters of low rank


def read_whole(foreign: dict) -> dict:
    """Our fields for a config of Liger's authors, who rebuilt LoLCATs with features and window of fixed sizes."""
    expect(foreign, **REBUILT, tie_feature_map_qk=False, attn=None, expand_k=1, expand_v=1)
    fixed = {"feature_dim": 128, "window": 64, "terraced": False, "eps": 1e-6}
    return read_teacher(foreign) | {"head_dim": foreign["head_dim"]} | fixed


def read_added(foreign: dict) -> dict:
    """Our fields for the base model's config and the shapes of what was added; the window is that of the published models."""
    expect(foreign, attention_bias=False)
    keys = foreign["head_dim"] or foreign["hidden_size"] // foreign["num_attention_heads"]
    features = next((shape[-1] for name, shape in foreign.get("tensors", {}).items() if OWN in name), keys // 2)
    return read_teacher(foreign) | {"head_dim": keys, "feature_dim": features, "window": 64, "terraced": True, "eps": 0.0}


def written(config: LolcatsConfig) -> dict:
    """The inverse of what both share; what it cannot say is noticed by mapping back."""
    return write_teacher(config) | {"head_dim": config.head_dim or config.divide("hidden_size", "num_heads")}


def write_added(config: LolcatsConfig) -> dict:
    """The inverse of `read_added`."""
    fields = written(config)
    return fields | {"tensors": {OWN: [config.num_heads, fields["head_dim"], config.feature_dim or max(1, fields["head_dim"] // 2)]}}


def rules_of_heads(config: LolcatsConfig) -> tuple[Rule, ...]:
    """Features with a matrix for each head under its own name."""
    theirs = tuple(Pattern(f"{LAYER}feature_map_{{q,k}}.mlp.linears.{head}.weight") for head in range(config.num_heads))
    features = Rule(
        theirs, (Pattern(MIXER + "{q,k}_features.weight"),), lambda x, shapes, config: [torch.stack([w.t() for w in x])],
        lambda x, config: [w.t().contiguous() for w in x[0]],
    )  # fmt: skip
    return features, FACTORS, PROJECTIONS, *KEPT


LAYOUTS = (
    Layout(
        "lolcats", ("lolcats",), read_whole, lambda config: written(config) | REBUILT, rules_of_heads,
        complete=derived("llama", feature_map="lolcats_t2r"), classes="LolcatsModel",
        trials={"grouped": REBUILT, "tied": REBUILT | {"tie_word_embeddings": True, "num_key_value_heads": 4}},
    ),
    Layout(
        "lolcats-added", ("llama", "mistral"), read_added, write_added,
        (rename(LAYER + "feature_map_{q,k}.mlp.layer", MIXER + "{q,k}_features.weight"), FACTORS, PROJECTIONS, *KEPT),
        matches=lambda foreign: any(OWN in name for name in foreign.get("tensors", ())),
        complete=lambda foreign: derived(foreign["model_type"])(foreign), classes="Llama", file="model.pt",
        delta=Delta(lambda name: any(word in name for word in ADDED), partial(with_adapters, alpha=ALPHA)),
        trials={"grouped": {"rope_theta": 500.0}, "tied": {"tie_word_embeddings": True, "head_dim": 12}},
    ),
)  # fmt: skip


register(
    "lolcats",
    config=LolcatsConfig,
    mixer=LolcatsMixer,
    title="LoLCATs: On Low-Rank Linearizing of Large Language Models",
    paper="arXiv:2410.10254",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, window=8, vocab_size=256),
        "8b": dict(
            hidden_size=4096, num_hidden_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336, rope_theta=500000.0,
            vocab_size=128256,
        ),
    },
    layouts=LAYOUTS,
)  # fmt: skip

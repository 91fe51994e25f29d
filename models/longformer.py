"""Longformer: softmax attention over a window, and a few global tokens that see all and are seen by all.

    o_t = attention of q_t over { k_j, v_j : |t - j| <= W / 2, or j global }                        t local
    o_t = attention of q'_t over { k'_j, v'_j : all j }                                             t global

q', k', v' are projections of their own (section 3.1, "Linear Projections for Global Attention"); all that a local token
sees, global tokens included, it sees by the ordinary ones. Global are the first tokens of every sequence, and of an encoder
also those of `global_attention_mask`, say of a question. W counts both sides, as published: a token sees W / 2 neighbours on
the left, as many on the right, and itself.

The encoder is RoBERTa's: learned positions, norms after the residual sums and after the embedding, an MLP with GELU. With
`causal=True` a token sees W / 2 tokens before it, itself, and the first tokens, all by the ordinary projections.

Paper: Beltagy, Peters, Cohan 2020, arXiv:2004.05150: section 3.1; the language model in section 4, the encoder in section 5.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.attention import cache, flops
from zoo.kernels.packing import Packing
from zoo.layers import merge_heads, split_heads, token_positions
from zoo.layout import Layout, Rule, drop, rename
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register
from zoo.terms import (
    bert_answers,
    bert_attention,
    bert_body,
    bert_classifiers,
    bert_decoder,
    foreign_activation,
    given,
    own_activation,
    same_fields,
)


@strict
class LongformerConfig(ZooConfig):
    """The window and the global tokens."""

    model_type = "zoo_longformer"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    causal: bool = False
    channel_mixer: str | None = "mlp"
    norm: str = "layernorm"
    post_norm: bool = True
    embedding_norm: bool = True
    max_position_embeddings: int | None = 4096
    classifier_args: dict | None = field(default_factory=lambda: {"act": "tanh", "norm": None})
    num_heads: int = 12
    window: int | list[int] = 512  # W, neighbours seen on both sides together, an even number; a list has one for each layer
    num_global_tokens: int = 1  # first tokens of every sequence that are global; if causal, that stay visible

    def validate_window(self):
        """Heads must divide the width, and windows must have two equal sides."""
        self.divide("hidden_size", "num_heads")
        windows = self.window if isinstance(self.window, list) else [self.window] * self.num_hidden_layers
        if len(windows) != self.num_hidden_layers:
            raise ValueError(f"LongformerConfig: window has {len(windows)} entries for num_hidden_layers={self.num_hidden_layers}")
        if any(w < 2 or w % 2 for w in windows):
            raise ValueError(f"LongformerConfig: window={self.window} must be even and at least 2, half of it on either side")
        if self.num_global_tokens < 0:
            raise ValueError(f"LongformerConfig: num_global_tokens={self.num_global_tokens} cannot be negative")


class LongformerMixer(Mixer):
    """State, if causal: a ring `k` and `v` `[B, S + W / 2 + 1, H, K]` for S first tokens, and `length` `[B]`.

    The encoder sees its whole sequence at once and has no state.
    """

    traits = Traits(bidirectional=True, beside=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: LongformerConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.causal = config.hidden_size, config.num_heads, config.causal
        self.keys = config.divide("hidden_size", "num_heads")
        self.side = (config.window[layer] if isinstance(config.window, list) else config.window) // 2
        self.firsts = config.num_global_tokens
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        if not self.causal:  # without global tokens too: checkpoints have them, and which tokens are global depends on the task
            self.q_global = nn.Linear(width, width)
            self.k_global = nn.Linear(width, width)
            self.v_global = nn.Linear(width, width)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        if not self.causal:
            return {}
        shape = (batch, self.firsts + self.side + 1, self.heads, self.keys)
        k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return {"k": k, "v": v, "length": torch.zeros(batch, dtype=torch.long, device=device)}

    def operator_flops(self, length: int) -> int:
        firsts, side = min(self.firsts, length), min(self.side, length - 1)
        near = length * (side + 1) - side * (side + 1) // 2  # pairs within the left side of the window
        far = max(length - side - 1, 0)  # tokens that see the first one by its being first only
        extra = sum(max(far - j, 0) for j in range(firsts))
        if self.causal:
            return flops(near + extra, self.heads, self.keys, self.keys)
        return flops(2 * near - length + extra + firsts * length, self.heads, self.keys, self.keys)

    def flops(self, length: int) -> int:
        if self.causal:
            return super().flops(length)
        asked = min(self.firsts, length)  # tokens with a global query, without any of which no key answers
        idle = length - asked if asked else 3 * length
        return super().flops(length) - 2 * idle * self.q_global.weight.numel()

    def forward(
        self, x: Tensor, state: State | None = None, packing: Packing | None = None, marks: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """`marks`: booleans `[B, T]`, further tokens that are global."""
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.causal:
            if marks is not None:
                raise ValueError("global tokens of a causal Longformer are its first; set num_global_tokens, not global_attention_mask")
            o, state = self.attend_left(q, k, v, token_positions(x, state["length"] if state else None, packing), state, packing)
            return self.out_proj(merge_heads(o)), state
        rule = {"causal": False, "window": self.side, "sinks": self.firsts, "global_tokens": marks}
        o, _ = ops.attention(q, k, v, **rule, packing=packing)
        if self.firsts or marks is not None:
            o = self.answer_global(o, x, marks, packing)
        return self.out_proj(merge_heads(o)), {}

    def attend_left(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: State | None, packing: Packing | None
    ) -> tuple[Tensor, State]:
        """Attention to the left side of the window and the first tokens, and the ring after."""
        rule = {"window": self.side + 1, "sinks": self.firsts}
        keys, values, kv_positions, after = cache.ring_append(state, k, v, **rule, packing=packing)
        if state is None:
            return ops.attention(q, k, v, **rule, packing=packing)[0], after
        if packing is not None:
            q, positions = packing.pad(q), packing.pad(positions, -1)
        o, _ = ops.attention(q, keys, values, **rule, q_positions=positions, kv_positions=kv_positions)
        return o if packing is None else packing.unpad(o), after

    def answer_global(self, o: Tensor, x: Tensor, marks: Tensor | None, packing: Packing | None) -> Tensor:
        """o `[B, T, H, K]` with the outputs of global tokens in their places."""
        k, v = (split_heads(p(x), self.heads) for p in (self.k_global, self.v_global))
        if packing is None and marks is None:
            q = split_heads(self.q_global(x[:, : self.firsts]), self.heads)
            answer, _ = ops.attention(q, k, v, causal=False)
            return torch.cat([answer, o[:, self.firsts :]], dim=1)
        at = token_positions(x, None, packing)
        chosen = at < self.firsts if marks is None else marks | (at < self.firsts)
        rows = chosen
        if packing is not None:  # keys behind a sequence's end are not seen
            x, k, v, rows, at = packing.pad(x), packing.pad(k), packing.pad(v), packing.pad(chosen), packing.pad(at, -1)
        count = self.firsts if marks is None else int(rows.sum(-1).max())
        if not count:
            return o
        order = rows.int().argsort(dim=-1, descending=True, stable=True)[:, :count]  # beyond a row's own number not used
        q = split_heads(self.q_global(x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))), self.heads)
        answer, _ = ops.attention(q, k, v, causal=False, q_positions=at.gather(1, order), kv_positions=at)
        return o.masked_scatter(chosen[..., None, None], answer[rows.gather(1, order)])


RENAMED = {
    "norm_eps": "layer_norm_eps", "num_heads": "num_attention_heads", "window": "attention_window", "token_types": "type_vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
CLASSIFIER = {"act": "tanh", "norm": None}


def from_longformer(foreign: dict) -> dict:
    """Fields of a LongformerConfig. transformers makes tokens global by a mask; without one, the first where it classifies."""
    if foreign["pad_token_id"] is None:
        raise ValueError("a longformer needs a pad_token_id, as its positions count from the row behind it; set it in the config")
    task = (foreign.get("architectures") or [""])[0]
    classifies = task.endswith("ForSequenceClassification")
    return same_fields(foreign, but=("use_cache",)) | {own: foreign[name] for own, name in RENAMED.items()} | {
        "position_offset": foreign["pad_token_id"] + 1,
        "channel_args": {"act": own_activation(foreign["hidden_act"])},
        "num_global_tokens": 1 if classifies else foreign.get("num_global_tokens", 0),
        "pooler_args": CLASSIFIER if task.endswith("Model") else None,
        "classifier_args": CLASSIFIER,
    }  # fmt: skip


def to_longformer(config: LongformerConfig) -> dict:
    """The inverse."""
    given(config, "classifier_args")
    act = (config.channel_args or {}).get("act", "gelu")
    return same_fields(config, but=("use_cache",)) | {name: getattr(config, own) for own, name in RENAMED.items()} | {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "hidden_act": foreign_activation(act, dated=True),
        "num_global_tokens": config.num_global_tokens,
    }  # fmt: skip


def longformer_rules(config: LongformerConfig) -> tuple[Rule, ...]:
    body, layer = "longformer.", "longformer.encoder.layer.{}.attention.self."
    return (
        *bert_body(body),
        *bert_attention(body),
        rename(layer + "{query,key,value}_global.{weight,bias}", "model.layers.{}.mixer.{q,k,v}_global.{weight,bias}"),
        *bert_decoder(config.tie_word_embeddings, "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        *bert_classifiers(),
        *bert_answers(),
        rename(body + "pooler.dense.{weight,bias}", "model.pooler.dense.{weight,bias}"),
        drop(body + "pooler.dense.{weight,bias}", "the heads of this architecture do not read the pooler"),
    )


LAYOUT = Layout(
    "longformer", ("longformer",), from_longformer, to_longformer, longformer_rules, prefix="longformer.",
    forgets=("sep_token_id", "onnx_export"),
    trials={
        "masked": {"architectures": ["LongformerForMaskedLM"], "attention_window": 6, "hidden_act": "gelu_new"},
        "bare": {"attention_window": [8, 4], "type_vocab_size": 1, "num_attention_heads": 2, "pad_token_id": 1},
        "sequences": {"architectures": ["LongformerForSequenceClassification"], "attention_window": 4, "num_labels": 3},
        "tokens": {"architectures": ["LongformerForTokenClassification"], "attention_window": 4, "num_global_tokens": 0},
    },
)  # fmt: skip
PUBLISHED = dict(
    vocab_size=50265, tie_word_embeddings=True, max_position_embeddings=4098, position_offset=2, token_types=1, pad_token_id=1,
    bos_token_id=0, eos_token_id=2,
)  # fmt: skip

register(
    "longformer",
    config=LongformerConfig,
    mixer=LongformerMixer,
    title="Longformer: The Long-Document Transformer",
    paper="arXiv:2004.05150",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, window=8, vocab_size=256, max_position_embeddings=512),
        "base": PUBLISHED,
        "large": PUBLISHED | dict(hidden_size=1024, num_hidden_layers=24, num_heads=16),
    },
    layouts=(LAYOUT,),
)

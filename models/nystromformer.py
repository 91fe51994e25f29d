"""Nystromformer: softmax attention by way of m landmarks, which stand for all queries and all keys.

    o = A(q, k~) A(q~, k~)^+ A(q~, k) v + conv(v),    A(q, k) = softmax(q k^T / sqrt(K)),    q~, k~ means over m segments

The pseudo-inverse comes from six steps of an iteration of order three, which begins at `A^T / max column sum`, the maximum being
over the heads of a sequence. The convolution over time is depthwise, one filter a head. Time and memory grow with T m.

Segments are as equal as T allows: token t lies in segment `floor(t m / T)`. Of sequences no longer than m tokens every token
is its own landmark; there, and with `num_landmarks=None` always, attention is computed exactly.

The encoder is BERT's. Paper: Xiong et al. 2021, arXiv:2102.03902, Algorithm 1; the iteration is that of Razavi et al. 2014.
"""

import math
from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels import long_conv
from zoo.kernels.attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import merge_heads, split_heads, wide
from zoo.layout import Layout, mapped
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register
from zoo.terms import (
    bert_answers,
    bert_attention,
    bert_body,
    bert_classifiers,
    bert_decoder,
    expect,
    foreign_activation,
    own_activation,
    same_fields,
)

STEPS = 6  # of the iteration towards the pseudo-inverse
ALL = 64  # as many landmarks as tokens in a segment: any such number attends exactly, and the published config has this one
OFFSET = 2  # the first row of the published position tables that is used


@strict
class NystromformerConfig(ZooConfig):
    """The landmarks and the convolution."""

    model_type = "zoo_nystromformer"

    vocab_size: int = 30000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    causal: bool = False
    channel_mixer: str | None = "mlp"
    channel_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    norm: str = "layernorm"
    post_norm: bool = True
    embedding_norm: bool = True
    max_position_embeddings: int | None = 512
    position_offset: int = OFFSET
    token_types: int = 2
    head_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    classifier_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh", "norm": None})
    tie_word_embeddings: bool = True
    num_heads: int = 12
    num_landmarks: int | None = 64  # m; None: exact attention
    conv_kernel: int = 65  # taps of the convolution of the values, half of them on either side of the one in the middle

    def validate_landmarks(self):
        """Heads must divide the width, there must be landmarks, and a tap in the middle."""
        self.divide("hidden_size", "num_heads")
        if self.num_landmarks is not None and self.num_landmarks < 1:
            raise ValueError(f"NystromformerConfig: num_landmarks={self.num_landmarks} must be positive; None attends exactly")
        if self.conv_kernel < 1 or self.conv_kernel % 2 == 0:
            raise ValueError(f"NystromformerConfig: conv_kernel={self.conv_kernel} must be an odd number, with a tap in the middle")


class NystromformerMixer(Mixer):
    """It sees its whole sequence at once and has no state."""

    traits = Traits(causal=False, bidirectional=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: NystromformerConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.landmarks, self.taps = config.hidden_size, config.num_heads, config.num_landmarks, config.conv_kernel
        self.keys = config.divide("hidden_size", "num_heads")
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.conv_weight = nn.Parameter(torch.empty(self.heads, self.taps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.taps)  # as torch initialises a depthwise convolution
        init.uniform_(self.conv_weight, -bound, bound)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {}

    def operator_flops(self, length: int) -> int:
        conv = long_conv.flops(length, self.taps, self.heads * self.keys)
        if self.landmarks is None or length <= self.landmarks:
            return conv + flops(length**2, self.heads, self.keys, self.keys)
        m = self.landmarks
        between = 2 * self.heads * (4 * STEPS * m**3 + 2 * m**2 * self.keys)  # A(q~, k~), its pseudo-inverse, and that times the values
        return conv + flops(2 * length * m, self.heads, self.keys, self.keys) + between

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        taps = self.conv_weight.flip(1).t().repeat_interleave(self.keys, dim=1)  # the operator's filters run backwards
        heard, _ = ops.long_conv(merge_heads(v), taps, causal=False, packing=packing)
        return self.out_proj(merge_heads(self.attend(q, k, v, packing)) + heard), {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
        """Attention within every sequence, `[B, T, H, K]`."""
        longest = q.shape[1] if packing is None else max(packing.lengths)
        if self.landmarks is None or longest <= self.landmarks:
            return ops.attention(q, k, v, causal=False, packing=packing)[0]
        if packing is None:
            return nystrom(q, k, v, self.landmarks)
        pieces = [[x[:, piece] for x in (q, k, v)] for _, piece in packing.split() if piece.stop > piece.start]
        return torch.cat([self.attend(*piece, None) for piece in pieces], dim=1)


def nystrom(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """Attention by way of the landmarks, of `[B, T, H, K]` with T > m. The m x m matrices are float32 at least."""
    q_marks, k_marks = segment_means(q, landmarks), segment_means(k, landmarks)
    summary, _ = ops.attention(q_marks, k, v, causal=False)
    logits = torch.einsum("bmhk,bnhk->bhmn", wide(q_marks), wide(k_marks)) / math.sqrt(q.shape[-1])
    values = torch.einsum("bhmn,bnhk->bmhk", pseudo_inverse(logits.softmax(-1)), wide(summary))
    return ops.attention(q, k_marks, values.to(v.dtype), causal=False)[0]


def segment_means(x: Tensor, segments: int) -> Tensor:
    """`[B, T, H, K] -> [B, m, H, K]`: means over segments of consecutive tokens, whose lengths differ by one at most."""
    place = torch.arange(x.shape[1], device=x.device) * segments // x.shape[1]
    counts = wide(x).new_zeros(segments).index_add(0, place, wide(x).new_ones(x.shape[1]))
    sums = wide(x).new_zeros(x.shape[0], segments, *x.shape[2:]).index_add(1, place, wide(x))
    return (sums / counts[:, None, None]).to(x.dtype)


def pseudo_inverse(a: Tensor) -> Tensor:
    """Of matrices `[B, H, m, m]` whose rows sum to one, by iteration."""
    z = a.mT / a.sum(-2).amax((-2, -1))[:, None, None, None]
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az)))
    return z


RENAMED = {
    "norm_eps": "layer_norm_eps", "num_heads": "num_attention_heads", "token_types": "type_vocab_size", "conv_kernel": "conv_kernel_size",
}  # fmt: skip


def from_foreign(foreign: dict) -> dict:
    """Our fields. With as many landmarks as tokens transformers attends exactly, and only then to sequences of other lengths."""
    # untied, transformers stores a second bias that nothing reads, and that we had nowhere to keep
    expect(foreign, add_cross_attention=False, inv_coeff_init_option=False, tie_word_embeddings=True)
    act, landmarks, length = own_activation(foreign["hidden_act"]), foreign["num_landmarks"], foreign["segment_means_seq_len"]
    if length % landmarks:
        raise ValueError(f"a nystromformer with num_landmarks={landmarks} needs a multiple of it as segment_means_seq_len, not {length}")
    return same_fields(foreign, but=("use_cache",)) | {own: foreign[name] for own, name in RENAMED.items()} | {
        "max_position_embeddings": foreign["max_position_embeddings"] + OFFSET,
        "position_offset": OFFSET,
        "num_landmarks": None if landmarks == length else landmarks,
        "channel_args": {"act": act},
        "head_args": {"act": act},
        "classifier_args": {"act": act, "norm": None},
    }  # fmt: skip


def to_foreign(config: NystromformerConfig) -> dict:
    """The inverse. With landmarks transformers takes sequences of one length only: the longest that there are positions for."""
    longest, landmarks = config.max_position_embeddings - OFFSET, config.num_landmarks or ALL
    return same_fields(config, but=("use_cache",)) | {name: getattr(config, own) for own, name in RENAMED.items()} | {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "max_position_embeddings": longest,
        "num_landmarks": landmarks,
        "segment_means_seq_len": ALL if config.num_landmarks is None else longest - longest % landmarks,
        "hidden_act": foreign_activation((config.channel_args or {}).get("act", "gelu"), dated=True),
    }  # fmt: skip


BODY, HEAD = "nystromformer.", "cls.predictions."
LAYOUT = Layout(
    "nystromformer", ("nystromformer",), from_foreign, to_foreign, prefix=BODY,
    rules=(
        *bert_body(BODY),
        *bert_attention(BODY),
        mapped(
            BODY + "encoder.layer.{}.attention.self.conv.weight", "model.layers.{}.mixer.conv_weight",
            lambda x: x[:, 0, :, 0].contiguous(), lambda x: x[:, None, :, None].contiguous(),
        ),
        *bert_decoder(True, HEAD + "transform.dense", HEAD + "transform.LayerNorm", HEAD + "decoder", HEAD + "bias"),
        *bert_classifiers(),
        *bert_answers(),
    ),
    trials={
        "masked": {"architectures": ["NystromformerForMaskedLM"]},
        "plain": {"conv_kernel_size": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "type_vocab_size": 1},
        "sequences": {"architectures": ["NystromformerForSequenceClassification"], "num_labels": 3, "conv_kernel_size": 5},
        "tokens": {"architectures": ["NystromformerForTokenClassification"], "num_labels": 5, "num_attention_heads": 2},
        "answers": {"architectures": ["NystromformerForQuestionAnswering"], "hidden_act": "relu"},
    },
)  # fmt: skip

register(
    "nystromformer",
    config=NystromformerConfig,
    mixer=NystromformerMixer,
    title="Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
    paper="arXiv:2102.03902",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, num_landmarks=4, conv_kernel=5, vocab_size=256),
        "512": {},
    },
    layouts=(LAYOUT,),
)

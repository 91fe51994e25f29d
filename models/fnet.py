"""FNet: tokens mix by a Fourier transform over the sequence and the channels, which has no parameters.

    y = Re F_T(F_D(x)),    F the discrete Fourier transform, unnormalised, over the T tokens and the D channels

All that is trained lies in the channel mixers, the embeddings and the norms. The encoder is BERT's with one map more, a linear
one behind the embeddings' norm.

Paper: Lee-Thorp, Ainslie, Eckstein, Ontanon 2021, arXiv:2105.03824, section 3.2, eq. 3.
"""

import math
from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from zoo.config import ZooConfig
from zoo.kernels.packing import Packing
from zoo.layers import wide
from zoo.layout import Layout, drop, rename
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register
from zoo.terms import bert_answers, bert_body, bert_decoder, expect, foreign_activation, own_activation, same_fields

POOLER = {"act": "tanh", "norm": None}


@strict
class FNetConfig(ZooConfig):
    """The shared fields with the defaults of the published model; the transform has nothing to choose."""

    model_type = "zoo_fnet"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    causal: bool = False
    channel_mixer: str | None = "mlp"
    channel_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    norm: str = "layernorm"
    norm_eps: float = 1e-12
    post_norm: bool = True
    embedding_norm: bool = True
    embedding_projection: bool = True
    max_position_embeddings: int | None = 512
    token_types: int = 4
    head_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    pooler_args: dict | None = field(default_factory=POOLER.copy)
    tie_word_embeddings: bool = True


class FNetMixer(Mixer):
    """It sees its whole sequence at once and has no state. Its outputs grow with `sqrt(T D / 2)`, as published."""

    traits = Traits(causal=False, bidirectional=True, amplifies=True)

    def __init__(self, config: FNetConfig, layer: int):
        super().__init__(config, layer)
        self.width = config.hidden_size

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {}

    def operator_flops(self, length: int) -> int:
        """A real transform of n numbers takes about `5 / 2 n log2 n`."""
        count = length * self.width
        return math.ceil(2.5 * count * math.log2(count))

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        if packing is None:
            return fourier(x), {}
        return torch.cat([fourier(x[:, piece]) for _, piece in packing.split() if piece.stop > piece.start], dim=1), {}


def fourier(x: Tensor) -> Tensor:
    """The real part of the transform of `[B, T, D]` over T and D, computed in float32 at least, in x's dtype.

    Channel D - d of the transform at frequency f is the conjugate of channel d at frequency -f, as x is real: half is computed.
    """
    half = torch.fft.rfftn(wide(x), dim=(1, 2)).real
    mirrored = half[..., 1 : (x.shape[-1] + 1) // 2].flip(1, 2).roll(1, 1)
    return torch.cat([half, mirrored], dim=-1).to(x.dtype)


RENAMED = {"norm_eps": "layer_norm_eps", "token_types": "type_vocab_size", "max_position_embeddings": "max_position_embeddings"}


def from_foreign(foreign: dict) -> dict:
    """Our fields."""
    # untied, transformers stores a second bias that nothing reads, and that we had nowhere to keep
    expect(foreign, use_tpu_fourier_optimizations=False, tie_word_embeddings=True)
    act = {"act": own_activation(foreign["hidden_act"])}
    renamed = {own: foreign[name] for own, name in RENAMED.items()}
    return same_fields(foreign, but=("use_cache",)) | renamed | {"channel_args": act, "head_args": act, "pooler_args": POOLER}


def to_foreign(config: FNetConfig) -> dict:
    """The inverse."""
    return same_fields(config, but=("use_cache",)) | {name: getattr(config, own) for own, name in RENAMED.items()} | {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "hidden_act": foreign_activation((config.channel_args or {}).get("act", "gelu"), dated=True),
    }  # fmt: skip


HEAD = "cls.predictions."
LAYOUT = Layout(
    "fnet", ("fnet",), from_foreign, to_foreign, prefix="fnet.",
    rules=(
        *bert_body("fnet.", "fourier.output.LayerNorm"),
        rename("fnet.embeddings.projection.{weight,bias}", "model.embed_projection.{weight,bias}"),
        rename("fnet.pooler.dense.{weight,bias}", "model.pooler.dense.{weight,bias}"),
        *bert_decoder(True, HEAD + "transform.dense", HEAD + "transform.LayerNorm", HEAD + "decoder", HEAD + "bias"),
        rename("classifier.{weight,bias}", "score.{weight,bias}"),
        *bert_answers(),
        drop("cls.seq_relationship.{weight,bias}", "whether one sentence follows another is asked in pretraining only"),
    ),
    forgets=("tpu_short_seq_length",),
    trials={
        "masked": {"architectures": ["FNetForMaskedLM"]},
        "odd": {"architectures": ["FNetForMaskedLM"], "hidden_act": "gelu", "hidden_size": 27, "type_vocab_size": 1},
        "bare": {"type_vocab_size": 2, "num_hidden_layers": 3, "hidden_act": "relu", "layer_norm_eps": 1e-3},
        "sequences": {"architectures": ["FNetForSequenceClassification"], "num_labels": 3},
        "tokens": {"architectures": ["FNetForTokenClassification"], "num_labels": 5},
        "answers": {"architectures": ["FNetForQuestionAnswering"]},
    },
)  # fmt: skip

register(
    "fnet",
    config=FNetConfig,
    mixer=FNetMixer,
    title="FNet: Mixing Tokens with Fourier Transforms",
    paper="arXiv:2105.03824",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, vocab_size=256, token_types=2),
        "base": {},
        "large": dict(hidden_size=1024, num_hidden_layers=24),
    },
    layouts=(LAYOUT,),
)

"""BigBird: softmax attention of blocks over their neighbours, the first and the last block, and a few blocks drawn at random.

    o_t = attention of q_t over { k_j, v_j : b(j) in {0, N - 1} or |b(t) - b(j)| <= 1 or b(j) in R_b(t) },    b(t) = floor(t / S)
    o_t = attention of q_t over all                                                        b(t) in {0, N - 1}

for N blocks of S tokens. R_i are r other blocks for block i, fixed for each layer and head. A sequence of no more than
`(5 + 2 r) S` tokens has too few blocks for that, and all its tokens see each other.

transformers draws blocks only while it trains; it evaluates with the first block counting r times more in the place of R_i
(`drawn=False`), and so do we with its checkpoints.

Paper: Zaheer et al. 2020, arXiv:2007.14062: section 2, internal transformer construction (ITC), blocks as in appendix D.
"""

from dataclasses import field

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig
from zoo.kernels.attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import merge_heads, split_heads
from zoo.layout import Layout, Rule, drop, rename
from zoo.mixer import Mixer, State, Traits
from zoo.registry import register
from zoo.terms import (
    bert_attention,
    bert_body,
    bert_classifiers,
    bert_decoder,
    expect,
    foreign_activation,
    given,
    own_activation,
    same_fields,
)


@strict
class BigBirdConfig(ZooConfig):
    """The blocks and how many of them are drawn."""

    model_type = "zoo_big_bird"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    causal: bool = False
    channel_mixer: str | None = "mlp"
    channel_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    norm: str = "layernorm"
    norm_eps: float = 1e-12
    post_norm: bool = True
    embedding_norm: bool = True
    max_position_embeddings: int | None = 4096
    head_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh"})
    classifier_args: dict | None = field(default_factory=lambda: {"act": "gelu_tanh", "norm": None})
    answer_block: bool = True
    num_heads: int = 12
    block_size: int | None = 64  # S; None: every token sees all
    num_random_blocks: int = 3  # r
    drawn: bool = True  # False: the first block stands r times in the place of the random ones
    qkv_bias: bool = True

    def validate_blocks(self):
        """Heads must divide the width; blocks hold something."""
        self.divide("hidden_size", "num_heads")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"BigBirdConfig: block_size={self.block_size} must be positive, or None for full attention")
        if self.num_random_blocks < 0:
            raise ValueError(f"BigBirdConfig: num_random_blocks={self.num_random_blocks} cannot be negative")


class BigBirdMixer(Mixer):
    """It sees its whole sequence at once and has no state."""

    traits = Traits(causal=False, bidirectional=True)
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: BigBirdConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.keys = config.hidden_size, config.num_heads, config.divide("hidden_size", "num_heads")
        self.size, self.drawn, self.randoms = config.block_size, config.drawn, config.num_random_blocks
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.out_proj = nn.Linear(width, width)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        return {}

    def all_seen(self, length: int) -> bool:
        """Whether a sequence is so short that nothing is left out."""
        return self.size is None or length <= (5 + 2 * self.randoms) * self.size

    def operator_flops(self, length: int) -> int:
        if self.all_seen(length):
            return flops(length * length, self.heads, self.keys, self.keys)
        blocks = -(-length // self.size)
        last = length - (blocks - 1) * self.size  # tokens in the last block
        inner = (blocks - 2) * ((4 + self.randoms) * self.size + last) - 2 * self.size  # keys over all blocks between first and last
        return flops((self.size + last) * length + self.size * inner, self.heads, self.keys, self.keys)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.all_seen(x.shape[1] if packing is None else max(packing.lengths)):
            o, _ = ops.attention(q, k, v, causal=False, packing=packing)
        elif packing is None:
            o = self.attend(q, k, v, torch.full((x.shape[0],), x.shape[1], device=x.device))
        else:
            o = self.attend_packed(q, k, v, packing)
        return self.out_proj(merge_heads(o)), {}

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """Sequences of which some are long: these together, and the short ones together."""
        rows = {short: [n for n, length in enumerate(packing.lengths) if self.all_seen(length) == short] for short in (False, True)}
        lengths, order = packing.cu_seqlens.diff(), torch.tensor(rows[False] + rows[True], device=q.device)
        q, k, v = (packing.pad(x)[order].split([len(rows[False]), len(rows[True])]) for x in (q, k, v))
        parts = [self.attend(q[0], k[0], v[0], lengths[order[: len(rows[False])]])]
        if rows[True]:
            at = torch.arange(q[1].shape[1], device=q[1].device).expand(len(rows[True]), -1)
            at = at.masked_fill(at >= lengths[order[len(rows[False]) :]].unsqueeze(1), -1)
            parts.append(ops.attention(q[1], k[1], v[1], causal=False, q_positions=at, kv_positions=at)[0])
        return packing.unpad(torch.cat(parts)[order.argsort()])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        """Long sequences of these lengths `[B]`, in rows `[B, T, H, K]`."""
        batch, length = q.shape[:2]
        q, k, v = (nn.functional.pad(x, (0, 0, 0, 0, 0, -length % self.size)) for x in (q, k, v))
        at = torch.arange(q.shape[1], device=q.device).expand(batch, -1)
        present, last = at < lengths.unsqueeze(1), (lengths - 1) // self.size
        o, _ = ops.block_attention(q, k, v, self.chosen(last, q.shape[1] // self.size), size=self.size, present=present)
        asked = torch.cat([at[:, : self.size], last.unsqueeze(1) * self.size + at[:, : self.size]], dim=1)  # those that see all
        rows = torch.arange(batch, device=q.device).unsqueeze(1)
        seen = at.masked_fill(~present, -1)
        answer, _ = ops.attention(q[rows, asked], k, v, causal=False, q_positions=asked, kv_positions=seen)
        return o.index_put((rows, asked), answer)[:, :length]

    def chosen(self, last: Tensor, blocks: int) -> Tensor:
        """The blocks that each block sees, `[B, N, M]`, or `[B, H, N, M]` where they are drawn; `last` `[B]`: number of the last."""
        own = torch.arange(blocks, device=last.device)
        last = last[:, None]
        near = torch.stack([own - 1, own, own + 1], dim=-1).expand(len(last), -1, -1)
        near = near.masked_fill((near <= 0) | (near >= last.unsqueeze(-1)), -1)  # the first and the last are there already
        edges = torch.stack([torch.zeros_like(last), last], dim=-1).expand(-1, blocks, -1)
        listed = torch.cat([edges, near], dim=-1)
        if not self.drawn:
            return torch.cat([listed, listed.new_zeros(*listed.shape[:2], self.randoms)], dim=-1)
        free = ((own - own.unsqueeze(1)).abs() > 1) & (own > 0) & (own < last.unsqueeze(-1))  # [B, N, N]: neither near nor an edge
        heads = self.layer * self.heads + torch.arange(self.heads, device=last.device)
        order = scramble(scramble(scramble(heads)[:, None, None] + own.unsqueeze(1)) + own)  # [H, N, N]
        best, drawn = order.masked_fill(~free.unsqueeze(1), -1).topk(self.randoms, dim=-1)
        return torch.cat([listed.unsqueeze(1).expand(-1, self.heads, -1, -1), drawn.masked_fill(best < 0, -1)], dim=-1)


def scramble(x: Tensor) -> Tensor:
    """Integers that look random, from 0 to 2^31 - 1, the same for the same x wherever it lies."""
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = (x ^ (x >> 16)) * factor & 0x7FFFFFFF
    return x ^ (x >> 16)


RENAMED = {
    "norm_eps": "layer_norm_eps", "num_heads": "num_attention_heads", "token_types": "type_vocab_size", "qkv_bias": "use_bias",
    "max_position_embeddings": "max_position_embeddings", "num_random_blocks": "num_random_blocks",
}  # fmt: skip


def from_big_bird(foreign: dict) -> dict:
    """Fields of a BigBirdConfig for a config of transformers."""
    expect(foreign, is_decoder=False, add_cross_attention=False)
    marks = (foreign.get("architectures") or [""])[0].endswith("ForQuestionAnswering")  # without a pooler
    act, full = own_activation(foreign["hidden_act"]), foreign["attention_type"] == "original_full"
    if not full:
        expect(foreign, attention_type="block_sparse")
    return same_fields(foreign) | {own: foreign[name] for own, name in RENAMED.items()} | {
        "block_size": None if full else foreign["block_size"],
        "drawn": False,
        "embedding_scale": foreign["hidden_size"] ** 0.5 if foreign["rescale_embeddings"] else 1.0,
        "channel_args": {"act": act},
        "head_args": {"act": act},
        "pooler_args": None if marks else {"act": "tanh", "norm": None},
        "classifier_args": {"act": act, "norm": None},
    }  # fmt: skip


def to_big_bird(config: BigBirdConfig) -> dict:
    """The inverse."""
    given(config, "head_args", "classifier_args")
    act = (config.channel_args or {}).get("act", "gelu")
    full = {"attention_type": "original_full"}
    return same_fields(config) | {name: getattr(config, own) for own, name in RENAMED.items()} | {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "hidden_act": foreign_activation(act, dated=True),
        "rescale_embeddings": config.embedding_scale != 1.0,
    } | (full if config.block_size is None else {"attention_type": "block_sparse", "block_size": config.block_size})  # fmt: skip


def big_bird_rules(config: BigBirdConfig) -> tuple[Rule, ...]:
    head = [f"cls.predictions.{part}" for part in ("transform.dense", "transform.LayerNorm", "decoder", "bias")]
    return (
        *bert_body("bert."),
        *bert_attention("bert."),
        *bert_decoder(config.tie_word_embeddings, *head),
        *bert_classifiers(),
        rename("qa_classifier.{intermediate,output}.dense.{weight,bias}", "answer_block.channel_mixer.{up,down}_proj.{weight,bias}"),
        rename("qa_classifier.output.LayerNorm.{weight,bias}", "answer_block.channel_norm.{weight,bias}"),
        rename("qa_classifier.qa_outputs.{weight,bias}", "answer.{weight,bias}"),
        rename("bert.pooler.{weight,bias}", "model.pooler.dense.{weight,bias}"),
        drop("cls.seq_relationship.{weight,bias}", "tells in pretraining whether two texts belong together"),
    )


SPARSE = {"block_size": 2, "num_random_blocks": 1}
LAYOUT = Layout(
    "big_bird", ("big_bird",), from_big_bird, to_big_bird, big_bird_rules, prefix="bert.",
    forgets=("sep_token_id",),
    trials={
        "masked": SPARSE | {"architectures": ["BigBirdForMaskedLM"]},
        "full": {"architectures": ["BigBirdForMaskedLM"], "attention_type": "original_full", "hidden_act": "relu"},
        "bare": {"block_size": 3, "num_random_blocks": 2, "use_bias": False, "num_attention_heads": 2, "hidden_act": "gelu"},
        "sequences": SPARSE | {"architectures": ["BigBirdForSequenceClassification"], "rescale_embeddings": True},
        "tokens": {"block_size": 4, "num_random_blocks": 3, "architectures": ["BigBirdForTokenClassification"], "type_vocab_size": 3},
    },
)  # fmt: skip
PUBLISHED = dict(
    vocab_size=50358, tie_word_embeddings=True, token_types=2, drawn=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    pooler_args={"act": "tanh", "norm": None},
)  # fmt: skip

register(
    "big_bird",
    config=BigBirdConfig,
    mixer=BigBirdMixer,
    title="Big Bird: Transformers for Longer Sequences",
    paper="arXiv:2007.14062",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, block_size=2, num_random_blocks=1, vocab_size=256),
        "base": PUBLISHED,
        "large": PUBLISHED | dict(hidden_size=1024, num_hidden_layers=24, num_heads=16),
    },
    layouts=(LAYOUT,),
)

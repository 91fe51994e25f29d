"""RetNet: linear attention that decays at a fixed rate per head.

    S_t = gamma_h S_{t-1} + k_t v_t^T,    o_t = q_t S_t / sqrt(K),    gamma_h = 1 - 2^(-5 - h)
    y_t = (swish(W_G x_t) * groupnorm_h(o_t)) W_O

with q and k rotated by their positions (the factor exp(i n theta) of eq. 5).

Paper: Sun, Dong, Huang, Ma, Xia, Xue, Wang, Wei 2023, arXiv:2307.08621: recurrence eq. 6, heads, norm and gate eq. 8. The
factors of section 2.2 that rescale retention scores cancel in the norm over each head, but for its epsilon.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from zoo import ops
from zoo.config import ZooConfig, nearest
from zoo.fla import GATED_MLP, SHELL, UNFUSED, fla_layout, layer
from zoo.kernels.checks import accumulator
from zoo.kernels.linear_attention import flops
from zoo.kernels.packing import Packing
from zoo.layers import GatedNorm, merge_heads, projected_sizes, rotary_table, rotate, split_heads, token_positions
from zoo.layout import Layout, Pattern, Rule, rename
from zoo.mixer import Mixer, State
from zoo.registry import register
from zoo.terms import inner_size


@strict
class RetNetConfig(ZooConfig):
    """Sizes of the heads, and the two choices in which published weights differ."""

    model_type = "zoo_retnet"

    channel_mixer: str | None = "mlp"
    norm: str = "layernorm"

    num_heads: int = 8  # H
    num_kv_heads: int | None = None  # G, each shared by H / G query heads, which decay by themselves; None: one for each
    key_ratio: float = 1.0  # K = D * key_ratio / H
    value_ratio: float = 2.0  # V = D * value_ratio / H
    rope_theta: float = 10000.0  # the slowest angle turns by 1 / rope_theta per token
    rope_inclusive: bool = True  # angles from 1 to 1 / rope_theta, both included (the authors' code); False: RoPE's, without the last
    norm_weight: bool = True  # a weight [V] in the norm over each head

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None and self.channel_mixer == "mlp":
            self.intermediate_size = 2 * self.hidden_size  # half as wide as usual: the values take the parameters
        super().__post_init__(**kwargs)

    def validate_heads(self):
        """Heads must divide evenly and have channels to turn."""
        keys = projected_sizes(self)[0] // self.num_heads
        if keys % 2 or keys < 4:
            raise ValueError(f"RetNetConfig: a head has {keys} key channels; rotation needs an even number of 4 channels or more")


class RetNetMixer(Mixer):
    """State: `memory` `[B, H, K, V]`, and `length` `[B]`, the tokens seen."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "out_proj")

    def __init__(self, config: RetNetConfig, layer: int):
        super().__init__(config, layer)
        width, self.heads, self.groups = config.hidden_size, config.num_heads, config.num_kv_heads or config.num_heads
        q, k, v = projected_sizes(config)
        self.keys, self.values = q // self.heads, v // self.groups
        # angles theta^(-i / (K/2 - 1)) are RoPE's theta^(-i / (K/2)) of a larger theta
        self.theta = config.rope_theta ** (self.keys / (self.keys - 2)) if config.rope_inclusive else config.rope_theta
        self.q_proj = nn.Linear(width, q, bias=False)
        self.k_proj = nn.Linear(width, k, bias=False)
        self.v_proj = nn.Linear(width, v, bias=False)
        self.gate_proj = nn.Linear(width, self.heads * self.values, bias=False)
        self.norm = GatedNorm(self.values, eps=config.norm_eps, elementwise=config.norm_weight)
        self.out_proj = nn.Linear(self.heads * self.values, width, bias=False)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype = torch.float32, device="cpu") -> State:
        memory = torch.zeros(batch, self.heads, self.keys, self.values, dtype=accumulator(dtype), device=device)
        return {"memory": memory, "length": torch.zeros(batch, dtype=torch.long, device=device)}

    def operator_flops(self, length: int) -> int:
        return flops(length, self.heads, self.keys, self.values)

    def forward(self, x: Tensor, state: State | None = None, packing: Packing | None = None) -> tuple[Tensor, State]:
        q, gate = (split_heads(p(x), self.heads) for p in (self.q_proj, self.gate_proj))
        k, v = (split_heads(p(x), self.groups) for p in (self.k_proj, self.v_proj))
        seen = state["length"] if state else None
        table = rotary_table(token_positions(x, seen, packing), self.keys, self.theta)
        log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(self.heads, device=x.device)))
        memory = state["memory"] if state else None
        o, memory = ops.linear_attention(rotate(q, table), rotate(k, table), v, log_decay, state=memory, packing=packing)
        added = torch.full((x.shape[0],), x.shape[1], device=x.device) if packing is None else packing.cu_seqlens.diff()
        return self.out_proj(merge_heads(self.norm(o, gate))), {"memory": memory, "length": added if seen is None else seen + added}


FLA = fla_layout(
    "retnet",
    "RetNet",
    (
        layer("attn.{q,k,v,g,o}_proj.weight", "mixer.{q,k,v,gate,out}_proj.weight"),
        layer("attn.g_norm_swish_gate.weight", "mixer.norm.weight"),
        *GATED_MLP,
        *SHELL,
    ),
    same={
        "num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "key_ratio": "expand_k", "value_ratio": "expand_v",
        "norm_weight": "elementwise_affine",
    },
    defaults={
        "num_heads": 8, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 2.0, "elementwise_affine": True, "hidden_ratio": 2,
    },
    only={"feature_map": (None,), "use_output_gate": (True,)},  # its models have no short convolution, whatever use_short_conv says
    read=lambda foreign: {"rope_inclusive": False},
    aliases=(UNFUSED,),
    trials={
        "plain": {"num_heads": 4, "expand_v": 1.5},
        "weightless": {"num_heads": 2, "elementwise_affine": False},
        "grouped": {"num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5},
    },
)  # fmt: skip


DEFAULTS = {
    "decoder_embed_dim": 768, "decoder_value_embed_dim": 1280, "decoder_retention_heads": 3, "decoder_ffn_embed_dim": 1280,
    "decoder_layers": 12, "activation_fn": "gelu", "layernorm_eps": 1e-6, "no_scale_embedding": True, "layernorm_embedding": False,
    "share_decoder_input_output_embed": False, "vocab_size": -1, "architectures": ["ForCausalLM"],
}  # fmt: skip
ONLY = {"decoder_normalize_before": True, "deepnorm": False, "moe_freq": 0, "multiway": False, "no_output_layer": False}
PASSED = {  # what steers training, chooses between forms of the same function, or belongs to other models
    "dropout", "drop_path_rate", "activation_dropout", "subln", "max_target_positions", "checkpoint_activations", "fsdp", "ddp_rank",
    "chunkwise_recurrent", "recurrent_chunk_size", "rel_pos_buckets", "max_rel_pos", "xpos_rel_pos", "xpos_scale_base",
    "moe_top1_expert", "moe_expert_count", "moe_gating_use_fp32", "moe_eval_capacity_token_fraction", "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping", "use_xmoe", "encoder_normalize_before",
}  # fmt: skip
SAME = {
    "hidden_size": "decoder_embed_dim", "num_heads": "decoder_retention_heads", "intermediate_size": "decoder_ffn_embed_dim",
    "num_hidden_layers": "decoder_layers", "norm_eps": "layernorm_eps", "embedding_norm": "layernorm_embedding",
    "tie_word_embeddings": "share_decoder_input_output_embed", "vocab_size": "vocab_size",
}  # fmt: skip
ACTIVATIONS = {"swish": "silu", "gelu": "gelu", "relu": "relu"}


def read_torchscale(foreign: dict) -> dict:
    """Our fields for the arguments of a RetNetConfig of torchscale."""
    if unknown := {name for name in foreign.keys() - DEFAULTS.keys() - ONLY.keys() - PASSED if not name.startswith("_")}:
        raise ValueError(f"a RetNetConfig of torchscale has no field {sorted(unknown)[0]!r}{nearest(min(unknown), DEFAULTS)}")
    for name, value in ONLY.items():
        if foreign.get(name, value) != value:
            raise ValueError(f"a torchscale RetNet with {name}={foreign[name]!r} is not supported, only {name}={value!r}")
    if foreign["activation_fn"] not in ACTIVATIONS:
        raise ValueError(f"activation_fn {foreign['activation_fn']!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    width, values = foreign["decoder_embed_dim"], foreign["decoder_value_embed_dim"]
    ratio = values / width if int(width * (values / width)) == values else (values + 0.5) / width  # it is rounded down
    return {own: foreign[name] for own, name in SAME.items()} | {
        "value_ratio": ratio, "norm": "rmsnorm", "norm_weight": False, "channel_mixer": "swiglu",
        "channel_args": {"act": ACTIVATIONS[foreign["activation_fn"]]},
        "embedding_scale": 1.0 if foreign["no_scale_embedding"] else width**0.5,
    }  # fmt: skip


def write_torchscale(config: RetNetConfig) -> dict:
    """The inverse."""
    act = (config.channel_args or {}).get("act", "silu")
    return {name: getattr(config, own) for own, name in SAME.items()} | {
        "decoder_value_embed_dim": int(config.hidden_size * config.value_ratio),
        "decoder_ffn_embed_dim": inner_size(config),
        "activation_fn": {own: theirs for theirs, own in ACTIVATIONS.items()}.get(act, act),
        "no_scale_embedding": config.embedding_scale == 1.0,
    }  # fmt: skip


def paired(foreign: str, own: str) -> Rule:
    """A projection to heads that turn channels 2 i and 2 i + 1 together, where ours turn i and i + K / 2."""
    return Rule(
        (Pattern(foreign),), (Pattern(own),),
        lambda x, shapes, config: [x[0].unflatten(0, (config.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)],
        lambda x, config: [x[0].unflatten(0, (config.num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)],
    )  # fmt: skip


def tables(config: RetNetConfig) -> list[Tensor]:
    """The angles and log-decays that torchscale stores beside the weights."""
    angles = 1.0 / 10000 ** torch.linspace(0, 1, config.hidden_size // config.num_heads // 2)
    return [angles.repeat_interleave(2), torch.log(1 - 2 ** (-5 - torch.arange(config.num_heads, dtype=torch.float32)))]


def without_tables(x: list[Tensor], shapes, config: RetNetConfig) -> list[Tensor]:
    """The last norm's weight; the stored tables must be those we compute."""
    norm, *stored = x
    for own, theirs in zip(tables(config), stored, strict=True):
        if own.shape != theirs.shape or not torch.allclose(own, theirs.float(), rtol=1e-2, atol=0):
            raise ValueError("the stored angles or decays are not those of the paper, the only ones supported")
    return [norm]


TORCHSCALE = Layout(
    "retnet-torchscale", (), read_torchscale, write_torchscale, prefix="", file="pytorch_model.bin",
    matches=lambda foreign: "decoder_retention_heads" in foreign,
    complete=lambda foreign: DEFAULTS | foreign,
    rules=(
        rename("embed_tokens.weight", "model.embed_tokens.weight"),
        rename("layernorm_embedding.weight", "model.embed_norm.weight"),
        layer("{retention_layer_norm,final_layer_norm}.weight", "{mixer,channel}_norm.weight", "layers.{}."),
        paired("layers.{}.retention.{q,k}_proj.weight", "model.layers.{}.mixer.{q,k}_proj.weight"),
        layer("retention.{v,g,out}_proj.weight", "mixer.{v,gate,out}_proj.weight", "layers.{}."),
        layer("ffn.{fc1,gate,fc2}.weight", "channel_mixer.{gate,up,down}_proj.weight", "layers.{}."),
        Rule(
            tuple(map(Pattern, ("layer_norm.weight", "retnet_rel_pos.angle", "retnet_rel_pos.decay"))), (Pattern("model.norm.weight"),),
            without_tables, lambda x, config: [x[0], *(table.to(x[0].dtype) for table in tables(config))],
        ),
        rename("output_projection.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    ),
    trials={
        name: {"decoder_embed_dim": 32, "decoder_ffn_embed_dim": 44, "decoder_layers": 2, "vocab_size": 97} | fields
        for name, fields in {
            "plain": {"decoder_retention_heads": 4, "decoder_value_embed_dim": 52},
            "tied": {"decoder_retention_heads": 2, "decoder_value_embed_dim": 32, "share_decoder_input_output_embed": True,
                     "activation_fn": "swish"},
            "scaled": {"decoder_retention_heads": 2, "decoder_value_embed_dim": 48, "layernorm_embedding": True,
                       "no_scale_embedding": False, "layernorm_eps": 1e-3},
        }.items()
    },
)  # fmt: skip


register(
    "retnet",
    config=RetNetConfig,
    mixer=RetNetMixer,
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    paper="arXiv:2307.08621",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=256),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=4, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_heads=8),
        "2.7b": dict(hidden_size=2560, num_hidden_layers=32, num_heads=10),
    },
    layouts=(FLA, TORCHSCALE),
)

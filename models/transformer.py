"""The transformer: softmax attention with rotary positions and grouped heads, as Llama, Mistral and Qwen have it.

    o_t = sum_{j <= t} softmax_j(q_t k_j / sqrt(K)) v_j,    q and k rotated by their positions,    y_t = W_O o_t

Papers: Vaswani et al. 2017, arXiv:1706.03762 (eq. 1); rotary positions Su et al. 2021, arXiv:2104.09864; grouped heads
Ainslie et al. 2023, arXiv:2305.13245; the block Touvron et al. 2023, arXiv:2302.13971. Sliding window as in Mistral,
arXiv:2310.06825; sinks after StreamingLLM, arXiv:2309.17453, at their own positions.
"""

from functools import partial

from huggingface_hub.dataclasses import strict

from zoo.attending import RotaryAttention
from zoo.config import ZooConfig
from zoo.fla import GATED_MLP, SHELL, fla_layout, layer
from zoo.layers import check_rope_scaling
from zoo.layout import Layout, drop, rename, split
from zoo.registry import register
from zoo.terms import SAME, foreign_activation, inner_size, own_activation


@strict
class TransformerConfig(ZooConfig):
    """Sizes of the heads, and what sets one family of transformers apart from another."""

    model_type = "zoo_transformer"

    num_heads: int = 16
    num_kv_heads: int | None = None  # G, each shared by H / G query heads; None: one for each
    head_dim: int | None = None  # K; None: D / H
    rope_theta: float | None = 10000.0  # base of the rotary angles; None: no rotary positions
    rope_fraction: float = 1.0  # share of a head's channels that turn
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", "factor": ...}, keys as in transformers
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool | float = False  # an RMSNorm over each head of q and k, before rotation; a number: with this epsilon, not norm_eps
    window: int | None = None  # how many tokens are seen, the own included; None: all
    sinks: int = 0  # first tokens that stay visible outside the window
    softcap: float | None = None  # c tanh(logits / c) before the softmax

    def validate_heads(self):
        """Heads must divide evenly, and the rule of visibility must be one."""
        if self.head_dim is None:
            self.divide("hidden_size", "num_heads")
        if self.num_kv_heads is not None:
            self.divide("num_heads", "num_kv_heads")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"TransformerConfig: window={self.window} must be positive and goes with causal=True only; None is no window")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ValueError(f"TransformerConfig: sinks={self.sinks} needs a window beside it, and cannot be negative")

    def validate_rope_scaling(self):
        """The scaling must be one that `zoo.layers.rotary_table` knows."""
        check_rope_scaling(self.rope_scaling)


class TransformerMixer(RotaryAttention):
    """Softmax attention; the state is that of `AttentionMixer`."""

    def __init__(self, config: TransformerConfig, layer: int):
        keys = config.head_dim or config.divide("hidden_size", "num_heads")
        turning = int(keys * config.rope_fraction) // 2 * 2
        super().__init__(
            config, layer, heads=config.num_heads, groups=config.num_kv_heads or config.num_heads, keys=keys,
            rope=None if config.rope_theta is None else (turning, config.rope_theta, config.rope_scaling), qkv_bias=config.qkv_bias,
            out_bias=config.out_bias, qk_norm=config.qk_norm, window=config.window, sinks=config.sinks, softcap=config.softcap,
        )  # fmt: skip


RENAMED = {"norm_eps": "rms_norm_eps", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}


def from_llama(foreign: dict) -> dict:
    """Fields of a TransformerConfig for a config of Llama, Mistral, Qwen2, Qwen3 or Phi-3."""
    fields = {name: foreign[name] for name in SAME} | {own: foreign.get(name) for own, name in RENAMED.items()}
    rope = dict(foreign["rope_parameters"])
    fields["rope_theta"] = float(rope.pop("rope_theta"))
    fields["rope_fraction"] = float(rope.pop("partial_rotary_factor", 1.0))
    if fields["rope_fraction"] != 1.0 and foreign["model_type"] != "phi3":
        raise ValueError(f"a {foreign['model_type']} with partial_rotary_factor other than 1 is not supported")
    turning = int((fields["head_dim"] or foreign["hidden_size"] // foreign["num_attention_heads"]) * fields["rope_fraction"])
    if turning % 2:
        raise ValueError(f"partial_rotary_factor={fields['rope_fraction']} turns {turning} channels of a head; it must be an even number")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else {n: v for n, v in rope.items() if n != "type"}
    check_rope_scaling(fields["rope_scaling"])
    args = {"act": own_activation(foreign["hidden_act"]), "bias": foreign.get("mlp_bias", False)}
    fields["channel_args"] = {n: v for n, v in args.items() if v not in ("silu", False)} or None
    biased = foreign.get("attention_bias", False)
    fields |= {"qkv_bias": biased or foreign["model_type"] == "qwen2", "out_bias": biased, "qk_norm": foreign["model_type"] == "qwen3"}
    kinds = set(foreign.get("layer_types") or [])
    if len(kinds) > 1:
        raise ValueError(f"layer_types mixes {sorted(kinds)}; a transformer has one kind of layer, build a hybrid for several")
    window = foreign.get("sliding_window")
    return fields | {"window": None if kinds == {"full_attention"} else window}


def to_llama(config: TransformerConfig, kind: str) -> dict:
    """The inverse, for a model type. What it cannot say is left out, and noticed by mapping back."""
    if config.rope_theta is None or not config.causal:
        raise ValueError(
            f"{kind} has rotary positions and is causal; this model has rope_theta={config.rope_theta}, causal={config.causal}"
        )
    args = config.channel_args or {}
    fields = {name: getattr(config, name) for name in SAME} | {name: getattr(config, own) for own, name in RENAMED.items()}
    fields["num_key_value_heads"] = config.num_kv_heads or config.num_heads
    fields["head_dim"] = config.head_dim or config.divide("hidden_size", "num_heads")
    inner = inner_size(config)
    fields |= {"intermediate_size": inner, "rope_parameters": {"rope_type": "default"} | (config.rope_scaling or {})}
    fields["rope_parameters"]["rope_theta"] = config.rope_theta
    if kind == "phi3":
        fields["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    fields["hidden_act"] = foreign_activation(args.get("act", "silu"))
    if kind == "llama":
        fields |= {"mlp_bias": args.get("bias", False)}
    if kind in ("llama", "qwen3"):
        fields |= {"attention_bias": config.out_bias}
    if kind in ("mistral", "phi3"):
        fields |= {"sliding_window": config.window}
    if kind in ("qwen2", "qwen3") and config.window is not None:
        fields |= {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0}
    return fields


APART = (
    rename("model.layers.{}.self_attn.{q,k,v,o}_proj.{weight,bias}", "model.layers.{}.mixer.{q,k,v,out}_proj.{weight,bias}"),
    rename("model.layers.{}.self_attn.{q,k}_norm.weight", "model.layers.{}.mixer.{q,k}_norm.weight"),
    rename("model.layers.{}.mlp.{gate,up,down}_proj.{weight,bias}", "model.layers.{}.channel_mixer.{gate,up,down}_proj.{weight,bias}"),
)
FUSED = (  # Phi-3 (arXiv:2404.14219)
    split("model.layers.{}.self_attn.qkv_proj.weight", [f"model.layers.{{}}.mixer.{name}_proj.weight" for name in "qkv"]),
    split("model.layers.{}.mlp.gate_up_proj.weight", [f"model.layers.{{}}.channel_mixer.{name}_proj.weight" for name in ("gate", "up")]),
    rename("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mixer.out_proj.weight"),
    rename("model.layers.{}.mlp.down_proj.weight", "model.layers.{}.channel_mixer.down_proj.weight"),
)
AROUND = (
    rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
    rename("model.layers.{}.{input,post_attention}_layernorm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename("model.norm.weight", "model.norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
    rename("score.{weight,bias}", "score.{weight,bias}"),
    drop("model.layers.{}.self_attn.rotary_emb.inv_freq", "follows from rope_theta"),
)
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TRIALS = {
    "llama": {
        "plain": {},
        "tied-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
        "stretched": {"rope_parameters": STRETCHED, "num_key_value_heads": 4},
        "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, "head_dim": 10, "hidden_size": 36},
    },
    "mistral": {"full": {"sliding_window": None, "head_dim": 14}, "window": {"sliding_window": 5}},
    "qwen2": {
        "tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    },
    "qwen3": {
        "plain": {"head_dim": 8, "rms_norm_eps": 1e-3},
        "biased": {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1},
        "judge": {"head_dim": 8, "architectures": ["Qwen3ForSequenceClassification"], "num_labels": 5},
    },
    "phi3": {
        "plain": {},
        "window": {"sliding_window": 5, "num_key_value_heads": 4, "tie_word_embeddings": True},
        "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75}},
    },
}
LAYOUTS = tuple(
    Layout(kind, (kind,), from_llama, partial(to_llama, kind=kind), (FUSED if kind == "phi3" else APART) + AROUND,
           trials=trials, forgets=("use_sliding_window", "max_window_layers", "original_max_position_embeddings"))
    for kind, trials in TRIALS.items()
)  # fmt: skip


def read_fla(foreign: dict) -> dict:
    """Further fields for a config of flash-linear-attention, whose norms of queries and keys have an epsilon of their own."""
    epsilon = True if foreign["norm_eps"] == 1e-5 else 1e-5
    return {"head_dim": foreign["hidden_size"] // foreign["num_heads"], "qk_norm": foreign["qk_norm"] and epsilon}


FLA = fla_layout(
    "transformer",
    "Transformer",
    (
        layer("attn.{q,k,v,o}_proj.{weight,bias}", "mixer.{q,k,v,out}_proj.{weight,bias}"),
        layer("attn.{q,k}_norm.weight", "mixer.{q,k}_norm.weight"),
        *GATED_MLP,
        *SHELL,
    ),
    same={
        "num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "qkv_bias": "qkv_bias", "window": "window_size",
        "rope_theta": "rope_theta",
    },
    defaults={
        "num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False, "window_size": None, "rope_theta": 10000.0,
    },
    only={"elementwise_affine": (True,)},
    read=read_fla,
    write=lambda config: {"qk_norm": bool(config.qk_norm)},
    trials={
        "grouped": {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5},
        "normed": {"num_heads": 2, "qk_norm": True, "norm_eps": 1e-6},
    },
)  # fmt: skip


register(
    "transformer",
    config=TransformerConfig,
    mixer=TransformerMixer,
    title="LLaMA: Open and Efficient Foundation Language Models",
    paper="arXiv:2302.13971",
    presets={
        "tiny": dict(hidden_size=32, num_hidden_layers=2, num_heads=4, num_kv_heads=2, vocab_size=256),
        "smollm2-135m": dict(
            hidden_size=576, num_hidden_layers=30, num_heads=9, num_kv_heads=3, intermediate_size=1536, vocab_size=49152,
            rope_theta=100000.0, tie_word_embeddings=True,
        ),
        "340m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16, tie_word_embeddings=True),
        "1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_heads=32),
        "sliding-window-1.3b": dict(hidden_size=2048, num_hidden_layers=24, num_heads=32, window=2048),
    },
    layouts=(*LAYOUTS, FLA),
)  # fmt: skip

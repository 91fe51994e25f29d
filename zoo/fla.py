"""What the checkpoints of flash-linear-attention have in common: fields of the config, their defaults, keys around the mixers.

Its library may be absent: a config is read as it is written, with the defaults its version 0.6.0 documents. Fields that only
choose kernels (`attn_mode`, `fuse_*`) or steer training say nothing about the function, and are passed over.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Size, Tensor

from zoo import layout
from zoo.config import ZooConfig
from zoo.layout import Layout, Pattern, Rule, drop, rename
from zoo.terms import inner_size

DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 24, "norm_eps": 1e-6, "initializer_range": 0.02,
    "tie_word_embeddings": False, "use_cache": True, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDTHS = {"hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish"}  # of models with a gated MLP
OLD = {"rms_norm_eps": "norm_eps", "exapnd_k": "expand_k", "exapnd_v": "expand_v"}  # earlier or misspelt names of fields
ONLY = {"attn": (None,), "attnres_block_size": (None,)}  # attention among the layers makes a hybrid, residuals over depth are not ours
SILU = ("swish", "silu")
BODY = "model.layers.{}."
UNFUSED = (BODY + "attn.g_norm.weight", BODY + "attn.g_norm_swish_gate.weight")  # the output norm, where `fuse_norm` is false
CONVOLUTION = {"use_short_conv": True, "conv_size": 4}  # of queries, keys and values


def layer(foreign: str, own: str, prefix: str = BODY) -> Rule:
    """`rename` for keys of a layer."""
    return rename(prefix + foreign, BODY + own)


SHELL = (
    rename("model.embeddings.weight", "model.embed_tokens.weight"),
    layer("attn_norm.{weight,bias}", "mixer_norm.{weight,bias}"),
    rename("model.norm.{weight,bias}", "model.norm.{weight,bias}"),
    rename("lm_head.weight", "lm_head.weight"),
    rename("score.{weight,bias}", "score.{weight,bias}"),
)
GATED_MLP = (
    layer("mlp_norm.weight", "channel_norm.weight"),
    layer("mlp.{gate,up,down}_proj.weight", "channel_mixer.{gate,up,down}_proj.weight"),
)
RWKV_SHELL = (
    rename("model.layers.0.pre_norm.{weight,bias}", "model.embed_norm.{weight,bias}"),
    layer("ffn_norm.{weight,bias}", "channel_norm.{weight,bias}"),
    *SHELL,
)


def from_fla(foreign: dict) -> bool:
    """Whether a config is of this library, where others use its model type too."""
    return "fuse_norm" in foreign or "fuse_cross_entropy" in foreign


def complete(foreign: dict, defaults: dict) -> dict:
    """The config under today's names, with what it leaves out."""
    return defaults | {OLD.get(name, name): value for name, value in foreign.items()}


def rounded_up(width: float, multiple: int) -> int:
    """The next multiple of a width, whose fraction does not count."""
    return -(-int(width) // multiple) * multiple


def read_fields(foreign: dict, same: dict, defaults: dict, only: dict, further: Callable[[dict], dict]) -> dict:
    """Our fields for a completed config; see `fla_layout`."""
    for name, values in only.items():
        if name in foreign and foreign[name] not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"a {foreign['model_type']} with {name}={foreign[name]!r} is not supported, only {name}={allowed}")
    fields = {}
    for own, name in same.items():
        value = foreign[name]
        fields[own] = float(value) if isinstance(defaults[name], float) and value is not None else value
    return fields | further(foreign)


def write_fields(config: ZooConfig, same: dict, only: dict, further: Callable[[ZooConfig], dict]) -> dict:
    """The inverse of `read_fields`."""
    fixed = {name: values[0] for name, values in only.items()}
    return {"fuse_norm": True} | fixed | {name: getattr(config, own) for own, name in same.items()} | further(config)


def nothing(config) -> dict:
    """No further fields."""
    return {}


def mlp_fields(foreign: dict) -> dict:
    """Our fields of the gated MLP."""
    inner = foreign["intermediate_size"] or rounded_up(foreign["hidden_size"] * (foreign["hidden_ratio"] or 4) * 2 / 3, 256)
    return {"channel_mixer": "swiglu", "norm": "rmsnorm", "intermediate_size": inner}


def mlp_back(config: ZooConfig) -> dict:
    """The inverse of `mlp_fields`; without a width of its own, the default of our gated MLP."""
    return {"intermediate_size": inner_size(config)}


def fla_layout(
    kind: str, classes: str, rules, *, same: dict | None = None, defaults: dict | None = None, only: dict | None = None,
    read: Callable[[dict], dict] = nothing, write: Callable[[ZooConfig], dict] = nothing, mlp: bool = True, **options,
) -> Layout:  # fmt: skip
    """A layout of this library for one model type.

    Args:
        kind: its model type; the layout is called `fla-<kind>`.
        classes: prefix of its model classes.
        same: our field -> its field of the same meaning, beside those every model has.
        defaults: its fields and their defaults, where they differ from `DEFAULTS` or are further ones.
        only: its field -> the values we can express, the one to write first; None: any.
        read, write: completed config -> our further fields, and back.
        mlp: the channel mixer is its gated MLP.
        options: further ones of the `Layout`.
    """
    defaults = DEFAULTS | (WIDTHS if mlp else {}) | (defaults or {})
    same = {name: name for name in DEFAULTS} | (same or {})
    only = ONLY | ({"hidden_act": SILU} if mlp else {}) | (only or {})
    only = {name: values for name, values in only.items() if values is not None}

    def fields(foreign: dict) -> dict:
        return (mlp_fields(foreign) if mlp else {}) | read(foreign)

    def back(config: ZooConfig) -> dict:
        return (mlp_back(config) if mlp else {}) | write(config)

    return Layout(
        f"fla-{kind}", (kind,), partial(read_fields, same=same, defaults=defaults, only=only, further=fields),
        partial(write_fields, same=same, only=only, further=back), rules,
        complete=partial(complete, defaults=defaults), classes=classes, **options,
    )  # fmt: skip


def read_convolution(foreign: dict) -> dict:
    """Our field of the short convolution."""
    return {"conv_kernel": foreign["conv_size"] if foreign["use_short_conv"] else None}


def write_convolution(config: ZooConfig) -> dict:
    """The inverse of `read_convolution`."""
    return {"use_short_conv": bool(config.conv_kernel), "conv_size": config.conv_kernel or CONVOLUTION["conv_size"]}


def convolutions(sizes: Callable[[ZooConfig], list[int]], letters: str = "qkv") -> Rule:
    """The short convolutions over queries, keys and values (or other projections), which are one of ours; `sizes`: their widths."""
    return layout.convolutions([f"{BODY}attn.{letter}_conv1d.weight" for letter in letters], BODY + "mixer.conv.weight", sizes)


def shared_bounds(config: ZooConfig) -> Rule:
    """The table `[L, D]` from which all layers' lower bounds of the forget gate come, for the bounds each layer of ours owns.

    The bound of layer l is `p_1 + ... + p_l`, p being the softmax of the table over its layers (HGRN, arXiv:2311.04823,
    section 3); so its logit is `logsumexp(table[1..l]) - logsumexp(table[0], table[l+1..])`. Back, the table is `log p`, which
    has the same softmax: the bounds are kept to rounding, the table up to a constant per channel.
    """
    table, own = "model.lower_bounds", [f"model.layers.{index}.mixer.bound_logit" for index in range(1, config.num_hidden_layers)]
    if not own:
        return drop(table, "the first layer's bound is zero")

    def to_own(x: list[Tensor], shapes: list[Size], config: ZooConfig):
        if len(x[0]) != len(own) + 1:
            raise ValueError(f"it has {len(x[0])} rows, one per layer would be {len(own) + 1}")
        rows = x[0].double()
        below = [rows[1 : index + 1].logsumexp(0) for index in range(1, len(rows))]
        above = [torch.cat([rows[:1], rows[index + 1 :]]).logsumexp(0) for index in range(1, len(rows))]
        return [(low - high).to(x[0].dtype) for low, high in zip(below, above, strict=True)]

    def to_foreign(x: list[Tensor], config: ZooConfig):
        logits = torch.stack(x).double()
        bounds = torch.cat([torch.zeros_like(logits[:1]), logits.sigmoid()])
        shares = torch.cat([(-logits[-1:]).sigmoid(), bounds.diff(dim=0)])
        if (shares < 0).any():
            raise ValueError("the lower bounds fall from one layer to the next; a shared table can only let them grow")
        return [shares.clamp_min(torch.finfo(torch.float32).tiny).log().to(x[0].dtype)]

    return Rule((Pattern(table),), tuple(map(Pattern, own)), to_own, to_foreign, exact=False)

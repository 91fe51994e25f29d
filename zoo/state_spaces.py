"""Checkpoints as the authors of Mamba publish them: config.json without a model type, a pickle of tensors, both heads of a tie."""

from functools import partial

from zoo.config import ZooConfig
from zoo.layout import Layout, Rule

DEFAULTS = {
    "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [], "attn_cfg": {},
    "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    "architectures": ["ForCausalLM"],
}  # fmt: skip
EPS = 1e-5  # of every norm
ONLY = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
AUTO = "auto"  # a rank that follows from the width


def matches(foreign: dict, block: str) -> bool:
    """Whether the config is one of theirs and its blocks are of this kind."""
    return {"d_model", "n_layer"} <= foreign.keys() and (foreign.get("ssm_cfg") or {}).get("layer", "Mamba1") == block


def complete(foreign: dict) -> dict:
    """The config with what it leaves out."""
    return DEFAULTS | foreign


def read_fields(foreign: dict, defaults: dict, same: dict, only: dict, block: str) -> dict:
    """Our fields for a completed config; see `state_spaces_layout`."""
    sizes = defaults | {name: value for name, value in foreign["ssm_cfg"].items() if name != "layer"}
    for place, allowed in ((foreign, ONLY), (sizes, only)):
        for name, value in allowed.items():
            if place.get(name, value) != value:
                raise ValueError(f"a {block} model with {name}={place[name]!r} is not supported, only {name}={value!r}")
    if unknown := sizes.keys() - defaults.keys() - only.keys() - {"chunk_size"}:
        raise ValueError(f"ssm_cfg of a {block} model has the fields {sorted(unknown)}, which we do not know")
    multiple = foreign["pad_vocab_size_multiple"]
    fields = {own: None if sizes[name] == AUTO else sizes[name] for own, name in same.items()}
    return fields | {
        "expand": float(sizes["expand"]), "hidden_size": foreign["d_model"], "num_hidden_layers": foreign["n_layer"],
        "vocab_size": -(-foreign["vocab_size"] // multiple) * multiple, "tie_word_embeddings": foreign["tie_embeddings"],
        "norm_eps": EPS, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


def write_fields(config: ZooConfig, same: dict, block: str) -> dict:
    """The inverse of `read_fields`."""
    sizes = {name: AUTO if (value := getattr(config, own)) is None else value for own, name in same.items()}
    expand = int(config.expand) if config.expand == int(config.expand) else config.expand
    fields = {name: value for name, value in DEFAULTS.items() if name != "architectures"}
    return fields | {
        "d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 8 if config.vocab_size % 8 == 0 else 1, "tie_embeddings": config.tie_word_embeddings,
        "ssm_cfg": {"layer": block, "expand": expand} | sizes,
    }  # fmt: skip


def state_spaces_layout(name: str, block: str, rules: tuple[Rule, ...], *, defaults: dict, same: dict, only: dict) -> Layout:
    """A layout of the authors' for one of their blocks.

    Args:
        name: of the layout.
        block: what `ssm_cfg` calls it.
        defaults: fields of `ssm_cfg`.
        same: our field -> that of `ssm_cfg` with the same meaning, beside `expand`.
        only: fields of `ssm_cfg` -> the value we can express.
    """
    return Layout(
        name, (), partial(read_fields, defaults=defaults, same=same, only=only, block=block),
        partial(write_fields, same=same, block=block), rules, prefix="backbone.", matches=partial(matches, block=block),
        complete=complete, file="pytorch_model.bin",
    )  # fmt: skip

"""What transformers' configs call the fields of ours that mean the same, for the layouts of several families."""

import math

from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.layout import Rule, rename

COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
SAME = (*COMMON, "intermediate_size")
ACTIVATIONS = {  # theirs -> ours; of several names for one the last is written
    "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def shell(norm: str = "norm") -> tuple[Rule, ...]:
    """Rules for the keys around the layers; `norm`: what the norm after the last one is called."""
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename(f"model.{norm}.weight", "model.norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    )


def same_fields(source: dict | ZooConfig, *, but: tuple[str, ...] = ()) -> dict:
    """The fields both sides call alike, of a foreign config or of ours, `but` for those that these do not share."""
    names = [name for name in SAME if name not in but]
    return {name: source[name] if isinstance(source, dict) else getattr(source, name) for name in names}


def inner_size(config: ZooConfig) -> int:
    """Width inside a gated MLP, which our configs may leave to its rule."""
    return config.intermediate_size or -(-8 * config.hidden_size // 3 // 64) * 64


def expect(foreign: dict, **values) -> None:
    """Raise ValueError unless the foreign config has these values, the only ones we can express."""
    for name, value in values.items():
        if foreign.get(name, value) != value:
            raise ValueError(f"a {foreign['model_type']} with {name}={foreign[name]!r} is not supported, only {name}={value!r}")


def expect_free_steps(foreign: dict) -> None:
    """Raise ValueError if Mamba-2's time steps have limits other than those of a softplus."""
    if tuple(map(float, foreign["time_step_limit"])) != (0.0, math.inf):
        raise ValueError(f"time_step_limit {foreign['time_step_limit']} is not supported, only none, which is (0.0, inf)")


def own_activation(name: str) -> str:
    """Our name of an activation, or a ValueError that lists those known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def foreign_activation(name: str) -> str:
    """The inverse."""
    return {own: theirs for theirs, own in ACTIVATIONS.items()}[name]


def rope_fields(foreign: dict) -> dict:
    """Our fields `rope_theta`, `rope_fraction` and `rope_scaling` for `rope_parameters`; theta is None where there are none."""
    rope = dict(foreign.get("rope_parameters") or {})
    theta, fraction = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", 1.0)
    kind = rope.get("rope_type", "default")
    scaling = None if kind == "default" else {name: value for name, value in rope.items() if name != "type"}
    check_rope_scaling(scaling)
    return {"rope_theta": None if theta is None else float(theta), "rope_fraction": float(fraction), "rope_scaling": scaling}


def rope_parameters(fields: dict) -> dict:
    """The inverse of `rope_fields`."""
    rope = {"rope_type": "default"} | (fields["rope_scaling"] or {}) | {"rope_theta": fields["rope_theta"]}
    return rope if fields["rope_fraction"] == 1.0 else rope | {"partial_rotary_factor": fields["rope_fraction"]}


def layers_of(kinds: list[str], kind: str) -> list[int]:
    """The places of one kind of layer."""
    return [index for index, other in enumerate(kinds) if other == kind]

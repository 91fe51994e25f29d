"""What transformers' configs call the fields of ours that mean the same, for the layouts of several families."""

import math

from zoo.config import ZooConfig
from zoo.layers import check_rope_scaling
from zoo.layout import Pattern, Rule, depending, drop, rename

COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
SAME = (*COMMON, "intermediate_size")
ACTIVATIONS = {  # theirs -> ours; of several names for one the last is written
    "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip


def shell(norm: str = "norm") -> tuple[Rule, ...]:
    """Rules for the keys around the layers; `norm`: what the norm after the last one is called."""
    return (
        rename("model.embed_tokens.weight", "model.embed_tokens.weight"),
        rename(f"model.{norm}.weight", "model.norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    )


def bert_body(prefix: str, norm: str = "attention.output.LayerNorm") -> tuple[Rule, ...]:
    """Rules for the embeddings, norms and channel mixers of an encoder laid out like BERT's; `norm`: that of the mixers."""
    layer, own = prefix + "encoder.layer.{}.", "model.layers.{}."
    return (
        rename(prefix + "embeddings.{word,position,token_type}_embeddings.weight", "model.embed_{tokens,positions,types}.weight"),
        rename(prefix + "embeddings.LayerNorm.{weight,bias}", "model.embed_norm.{weight,bias}"),
        rename(layer + norm + ".{weight,bias}", own + "mixer_norm.{weight,bias}"),
        rename(layer + "output.LayerNorm.{weight,bias}", own + "channel_norm.{weight,bias}"),
        rename(layer + "{intermediate,output}.dense.{weight,bias}", own + "channel_mixer.{up,down}_proj.{weight,bias}"),
        drop(prefix + "embeddings.{position_ids,token_type_ids}", "counts and zeros, which are made as they are needed"),
    )


def bert_attention(prefix: str) -> tuple[Rule, ...]:
    """Rules for its projections."""
    layer, own = prefix + "encoder.layer.{}.attention.", "model.layers.{}.mixer."
    return (
        rename(layer + "self.{query,key,value}.{weight,bias}", own + "{q,k,v}_proj.{weight,bias}"),
        rename(layer + "output.dense.{weight,bias}", own + "out_proj.{weight,bias}"),
    )


def bert_decoder(tied: bool, dense: str, norm: str, decoder: str, bias: str) -> tuple[Rule, ...]:
    """Rules for its head of masked language models. The decoder's bias is stored as `bias`; untied it is stored under both names."""
    if tied:
        last = rename(bias, "lm_head.bias"), drop(decoder + ".bias", "stored as the bias of the head")
    else:
        own = (Pattern(decoder + ".bias"), Pattern(bias)), (Pattern("lm_head.bias"),)
        last = (Rule(*own, lambda x, shapes, config: x[:1], lambda x, config: [x[0], x[0].clone()]),)
    return (
        rename(dense + ".{weight,bias}", "head.dense.{weight,bias}"),
        rename(norm + ".{weight,bias}", "head.norm.{weight,bias}"),
        rename(decoder + ".weight", "lm_head.weight"),
        *last,
    )


def bert_classifiers() -> tuple[Rule, ...]:
    """Rules for heads that classify sequences through a dense layer, or tokens without."""
    first = "classifier.dense.weight"
    return (
        rename("classifier.dense.{weight,bias}", "classifier.dense.{weight,bias}"),
        *depending(
            first,
            rename("classifier.out_proj.{weight,bias}", "score.{weight,bias}"),
            rename("classifier.{weight,bias}", "score.{weight,bias}"),
        ),
    )


def bert_answers() -> tuple[Rule, ...]:
    """Rules for a head that marks answers."""
    return (rename("qa_outputs.{weight,bias}", "answer.{weight,bias}"),)


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


def given(config: ZooConfig, *names: str) -> None:
    """Raise ValueError for fields that are None, where that says something which a foreign config cannot."""
    for name in names:
        if getattr(config, name) is None:
            raise ValueError(f"checkpoints of other libraries cannot express {name}=None for a {config.name}; save without layout=")


def own_activation(name: str) -> str:
    """Our name of an activation, or a ValueError that lists those known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def foreign_activation(name: str, *, dated: bool = False) -> str:
    """The inverse. `dated`: GELU's approximation goes by the name that GPT-2 and its contemporaries know."""
    known = {own: theirs for theirs, own in ACTIVATIONS.items()} | ({"gelu_tanh": "gelu_new"} if dated else {})
    return known[name]


def rope_fields(foreign: dict) -> dict:
    """Our fields `rope_theta`, `rope_fraction` and `rope_scaling` for `rope_parameters`; theta is None where there are none."""
    rope = dict(foreign.get("rope_parameters") or {})
    theta, fraction = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", 1.0)
    kind = rope.get("rope_type", "default")
    scaling = None if kind == "default" else {name: value for name, value in rope.items() if name != "type"}
    check_rope_scaling(scaling)
    return {"rope_theta": None if theta is None else float(theta), "rope_fraction": float(fraction), "rope_scaling": scaling}


def whole_rope(foreign: dict) -> dict:
    """The same for heads that turn as a whole: without `rope_fraction`, and a ValueError where it is not 1."""
    rope = rope_fields(foreign)
    if rope.pop("rope_fraction") != 1.0:
        raise ValueError(f"a {foreign['model_type']} with partial_rotary_factor other than 1 is not supported")
    return rope


def rope_parameters(fields: dict) -> dict:
    """The inverse of `rope_fields`."""
    rope = {"rope_type": "default"} | (fields["rope_scaling"] or {}) | {"rope_theta": fields["rope_theta"]}
    return rope if fields["rope_fraction"] == 1.0 else rope | {"partial_rotary_factor": fields["rope_fraction"]}


def layers_of(kinds: list[str], kind: str) -> list[int]:
    """The places of one kind of layer."""
    return [index for index, other in enumerate(kinds) if other == kind]

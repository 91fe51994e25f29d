"""What checkpoints of converted transformers have in common: the teacher's config with further fields, and the keys it left.

Their libraries derive their configs from the teacher's class in transformers, and write rotary positions as transformers 4 did, as
`rope_theta` and `rope_scaling`.
"""

from collections.abc import Callable
from copy import deepcopy

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo.config import ZooConfig
from zoo.keys import State
from zoo.layers import wide
from zoo.layout import drop, rename
from zoo.terms import expect, inner_size, same_fields, shell, whole_rope

HEADS = {"norm_eps": "rms_norm_eps", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
KEPT = (
    rename("model.layers.{}.{input,post_attention}_layernorm.weight", "model.layers.{}.{mixer,channel}_norm.weight"),
    rename("model.layers.{}.mlp.{gate,up,down}_proj.weight", "model.layers.{}.channel_mixer.{gate,up,down}_proj.weight"),
    drop("model.layers.{}.self_attn.rotary_emb.inv_freq", "follows from rope_theta"),
    *shell(),
)
PROJECTIONS = rename("model.layers.{}.self_attn.{q,k,v,o}_proj.{weight,bias}", "model.layers.{}.mixer.{q,k,v,out}_proj.{weight,bias}")


def derived(kind: str, **defaults) -> Callable[[dict], dict]:
    """`Layout.complete` for configs of a class derived from that of transformers for `kind`; `defaults` of its further fields."""

    def complete(foreign: dict) -> dict:
        kept = {name: foreign[name] for name in ("model_type", "architectures") if name in foreign}
        # a copy, as transformers writes into the dictionaries it is given
        known = CONFIG_MAPPING[kind].from_dict(deepcopy({name: value for name, value in foreign.items() if name not in kept}))
        return defaults | known.to_dict() | {"architectures": None} | kept

    return complete


def read_teacher(foreign: dict) -> dict:
    """Our fields for the teacher's sizes, heads and rotary positions; the config is completed."""
    expect(foreign, hidden_act="silu", mlp_bias=False)
    return same_fields(foreign) | {own: foreign[name] for own, name in HEADS.items()} | whole_rope(foreign)


def write_teacher(config: ZooConfig) -> dict:
    """The inverse; what it cannot say is noticed by mapping back."""
    fields = same_fields(config) | {name: getattr(config, own) for own, name in HEADS.items()}
    fields |= {"num_key_value_heads": config.num_kv_heads or config.num_heads, "hidden_act": "silu"}
    fields["intermediate_size"] = inner_size(config)
    theta = {} if config.rope_theta is None else {"rope_theta": config.rope_theta}
    return fields | theta | {"rope_scaling": getattr(config, "rope_scaling", None)}


def with_adapters(base: State, added: State, config: dict, *, alpha: float) -> State:
    """A base model's tensors with those trained beside it (a `Delta.join`); adapters of low rank are added to what they adapt.

    Args: alpha: of the adapters, named as PEFT names them; what they add is scaled by `alpha / rank`.
    """
    whole, added = dict(base), {name.removeprefix("base_model.model."): tensor for name, tensor in added.items()}
    for name, tensor in added.items():
        stem, adapter, rest = name.partition(".lora_A")
        if adapter:
            weight, up = base[stem + ".weight"], added[f"{stem}.lora_B{rest}"]
            whole[stem + ".weight"] = (wide(weight) + alpha / len(tensor) * wide(up) @ wide(tensor)).to(weight.dtype)
        elif ".lora_B" not in name:
            whole[name] = tensor
    return whole

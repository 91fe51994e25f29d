"""From a transformer to a hybrid that keeps some of its attention layers."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.auto import model_class
from zoo.config import ZooConfig
from zoo.convert.recipe import ROPES, choose
from zoo.convert.starts import begin
from zoo.convert.teacher import check_teacher
from zoo.convert.weights import seed_student
from zoo.models.hybrid import HybridConfig

logger = logging.getLogger(__name__)


def convert(
    teacher: nn.Module,
    *,
    mixer: str = "gated_deltanet",
    keep: Iterable[int] = (),
    window: int | None = 64,
    sinks: int = 4,
    mixer_args: dict | None = None,
    inherit: Iterable[str] = (),
    rope: str = "keep",
    starts: dict[str, str] | None = None,
    rows: Tensor | None = None,
) -> nn.Module:
    """A hybrid that starts from a transformer's weights.

    Args:
        teacher: a zoo transformer language model (`zoo.convert.load_teacher`). It is not changed and shares no memory with
            the student.
        mixer: registry name of what replaces attention.
        keep: indices of the layers that stay as they are.
        window: the replaced layers also keep attention over this many tokens, in parallel, and start as it alone; None
            leaves the mixer alone in its layer.
        sinks: first tokens that stay visible to the window.
        mixer_args: further fields of the mixer's config, over those that fit the teacher's heads.
        inherit: names of further fields that it takes from the teacher's layer, where it has them (`num_kv_heads`).
        rope: `keep` the teacher's rotary positions where the mixer has any, `drop` them, or leave them to the replaced layers only.
        starts: how begins what the teacher has no weight for, see `zoo.convert.starts`; rows: text that it may be measured on.

    Returns:
        a `HybridForCausalLM` in the teacher's dtype, on its device, in evaluation mode.

    Raises:
        ValueError: the teacher is no transformer, a layer to keep does not exist, the mixer or one of its fields is unknown.
    """
    check_teacher(teacher)
    config = student_config(teacher.config, mixer, keep, window, sinks, mixer_args, inherit, rope)
    with torch.device(teacher.device):
        student = model_class(config, "causal_lm")(config).to(teacher.dtype)
    account = seed_student(teacher, student)
    if account.dropped:
        reasons = sorted(set(account.dropped.values()))
        logger.warning("%d teacher weights have no place in the student: %s", len(account.dropped), "; ".join(reasons))
    begin(teacher, student, converted_layers(student), starts or {}, rows)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def student_config(
    teacher: ZooConfig, mixer: str, keep: Iterable[int], window: int | None, sinks: int, mixer_args: dict | None = None,
    inherit: Iterable[str] = (), rope: str = "keep",
) -> HybridConfig:  # fmt: skip
    """The config of the student of a teacher with this config; arguments and errors as in `convert`."""
    if mixer not in registry.list_mixers():
        raise ValueError(f"no mixer {mixer!r}{registry.nearest(mixer, registry.list_mixers())}; zoo.list_mixers() names all")
    if mixer == "parallel":
        raise ValueError("parallel is a window beside a mixer; name that mixer, and the window")
    layers = teacher.layer_configs()
    keep = sorted(set(keep))
    if outside := [index for index in keep if not 0 <= index < len(layers)]:
        raise ValueError(f"keep names layers {outside}, the teacher has 0 to {len(layers) - 1}")
    if window is not None and (window < 1 or sinks < 0):
        raise ValueError(
            f"window={window} with sinks={sinks}: a window is at least one token, sinks cannot be negative; window=None is no window"
        )
    choose("rope", rope, ROPES)
    stays = positions_kept(rope)
    plan = [
        attention_entry(layer, **stays)
        if index in keep
        else converted_entry(layer, mixer, window, sinks, positions(registry.get(mixer).config, layer, rope) | (mixer_args or {}), inherit)
        for index, layer in enumerate(layers)
    ]
    return HybridConfig(**teacher.shared_fields(), plan=plan)


def converted_layers(student: nn.Module) -> list[int]:
    """Indices of the layers whose attention was replaced."""
    return [index for index, entry in enumerate(student.config.plan) if entry["mixer"] != "transformer"]


def attention_entry(layer: ZooConfig, **changes) -> dict:
    """A plan entry for the attention of `layer`: the fields in which it differs from its family's defaults."""
    shared = layer.shared_fields()
    own = {
        f.name: (getattr(layer, f.name), f.default) for f in fields(layer) if f.name in type(layer).__annotations__ and f.name not in shared
    }
    return {"mixer": layer.name} | {name: value for name, (value, default) in own.items() if value != default} | changes


def converted_entry(layer: ZooConfig, mixer: str, window: int | None, sinks: int, mixer_args: dict, inherit: Iterable[str] = ()) -> dict:
    """A plan entry for what replaces the attention of `layer`."""
    config = registry.get(mixer).config
    if mixer == layer.name:
        return attention_entry(layer, **mixer_args)
    taken = {name: getattr(layer, name) for name in inherit if name in {f.name for f in fields(config)}}
    replacement = {"mixer": mixer} | matching_fields(config, layer) | taken | mixer_args
    if window is None:
        return replacement
    if layer.window is not None:
        window = min(window, layer.window)
    return {"mixer": "parallel", "branches": [attention_entry(layer, window=window, sinks=max(sinks, layer.sinks)), replacement]}


def positions_kept(rope: str) -> dict:
    """What changes in the layers that stay."""
    return {"rope_theta": None} if rope == "replaced_only" else {}


def positions(config: type[ZooConfig], layer: ZooConfig, rope: str) -> dict:
    """The fields by which a mixer turns queries and keys as the teacher's layer does, or does not.

    Raises:
        ValueError: positions that the mixer would have to have, or cannot be without.
    """
    known = {f.name: f for f in fields(config)}
    if "rope_theta" not in known:
        if rope == "replaced_only":
            raise ValueError(
                f"rope=replaced_only leaves positions to {config.name}, which has no rotary ones; choose another mixer or rope=keep"
            )
        return {}
    if rope == "drop":
        if "None" not in str(known["rope_theta"].type):
            raise ValueError(f"rope=drop: {config.name} cannot be without rotary positions; choose another mixer or rope=keep")
        return {"rope_theta": None}
    if lost := [n for n in ("rope_fraction", "rope_scaling") if n not in known and getattr(layer, n) != type(layer).__dict__[n]]:
        raise ValueError(f"{config.name} has no {lost[0]}, the teacher's layers have {getattr(layer, lost[0])!r}; choose rope=drop")
    same = {name: getattr(layer, name) for name in ("rope_theta", "rope_fraction", "rope_scaling") if name in known}
    return same | ({"rope_inclusive": False} if "rope_inclusive" in known else {})


def matching_fields(config: type[ZooConfig], layer: ZooConfig) -> dict:
    """Those fields of a mixer's config that give it the teacher's heads and nothing after them, so that its projections can be seeded."""
    heads, width = layer.num_heads, layer.head_dim or layer.hidden_size // layer.num_heads
    known = {f.name: f for f in fields(config)}
    share = heads * width / layer.hidden_size
    # beside a head_dim, value_ratio counts in key widths, without one in model widths
    sizes = {"num_heads": heads, "head_dim": width, "key_ratio": share, "value_ratio": 1.0 if "head_dim" in known else share}
    sizes |= {
        "use_gate": False,
        "qkv_bias": layer.qkv_bias,
        "expansion": width,
    }  # an output gate that starts at random would hide the values
    if known.keys() & {"num_groups", "num_kv_heads"}:  # of state spaces those whose B and C can be keys and queries
        sizes |= {"state_size": width, "num_groups": heads, "expand": share, "bias": layer.qkv_bias}
    if "num_kv_heads" in known and isinstance(known["num_kv_heads"].default, int):
        sizes["num_kv_heads"] = layer.num_kv_heads or heads
    return {name: value for name, value in sizes.items() if name in known}

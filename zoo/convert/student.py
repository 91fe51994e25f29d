"""From a transformer to a hybrid that keeps some of its attention layers."""

import copy
import logging
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import nn

from zoo import registry
from zoo.auto import model_class
from zoo.config import ZooConfig
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
        inherit: names of fields that it takes from the teacher's layer, where it has them (`rope_theta`, `num_kv_heads`).

    Returns:
        a `HybridForCausalLM` in the teacher's dtype, on its device, in evaluation mode.

    Raises:
        ValueError: the teacher is no transformer, a layer to keep does not exist, the mixer or one of its fields is unknown.
    """
    check_teacher(teacher)
    config = student_config(teacher.config, mixer, keep, window, sinks, mixer_args, inherit)
    with torch.device(teacher.device):
        student = model_class(config, "causal_lm")(config).to(teacher.dtype)
    account = seed_student(teacher, student)
    if account.dropped:
        reasons = sorted(set(account.dropped.values()))
        logger.warning("%d teacher weights have no place in the student: %s", len(account.dropped), "; ".join(reasons))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def student_config(
    teacher: ZooConfig, mixer: str, keep: Iterable[int], window: int | None, sinks: int, mixer_args: dict | None = None,
    inherit: Iterable[str] = (),
) -> HybridConfig:  # fmt: skip
    """The config of the student of a teacher with this config; arguments and errors as in `convert`."""
    if mixer not in registry.list_mixers():
        raise ValueError(f"no mixer {mixer!r}{registry.nearest(mixer, registry.list_mixers())}; zoo.list_mixers() names all")
    layers = teacher.layer_configs()
    keep = sorted(set(keep))
    if outside := [index for index in keep if not 0 <= index < len(layers)]:
        raise ValueError(f"keep names layers {outside}, the teacher has 0 to {len(layers) - 1}")
    if window is not None and (window < 1 or sinks < 0):
        raise ValueError(
            f"window={window} with sinks={sinks}: a window is at least one token, sinks cannot be negative; window=None is no window"
        )
    plan = [
        attention_entry(layer) if index in keep else converted_entry(layer, mixer, window, sinks, mixer_args or {}, inherit)
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
    taken = {name: getattr(layer, name) for name in inherit if name in {f.name for f in fields(config)}}
    replacement = {"mixer": mixer} | matching_fields(config, layer) | taken | mixer_args
    if window is None:
        return replacement
    if layer.window is not None:
        window = min(window, layer.window)
    return {"mixer": "parallel", "branches": [attention_entry(layer, window=window, sinks=max(sinks, layer.sinks)), replacement]}


def matching_fields(config: type[ZooConfig], layer: ZooConfig) -> dict:
    """Those fields of a mixer's config that give it the teacher's heads and nothing after them, so that its projections can be seeded."""
    heads, width = layer.num_heads, layer.head_dim or layer.hidden_size // layer.num_heads
    known = {f.name for f in fields(config)}
    share = heads * width / layer.hidden_size
    # beside a head_dim, value_ratio counts in key widths, without one in model widths
    sizes = {"num_heads": heads, "head_dim": width, "key_ratio": share, "value_ratio": 1.0 if "head_dim" in known else share}
    sizes["use_gate"] = False  # an output gate that starts at random would hide the values
    return {name: value for name, value in sizes.items() if name in known}

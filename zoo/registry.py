"""The catalogue: architectures by name, found by listing the folder `models/`."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from zoo.config import ZooConfig, nearest
from zoo.mixer import Mixer

if TYPE_CHECKING:
    from zoo.layout import Layout

AUTO = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Architecture:
    """One entry of the catalogue.

    Args:
        name: registry name, file stem, `zoo_<name>` as model type.
        config, mixer: its classes; a mixer of None means that the config names the mixers of its layers.
        title, paper: of the publication; `paper` is an arXiv id or another reference.
        presets: preset name -> config fields. "tiny" is the smallest and exists for every architecture.
        models: suffix ("Model", "ForCausalLM", ...) -> class.
        layouts: foreign checkpoints it can load and save, `zoo.layout.Layout`s.
    """

    name: str
    config: type[ZooConfig]
    mixer: type[Mixer] | None
    title: str
    paper: str
    presets: dict[str, dict]
    models: dict[str, type] = field(default_factory=dict)
    layouts: tuple["Layout", ...] = ()


ARCHITECTURES: dict[str, Architecture] = {}
CHANNEL_MIXERS: dict[str, type] = {}
PARTS: dict[str, type[Mixer]] = {}  # mixers that only make sense within a larger whole, by the names of their configs


def register(
    name: str, *, config: type[ZooConfig], mixer: type[Mixer] | None, title: str, paper: str, presets: dict[str, dict],
    layouts: tuple["Layout", ...] = (),
) -> Architecture:  # fmt: skip
    """Enter an architecture; called once, at the end of its file.

    Makes its model classes (`<Prefix>Model`, `<Prefix>ForCausalLM`, ..., the prefix being that of the config class), puts
    them into the file's module, and tells transformers' Auto classes about them.

    Raises:
        ValueError: the name is taken or malformed, the config's `model_type` or class name does not follow it, there is no
            preset "tiny", or a layout reads a model type that another one reads.
    """
    from zoo import heads, seq2seq  # which need the registry to build their layers

    if name in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is registered twice; choose another name or call zoo.registry.unregister({name!r})")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"architecture name {name!r} must be a lower-case identifier")
    if config.model_type != f"zoo_{name}" or not config.__name__.endswith("Config"):
        raise ValueError(f"{config.__name__}: expected model_type 'zoo_{name}' and a class name ending in 'Config'")
    if "tiny" not in presets:
        raise ValueError(f"architecture {name!r} has no preset 'tiny'; the tests need one")
    readers = [layout for entry in ARCHITECTURES.values() for layout in entry.layouts if layout.matches is None]
    taken = {kind: layout.name for layout in readers for kind in layout.model_types}
    if clash := [kind for layout in layouts if layout.matches is None for kind in layout.model_types if kind in taken]:
        raise ValueError(f"architecture {name!r}: model type {clash[0]!r} is read by the layout {taken[clash[0]]!r} already")
    config.name = name
    models = make_models(config, (seq2seq if issubclass(config, seq2seq.Seq2SeqConfig) else heads).SHELLS)
    entry = Architecture(name, config, mixer, title, paper, presets, models, layouts)
    AutoConfig.register(config.model_type, config)
    module = sys.modules[config.__module__]
    for suffix, cls in entry.models.items():
        AUTO[suffix].register(config, cls, exist_ok=True)  # transformers compares class names, and has a Mamba2Config of its own
        setattr(module, cls.__name__, cls)
    ARCHITECTURES[name] = entry
    return entry


def make_models(config: type[ZooConfig], shells: dict[str, type]) -> dict[str, type]:
    """The model classes of an architecture: suffix -> class, living in the module of its config."""
    prefix = config.__name__.removesuffix("Config")
    classes = {}
    for suffix, shell in shells.items():
        members = {"config_class": config, "__module__": config.__module__, "__doc__": shell.__doc__, "_base": classes.get("Model")}
        classes[suffix] = type(prefix + suffix, (shell,), members)
    return classes


def unregister(name: str) -> None:
    """Take an architecture out of the catalogue (for tests and notebooks that redefine one)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    entry = ARCHITECTURES.pop(get(name).name)
    CONFIG_MAPPING._extra_content.pop(entry.config.model_type)
    for suffix in entry.models:
        AUTO[suffix]._model_mapping._extra_content.pop(entry.config)


def register_channel_mixer(name: str) -> Callable[[type], type]:
    """Class decorator: enter a channel mixer, built as `cls(config, **channel_args)`."""

    def enter(cls: type) -> type:
        if name in CHANNEL_MIXERS:
            raise ValueError(f"channel mixer {name!r} is registered twice")
        CHANNEL_MIXERS[name] = cls
        return cls

    return enter


def register_part(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: enter a mixer that is no architecture by itself, for configs of this name."""

    def enter(cls: type[Mixer]) -> type[Mixer]:
        if name in PARTS:
            raise ValueError(f"part {name!r} is registered twice")
        PARTS[name] = cls
        return cls

    return enter


def mixer_class(name: str) -> type[Mixer]:
    """The mixer for a layer whose config has this name."""
    return PARTS[name] if name in PARTS else get(name).mixer


def load_all() -> None:
    """Import every file of `models/`."""
    import zoo.models

    for module in pkgutil.iter_modules(zoo.models.__path__):
        importlib.import_module(f"zoo.models.{module.name}")


def get(name: str) -> Architecture:
    """The architecture of this name, or an error that names the nearest one."""
    if name not in ARCHITECTURES:
        raise ValueError(f"no architecture {name!r}{nearest(name, ARCHITECTURES)}; zoo.list_models() names all {len(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def get_channel_mixer(name: str) -> type:
    """The channel mixer of this name, or an error that names the nearest one."""
    if name not in CHANNEL_MIXERS:
        raise ValueError(f"no channel mixer {name!r}{nearest(name, CHANNEL_MIXERS)}; known: {', '.join(CHANNEL_MIXERS)}")
    return CHANNEL_MIXERS[name]


def list_models(*, encoder_decoder: bool | None = None) -> list[str]:
    """Names of all architectures, or of those that are (True) or are not (False) encoder-decoders."""
    kinds = {name: entry.config.is_encoder_decoder for name, entry in ARCHITECTURES.items()}
    return sorted(name for name, kind in kinds.items() if encoder_decoder in (None, kind))


def list_mixers() -> list[str]:
    """Names of all architectures that bring a mixer, each usable as a layer of a hybrid."""
    return sorted(name for name, entry in ARCHITECTURES.items() if entry.mixer is not None)


def list_channel_mixers() -> list[str]:
    """Names of all channel mixers."""
    return sorted(CHANNEL_MIXERS)


def list_presets() -> list[str]:
    """All `<architecture>-<preset>` names that `build_config` understands."""
    return sorted(f"{name}-{preset}" for name, entry in ARCHITECTURES.items() for preset in entry.presets)


def build_config(name: str, **fields) -> ZooConfig:
    """The config `name` (`"gla"`, or with a preset `"gla-340m"`), with `fields` on top."""
    if name in ARCHITECTURES:
        return get(name).config(**fields)
    stem, _, preset = name.partition("-")
    if stem not in ARCHITECTURES or not preset:
        raise ValueError(f"no architecture or preset {name!r}{nearest(name, [*ARCHITECTURES, *list_presets()])}")
    entry = get(stem)
    if preset not in entry.presets:
        raise ValueError(f"{stem!r} has no preset {preset!r}{nearest(preset, entry.presets)}; it has {', '.join(entry.presets)}")
    return entry.config(**entry.presets[preset] | fields)

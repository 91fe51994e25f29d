"""What a property of layouts is given: a tiny model of transformers, saved by transformers and loaded by us, or only one of ours."""

import copy
import random
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from zoo.auto import from_pretrained, model_class
from zoo.config import nearest
from zoo.foreign import config_class, with_defaults
from zoo.keys import Pattern
from zoo.layout import Layout, get_layout, layouts
from zoo.registry import build_config, get

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def find(name: str) -> Layout:
    """The layout of this name, or an error that names the nearest."""
    if name not in layouts():
        raise ValueError(f"no layout {name!r}{nearest(name, layouts())}; zoo.layouts() names them")
    return get_layout(get(layouts()[name]), name)


def has_oracle(layout: Layout) -> bool:
    """Whether transformers has the models of this layout."""
    alone = layout.complete is None and not layout.beside
    return alone and bool(layout.model_types) and config_class(layout.model_types[0]) is not None


def foreign_config(layout: Layout, fields: dict) -> PreTrainedConfig:
    """The config of transformers with these fields over the shared sizes, which go where its class has a field for them."""
    fields = dict(fields)
    cls = config_class(fields.pop("model_type", layout.model_types[0]))
    known = cls.__dataclass_fields__.keys()
    sizes = {cls.attribute_map.get(name, name): value for name, value in SIZES.items()}
    return cls(**{name: value for name, value in sizes.items() if name in known} | fields)


def push(model: nn.Module, fixed: list[Pattern]) -> None:
    """Move every parameter and stored buffer away from special values, but for the buffers of these names: they are computed."""
    buffers = dict(model.named_buffers())
    pushed = set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            computed = name in buffers and any(pattern.match(name) is not None for pattern in fixed)
            if tensor.is_floating_point() and tensor.data_ptr() not in pushed and not computed:
                pushed.add(tensor.data_ptr())
                tensor.add_(torch.randn_like(tensor) * 0.1)


class OwnTrial:
    """A model of ours to be saved in a layout: of the trial's config, or where a layout has no trials of the preset "tiny".

    Attributes: layout; name of the trial; place: a folder to work in; entry: the architecture; ours: the model.
    """

    def __init__(self, layout: Layout, name: str, place: Path):
        self.layout, self.name, self.place = layout, name, place
        self.entry = get(layouts()[layout.name])

    @cached_property
    def ours(self) -> nn.Module:
        if not self.layout.trials:
            config = build_config(f"{self.entry.name}-tiny")
        else:
            kind = {"model_type": self.layout.model_types[0]} if self.layout.model_types else {}
            sizes = {name: value for name, value in SIZES.items() if name in with_defaults(kind, self.layout)}
            foreign = with_defaults(kind | sizes | self.layout.trials[self.name], self.layout)
            config = self.entry.config(**self.layout.config_map(foreign))
        torch.manual_seed(0)
        model = model_class(config)(config).eval()
        push(model, [])
        return model


class Trial(OwnTrial):
    """A tiny model of transformers and ours of the same weights.

    Attributes: theirs, ours: the models; folder: where transformers saved its own; report: of loading it.
    """

    @property
    def theirs(self) -> nn.Module:
        """A copy each time, for some models change as they run (a BigBird that met a short sequence attends to all from then on)."""
        return copy.deepcopy(self.original)

    @cached_property
    def original(self) -> nn.Module:
        config = foreign_config(self.layout, self.layout.trials[self.name])
        own = self.entry.config(**self.layout.config_map(with_defaults(config.to_dict(), self.layout)))
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if own.causal and not own.is_encoder_decoder else AutoModel
        cls = getattr(transformers, config.architectures[0])._from_config if config.architectures else auto.from_config
        model = cls(config, **PLAIN).eval()
        rules = self.layout.rules(own) if callable(self.layout.rules) else self.layout.rules
        push(model, [pattern for rule in rules if not rule.moved for pattern in rule.foreign])
        return model

    @cached_property
    def folder(self) -> Path:
        self.theirs.save_pretrained(self.place / "theirs")
        return self.place / "theirs"

    @cached_property
    def ours(self) -> nn.Module:
        model, self.report = from_pretrained(self.folder, output_loading_info=True)
        return model

    def tokens(self, batch: int, length: int) -> Tensor:
        """Random token ids, none of them a special one."""
        return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def trial_names(layout: Layout) -> list[str]:
    """The trials of a layout; one without oracle and trials is tried on the preset "tiny"."""
    if has_oracle(layout) and not layout.trials:
        raise ValueError(f"layout {layout.name!r} has no trials; give it some, transformers knows its models")
    return list(layout.trials) or ["tiny"]


def sampled(layout: Layout) -> str:
    """One of the trials, always the same."""
    return random.Random(layout.name).choice(trial_names(layout))


def make_trial(layout: Layout, name: str, place: Path) -> Trial | OwnTrial:
    """A trial by its name, with an empty folder to work in."""
    if name not in trial_names(layout):
        raise ValueError(
            f"layout {layout.name!r} has no trial {name!r}{nearest(name, layout.trials)}; it has {', '.join(trial_names(layout))}"
        )
    return (Trial if has_oracle(layout) else OwnTrial)(layout, name, place)

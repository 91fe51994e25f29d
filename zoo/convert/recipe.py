"""Recipes: how published methods turn a transformer into something else, as data that is checked when it is read.

A recipe is a file of `recipes/`. It states what its paper states; for the rest the defaults below hold, and `origin` tells which
is which. What the engine cannot do yet, `missing` names.
"""

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from zoo import registry
from zoo.config import nearest

FOLDER = Path(__file__).parent / "recipes"
LOSSES = {  # what a stage compares -> how
    "attention_map": ("xent", "frobenius"),
    "mixer_out": ("rel_mse", "mse", "l2", "cos"),
    "block_out": ("rel_mse", "mse", "l2", "cos"),
    "logits": ("fkl", "rkl", "ce+fkl"),
    "tokens": ("ce",),
}
LAYERWISE = ("attention_map", "mixer_out", "block_out")  # targets that every layer has
# what a stage trains, alone or joined by +: replaced mixers, of these what no weight filled, their feature maps, low-rank adapters;
# attention that stays, channel mixers, norms, embeddings with the head; everything
PARTS = ("mixer", "new", "features", "lora", "attention", "mlp", "norms", "embeddings", "all")
SCHEDULES = ("cosine", "linear", "constant", "stable", "plateau")
INPUTS = ("teacher", "student")
PRECISIONS = ("float32", "bfloat16")
ROPES = ("keep", "drop", "replaced_only")  # of replaced layers: as the mixer has them, none; or none in the layers that stay
STARTS = {  # what of a mixer the teacher has no weight for -> how it may begin; the first is what happens otherwise
    "decay": ("native", "measured"),
    "rate": ("native", "measured"),
    "gate": ("native", "zero", "one", "random"),
    "conv": ("identity", "native"),
    "skip": ("native", "zero"),
    "values": ("native", "measured"),
}
SELECTORS = ("none", "uniform", "window", "recall", "bypass", "swap", "restore", "both")  # how the layers that stay are found


@dataclass(frozen=True)
class Stage:
    """One training of a conversion.

    Args:
        target, loss: what the student is compared by (`LOSSES`): layer by layer the weights with which a mixer mixes tokens, its
            output or the block's; the logits; or the text itself.
        train: of `PARTS`, joined by +.
        tokens: how many to train on; None: by the teacher's size (`default_tokens`).
        length, batch: of a step's rows; accumulate: how many passes, one after the other, they are divided among.
        learning_rate, final_rate: highest and last; `final_rate` None is a tenth.
        schedule, warmup: a linear warm-up over this share of the steps, then down by a cosine or a line, level, level but for a
            line over the last tenth (stable), or down tenfold where the loss stays (plateau).
        paced: gates learn thirty times, new mixers three times as fast as copied attention.
        inputs, scope: what a layer reads where layers are compared, and how far its loss reaches back: `layer` itself, a number of
            layers, or the `model`. The first layer of such a run reads the teacher's states or the student's own.
        kl_weight: of the divergence beside the likelihood in `ce+fkl`.
        lora_rank, lora_alpha, lora_targets: of adapters, with `train: lora`, merged when the stage ends; an alpha of None is twice the
            rank, and without targets they go where replaced mixers want them.
        precision: in which linear layers compute while it trains; weights, their updates and sums are in float32 always.
        untie: train a tied head apart from the embedding, and drop it for the embedding when the stage ends (RADLADS).
    """

    name: str
    target: str
    loss: str
    train: str
    tokens: int | None = None
    length: int = 512
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-4
    final_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    paced: bool = False
    inputs: str = "teacher"
    scope: str | int = "layer"
    kl_weight: float = 0.1
    precision: str = "float32"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    untie: bool = False

    def __post_init__(self):
        where = f"stage {self.name!r}"
        for name, known in (("target", LOSSES), ("schedule", SCHEDULES), ("inputs", INPUTS), ("precision", PRECISIONS)):
            choose(f"{where}: {name}", getattr(self, name), known)
        choose(f"{where}: loss of {self.target}", self.loss, LOSSES[self.target])
        for part in self.parts:
            choose(f"{where}: train", part, PARTS)
        for name in ("tokens", "length", "batch", "accumulate", "learning_rate", "clip", "kl_weight", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{where}: {name} is {value!r}, it must be a positive number")
        if self.batch % self.accumulate:
            raise ValueError(f"{where}: batch={self.batch} is not divisible by accumulate={self.accumulate}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"{where}: warmup is {self.warmup}, it must be a share of the steps")
        if ("lora" in self.parts) != (self.lora_rank is not None):
            raise ValueError(f"{where}: train: lora and lora_rank go together")
        if self.scope not in ("layer", "model") and not (type(self.scope) is int and self.scope > 0):
            raise ValueError(f"{where}: scope is {self.scope!r}; it is layer, model, or how many layers at once")
        if not self.layerwise and (self.inputs, self.scope) != ("teacher", "layer"):
            raise ValueError(
                f"{where}: inputs and scope go with a target that layers have ({', '.join(LAYERWISE)}), not with {self.target}"
            )

    @property
    def parts(self) -> list[str]:
        return self.train.split("+")

    @property
    def layerwise(self) -> bool:
        return self.target in LAYERWISE

    @property
    def apart(self) -> bool:
        """Whether no layer's training depends on another's."""
        return self.layerwise and (self.inputs, self.scope) in (("teacher", "layer"), ("teacher", 1))

    @property
    def steps(self) -> int:
        return max(1, round((self.tokens or 0) / (self.batch * self.length)))


@dataclass(frozen=True)
class Method:
    """A recipe.

    Args:
        name, title, paper: whose it is.
        mixer, mixer_args, inherit: what replaces attention, fields of its config, and those it takes from the teacher's layer.
        window, sinks: attention that a replaced layer keeps beside the mixer; None: the mixer alone.
        rope: rotary positions, one of `ROPES`.
        init: how begins what the teacher has no weight for (`STARTS`).
        keep, select: which layers stay: a share below one, a number, or their indices; and how they are found.
        must_keep, min_gap: where they are found, layers that are among them, and how far apart any two are at least.
        stages: the trainings, in order.
        needs: what else its paper does and no field here can say; such a recipe is known, but cannot be run.
        differs: what it does otherwise than its paper; it is said wherever the recipe is shown.
        origin: field, or `stage.field` -> where its value is from: "recipe", "default" or whatever changed it.
    """

    name: str
    title: str
    paper: str
    mixer: str
    stages: tuple[Stage, ...]
    mixer_args: dict = field(default_factory=dict)
    inherit: tuple[str, ...] = ()
    window: int | None = None
    sinks: int = 0
    rope: str = "keep"
    init: dict[str, str] = field(default_factory=dict)
    keep: float | int | tuple[int, ...] = 0
    select: str = "none"
    must_keep: tuple[int, ...] = ()
    min_gap: int = 1
    needs: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    origin: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.mixer not in registry.list_mixers():
            raise ValueError(f"recipe {self.name!r}: no mixer {self.mixer!r}{nearest(self.mixer, registry.list_mixers())}")
        choose(f"recipe {self.name!r}: select", self.select, SELECTORS)
        choose(f"recipe {self.name!r}: rope", self.rope, ROPES)
        if isinstance(self.keep, tuple) and (self.must_keep or self.min_gap != 1):
            raise ValueError(
                f"recipe {self.name!r}: keep names the layers that stay, so must_keep and min_gap bind nothing; leave them out"
            )
        for what, start in self.init.items():
            choose(f"recipe {self.name!r}: init", what, STARTS)
            choose(f"recipe {self.name!r}: init.{what}", start, STARTS[what])
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"recipe {self.name!r}: its stages are named {names}; there must be one at least, and no name twice")

    def missing(self) -> list[str]:
        """What of it the engine lacks; empty: it can be run."""
        return list(self.needs)

    def kept(self, layers: int) -> int | tuple[int, ...]:
        """How many of the teacher's layers stay, or which."""
        if isinstance(self.keep, tuple):
            return self.keep
        count = round(self.keep * layers) if isinstance(self.keep, float) else self.keep
        if not 0 <= count <= layers:
            raise ValueError(f"keep={self.keep} of {layers} layers; give a share from 0.0 to 1.0, a number, or indices")
        return count

    def only(self, names: Collection[str] | None) -> "Method":
        """With these of its stages; None: all."""
        if names is None:
            return self
        for name in names:
            choose("stage to take", name, [stage.name for stage in self.stages])
        return dataclasses.replace(self, stages=tuple(stage for stage in self.stages if stage.name in names))

    def to_dict(self) -> dict:
        """What defines it; `read_method` reads it."""
        return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(self).items() if k != "origin"}))


def choose(what: str, value: str, known) -> None:
    """Raise ValueError for a value that is not known."""
    if value not in known:
        raise ValueError(f"{what} is {value!r}{nearest(value, known)}; choose one of {', '.join(known)}")


def list_recipes() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str, changes: dict | None = None, why: str = "command line") -> Method:
    """A recipe by name, or the YAML file of one.

    Args:
        changes: field, `stage.field`, `mixer_args.field` or `init.field` -> another value; None as value sets None.
        why: their origin.

    Raises:
        ValueError: no such recipe, or a field or value that does not exist.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no recipe {name!r}{nearest(name, list_recipes())}; known: {', '.join(list_recipes())}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ValueError(f"{path} must be a mapping with a list of stages")
    return read_method({"name": path.stem} | content, changes or {}, why)


def read_method(content: dict, changes: dict, why: str = "command line", origin: str = "recipe") -> Method:
    """A recipe from the mapping that its file holds, with these changes."""
    content = json.loads(json.dumps(content))  # a copy, of which tuples are lists
    stages = {str(stage.get("name")): stage for stage in content.get("stages", ())}
    origins = dict.fromkeys(content, origin) | {f"{s}.{name}": origin for s, stage in stages.items() for name in stage}
    if changes.get("mixer", content.get("mixer")) != content.get("mixer"):
        content["mixer_args"] = {}  # they were another's
        origins.pop("mixer_args", None)
    for path, value in changes.items():
        first, _, last = path.partition(".")
        if last and first in ("mixer_args", "init"):
            content.setdefault(first, {})[last] = value
        elif last:
            choose("stage to change", first, stages)
            stages[first][last] = value
        else:
            content[first] = value
        origins[path] = why
    check_fields("stage", Stage, *stages.values())
    check_fields(f"recipe {content.get('name')!r}", Method, content)
    pairs = ("betas", "lora_targets")
    read = [Stage(**stage | {name: tuple(stage[name]) for name in pairs if name in stage}) for stage in stages.values()]
    tuples = {
        name: tuple(content[name]) for name in ("inherit", "needs", "differs", "keep", "must_keep") if isinstance(content.get(name), list)
    }
    known = {f.name for f in dataclasses.fields(Method)} | {f"{s}.{f.name}" for s in stages for f in dataclasses.fields(Stage)}
    origins = dict.fromkeys(sorted(known), "default") | origins
    return Method(**content | tuples | {"stages": tuple(read), "origin": origins})


def check_fields(what: str, kind: type, *found: dict) -> None:
    """Raise ValueError for a field that does not exist, or one that must be there and is not."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    for content in found:
        for name in content:
            if name not in known or name == "origin":
                raise ValueError(f"{what} has no field {name!r}{nearest(name, known)}")
        needed = [n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        if absent := [name for name in needed if name not in content]:
            raise ValueError(f"{what} lacks {', '.join(absent)}")


def default_tokens(stage: Stage, parameters: int) -> int:
    """Where a recipe names none: 100M for a teacher of 7B and less by the square root of its size, at least 2M; five times
    that for what follows the alignment. A rule of thumb of ours."""
    align = max(2e6, 1e8 * math.sqrt(parameters / 7e9))
    return round(align if stage.layerwise else 5 * align)


def settled(method: Method, parameters: int, scale: float = 1.0) -> Method:
    """The recipe with every stage's tokens named: those it states or, where it states none, by size; times `scale`."""
    if not 0 < scale < math.inf:
        raise ValueError(f"tokens are to be scaled by {scale}; give a positive number")
    origin, stages = dict(method.origin), []
    for stage in method.stages:
        tokens = stage.tokens
        if tokens is None:
            tokens, origin[f"{stage.name}.tokens"] = default_tokens(stage, parameters), "size of the teacher"
        if scale != 1:
            origin[f"{stage.name}.tokens"] += f" x {scale:g}"
        stages.append(dataclasses.replace(stage, tokens=max(1, round(tokens * scale))))
    return dataclasses.replace(method, stages=tuple(stages), origin=origin)

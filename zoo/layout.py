"""Foreign checkpoints: tables of reversible rules between their keys and ours, and loading and saving through them.

    LLAMA = Layout("llama", ("llama",), config_map, config_back, rules=(
        rename("model.layers.{}.self_attn.{q,k,v,o}_proj.{weight,bias}", "model.layers.{}.mixer.{q,k,v,out}_proj.{weight,bias}"),
        drop("model.layers.{}.self_attn.rotary_emb.inv_freq", "computed from rope_theta"),
        ...,
    ))

In a pattern `{}` stands for a number and `{a,b}` for one of several spellings; both sides of a rule have the same slots in the
same order, so that every rule reads in both directions. Patterns name keys as a model with a head has them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Size, Tensor

from zoo import registry
from zoo.config import ZooConfig, nearest

State = dict[str, Tensor]
SHOWN = 4  # keys named in one message
TIED = "tied to the embedding"
OTHER_HEAD = "head of another task"


class Pattern:
    """A key with slots."""

    def __init__(self, text: str):
        parts = re.split(r"\{([^{}]*)\}", text)
        self.text, self.literals = text, parts[::2]
        self.slots = [slot.split(",") if slot else None for slot in parts[1::2]]
        regex = re.escape(self.literals[0])
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            regex += (r"(\d+)" if slot is None else "(" + "|".join(map(re.escape, slot)) + ")") + re.escape(literal)
        self.regex = re.compile(regex)

    @property
    def kinds(self) -> list[int]:
        """What must agree between the sides of a rule: the number of spellings in each slot, 0 for a number."""
        return [0 if slot is None else len(slot) for slot in self.slots]

    def match(self, name: str) -> tuple[int, ...] | None:
        """What stands in the slots, spellings as their rank; None for another key."""
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        return tuple(int(text) if slot is None else slot.index(text) for slot, text in zip(self.slots, found.groups(), strict=True))

    def name(self, values: tuple[int, ...]) -> str:
        """The key with these values in its slots."""
        filled = (str(v) if slot is None else slot[v] for slot, v in zip(self.slots, values, strict=True))
        return self.literals[0] + "".join(text + literal for text, literal in zip(filled, self.literals[1:], strict=True))


@dataclass(frozen=True)
class Rule:
    """Some foreign keys and the own keys they become.

    Args:
        to_own: (foreign tensors, shapes of the own ones, config) -> own tensors; to_foreign: (own tensors, config) -> foreign
            tensors, its inverse. None for a rule with only one side.
        moved: the tensors are the same on both sides.
        mixer: only in layers with this mixer, the first number in the keys being the layer's; empty: in all.
        reason: why the foreign key is not needed.
    """

    foreign: tuple[Pattern, ...] = ()
    own: tuple[Pattern, ...] = ()
    to_own: Callable[[list[Tensor], list[Size], ZooConfig], Iterable[Tensor]] | None = None
    to_foreign: Callable[[list[Tensor], ZooConfig], Iterable[Tensor]] | None = None
    moved: bool = False
    mixer: str = ""
    reason: str = ""

    def __post_init__(self):
        sides = [*self.foreign, *self.own]
        for other in sides[1:]:
            if other.kinds != sides[0].kinds:
                raise ValueError(
                    f"the slots of {sides[0].text!r} and {other.text!r} differ; both sides of a rule need the same in the same order"
                )


def rename(foreign: str, own: str) -> Rule:
    """The same tensor under another name."""
    return Rule((Pattern(foreign),), (Pattern(own),), lambda x, shapes, config: x, lambda x, config: x, moved=True)


def mapped(foreign: str, own: str, to_own: Callable[[Tensor], Tensor], to_foreign: Callable[[Tensor], Tensor]) -> Rule:
    """A tensor stored in another form; `to_foreign` undoes `to_own` bit by bit."""
    return Rule(
        (Pattern(foreign),), (Pattern(own),), lambda x, shapes, config: [to_own(x[0])], lambda x, config: [to_foreign(x[0])]
    )  # fmt: skip


def transpose(foreign: str, own: str) -> Rule:
    """A matrix stored the other way round; a vector under the same rule stays as it is."""
    return mapped(foreign, own, lambda x: x.t().contiguous(), lambda x: x.t().contiguous())


def split(foreign: str, own: list[str], dim: int = 0, transposed: bool = False) -> Rule:
    """One foreign tensor is several of ours, laid end to end along `dim`; their sizes are the model's.

    `transposed`: it is a matrix stored the other way round, as under `transpose`; `dim` is that of ours.
    """

    def to_own(x: list[Tensor], shapes: list[Size], config: ZooConfig):
        whole = x[0].t() if transposed else x[0]
        sizes = [shape[dim] for shape in shapes]
        if whole.shape[dim] != sum(sizes):
            raise ValueError(f"it is {list(x[0].shape)}, but its parts have {sizes} along dimension {dim}")
        # parameters and files want memory of their own
        return [part.clone(memory_format=torch.contiguous_format) for part in whole.split(sizes, dim)]

    def to_foreign(x: list[Tensor], config: ZooConfig):
        whole = torch.cat(x, dim)
        return [whole.t().contiguous() if transposed else whole]

    return Rule((Pattern(foreign),), tuple(map(Pattern, own)), to_own, to_foreign)


def merge(foreign: list[str], own: str, dim: int = 0, sizes: Callable[[ZooConfig], list[int]] | None = None) -> Rule:
    """Several foreign tensors are one of ours. `sizes`: how large each is along `dim`; None for equal parts."""

    def to_foreign(x: list[Tensor], config: ZooConfig):
        whole = x[0].shape[dim]
        parts = [whole // len(foreign)] * len(foreign) if sizes is None else sizes(config)
        return [part.clone() for part in x[0].split(parts, dim)]

    return Rule(tuple(map(Pattern, foreign)), (Pattern(own),), lambda x, shapes, config: [torch.cat(x, dim)], to_foreign)


def interleave(foreign: str, own: list[str], groups: Callable[[ZooConfig], int]) -> Rule:
    """One foreign tensor is several of ours, `groups` times over: each group of its rows holds a share of every one in turn."""

    def to_own(x: list[Tensor], shapes: list[Size], config: ZooConfig):
        count = groups(config)
        sizes = [shape[0] // count for shape in shapes]
        if x[0].shape[0] != count * sum(sizes):
            raise ValueError(f"it is {list(x[0].shape)}, but {count} groups of its parts have {sizes} rows each")
        return [part.flatten(0, 1).clone() for part in x[0].unflatten(0, (count, -1)).split(sizes, 1)]

    def to_foreign(x: list[Tensor], config: ZooConfig):
        return [torch.cat([part.unflatten(0, (groups(config), -1)) for part in x], 1).flatten(0, 1)]

    return Rule((Pattern(foreign),), tuple(map(Pattern, own)), to_own, to_foreign)


def within(mixer: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules for the layers with this mixer alone, in a model with several kinds."""
    return tuple(replace(rule, mixer=mixer) for rule in rules)


def squeeze(foreign: str, own: str) -> Rule:
    """The weight of a depthwise convolution, `[D, 1, W]` there and `[D, W]` here; its bias under the same rule stays as it is."""
    return mapped(foreign, own, lambda x: x.squeeze(1) if x.ndim == 3 else x, lambda x: x.unsqueeze(1) if x.ndim == 2 else x)


def convolutions(foreign: list[str], own: str, sizes: Callable[[ZooConfig], list[int]]) -> Rule:
    """The weights of several depthwise convolutions of these widths, `[D, 1, W]`, which are one of ours, `[sum of D, W]`."""
    return Rule(
        tuple(map(Pattern, foreign)),
        (Pattern(own),),
        lambda x, shapes, config: [torch.cat(x).squeeze(1)],
        lambda x, config: [part.clone() for part in x[0].unsqueeze(1).split(sizes(config))],
    )


def fresh(own: str) -> Rule:
    """Keys the foreign checkpoint does not have: they start untrained, and are left out when saving."""
    return Rule(own=(Pattern(own),))


def drop(foreign: str, reason: str) -> Rule:
    """Keys we do not need."""
    return Rule(foreign=(Pattern(foreign),), reason=reason)


@dataclass
class Report:
    """What became of every key.

    Args:
        taken: foreign key -> own key, for tensors that stayed the same.
        transformed: own key -> foreign keys it was made from.
        fresh: own keys that start untrained.
        dropped: foreign key -> why it was not needed.
    """

    taken: dict[str, str] = field(default_factory=dict)
    transformed: dict[str, list[str]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A rule with its slots filled."""

    rule: Rule
    foreign: list[str]
    own: list[str]


@dataclass(frozen=True)
class Layout:
    """How somebody else lays out the checkpoints of one of our architectures.

    Args:
        name: what `save_pretrained(layout=...)` calls it.
        model_types: of the foreign configs; the first is written when saving. Empty for configs that name none.
        config_map: foreign config (with its defaults filled in where transformers knows it) -> fields of ours. It raises
            ValueError for what we cannot express.
        config_back: our config -> foreign fields; it need not check, what would be lost is found by mapping back.
        rules: of the keys, or a function of our config that makes them, where they differ from layer to layer.
        prefix: in front of the foreign keys of the body, where a model has a head.
        matches: whether a foreign config is of this layout, where its model type does not tell; such a layout is asked first.
        complete: foreign config -> the same with what it leaves out; None: as the class of transformers for its type says.
        classes: prefix of the foreign model classes; "": that of transformers' config class.
        aliases: (old, new) patterns of foreign keys; checkpoints with the old name are read as well.
        file: what the weights are written to. Files of torch (.bin, .pth) repeat tied tensors, as their libraries load strictly;
            a .pth stands alone: its foreign config is `{"tensors": {key: shape}}`.
        trials: short name -> fields of the foreign config, of sizes that test in no time, on which `zoo.evaluate.parity` proves the
            layout against transformers. They lie over the sizes that all trials share; "model_type" chooses among several types.
    """

    name: str
    model_types: tuple[str, ...]
    config_map: Callable[[dict], dict]
    config_back: Callable[[ZooConfig], dict]
    rules: tuple[Rule, ...] | Callable[[ZooConfig], tuple[Rule, ...]]
    prefix: str = "model."
    matches: Callable[[dict], bool] | None = None
    complete: Callable[[dict], dict] | None = None
    classes: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    file: str = "model.safetensors"
    trials: dict[str, dict] = field(default_factory=dict)

    def to_zoo(self, state: State, model, *, other_task: bool = False) -> tuple[State, Report]:
        """Our state dict from a foreign one.

        Args:
            model: one of ours (on the meta device will do), for its keys, shapes and config.
            other_task: the checkpoint's head may be missing or superfluous.

        Raises:
            ValueError: a key is missing, surplus or misshapen, or a key of the model has no rule.
        """
        plan = Plan(self, model)
        bare = not any(name.startswith(self.prefix) for name in state)
        names = {self.current(self.prefix + name if bare else name): name for name in state}
        report = plan.account(set(names), other_task)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        result = {}
        for job in plan.jobs:
            own = [plan.own_names[name] for name in job.own]
            if own[0] in report.fresh:
                continue
            foreign = [names[name] for name in job.foreign]
            wanted = [shapes[name] for name in own]
            try:
                tensors = list(job.rule.to_own([state[name] for name in foreign], wanted, model.config))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{', '.join(foreign)} cannot become {', '.join(own)}: {error}") from error
            for name, tensor, shape in zip(own, tensors, wanted, strict=True):
                if tensor.shape != shape:
                    raise ValueError(
                        f"{', '.join(foreign)}: {list(tensor.shape)} in the checkpoint, but {name} is {list(shape)} in the model"
                    )
                result[name] = tensor
            if job.rule.moved:
                report.taken[foreign[0]] = own[0]
            else:
                report.transformed |= dict.fromkeys(own, foreign)
        return result, report

    def current(self, name: str) -> str:
        """Today's name of a foreign key."""
        for old, new in self.aliases:
            if (values := Pattern(old).match(name)) is not None:
                return Pattern(new).name(values)
        return name

    def to_foreign(self, state: State, model) -> State:
        """A foreign state dict from ours, `model.state_dict()` or one with the same keys; undoes `to_zoo`."""
        plan = Plan(self, model)
        own = set(plan.own_names.values())
        refuse("our state dict does not fit the model", own - set(state) - plan.tied_own, set(state) - own)
        result = {}
        for job in plan.jobs if self.file.endswith(".safetensors") else plan.jobs + plan.tied_jobs:
            tensors = [state[plan.own_names[name]] for name in job.own]
            for name, tensor in zip(job.foreign, job.rule.to_foreign(tensors, model.config), strict=True):
                result[name.removeprefix(self.prefix) if plan.bare else name] = tensor
        return result

    def check_expressible(self, config: ZooConfig, foreign: dict) -> None:
        """Raise ValueError if `foreign` does not say all that `config` does. Fields of None are derived ones."""
        again = type(config)(**self.config_map(foreign))
        layers, layers_again = ([layer.to_dict() for layer in each.layer_configs()] for each in (config, again))
        names = config.shared_fields().keys() | ({f.name for f in fields(config)} - {f.name for f in fields(ZooConfig)})
        if layers == layers_again:  # two ways of saying the same plan
            names = config.shared_fields().keys()
        lost = [n for n in sorted(names) if getattr(config, n) is not None and getattr(config, n) != getattr(again, n)]
        if lost:
            values = ", ".join(f"{n}={getattr(config, n)!r}" for n in lost)
            raise ValueError(
                f"the layout {self.name!r} cannot express {values}; save without layout=, or choose another of {list(layouts())}"
            )


class Plan:
    """The rules of a layout laid over the keys of one model, all as a model with a head has them.

    Attributes: jobs; fresh: keys with no counterpart; own_names: such a key -> the model's own; bare: the model has no head;
    tied_own: the model's keys that repeat another; tied_jobs, tied: their jobs and foreign keys.
    """

    def __init__(self, layout: Layout, model):
        self.layout, self.bare = layout, model.base_model is model
        body = model.base_model_prefix + "."
        self.body = body
        self.own_names = {body + name if self.bare else name: name for name in model.state_dict()}
        self.tied_own = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        self.mixers = [layer.name for layer in model.config.layer_configs()]
        self.rules = layout.rules(model.config) if callable(layout.rules) else layout.rules
        jobs, self.fresh, self.tied, self.tied_jobs = {}, [], set(), []
        for name in self.own_names:
            index, values = self._find(name)
            rule = self.rules[index]
            if not rule.foreign:
                self.fresh.append(name)
                continue
            job = Job(rule, [p.name(values) for p in rule.foreign], [p.name(values) for p in rule.own])
            if self.own_names[name] in self.tied_own:
                self.tied |= set(job.foreign)
                self.tied_jobs.append(job)
            else:
                jobs[index, values] = job
        self.jobs = list(jobs.values())
        if absent := [name for job in self.jobs for name in job.own if name not in self.own_names]:
            raise ValueError(f"layout {layout.name!r} makes {', '.join(absent[:SHOWN])}, which the model does not have")

    def _find(self, name: str) -> tuple[int, tuple[int, ...]]:
        """The one rule for an own key."""
        rules = enumerate(self.rules)
        found = [(i, values) for i, rule in rules for p in rule.own if (values := p.match(name)) is not None and self._meant(rule, values)]
        if len(found) != 1:
            known = [p.text for rule in self.rules for p in rule.own]
            what = "no rule" if not found else f"{len(found)} rules"
            raise ValueError(f"layout {self.layout.name!r} has {what} for our key {name}{nearest(name, known)}; it needs exactly one")
        return found[0]

    def _meant(self, rule: Rule, values: tuple[int, ...]) -> bool:
        """Whether a rule that fits the key is one for its layer."""
        return not rule.mixer or rule.mixer == self.mixers[values[0]]

    @cached_property
    def drops(self) -> list[tuple[Pattern, str]]:
        return [(p, rule.reason) for rule in self.rules if not rule.own for p in rule.foreign]

    def is_head(self, name: str) -> bool:
        """Whether a foreign key lies outside the body."""
        rules = (rule for rule in self.rules if rule.own and not rule.own[0].text.startswith(self.body))
        return not name.startswith(self.layout.prefix) or any(p.match(name) is not None for rule in rules for p in rule.foreign)

    def account(self, given: set[str], other_task: bool) -> Report:
        """A report of what will be fresh and dropped, or a ValueError about what is missing and surplus."""
        report = Report(fresh=[self.own_names[name] for name in self.fresh])
        surplus, missing = given - {name for job in self.jobs for name in job.foreign}, set()
        for name in sorted(surplus):
            reason = next((why for pattern, why in self.drops if pattern.match(name) is not None), None)
            if reason is None and name in self.tied:
                reason = TIED
            if reason is None and other_task and self.is_head(name):
                reason = OTHER_HEAD
            if reason is not None:
                report.dropped[name] = reason
        for job in self.jobs:
            absent = set(job.foreign) - given
            if absent and other_task and not job.own[0].startswith(self.body):
                report.fresh += [self.own_names[name] for name in job.own]
            else:
                missing |= absent
        refuse(f"the checkpoint does not fit the layout {self.layout.name!r}", missing, surplus - set(report.dropped))
        return report


def refuse(what: str, missing: set[str], surplus: set[str]) -> None:
    """Raise ValueError if there is anything in either, naming for each key the nearest of the other side."""
    problems = []
    for label, keys, others in (("missing", missing, surplus), ("unknown", surplus, missing)):
        if keys:
            problems.append(f"{label} {len(keys)}: " + ", ".join(k + nearest(k, others) for k in sorted(keys)[:SHOWN]))
    if problems:
        raise ValueError(f"{what}: " + " | ".join(problems))


def layouts() -> dict[str, str]:
    """Foreign layouts that can be loaded and saved: name -> the architecture they become."""
    return {layout.name: entry.name for entry in registry.ARCHITECTURES.values() for layout in entry.layouts}


def find_layout(config: dict) -> tuple[registry.Architecture, Layout]:
    """The architecture and layout for a foreign config, or an error that names the nearest."""
    kind = config.get("model_type")
    every = [(entry, layout) for entry in registry.ARCHITECTURES.values() for layout in entry.layouts]
    for entry, layout in sorted(every, key=lambda pair: pair[1].matches is None):
        named = kind in layout.model_types or (kind is None and not layout.model_types)
        if named and (layout.matches is None or layout.matches(config)):
            return entry, layout
    known = sorted({kind for _, layout in every for kind in layout.model_types})
    raise ValueError(f"no layout for checkpoints of model_type {kind!r}{nearest(kind, known)}; known: {', '.join(known)}")


def get_layout(entry: registry.Architecture, name: str) -> Layout:
    """A layout of this architecture by its name."""
    own = {layout.name: layout for layout in entry.layouts}
    if name not in own:
        raise ValueError(f"{entry.name!r} has no layout {name!r}{nearest(name, own)}; it has {', '.join(own) or 'none'}")
    return own[name]

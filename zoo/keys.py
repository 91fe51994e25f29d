"""Keys of two checkpoints, and the rules between them: which becomes which, and what is missing, surplus or not needed."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Size, Tensor

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
        exact: there and back no bit changes; else what the tensors mean is kept, to rounding.
        mixer: only in layers with this mixer, the first number in the keys being the layer's; empty: in all.
        beside, without: only in models with, and only in models without this key of ours; empty: in all.
        reason: why the foreign key is not needed.
    """

    foreign: tuple[Pattern, ...] = ()
    own: tuple[Pattern, ...] = ()
    to_own: Callable[[list[Tensor], list[Size], ZooConfig], Iterable[Tensor]] | None = None
    to_foreign: Callable[[list[Tensor], ZooConfig], Iterable[Tensor]] | None = None
    moved: bool = False
    exact: bool = True
    mixer: str = ""
    beside: str = ""
    without: str = ""
    reason: str = ""

    def __post_init__(self):
        sides = [*self.foreign, *self.own]
        for other in sides[1:]:
            if other.kinds != sides[0].kinds:
                raise ValueError(
                    f"the slots of {sides[0].text!r} and {other.text!r} differ; both sides of a rule need the same in the same order"
                )


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

    def __str__(self) -> str:
        """A line for each kind, and one for each reason."""
        made = {name for names in self.transformed.values() for name in names}
        lines = [
            f"{len(self.taken)} tensors as they were: {few(self.taken)}",
            f"{len(self.transformed)} made from {len(made)} others: {few(self.transformed)}",
            f"{len(self.fresh)} start untrained: {few(self.fresh)}",
        ]
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            lines.append(f"{len(names)} not needed, {reason}: {few(names)}")
        return "\n".join(line for line in lines if not line.startswith("0 "))


def few(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


@dataclass(frozen=True)
class Job:
    """A rule with its slots filled."""

    rule: Rule
    foreign: list[str]
    own: list[str]


class Plan:
    """The rules of a layout laid over the keys of one model, all as a model with a head has them.

    Attributes: jobs; fresh: keys with no counterpart; own_names: such a key -> the model's own; bare: the model has no head;
    tied_own: the model's keys that repeat another; tied_jobs, tied: their jobs and foreign keys.
    """

    def __init__(self, layout, model):
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
        """Whether a rule that fits the key is one for its layer, and for this model."""
        if (rule.beside and rule.beside not in self.own_names) or rule.without in self.own_names:
            return False
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

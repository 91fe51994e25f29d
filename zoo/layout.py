"""Foreign checkpoints: tables of reversible rules between their keys and ours, and loading and saving through them.

    LLAMA = Layout("llama", ("llama",), config_map, config_back, rules=(
        rename("model.layers.{}.self_attn.{q,k,v,o}_proj.{weight,bias}", "model.layers.{}.mixer.{q,k,v,out}_proj.{weight,bias}"),
        drop("model.layers.{}.self_attn.rotary_emb.inv_freq", "computed from rope_theta"),
        ...,
    ))

In a pattern `{}` stands for a number and `{a,b}` for one of several spellings; both sides of a rule have the same slots in the
same order, so that every rule reads in both directions. Patterns name keys as a model with a head has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Size, Tensor

from zoo import registry
from zoo.config import ZooConfig, nearest
from zoo.keys import Pattern, Plan, Report, Rule, State, refuse


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


def stack(foreign: str, own: list[list[str]]) -> Rule:
    """One foreign tensor is a stack of ours: its row i holds those of `own[i]`, end to end."""
    flat = [name for row in own for name in row]

    def to_own(x: list[Tensor], shapes: list[Size], config: ZooConfig):
        sizes = [shape[0] for shape in shapes[: len(own[0])]]
        if list(x[0].shape[:2]) != [len(own), sum(sizes)]:
            raise ValueError(f"it is {list(x[0].shape)}, but {len(own)} rows have parts of {sizes}")
        return [part.clone() for row in x[0] for part in row.split(sizes)]

    def to_foreign(x: list[Tensor], config: ZooConfig):
        width = len(own[0])
        return [torch.stack([torch.cat(x[first : first + width]) for first in range(0, len(x), width)])]

    return Rule((Pattern(foreign),), tuple(map(Pattern, flat)), to_own, to_foreign)


def within(mixer: str, *rules: Rule) -> tuple[Rule, ...]:
    """Rules for the layers with this mixer alone, in a model with several kinds."""
    return tuple(replace(rule, mixer=mixer) for rule in rules)


def depending(key: str, present: Rule, absent: Rule) -> tuple[Rule, Rule]:
    """The first rule for models that have this key of ours, the second for those that do not."""
    return replace(present, beside=key), replace(absent, without=key)


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


@dataclass(frozen=True)
class Delta:
    """Checkpoints that may hold only what was trained beside the tensors of a base model.

    Args:
        own: whether a foreign key is of the trained part.
        join: (tensors of the base, of the trained part, foreign config) -> those of the whole; None: both together.
    """

    own: Callable[[str], bool]
    join: Callable[[State, State, dict], State] | None = None


@dataclass(frozen=True)
class Layout:
    """How somebody else lays out the checkpoints of one of our architectures.

    Args:
        name: what `save_pretrained(layout=...)` calls it.
        model_types: of the foreign configs; the first is written when saving. Empty for configs that name none; None among them
            for those that may leave it out.
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
        beside: JSON files read beside config.json, where there are any; each is a field of the foreign config, named as the file.
        delta: where checkpoints may leave out what a base model has, which is then named when loading.
        trials: short name -> fields of the foreign config, of sizes that test in no time, on which `zoo.evaluate.parity` proves the
            layout against transformers. They lie over the sizes that all trials share; "model_type" chooses among several types,
            "architectures" another class than the one for language models (of an encoder: the bare one).
        forgets: fields of the foreign config that leave what a trained model computes as it is, or that saving writes as what they
            amount to. Whatever else that config has, `config_map` looks at.
    """

    name: str
    model_types: tuple[str | None, ...]
    config_map: Callable[[dict], dict]
    config_back: Callable[[ZooConfig], dict]
    rules: tuple[Rule, ...] | Callable[[ZooConfig], tuple[Rule, ...]]
    prefix: str = "model."
    matches: Callable[[dict], bool] | None = None
    complete: Callable[[dict], dict] | None = None
    classes: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    file: str = "model.safetensors"
    beside: tuple[str, ...] = ()
    delta: Delta | None = None
    trials: dict[str, dict] = field(default_factory=dict)
    forgets: tuple[str, ...] = ()

    def to_zoo(
        self, state: Mapping[str, Tensor], model, *, other_task: bool = False, dtype: torch.dtype | None = None,
        only: Callable[[str], bool] = lambda name: True,
    ) -> tuple[State, Report]:  # fmt: skip
        """Our state dict from a foreign one.

        Args:
            only: of our keys, which to make; others are accounted for, but not read.
            model: one of ours (on the meta device will do), for its keys, shapes and config.
            other_task: the checkpoint's head may be missing or superfluous.
            dtype: what floating tensors become, but for those that the model keeps in float32; None: as they are.

        Raises:
            ValueError: a key is missing, surplus or misshapen, or a key of the model has no rule.
        """
        plan = Plan(self, model)
        bare = not any(name.startswith(self.prefix) for name in state)
        names = {self.current(self.prefix + name if bare else name): name for name in state}
        report = plan.account(set(names), other_task)
        blank = model.state_dict()
        result = {}
        loan = getattr(state, "loan", state.__getitem__)  # what is made of a tensor need not keep its file in memory
        for job in plan.jobs:
            own = [plan.own_names[name] for name in job.own]
            if own[0] in report.fresh or not only(own[0]):
                continue
            foreign = [names[name] for name in job.foreign]
            wanted = [blank[name].shape for name in own]
            try:
                same = job.rule.moved and state[foreign[0]].dtype == (dtype or state[foreign[0]].dtype)
                given = [state[name] if same else loan(name) for name in foreign]
                tensors = list(job.rule.to_own(given, wanted, model.config))
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{', '.join(foreign)} cannot become {', '.join(own)}: {error}") from error
            for name, tensor in zip(own, tensors, strict=True):
                check_fit(", ".join(foreign), tensor, name, blank[name])
                wide = not tensor.is_floating_point() or any(part in name for part in model._keep_in_fp32_modules_strict or ())
                result[name] = tensor if wide or dtype is None else tensor.to(dtype)
            if job.rule.moved:
                report.taken[foreign[0]] = own[0]
            else:
                report.transformed |= dict.fromkeys(own, foreign)
        self._check_tied(plan, state, names, result, model)
        return result, report

    def _check_tied(self, plan: Plan, state: State, names: dict[str, str], result: State, model) -> None:
        """Raise ValueError if the checkpoint holds a tensor that the config ties to another and that is different."""
        for job in plan.tied_jobs:
            (own,), foreign = (plan.own_names[name] for name in job.own), [names.get(name) for name in job.foreign]
            source = result.get(model.all_tied_weights_keys[own])
            if None in foreign or source is None:
                continue
            (copy,) = job.rule.to_own([state[name] for name in foreign], [source.shape], model.config)
            if not torch.equal(copy, source):
                raise ValueError(
                    f"{', '.join(foreign)} is tied to the embedding by config.json, but differs from it in the checkpoint; "
                    "set tie_word_embeddings to false if both are wanted"
                )

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
            others = [layout.name for layout in registry.get(config.name).layouts if layout is not self]
            raise ValueError(f"the layout {self.name!r} cannot express {values}; save without layout=, or choose another of {others}")


def layouts() -> dict[str, str]:
    """Foreign layouts that can be loaded and saved: name -> the architecture they become."""
    return {layout.name: entry.name for entry in registry.ARCHITECTURES.values() for layout in entry.layouts}


def check_fit(foreign: str, tensor: Tensor, name: str, blank: Tensor) -> None:
    """Raise ValueError unless a tensor made from the foreign ones can stand in the place of `blank`."""
    if tensor.shape != blank.shape:
        raise ValueError(
            f"{foreign}: {list(tensor.shape)} in the checkpoint, but {name} is {list(blank.shape)} in the model its config.json describes"
        )
    if tensor.is_floating_point() != blank.is_floating_point() or tensor.element_size() == 1:
        raise ValueError(f"{foreign} is of {tensor.dtype} in the checkpoint, so probably quantised; {name} is of {blank.dtype}")


def find_layout(config: dict) -> tuple[registry.Architecture, Layout]:
    """The architecture and layout for a foreign config, or an error that names the nearest."""
    kind = config.get("model_type")
    every = [(entry, layout) for entry in registry.ARCHITECTURES.values() for layout in entry.layouts]
    for entry, layout in sorted(every, key=lambda pair: pair[1].matches is None):
        named = kind in layout.model_types or (kind is None and not layout.model_types)
        if named and (layout.matches is None or layout.matches(config)):
            return entry, layout
    known = sorted({kind for _, layout in every for kind in layout.model_types if kind})
    if kind in known:
        what = f"none of the layouts for model_type {kind!r} is meant by the other fields"
    else:
        what = f"no layout for checkpoints of model_type {kind!r}{nearest(kind, known) if kind else ''}"
    shown = {name: value for name, value in config.items() if name != "tensors"} or config.get("tensors", {})
    raise ValueError(f"{what}; looked at {', '.join(sorted(shown)[:20])}; known model types: {', '.join(known)}")


def get_layout(entry: registry.Architecture, name: str) -> Layout:
    """A layout of this architecture by its name."""
    own = {layout.name: layout for layout in entry.layouts}
    if name not in own:
        raise ValueError(f"{entry.name!r} has no layout {name!r}{nearest(name, own)}; it has {', '.join(own) or 'none'}")
    return own[name]

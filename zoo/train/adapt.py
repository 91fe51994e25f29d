"""Which part of a model is trained: low-rank adapters where each mixer wants them, or parameters by pattern."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.util import find_spec

from torch import nn

from zoo.block import Block
from zoo.config import nearest

PARTS = ("mixers", "channel_mixers")


@dataclass
class Coverage:
    """Where adapters go.

    Args:
        modules: full names of the linear layers that get one.
        layers: for every kind of part, `mixer gla` or `channel_mixer GatedMLP`, how many the model has.
        reached: how many of those have an adapter, and `linears`, how many linear layers in them.
    """

    modules: list[str] = field(default_factory=list)
    layers: Counter = field(default_factory=Counter)
    reached: Counter = field(default_factory=Counter)
    linears: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = (f"{kind} {self.reached[kind]}/{count} layers, {self.linears[kind]} linear layers" for kind, count in self.layers.items())
        return "; ".join(lines)


def lora_coverage(model: nn.Module, targets: Iterable[str] = ()) -> Coverage:
    """Where adapters on `targets` go.

    Args: targets: `mixers` and `channel_mixers`, the projections each declares as its `lora_targets`; or names of linear layers,
    with as much of their path in front as tells them apart. None: all that is declared.

    Raises:
        ValueError: a target that matches no linear layer of the model.
    """
    asked, coverage, matched = list(targets), Coverage(), Counter()
    targets = asked or PARTS
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
    for part, (path, block) in ((part, named) for named in blocks for part in PARTS):
        module = getattr(block, part[:-1])
        if module is not None:
            kind, found = f"{part[:-1]} {type(module).__name__}", []
            for name, linear in module.named_modules(prefix=f"{path}.{part[:-1]}"):
                if isinstance(linear, nn.Linear):
                    hits = [target for target in targets if _hits(target, part, module, name)]
                    matched.update(hits)
                    found += [name] if hits else []
            coverage.modules += found
            coverage.layers[kind] += 1
            coverage.reached[kind] += bool(found)
            coverage.linears[kind] += len(found)
    if missing := [target for target in asked if not matched[target]] or ([] if coverage.modules else list(PARTS)):
        names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(
            f"the adapter target {missing[0]!r} matches no linear layer of a {type(model).__name__}'s blocks{nearest(missing[0], names)}; "
            f"there are mixers, channel_mixers, {', '.join(sorted(names))}"
        )
    return coverage


def _hits(target: str, part: str, module: nn.Module, name: str) -> bool:
    if target in PARTS:
        return target == part and name.rsplit(".", 1)[-1] in module.lora_targets
    return f".{name}".endswith(f".{target}")


def check_peft() -> None:
    """Raise ValueError unless the package that makes adapters is there."""
    if find_spec("peft") is None:
        raise ValueError("adapters need the package peft; run: pip install peft")


def add_lora(model: nn.Module, targets: Iterable[str], *, r: int, alpha: float | None = None, dropout: float = 0.0):
    """The model with adapters on `targets` (see `lora_coverage`), and where they went."""
    check_peft()
    from peft import LoraConfig, get_peft_model

    coverage = lora_coverage(model, targets)
    settings = LoraConfig(
        r=r, lora_alpha=2 * r if alpha is None else alpha, lora_dropout=dropout, target_modules=coverage.modules,
        task_type="CAUSAL_LM" if model.config.causal else None,
    )  # fmt: skip
    return get_peft_model(model, settings), coverage


def learn_states(model: nn.Module) -> None:
    """Let every sequence begin from learned states, at first those of nothing seen; they are saved with the model.

    Raises:
        ValueError: no layer has a state to learn.
    """
    for block in model.base_model.layers:
        block.learn_state()
    if not any(block.start for block in model.base_model.layers):
        raise ValueError(f"a {type(model).__name__} has no states to learn: attention holds single tokens; adapt its weights instead")
    model.config.learned_state = True


def choose_parameters(model: nn.Module, train_only: Iterable[str] = (), freeze: Iterable[str] = ()) -> None:
    """Freeze every parameter whose name matches none of `train_only` (if there are any) or one of `freeze`; patterns as in a shell.

    Raises:
        ValueError: a pattern that matches no parameter, or nothing left to train.
    """
    train_only, freeze = list(train_only), list(freeze)
    names = [name for name, _ in model.named_parameters()]
    for pattern in (*train_only, *freeze):
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"the pattern {pattern!r} matches no parameter{nearest(pattern, names)}; they are named like {names[-1]!r}")
    for name, parameter in model.named_parameters():
        chosen = not train_only or any(fnmatch(name, pattern) for pattern in train_only)
        parameter.requires_grad_(chosen and not any(fnmatch(name, pattern) for pattern in freeze))
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"nothing is left to train: train_only={train_only}, freeze={freeze}")

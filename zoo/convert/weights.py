"""How the weights of a transformer layer seed the mixer that takes its place, role by role."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zoo.mixer import ROLES, Mixer


@dataclass
class Account:
    """What became of every weight.

    Args:
        copied: teacher keys that the student holds unchanged, somewhere.
        seeded: teacher keys that only begin a weight of another kind of mixer.
        dropped: teacher key -> why no part of the student holds it.
        fresh: student keys that no teacher key fills whole; they keep their architecture's own initial values, but for what
            `zoo.convert.starts` changes.
    """

    copied: set[str] = field(default_factory=set)
    seeded: set[str] = field(default_factory=set)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)

    def close(self, teacher: nn.Module, student: nn.Module, filled: set[str]) -> "Account":
        """Balance the account.

        Raises:
            ValueError: a teacher key is neither copied nor seeded nor dropped.
        """
        self.seeded -= self.copied
        self.dropped = {key: why for key, why in self.dropped.items() if key not in self.copied | self.seeded}
        self.fresh = set(student.state_dict()) - filled
        lost = set(teacher.state_dict()) - self.copied - self.seeded - self.dropped.keys()
        if lost:
            raise ValueError(f"{len(lost)} teacher weights found no place in the student: {', '.join(sorted(lost)[:4])}")
        return self


@torch.no_grad()
def seed_student(teacher: nn.Module, student: nn.Module) -> Account:
    """Fill a student with its teacher's weights: all but the mixers is copied, the mixers by `seed_mixer`.

    Raises:
        ValueError: a teacher weight that was forgotten.
    """
    account, filled = Account(), set()
    target = student.state_dict()
    for key, weight in teacher.state_dict().items():
        if ".mixer." not in key:
            target[key].copy_(weight)
            account.copied.add(key)
            filled.add(key)
    for index, (source, block) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        prefix = f"model.layers.{index}.mixer."
        filled |= {prefix + name for name in seed_mixer(source.mixer, block.mixer, account, prefix)}
    return account.close(teacher, student, filled)


@torch.no_grad()
def seed_mixer(source: Mixer, mixer: Mixer, account: Account, prefix: str) -> set[str]:
    """Seed one mixer from an attention layer; the names of its parameters that were filled.

    Attention is copied whole. Branches that stand side by side are seeded each. Any other mixer takes the projections that it
    names as its `roles`, in a shape that `fit` can make; the account says why any was dropped.
    """
    if hasattr(mixer, "branches"):
        parts = ((f"branches.{i}.", branch) for i, branch in enumerate(mixer.branches))
        return {part + name for part, branch in parts for name in seed_mixer(source, branch, account, prefix)}
    weights = source.state_dict()
    if type(mixer) is type(source):
        mixer.load_state_dict(weights)
        account.copied |= {prefix + name for name in weights}
        return set(weights)
    rows, own, roles = {}, dict(mixer.named_parameters()), mixer.roles()
    for name, weight in weights.items():
        role, _, kind = name.partition(".")
        place, slices = roles.get(role, (role, []))
        target = own.get(f"{place}.{kind}") if role in ROLES else None
        if target is None or not slices:
            account.dropped[prefix + name] = f"{type(mixer).__name__} has no {name}"
            continue
        try:
            for part in slices:
                target[part].copy_(fit(weight, target[part].shape, source.keys, source.heads))
        except ValueError as error:
            account.dropped[prefix + name] = f"{type(mixer).__name__}.{name}: {error}"
            continue
        account.seeded.add(prefix + name)
        rows[f"{place}.{kind}"] = rows.get(f"{place}.{kind}", 0) + sum(len(target[part]) for part in slices)
    return {name for name, count in rows.items() if count == len(own[name])}


def fit(weight: Tensor, shape: torch.Size, head: int, heads: int) -> Tensor:
    """A projection in the shape the student wants: as it is, or with each group of `head` rows repeated for the query heads it serves.

    Head h of H takes group `h // (H / G)`, as grouped attention does (arXiv:2305.13245); `h % G` would pair it with
    another's values. heads: H, of the teacher, which a student's number of groups divides.
    """
    if weight.shape == shape:
        return weight
    repeats, rest = divmod(shape[0], weight.shape[0])
    if rest or weight.shape[1:] != shape[1:] or weight.shape[0] % head or heads % (shape[0] // head):
        raise ValueError(
            f"the teacher's is {list(weight.shape)}, the student's {list(shape)}; give the mixer the teacher's number and width of heads"
        )
    return weight.unflatten(0, (-1, head)).repeat_interleave(repeats, dim=0).flatten(0, 1)

"""What must hold before a conversion is called done: properties of the student at hand, judged by the one rule of closeness."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from zoo.auto import from_pretrained
from zoo.convert.student import convert
from zoo.evaluate.closeness import assert_close
from zoo.ops import use_backend

GATES: dict[str, Callable[["Case"], None]] = {}
LEAST = 48  # tokens of a row to try them on


def gate(function: Callable[["Case"], None]) -> Callable[["Case"], None]:
    GATES[function.__name__] = function
    return function


@dataclass(eq=False)
class Case:
    """A student, its teacher, and a row `[1, T]` of token ids; T should exceed every window."""

    teacher: nn.Module
    student: nn.Module
    ids: Tensor

    def __post_init__(self):
        self.known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def whole(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the first tokens, all at once: by the definition in float64 and in the student's dtype, and as they are computed."""
        if length not in self.known:
            ids = self.ids[:, :length]
            with use_backend("reference"):
                exact, plain = (model(ids, use_cache=False).logits for model in (copy.deepcopy(self.student).double(), self.student))
            self.known[length] = exact, plain, self.student(ids, use_cache=False).logits
        return self.known[length]

    def check(self, result: Tensor, what: str) -> None:
        """Raise AssertionError unless these are the logits `[1, T, vocabulary]` of the first T tokens, up to the noise of the dtype."""
        exact, *plain = self.whole(result.shape[1])
        assert_close(result, tuple(plain), exact, what)


@torch.no_grad()
def run_gates(teacher: nn.Module, student: nn.Module, ids: Tensor) -> dict[str, str | None]:
    """Gate -> None where it holds, else what is wrong.

    Args:
        teacher, student: zoo language models in evaluation mode, on one device.
        ids: `[1, T]`.

    Raises:
        ValueError: a row that is too short.
    """
    if ids.shape[0] != 1 or ids.shape[1] < LEAST:
        raise ValueError(f"the gates need a row of at least {LEAST} tokens, got {list(ids.shape)}")
    case, found = Case(teacher, student, ids.to(student.device)), {}
    for name, holds in GATES.items():
        try:
            holds(case)
            found[name] = None
        except (AssertionError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@gate
def softmax_in_every_layer_is_the_teacher(case: Case) -> None:
    """The maps from teacher to student, with attention as the mixer that takes attention's place: the same bits."""
    layer = case.teacher.config.layer_configs()[0]
    same = convert(case.teacher, mixer=layer.name, window=None, sinks=0, inherit=type(layer).__annotations__)
    ours, theirs = same(case.ids).logits, case.teacher(case.ids).logits
    assert torch.equal(ours, theirs), f"the logits differ by {(ours - theirs).abs().max().item():.3g}"


@gate
def step_by_step_is_the_whole(case: Case) -> None:
    """Every token through the state of those before it: what training computes in parallel."""
    case.check(pieces(case.student, case.ids, range(1, case.ids.shape[1])), "token by token")


@gate
def prefill_and_steps_are_the_whole(case: Case) -> None:
    length = case.ids.shape[1]
    for cut in (length // 2, length - 7):
        case.check(pieces(case.student, case.ids, range(cut, length)), f"a prefill of {cut}, then steps")


@gate
def padded_is_alone(case: Case) -> None:
    """Rows of several lengths in one batch, padded on the left."""
    length = case.ids.shape[1]
    rows = [case.ids[:, :n] for n in (length, length // 3, 5)]
    ids, mask = (torch.zeros(len(rows), length, dtype=torch.long, device=case.ids.device) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, length - row.shape[1] :], mask[i, length - row.shape[1] :] = row[0], 1
    result = case.student(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        case.check(result[i][mask[i] == 1][None], f"a row of {row.shape[1]} tokens, padded")


@gate
def saved_and_loaded_is_equal(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        case.student.save_pretrained(folder)
        loaded = from_pretrained(folder, task="causal_lm", dtype=case.student.dtype)
        before, after = case.student.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys(), f"keys differ: {sorted(before.keys() ^ after.keys())[:4]}"
        for name, weight in before.items():
            assert torch.equal(weight.cpu(), after[name]), f"{name} differs"
        # a copy, for memory mapped from a file is aligned otherwise, by which matrix products round differently
        again = copy.deepcopy(loaded).to(case.student.device).eval()
        assert torch.equal(again(case.ids).logits, case.student(case.ids).logits), "the logits differ"


def pieces(model: nn.Module, ids: Tensor, cuts) -> Tensor:
    """Logits of `ids` fed piece by piece, cut before each index."""
    cache, found, edges = None, [], [0, *cuts, ids.shape[1]]
    for start, stop in pairwise(edges):
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)

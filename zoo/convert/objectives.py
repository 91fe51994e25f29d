"""What a student is compared by: its layers, one by one or in runs, the logits, or the tokens themselves.

Each objective is called with the teacher, the student and a batch `[B, T]` of token ids, leaves gradients in the student, and
returns its losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.block import Block
from zoo.convert.maps import weights_of
from zoo.convert.recipe import Stage
from zoo.entry import Entry
from zoo.loss import LOGITS

Objective = Callable[[nn.Module, nn.Module, Tensor], list[float]]


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Squared error over the power of the target, a scalar."""
    return (y - target).float().square().mean() / target.float().square().mean().clamp_min(1e-12)


def cross_entropy(weights: Tensor, target: Tensor) -> Tensor:
    """Of attention weights `[B, H, T, T]`, those of a query being a distribution: the mean over queries (Hedgehog, arXiv:2402.04347)."""
    if (weights.detach().float().sum(-1) - 1).abs().max() > 0.01 or weights.detach().min() < -0.01:
        raise ValueError("the mixer's weights do not sum to one, so they have no cross-entropy; compare them by loss: frobenius")
    return -(target.float() * weights.float().clamp_min(1e-12).log()).sum(-1).mean()


ERRORS = {  # of outputs `[B, T, D]`, or of weights `[B, H, T, T]`
    "rel_mse": relative_error,
    "mse": lambda y, target: F.mse_loss(y.float(), target.float()),
    "l2": lambda y, target: (y - target).float().norm(dim=-1).mean() / y.shape[-1] ** 0.5,  # RADLADS, arXiv:2505.03005
    "cos": lambda y, target: 1 - F.cosine_similarity(y.float(), target.float(), dim=-1).mean(),
    "xent": cross_entropy,
    "frobenius": lambda y, target: torch.linalg.matrix_norm((y - target).float()).mean(),  # MOHAWK, arXiv:2408.10189
}


# -- layers --------------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a mixer read and gave, what its block gave (None where the mixer was asked alone), and what it hands on (the carry trait)."""

    read: Tensor
    mixed: Tensor
    out: Tensor | None
    carry: Tensor | None


def ask(block: Block, x: Tensor, carry: Tensor | None = None) -> Answer:
    """Run a block and see what passes through its mixer."""
    seen = []
    hook = block.mixer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0])))
    try:
        out, _, carry = block(x, None, None, carry)
    finally:
        hook.remove()
    return Answer(*seen[0], out, carry)


def ask_mixer(mixer: nn.Module, x: Tensor, carry: Tensor | None = None) -> Answer:
    """The same of a mixer alone."""
    if mixer.traits.carry:
        y, _, carry = mixer(x, None, None, carry)
    else:
        y = mixer(x)[0]
    return Answer(x, y, None, carry)


def observe(target: str, mixer: nn.Module, call: Callable[[], Answer]) -> tuple[Tensor, Answer]:
    """What a stage compares, and the whole answer."""
    if target == "attention_map":
        answers = []
        return weights_of(mixer, lambda: answers.append(call())), answers[0]
    answer = call()
    return (answer.mixed if target == "mixer_out" else answer.out), answer


def compare(
    stage: Stage, source: Block, block: Block, x: Tensor, own: Tensor | None = None, carry: Tensor | None = None
) -> tuple[Tensor, Tensor, Answer]:
    """One replaced layer: its loss, the teacher's output and the student's answer.

    Args: x: what the teacher's block reads; own: what the student's does, None is the same; carry: what an earlier layer handed on.
    """
    with torch.no_grad():
        wanted, truth = observe(stage.target, source.mixer, lambda: ask(source, x))
    if own is None and stage.target != "block_out":
        dtype = next(block.mixer.parameters()).dtype
        found, answer = observe(stage.target, block.mixer, lambda: ask_mixer(block.mixer, truth.read.to(dtype), carry))
    else:
        found, answer = observe(stage.target, block.mixer, lambda: ask(block, x if own is None else own, carry))
    return ERRORS[stage.loss](found, wanted), truth.out, answer


def entering(model: nn.Module, ids: Tensor) -> Tensor:
    """`[B, T, D]`: what the first block of a model reads."""
    entry = Entry.open(*ids.shape, None, None, None, None, False, False)
    return model._position(entry.enter(model._embed(ids)), entry, None)


def layers(stage: Stage, replaced: list[int]) -> Objective:
    """Every replaced layer is compared with its teacher's; one loss for each.

    Layers are taken in runs as `stage.scope` says. The graph of a run is freed before the next is computed, and a run's first
    layer takes what it reads, and what was carried to it, as it is.
    """

    def objective(teacher: nn.Module, student: nn.Module, ids: Tensor) -> list[float]:
        losses, pending, carry = [], [], None
        reach = {"layer": 1, "model": len(teacher.model.layers)}.get(stage.scope, stage.scope)
        with torch.no_grad():
            x = own = entering(teacher.model, ids)
        for index in range(replaced[-1] + 1):
            source, block = teacher.model.layers[index], student.model.layers[index]
            if index % reach == 0:
                learn(pending)
                own, carry = (x if stage.inputs == "teacher" else own.detach()), None if carry is None else carry.detach()
            if index in replaced:
                loss, x, answer = compare(stage, source, block, x, None if stage.apart else own, carry)
                own, carry = answer.out, answer.carry
                pending.append(loss)
                losses.append(loss.detach())
            else:
                with torch.no_grad():
                    x = source(x)[0]
                own, _, carry = (None, None, carry) if stage.apart else block(own, None, None, carry)
        learn(pending)
        return torch.stack(losses).tolist()

    return objective


def learn(pending: list[Tensor]) -> None:
    """Leave the gradients of these losses, and forget them."""
    if pending:
        torch.stack(pending).sum().backward()
    pending.clear()


# -- the whole model -----------------------------------------------------------------------------------------------------


def logits(stage: Stage) -> Objective:
    """The Kullback-Leibler divergence between the predictions, teacher from student (`fkl`) or the reverse, in nats per token;
    with `ce+fkl` its share beside the negative log likelihood of the text."""

    def objective(teacher: nn.Module, student: nn.Module, ids: Tensor) -> list[float]:
        with torch.no_grad():
            expected = teacher.model(ids, use_cache=False).last_hidden_state
        states = student.model(ids, use_cache=False).last_hidden_state
        terms = {"labels": ids, "weight": stage.kl_weight} if stage.loss == "ce+fkl" else {"reverse": stage.loss == "rkl"}
        return [divergence(states, expected, student._logits, teacher._logits, student.config.vocab_size, **terms)]

    return objective


def divergence(
    states: Tensor, expected: Tensor, head: Callable, teacher_head: Callable, vocab_size: int, *, reverse: bool = False,
    labels: Tensor | None = None, weight: float = 1.0,
) -> float:  # fmt: skip
    """The mean divergence over all tokens, whose gradient goes to `states` and to what the head is made of.

    Args:
        states, expected: `[B, T, D]`, what the two heads read; both sets of logits exist for a few tokens at a time only.
        labels: `[B, T]`, shifted here: the mean negative log likelihood of these is added. weight: of the divergence.
    """
    leaf = states.detach().flatten(0, 1).requires_grad_()
    total, rows = 0.0, max(64, LOGITS // vocab_size)
    targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    for start in range(0, len(leaf), rows):
        part = slice(start, start + rows)
        with torch.no_grad():
            wanted = F.log_softmax(teacher_head(expected.flatten(0, 1)[part]).float(), -1)
        found = F.log_softmax(head(leaf[part]).float(), -1)
        first, second = (wanted, found) if reverse else (found, wanted)
        loss = weight * F.kl_div(first, second, log_target=True, reduction="sum") / len(leaf)
        if targets is not None:
            loss = loss + F.nll_loss(found, targets[part], ignore_index=-100, reduction="sum") / (targets != -100).sum()
        loss.backward()
        total += loss.item()
    states.backward(leaf.grad.view_as(states))
    return total


def tokens(stage: Stage) -> Objective:
    """The mean negative log likelihood of the text itself; the teacher is not asked."""

    def objective(teacher: nn.Module, student: nn.Module, ids: Tensor) -> list[float]:
        found = student(ids, labels=ids, skip_logits=True, use_cache=False).loss
        found.backward()
        return [found.item()]

    return objective

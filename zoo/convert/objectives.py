"""What a student is compared by: the mixers' outputs, layer by layer, the logits, or the tokens themselves.

Each objective is called with the teacher, the student and a batch `[B, T]` of token ids, leaves gradients in the student, and
returns its losses.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.loss import LOGITS

Objective = Callable[[nn.Module, nn.Module, Tensor], list[float]]


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Squared error over the power of the target, a scalar."""
    return (y - target).float().square().mean() / target.float().square().mean().clamp_min(1e-12)


ERRORS = {  # of a mixer's output `[B, T, D]`
    "rel_mse": relative_error,
    "mse": lambda y, target: F.mse_loss(y.float(), target.float()),
    "l2": lambda y, target: (y - target).float().norm(dim=-1).mean() / y.shape[-1] ** 0.5,  # RADLADS, arXiv:2505.03005
    "cos": lambda y, target: 1 - F.cosine_similarity(y.float(), target.float(), dim=-1).mean(),
}


def mixer_outputs(layers: list[int], loss: str) -> Objective:
    """Every replaced mixer answers the input of its teacher's; one loss for each.

    A mixer's graph is freed before the next layer is computed. What a mixer hands on to later layers (the carry trait) they
    take as it is, without a gradient.
    """
    error = ERRORS[loss]

    def learner(mixer: nn.Module, losses: list[Tensor], carried: list[Tensor | None]):
        def learn(_, inputs: tuple, output: tuple) -> None:
            x = inputs[0].to(next(mixer.parameters()).dtype)
            with torch.enable_grad():
                if mixer.traits.carry:
                    y, _, carry = mixer(x, None, None, carried[0])
                    carried[0] = carry.detach()
                else:
                    y = mixer(x)[0]
                found = error(y, output[0])
                found.backward()
            losses.append(found.detach())

        return learn

    def objective(teacher: nn.Module, student: nn.Module, ids: Tensor) -> list[float]:
        losses: list[Tensor] = []
        carried: list[Tensor | None] = [None]
        with ExitStack() as hooks, torch.no_grad():
            for index in layers:
                hook = learner(student.model.layers[index].mixer, losses, carried)
                hooks.callback(teacher.model.layers[index].mixer.register_forward_hook(hook).remove)
            teacher.model(ids, use_cache=False)
        return torch.stack(losses).tolist()

    return objective


def logits(loss: str) -> Objective:
    """The Kullback-Leibler divergence between the predictions, teacher from student (`fkl`) or the reverse, in nats per token."""

    def objective(teacher: nn.Module, student: nn.Module, ids: Tensor) -> list[float]:
        with torch.no_grad():
            expected = teacher.model(ids, use_cache=False).last_hidden_state
        states = student.model(ids, use_cache=False).last_hidden_state
        return [divergence(states, expected, student._logits, teacher._logits, student.config.vocab_size, reverse=loss == "rkl")]

    return objective


def divergence(
    states: Tensor, expected: Tensor, head: Callable, teacher_head: Callable, vocab_size: int, *, reverse: bool = False
) -> float:
    """The mean divergence over all tokens, whose gradient goes to `states` and to what the head is made of.

    Args:
        states, expected: `[B, T, D]`, what the two heads read; both sets of logits exist for a few tokens at a time only.
    """
    leaf = states.detach().flatten(0, 1).requires_grad_()
    total, rows = 0.0, max(64, LOGITS // vocab_size)
    for part, other in zip(leaf.split(rows), expected.flatten(0, 1).split(rows), strict=True):
        with torch.no_grad():
            wanted = F.log_softmax(teacher_head(other).float(), -1)
        found = F.log_softmax(head(part).float(), -1)
        first, second = (wanted, found) if reverse else (found, wanted)
        loss = F.kl_div(first, second, log_target=True, reduction="sum") / len(leaf)
        loss.backward()
        total += loss.item()
    states.backward(leaf.grad.view_as(states))
    return total


def tokens(loss: str) -> Objective:
    """The mean negative log likelihood of the text itself; the teacher is not asked."""

    def objective(teacher: nn.Module, student: nn.Module, ids: Tensor) -> list[float]:
        found = student(ids, labels=ids, skip_logits=True, use_cache=False).loss
        found.backward()
        return [found.item()]

    return objective

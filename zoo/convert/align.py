"""Layer-wise alignment: every new mixer learns to answer as its teacher layer does, from that layer's own input.

The first stage of MOHAWK (arXiv:2408.10189), LoLCATs (arXiv:2410.10254) and RADLADS (arXiv:2505.03005). The layers do not
depend on one another, so a single pass of the teacher trains all of them, and each one's graph is freed at once.
"""

import math

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zoo import registry
from zoo.convert.student import converted_layers


def align(
    teacher: nn.Module,
    student: nn.Module,
    rows: Tensor,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch: int = 1,
    warmup: float = 0.1,
    seed: int = 0,
    label: str | None = None,
) -> list[list[float]]:
    """Train the replaced mixers of `student`, and nothing else, on the inputs and outputs of the teacher's.

    Args:
        teacher: the zoo transformer the student was converted from.
        rows: `[N, T]` token ids; each step takes `batch` of them, in a new random order after each round.
        learning_rate: the highest, of attention; the other mixers take three times it, gates thirty. AdamW, linear warm-up
            over the share `warmup` of the steps, then a cosine down to a tenth.
        label: of a progress bar with tokens per second, time left and loss; None shows none.

    Returns:
        for every step the loss of each replaced layer, in the order of `converted_layers`: the squared error of the mixer's
        output relative to the power of the teacher's.

    Raises:
        ValueError: nothing to train, or no text.
        FloatingPointError: a loss that is not finite; the layer is named and no weight has been spoilt by that step.
    """
    layers = converted_layers(student)
    if not layers or steps < 1 or not len(rows):
        raise ValueError(
            f"nothing to align: {len(layers)} replaced layers, {steps} steps, {len(rows)} rows of text; each must be at least one"
        )
    mixers = [student.model.layers[index].mixer for index in layers]
    parameters = [p for mixer in mixers for p in mixer.parameters()]
    optimizer = torch.optim.AdamW(_groups(mixers, learning_rate), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step / steps, warmup, 1 / steps))
    losses: list[Tensor] = []
    hooks = [
        teacher.model.layers[index].mixer.register_forward_hook(_learner(mixer, losses))
        for index, mixer in zip(layers, mixers, strict=True)
    ]
    trained = {p: p.requires_grad for p in student.parameters()}
    student.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    progress = tqdm(total=steps * batch * rows.shape[1], desc=label, unit="tok", disable=label is None, mininterval=1.0)
    history: list[list[float]] = []
    try:
        for picked in _order(len(rows), batch, steps, seed):
            losses.clear()
            with torch.no_grad():
                teacher.model(rows[picked].to(teacher.device), use_cache=False)
            history.append(torch.stack(losses).tolist())
            _check(history, layers)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update(batch * rows.shape[1])
            progress.set_postfix(loss=f"{sum(history[-1]) / len(layers):.4f}")
    finally:
        progress.close()
        for hook in hooks:
            hook.remove()
        for p, flag in trained.items():
            p.requires_grad_(flag)
            p.grad = None
    return history


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """Squared error over the power of the target, a scalar."""
    return (y - target).float().square().mean() / target.float().square().mean().clamp_min(1e-12)


def _groups(mixers: list[nn.Module], learning_rate: float) -> list[dict]:
    """Parameters by pace: attention starts from the teacher's solution, other mixers from a guess, gates from zero."""
    paces: dict[float, list[nn.Parameter]] = {1.0: [], 3.0: [], 30.0: []}
    for mixer in mixers:
        branches = getattr(mixer, "branches", [mixer])
        for branch in branches:
            paces[1.0 if type(branch) is registry.get("transformer").mixer else 3.0] += branch.parameters()
        paces[30.0] += [p for name, p in mixer.named_parameters(recurse=False) if name == "gate"]
    return [{"params": parameters, "lr": pace * learning_rate} for pace, parameters in paces.items()]


def _learner(mixer: nn.Module, losses: list[Tensor]):
    """A hook for a teacher's mixer: the student's sees the same input, and its gradient is taken on the spot."""

    def learn(_, inputs: tuple, output: tuple) -> None:
        with torch.enable_grad():
            loss = relative_error(mixer(inputs[0])[0], output[0])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        losses.append(loss.detach())

    return learn


def _check(history: list[list[float]], layers: list[int]) -> None:
    """Raise FloatingPointError that names the first layer whose loss is not finite."""
    for layer, loss in zip(layers, history[-1], strict=True):
        if not math.isfinite(loss):
            raise FloatingPointError(f"layer {layer}: the alignment loss is {loss} at step {len(history)}; lower the learning rate")


def _order(count: int, batch: int, steps: int, seed: int):
    """Indices of the rows of every step, each round a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch]
        queue = queue[batch:]


def _pace(done: float, warmup: float, step: float) -> float:
    """Share of the highest learning rate after a share `done` of the steps."""
    if done < warmup:
        return (done + step) / (warmup + step)
    return 0.55 + 0.45 * math.cos(math.pi * (done - warmup) / (1 - warmup))

"""One stage of a conversion under way: which weights it trains, its steps, and the state from which it goes on."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zoo import registry
from zoo.convert import objectives
from zoo.convert.recipe import Stage
from zoo.convert.student import converted_layers


class Fit:
    """Trains `student` as `stage` says; built anew and given `load`, it goes on where another left off, to the same weights.

    Args:
        teacher, student: zoo language models on one device; the student in float32, as its updates are small.
        rows: `[N, T]` token ids; a step takes `stage.batch` of them, in a new random order after each round.
        fresh: names of the student's weights that nothing has filled, for `train: new`.

    Raises:
        ValueError: nothing to train, or no text, or a stage that the engine lacks.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, rows: Tensor, stage: Stage, *, fresh: set[str] | None = None, seed: int = 0):
        if lacking := stage.missing():
            raise ValueError(f"cannot be run yet: {', '.join(lacking)}")
        self.teacher, self.student, self.rows, self.stage, self.seed = teacher, student, rows, stage, seed
        self.layers, self.history, self.steps = converted_layers(student), [], stage.steps
        self.names = trained(student, stage, fresh or set())
        if not self.names or not len(rows):
            raise ValueError(
                f"nothing to align: {len(self.layers)} replaced layers, {len(self.names)} weights to train, {len(rows)} rows of text; "
                "each must be at least one"
            )
        groups = [{"params": some, "pace": pace} for pace, some in self._paces().items() if some]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay)
        by_layer = stage.target == "mixer_out"
        self.objective = (
            objectives.mixer_outputs(self.layers, stage.loss)
            if by_layer
            else {"logits": objectives.logits, "tokens": objectives.tokens}[stage.target](stage.loss)
        )
        self.what = [f"layer {index}" for index in self.layers] if by_layer else [f"stage {stage.name!r}"]

    def run(self, label: str | None = None, after: Callable[["Fit"], bool] | None = None) -> list[list[float]]:
        """Take the steps that are left.

        Args:
            label: of a progress bar with tokens per second, time left and loss; None shows none.
            after: called after every step; True ends the run there.

        Returns:
            the losses of every step, also those before a `load`.

        Raises:
            FloatingPointError: a loss that is not finite; what it is of is named, and that step is not taken.
        """
        flags = {p: p.requires_grad for p in self.student.parameters()}
        own = dict(self.student.named_parameters())
        for name, p in own.items():
            p.requires_grad_(name in self.names)
        per_step = self.stage.batch * self.rows.shape[1]
        progress = tqdm(total=self.steps * per_step, initial=len(self.history) * per_step, desc=label, unit="tok",
                        disable=label is None, mininterval=1.0)  # fmt: skip
        try:
            for step, picked in enumerate(order(len(self.rows), self.stage.batch, self.steps, self.seed)):
                if step < len(self.history):
                    continue
                passes = self.rows[picked].to(self.student.device).long().chunk(self.stage.accumulate)
                each = [self.objective(self.teacher, self.student, ids) for ids in passes]
                losses = [sum(some) / len(passes) for some in zip(*each, strict=True)]
                self._check(losses)
                self._update(step, {name: own[name] for name in self.names})
                self.history.append(losses)
                progress.update(per_step)
                progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
                if after is not None and after(self):
                    break
        finally:
            progress.close()
            for p, flag in flags.items():
                p.requires_grad_(flag)
                p.grad = None
        return self.history

    def state(self) -> dict:
        """What `load` needs, but for the student's weights."""
        return {"optimizer": self.optimizer.state_dict(), "history": self.history}

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])

    @property
    def done(self) -> bool:
        return len(self.history) >= self.steps

    def _update(self, step: int, parameters: dict[str, nn.Parameter]) -> None:
        stage = self.stage
        for p in parameters.values():
            if p.grad is not None and stage.accumulate > 1:
                p.grad /= stage.accumulate
        by_layer = stage.target == "mixer_out"  # what learns by itself is clipped by itself
        for prefix in [f"model.layers.{index}." for index in self.layers] if by_layer else [""]:
            nn.utils.clip_grad_norm_([p for name, p in parameters.items() if name.startswith(prefix)], stage.clip)
        share = pace(step / self.steps, 1 / self.steps, stage)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["pace"] * stage.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _paces(self) -> dict[float, list[nn.Parameter]]:
        """Parameters by pace: attention starts from the teacher's solution, other mixers from a guess, gates from zero."""
        fast = {}
        for block in (self.student.model.layers[index] for index in self.layers if self.stage.paced):
            for branch in getattr(block.mixer, "branches", [block.mixer]):
                fast |= dict.fromkeys(branch.parameters(), 1.0 if type(branch) is registry.get("transformer").mixer else 3.0)
            fast |= {p: 30.0 for name, p in block.mixer.named_parameters(recurse=False) if name == "gate"}
        paces: dict[float, list[nn.Parameter]] = {1.0: [], 3.0: [], 30.0: []}
        for name, p in self.student.named_parameters():
            if name in self.names:
                paces[fast.get(p, 1.0)].append(p)
        return paces

    def _check(self, losses: list[float]) -> None:
        """Raise FloatingPointError that names the first loss that is not finite."""
        for what, loss in zip(self.what, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f"{what}: the loss is {loss} at step {len(self.history) + 1}; lower the learning rate")


def trained(student: nn.Module, stage: Stage, fresh: set[str]) -> list[str]:
    """Names of the parameters that a stage trains; a tied one is named once."""
    names = [name for name, _ in student.named_parameters()]
    if stage.train == "mixer":
        parts = tuple(f"model.layers.{index}.mixer." for index in converted_layers(student))
        return [name for name in names if name.startswith(parts)]
    return [name for name in names if name in fresh] if stage.train == "new" else names


def order(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of the rows of every step, each round a new permutation."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:batch]
        queue = queue[batch:]


def pace(done: float, step: float, stage: Stage) -> float:
    """Share of the highest learning rate after a share `done` of the steps, each of which is `step`."""
    if done < stage.warmup:
        return (done + step) / (stage.warmup + step)
    if stage.schedule == "constant":
        return 1.0
    last = 0.1 if stage.final_rate is None else stage.final_rate / stage.learning_rate
    return last + (1 - last) * (1 + math.cos(math.pi * (done - stage.warmup) / (1 - stage.warmup))) / 2

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
from zoo.convert.trainable import Loan, trained

WINDOWS, PATIENCE = 100, 10  # of `plateau`: into how many parts a stage is cut, and how many may pass without a better one


class Steps:
    """The steps of a stage on some parameters; built anew and given `load`, they go on where others left off, to the same weights.

    Args:
        module: what the parameters are of; parameters: name -> those to train, in float32, as their updates are small.
        objective: rows -> losses, leaving gradients.
        rows: `[N, T, ...]`; a step takes `stage.batch` of them, in a new random order after each round.
        what: names of the losses. alone: beginnings of the names of parameters that learn, and are clipped, by themselves.
        paces: parameter -> how many times faster than others it learns.

    Raises:
        ValueError: nothing to train, no text, or parameters in half precision.
    """

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], objective: Callable[[Tensor], list[float]], rows: Tensor,
        stage: Stage, *, what: list[str], alone: tuple[str, ...] = ("",), paces: dict[nn.Parameter, float] | None = None, seed: int = 0,
    ):  # fmt: skip
        self.module, self.parameters, self.objective, self.rows, self.stage, self.seed = module, parameters, objective, rows, stage, seed
        self.what, self.alone, self.history, self.steps = what, alone, [], stage.steps
        if not parameters or not len(rows):
            raise ValueError(
                f"nothing to train in stage {stage.name!r}: {len(parameters)} weights, {len(rows)} rows of text; each must be at least one"
            )
        if coarse := [name for name, p in parameters.items() if p.dtype.itemsize < 4]:
            raise ValueError(f"{coarse[0]} is in {parameters[coarse[0]].dtype}, which swallows small updates; load the student in float32")
        groups: dict[float, list[nn.Parameter]] = {}
        for p in parameters.values():
            groups.setdefault((paces or {}).get(p, 1.0), []).append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": some, "pace": pace} for pace, some in sorted(groups.items())], lr=stage.learning_rate, betas=stage.betas,
            weight_decay=stage.weight_decay,
        )  # fmt: skip

    def run(self, label: str | None = None, after: Callable[["Steps"], bool] | None = None) -> list[list[float]]:
        """Take the steps that are left.

        Args:
            label: of a progress bar with tokens per second, time left and loss; None shows none.
            after: called after every step; True ends the run there.

        Returns:
            the losses of every step, also those before a `load`.

        Raises:
            FloatingPointError: a loss that is not finite; what it is of is named, and that step is not taken.
        """
        flags = {p: p.requires_grad for p in self.module.parameters()}
        chosen = set(self.parameters.values())
        for p in flags:
            p.requires_grad_(p in chosen)
        per_step, device = self.stage.batch * self.rows.shape[1], next(iter(chosen)).device
        progress = tqdm(total=self.steps * per_step, initial=len(self.history) * per_step, desc=label, unit="tok",
                        disable=label is None, mininterval=1.0)  # fmt: skip
        try:
            for step, picked in enumerate(order(len(self.rows), self.stage.batch, self.steps, self.seed)):
                if step < len(self.history):
                    continue
                passes = self.rows[picked].to(device).chunk(self.stage.accumulate)
                with torch.autocast(device.type, torch.bfloat16, enabled=self.stage.precision == "bfloat16"):
                    each = [self.objective(rows) for rows in passes]
                losses = [sum(some) / len(passes) for some in zip(*each, strict=True)]
                self._check(losses)
                self._update(step)
                self.history.append(losses)
                progress.update(per_step)
                progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", **self._worst(losses))
                if after is not None and after(self):
                    break
        finally:
            progress.close()
            for p, flag in flags.items():
                p.requires_grad_(flag)
                p.grad = None
        return self.history

    def state(self) -> dict:
        """What `load` needs, but for the weights."""
        return {"optimizer": self.optimizer.state_dict(), "history": self.history}

    def load(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])

    @property
    def done(self) -> bool:
        return len(self.history) >= self.steps

    def _update(self, step: int) -> None:
        stage = self.stage
        for p in self.parameters.values():
            if p.grad is not None and stage.accumulate > 1:
                p.grad /= stage.accumulate
        for prefix in self.alone:
            nn.utils.clip_grad_norm_([p for name, p in self.parameters.items() if name.startswith(prefix)], stage.clip)
        share = pace(step / self.steps, 1 / self.steps, stage)
        if stage.schedule == "plateau":
            share *= plateau(self.history, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["pace"] * stage.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _worst(self, losses: list[float]) -> dict[str, str]:
        """Where the loss is highest, for the progress bar."""
        index = max(range(len(losses)), key=losses.__getitem__)
        return {"worst": f"{losses[index]:.4f} at {self.what[index]}"} if len(losses) > 1 else {}

    def _check(self, losses: list[float]) -> None:
        """Raise FloatingPointError that names the first loss that is not finite."""
        for what, loss in zip(self.what, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f"{what}: the loss is {loss} at step {len(self.history) + 1}; lower the learning rate")


class Fit(Steps):
    """Trains `student` as `stage` says. `close` ends a stage that has adapters, or a head apart from the embedding.

    Args:
        teacher, student: zoo language models on one device.
        rows: `[N, T]` token ids.
        fresh: names of the student's weights that nothing has filled, for `train: new`.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, rows: Tensor, stage: Stage, *, fresh: set[str] | None = None, seed: int = 0):
        self.teacher, self.student, self.layers = teacher, student, converted_layers(student)
        if stage.layerwise and not self.layers:
            raise ValueError(f"stage {stage.name!r} compares replaced layers by their {stage.target}, and the student has none")
        self.loan = Loan(student, stage, seed)
        own, names = dict(student.named_parameters()), trained(student, stage, fresh or set())
        compared = (
            objectives.layers(stage, self.layers)
            if stage.layerwise
            else {"logits": objectives.logits, "tokens": objectives.tokens}[stage.target](stage)
        )
        super().__init__(
            student, {name: own[name] for name in names}, lambda ids: compared(teacher, student, ids.long()), rows, stage, seed=seed,
            paces={p: pace for index in self.layers for p, pace in paces(student.model.layers[index], stage).items()},
            what=[f"layer {index}" for index in self.layers] if stage.layerwise else [f"stage {stage.name!r}"],
            alone=tuple(f"model.layers.{index}." for index in self.layers) if stage.apart else ("",),
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        return list(self.parameters)

    def close(self) -> None:
        """Merge adapters and tie again what was tied; the student is then as any other."""
        self.loan.give_back()


def paces(block: nn.Module, stage: Stage) -> dict[nn.Parameter, float]:
    """How many times faster than others a replaced mixer's parameters learn: attention starts from the teacher's solution, other
    mixers from a guess, gates from zero."""
    fast: dict[nn.Parameter, float] = {}
    if stage.paced:
        for branch in getattr(block.mixer, "branches", [block.mixer]):
            fast |= dict.fromkeys(branch.parameters(), 1.0 if type(branch) is registry.get("transformer").mixer else 3.0)
        fast |= {p: 30.0 for name, p in block.mixer.named_parameters(recurse=False) if name == "gate"}
    return fast


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
    if stage.schedule in ("constant", "plateau"):
        return 1.0
    last = 0.1 if stage.final_rate is None else stage.final_rate / stage.learning_rate
    start = 0.9 if stage.schedule == "stable" else stage.warmup  # MOHAWK falls over the last tenth (arXiv:2408.10189)
    fallen = max(0.0, (done - start) / (1 - start))
    return 1 - (1 - last) * ((1 - math.cos(math.pi * fallen)) / 2 if stage.schedule == "cosine" else fallen)


def plateau(history: list[list[float]], steps: int) -> float:
    """A tenth for every time that the mean loss has not fallen for a while."""
    size = max(1, steps // WINDOWS)
    best, waited, share = math.inf, 0, 1.0
    for start in range(0, len(history) - size + 1, size):
        mean = sum(map(sum, history[start : start + size])) / size
        best, waited = (mean, 0) if mean < best else (best, waited + 1)
        if waited > PATIENCE:
            share, waited = share / 10, 0
    return share

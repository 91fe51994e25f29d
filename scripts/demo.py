"""Convert a real language model on this machine: `python scripts/demo.py --output demo`."""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning stall one another on a busy machine

import torch
from transformers.utils import logging

from zoo.convert import check_logits, prepare_teacher
from zoo.convert.folder import advance, start
from zoo.convert.job import Job
from zoo.convert.recipe import load_recipe
from zoo.convert.report import Row, table
from zoo.convert.teacher import open_teacher
from zoo.generate import encode, generate, load_language_model

LENGTH = 512  # of a row; each step takes one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--teacher", default="smollm2-135m-instruct", help="a folder, a Hub id, a .gguf file, or the packaged model (default)"
    )
    parser.add_argument("--output", default="demo", help="folder for the student, the table and the picture")
    parser.add_argument("--mixer", default="gated_deltanet", help="what replaces attention: a name of zoo.list_mixers()")
    parser.add_argument("--keep", type=int, default=10, help="how many attention layers stay")
    parser.add_argument("--steps", type=int, default=48, help="steps of alignment")
    parser.add_argument("--prompt", default="What is a Python module?")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    begun, folder = time.monotonic(), Path(args.output) / "student"

    print(f"Preparing the teacher {args.teacher}")
    path = prepare_teacher(args.teacher, Path(args.output) / "teacher")
    changes = {"mixer": args.mixer, "keep": args.keep, "align.tokens": args.steps * LENGTH, "align.length": LENGTH, "align.batch": 1}
    method = load_recipe("zoo", changes, "the demo")
    job = Job(path, method.only(["align"]))
    start(folder, job, print)
    teacher, tokenizer = open_teacher(path, "cpu")
    asked = [{"role": "user", "content": args.prompt}] if tokenizer.chat_template else args.prompt
    difference = check_logits(teacher, path, torch.tensor([encode(teacher, tokenizer, asked)]))
    del teacher
    print(f"{path} loaded as a zoo transformer: logits equal transformers' own (largest difference {difference:.2g})")
    if not advance(folder, print):
        return 1

    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    rows = [Row(**row | {"state_bytes": {int(length): count for length, count in row["state_bytes"].items()}}) for row in found]
    print(f"\n{table(rows)}\n")
    student, tokenizer = load_language_model(folder, dtype="float32")
    print(f"> {args.prompt}\n{generate(student, tokenizer, [asked], max_new_tokens=48)[0].strip()}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
    print(f"{folder / 'report.png'} and report.json hold these numbers. {time.monotonic() - begun:.0f} s, {peak:.1f} GiB at most.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

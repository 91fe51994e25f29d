"""Convert a real language model on this machine: `python scripts/demo.py --output demo`."""

import argparse
import os
import resource
import shlex
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait by spinning stall one another on a busy machine

from transformers import AutoTokenizer
from transformers.utils import logging

from zoo.convert import Recipe, check_logits, complete, load_teacher, prepare_teacher, pydoc_topics, run, token_rows
from zoo.convert.report import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--teacher", default="smollm2-135m-instruct", help="a folder, a Hub id, a .gguf file, or the packaged model (default)"
    )
    parser.add_argument("--output", default="demo", help="folder for the student, the table and the picture")
    parser.add_argument("--mixer", default=Recipe.mixer, help="what replaces attention: a name of zoo.list_mixers()")
    parser.add_argument("--keep", type=int, default=Recipe.keep, help="how many attention layers stay")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of alignment")
    parser.add_argument("--prompt", default="What is a Python module?")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.monotonic()

    print(f"Preparing the teacher {args.teacher}")
    path = prepare_teacher(args.teacher, Path(args.output) / "teacher")
    tokenizer, teacher = AutoTokenizer.from_pretrained(path), load_teacher(path)
    texts = pydoc_topics()
    difference = check_logits(teacher, path, token_rows(tokenizer, texts[1], 64, join=False)[:1])
    print(f"{path} loaded as a zoo transformer: logits equal transformers' own (largest difference {difference:.2g})")

    recipe = Recipe(mixer=args.mixer, keep=args.keep, steps=args.steps)
    outcome = run(teacher, tokenizer, texts, Path(args.output) / "student", recipe, print, shlex.join(["python", *sys.argv]))
    print(f"\n{table(outcome.rows)}\n")
    print(f"> {args.prompt}\n{complete(outcome.student, tokenizer, args.prompt)}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere
    print(f"{outcome.picture} and {outcome.numbers.name} hold these numbers. {time.monotonic() - start:.0f} s, {peak:.1f} GiB at most.")


if __name__ == "__main__":
    main()

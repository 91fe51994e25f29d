"""Measure a language model: how well it predicts text, also far beyond the length it was trained at, and what it finds again.

python scripts/evaluate_model.py MODEL                                          # all tasks, on Python's help topics
python scripts/evaluate_model.py MODEL --text book.txt --length 2048 -o results # beside the table: JSON and a picture
python scripts/evaluate_model.py MODEL --tasks passkey --lengths 1024 4096 16384 --depths 11
python scripts/evaluate_model.py MODEL --tasks perplexity --lm-eval hellaswag arc_easy --limit 200
"""

import argparse
import shlex
import sys
from pathlib import Path

from transformers.utils import logging

from zoo.convert.texts import pydoc_topics
from zoo.evaluate.suite import TASKS, Settings, check_tasks, evaluate, table, write
from zoo.generate import load_language_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub id, of the zoo or of transformers")
    parser.add_argument("--tasks", nargs="*", default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="held-out text (default: Python's help topics)")
    parser.add_argument("--length", type=int, default=Settings.length, help="of training, say; windows of perplexity (default: 1024)")
    parser.add_argument("--stride", type=int, help="of the windows (default: half of the length)")
    parser.add_argument("--lengths", type=int, nargs="+", help="of prompts; the last also for positions (default: length x 1, 2, 4, 8)")
    parser.add_argument("--depths", type=int, default=Settings.depths, help="how many places to hide something in (default: 5)")
    parser.add_argument("--rows", type=int, default=Settings.rows, help="of text by position, at most (default: 16)")
    parser.add_argument("--trials", type=int, default=Settings.trials, help="prompts for each length and depth (default: 4)")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--lm-eval", nargs="+", metavar="TASK", help="tasks of lm-eval (pip install 'seqzoo[eval]')")
    parser.add_argument("--limit", type=int, help="documents of each of those, at most")
    parser.add_argument("--include", help="a folder with further tasks of lm-eval")
    parser.add_argument("--batch", type=int, default=8, help="prompts of lm-eval at a time (default: 8)")
    parser.add_argument("-o", "--output", type=Path, help="folder for evaluation.json and evaluation.png")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or as the checkpoint says (default)")
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, where the model has none")
    parser.add_argument("--original", action="store_true", help="transformers' own class, also where the zoo has one")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    check_tasks(args.tasks)
    harness = None
    if args.lm_eval:  # first, as it may be missing
        from zoo.evaluate import harness
    model, tokenizer = load_language_model(
        args.model, tokenizer=args.tokenizer, original=args.original, device=args.device, dtype=args.dtype
    )
    texts = [path.read_text(encoding="utf-8") for path in args.text] if args.text else pydoc_topics()[1]
    chosen = {name: getattr(args, name) for name in ("length", "stride", "depths", "rows", "trials", "seed")}
    settings = Settings(lengths=tuple(args.lengths) if args.lengths else None, **chosen)
    results = evaluate(model, tokenizer, texts, args.tasks, settings)
    if harness:
        results["lm-eval"] = harness.run(model, tokenizer, args.lm_eval, limit=args.limit, batch=args.batch, include=args.include)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{args.model}: {type(model).__name__}, {size:,} parameters, {str(model.dtype).removeprefix('torch.')}\n\n{table(results)}")
    if args.output:
        command = f"zoo evaluate {shlex.join(sys.argv[1:])}"
        facts = {"command": command, "model": args.model, "class": type(model).__name__, "parameters": size, "dtype": str(model.dtype)}
        print(f"\nwrote {' and '.join(map(str, write(results, facts, args.output)))}")


if __name__ == "__main__":
    main()

"""Let a language model write.

python scripts/generate.py MODEL "Once upon a time"             # continue a text
python scripts/generate.py MODEL --chat "Who was Ada Lovelace?" # one answer, through the chat template
python scripts/generate.py MODEL --chat                         # a conversation; an empty line ends it
python scripts/generate.py MODEL --file prompts.txt -o out.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import TextStreamer, set_seed
from transformers.utils import logging

from zoo.generate import generate, load_language_model


def talk(write, system: list[dict]) -> None:
    """Answer the lines of the standard input, each with the conversation before it."""
    messages, sign = list(system), "> " if sys.stdin.isatty() else ""
    print(sign, end="", flush=True)
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        messages.append({"role": "assistant", "content": write([messages])[0]})
        print(sign, end="", flush=True)


def write_all(write, prompts: list[str], as_prompt, batch: int, output: Path | None) -> None:
    """Batch after batch, as JSON lines into a file or as text."""
    lines = []
    for start in tqdm(range(0, len(prompts), batch), unit="batch", disable=len(prompts) <= batch):
        some = prompts[start : start + batch]
        lines += [{"prompt": prompt, "text": text} for prompt, text in zip(some, write(list(map(as_prompt, some))), strict=True)]
    if output:
        output.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    else:
        print("\n\n".join(f"> {line['prompt']}\n{line['text'].strip()}" for line in lines))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub id, of the zoo or of transformers")
    parser.add_argument("prompt", nargs="?", help="text to continue or, with --chat, to answer")
    parser.add_argument("--chat", action="store_true", help="use the tokenizer's chat template; without a prompt: a conversation")
    parser.add_argument("--system", help="what the conversation begins with (with --chat)")
    parser.add_argument("--file", type=Path, help="a prompt a line")
    parser.add_argument("-o", "--output", type=Path, help="JSON lines of prompts and texts (with --file)")
    parser.add_argument("--batch", type=int, default=8, help="prompts of a file at a time (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or as the checkpoint says (default)")
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, where the model has none")
    parser.add_argument("--original", action="store_true", help="transformers' own class, also where the zoo has one")
    args = parser.parse_intermixed_args()  # a prompt may come behind a flag
    if (args.prompt is not None) + (args.file is not None) > 1 or not (args.prompt is not None or args.file or args.chat):
        parser.error("give a prompt, or --file, or --chat")
    return args


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    prompts = [line for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()] if args.file else [args.prompt]
    model, tokenizer = load_language_model(
        args.model, tokenizer=args.tokenizer, original=args.original, device=args.device, dtype=args.dtype
    )
    set_seed(args.seed)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")}
    streamer = None if args.file else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    system = [{"role": "system", "content": args.system}] if args.system else []

    def write(some: list) -> list[str]:
        return generate(model, tokenizer, some, batch=args.batch, streamer=streamer, **options)

    def as_prompt(text: str) -> str | list[dict]:
        return [*system, {"role": "user", "content": text}] if args.chat else text

    if args.file:
        write_all(write, prompts, as_prompt, args.batch, args.output)
    elif args.prompt is None:
        talk(write, system)
    else:
        write([as_prompt(args.prompt)])


if __name__ == "__main__":
    main()

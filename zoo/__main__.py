"""The command `zoo`, also `python -m zoo`: it finds the script of that name and hands it the rest of the line."""

import importlib
import sys

from zoo.config import nearest

COMMANDS = {  # name: (file of scripts/, what it does)
    "list": ("list_models", "what the zoo holds: architectures, presets, mixers, layouts"),
    "card": ("print_card", "an architecture's model card"),
    "generate": ("generate", "continue a text, answer a prompt, or chat"),
    "evaluate": ("evaluate_model", "perplexity by position, passkeys, needles, copying, tasks of lm-eval"),
    "pretrain": ("pretrain", "train an architecture from random weights"),
    "finetune": ("finetune", "train a model further: whole, in part, or with low-rank adapters"),
    "convert": ("convert", "turn a pretrained transformer into a hybrid of other mixers, by a recipe"),
    "push": ("push_to_hub", "put a checkpoint on the Hub, with its card"),
    "pull": ("pull_from_hub", "fetch a checkpoint from the Hub into a folder"),
    "bench": ("benchmark", "time operators and training beside other libraries, weigh loading"),
    "parity": ("parity", "prove checkpoint layouts against transformers"),
    "conformance": ("conformance", "put architectures through the battery of properties"),
}
EXAMPLES = """\
  zoo list delta
  zoo pretrain --architecture gla-tiny --dataset_name pydoc --tokenizer_name bytes --learning_rate 3e-3 --max_steps 400 --output_dir bytes
  zoo convert run HuggingFaceTB/SmolLM2-135M-Instruct -o student --mixer gated_deltanet --keep-attention 10 --tokens-scale 0.01
  zoo generate student --chat "What is a Python module?"
  zoo evaluate student --tasks perplexity passkey --length 1024 -o results"""


def usage() -> str:
    """What `zoo --help` prints."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: zoo COMMAND [...]

Efficient sequence architectures behind one interface: load, convert, train, serve.

commands:
{lines}

examples:
{EXAMPLES}

`zoo COMMAND --help` explains a command. A checkpoint is a folder or a Hub id, of the zoo or of transformers. An error says what is wrong
and what to do; `python -m zoo.scripts.FILE` with the same arguments says also where.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the status is that of its script, and 2 where the input was wrong."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if command not in COMMANDS:
        sys.stderr.write(f"zoo: no command {command!r}{nearest(command, COMMANDS)}; zoo --help names all\n")
        return 2
    script = importlib.import_module(f"zoo.scripts.{COMMANDS[command][0]}")
    previous, sys.argv = sys.argv, [f"zoo {command}", *rest]
    try:
        return int(script.main() or 0)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"zoo {command}: {error}\n")
        return 2
    finally:
        sys.argv = previous


if __name__ == "__main__":
    raise SystemExit(main())

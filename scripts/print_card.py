"""Print an architecture's model card: `python scripts/print_card.py gla`."""

import argparse
from pathlib import Path

import zoo
from zoo.registry import get

CARDS = Path(zoo.__file__).parent / "model_cards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name of zoo.list_models()")
    args = parser.parse_args()
    print((CARDS / f"{get(args.name).name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

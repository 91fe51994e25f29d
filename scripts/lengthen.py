"""Make a BERT or RoBERTa a Longformer: `python scripts/lengthen.py google-bert/bert-base-uncased -o long-bert`."""

import argparse

from zoo.convert.lengthen import lengthen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", help="a folder or Hub id")
    parser.add_argument("-o", "--output", required=True, help="folder for the Longformer")
    parser.add_argument("--window", type=int, default=512, help="neighbours that a token sees on both sides together")
    parser.add_argument("--positions", type=int, default=4096, help="tokens of the longest text")
    parser.add_argument("--firsts", type=int, default=1, help="first tokens that are global")
    args = parser.parse_args()
    lengthen(args.source, args.output, window=args.window, positions=args.positions, firsts=args.firsts)


if __name__ == "__main__":
    main()

"""Prove layouts against transformers and print a line for each.

python scripts/parity.py [LAYOUT ...] [--grid] [--write] [-v]
"""

import argparse
import platform
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import zoo
from zoo.evaluate.proof import prove, table
from zoo.evaluate.trial import find, sampled

PAGE = Path(__file__).resolve().parent.parent / "docs" / "layouts.md"
OPENING = f"""# Layouts

<!-- written by `python scripts/parity.py --grid --write`; do not edit -->

What is proven of every foreign layout, on tiny models of random weights: `zoo/evaluate/parity.py` says how, the configs are the
layouts' `trials`. With transformers {transformers.__version__}, torch {torch.__version__} and Python {platform.python_version()}.
Errors are relative to the largest logit, or to 1. Rows without an error are layouts of libraries other than transformers: a model
of ours saved in one and loaded again has the same bits in float32 and bfloat16.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="layouts (default: all)")
    parser.add_argument("--grid", action="store_true", help="all trials, not one of each")
    parser.add_argument("--write", action="store_true", help=f"write these rows into docs/{PAGE.name}")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what failed in full")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    proofs = []
    for name in tqdm(args.names or sorted(zoo.layouts()), unit="layout", leave=False):
        layout = find(name)
        proofs.append(prove(layout, None if args.grid else [sampled(layout)]))
        for (trial, label), text in proofs[-1].failures.items():
            tqdm.write(f"{name}-{trial}: {label}: " + (text if args.verbose else text.strip().splitlines()[-1]))
    print("\n".join(table(proofs)))
    if args.write:
        PAGE.write_text(OPENING + "\n" + "\n".join(table(proofs, PAGE.read_text() if PAGE.exists() else "")) + "\n")
    return any(proof.failures for proof in proofs)


if __name__ == "__main__":
    raise SystemExit(main())

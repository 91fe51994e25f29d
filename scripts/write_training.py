"""Measure what docs/training.md says, and write it: `python scripts/write_training.py` (some minutes on two cores)."""

import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import zoo
from zoo.evaluate.training import EQUIVALENCES, STEPS, adapters, compare

HEAD = f"""# What training promises

Written by `python scripts/write_training.py`; the tests hold the same comparisons (`tests/test_train.py`).

## The same run, done otherwise

{STEPS} steps of gradient descent on a hybrid of GLA, Mamba-2 and attention in float32, through the Trainer as a user runs it; the largest
difference between any two weights afterwards, and the most that the rule of closeness allows it (`zoo/evaluate/closeness.py`). FSDP2
runs without the Trainer there, on the CPU, because accelerate uses it on GPUs only. Rows of one document each, as token files without an
end token have them, compile to one graph; packed rows break it where their lengths are read.

| compared | difference | allowed |
|---|--:|--:|
"""
ADAPTERS = """
## Low-rank adapters

For every architecture: where adapters go by default (`--lora_r 16`), how many linear layers get one, by how much random ones change the
logits, and by how much merging them changes these again (in float64).

| architecture | adapters | change | merged |
|---|---|--:|--:|
"""


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name in tqdm(EQUIVALENCES, unit="comparison"):
        rows.append(f"| {name} | {{:.1e}} | {{:.1e}} |\n".format(*compare(name)))
    for name in tqdm(zoo.list_models(encoder_decoder=False), unit="architecture"):
        coverage, change, merged = adapters(name)
        rows.append(f"| `{name}` | {coverage} | {change:.2f} | {merged:.0e} |\n")
    text = HEAD + "".join(rows[: len(EQUIVALENCES)]) + ADAPTERS + "".join(rows[len(EQUIVALENCES) :])
    path = Path(__file__).resolve().parent.parent / "docs" / "training.md"
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

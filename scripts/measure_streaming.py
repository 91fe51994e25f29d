"""Measure the memory of an alignment layer by layer: `python scripts/measure_streaming.py --device cuda -o FOLDER`.

Writes a teacher of random weights in the shape of a Llama, in bfloat16 and in shards, converts and aligns it with one layer in memory at
a time, and prints the most that was held, beside what the plan said.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.convert.folder import advance, start
from zoo.convert.headers import blank_teacher
from zoo.convert.job import Job
from zoo.convert.plan import stage_plans
from zoo.convert.recipe import read_method
from zoo.convert.show import amount
from zoo.train.meter import memory

SIZES = {  # width, width inside the MLP, layers, heads, groups, vocabulary
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 128, 4, 4, 2, 256),
}


def write_teacher(folder: Path, size: str) -> None:
    """A checkpoint of random weights, a shard a layer; what is there already stays."""
    width, inner, layers, heads, groups, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        blank = LlamaForCausalLM(config).state_dict()
    files: dict[str, list[str]] = {}
    for name in blank:
        files.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for part, names in files.items():
        drawn = {name: torch.randn(blank[name].shape, dtype=torch.bfloat16) * 0.02 + ("norm" in name) for name in names}
        save_file(drawn, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
    weights = {name: f"model-{part}.safetensors" for part, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--tokens", type=int, default=65536, help="to align on")
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens a step")
    parser.add_argument("-o", "--output", required=True, help="folder; the student's part of it is removed in the end")
    args = parser.parse_args()
    place, began = Path(args.output), time.monotonic()
    write_teacher(place / "teacher", args.size)
    print(f"{args.size} teacher of random weights: {time.monotonic() - began:.0f} s")
    np.save(place / "tokens.npy", np.random.default_rng(0).integers(0, 256, args.tokens + 10240).astype(np.int32))
    stage = {"name": "align", "target": "mixer_out", "loss": "rel_mse", "train": "mixer", "tokens": args.tokens, "length": 512,
             "batch": args.batch}  # fmt: skip
    content = {"name": "align", "title": "alignment", "paper": "none", "mixer": args.mixer, "window": 64, "sinks": 4, "stages": [stage]}
    job = Job(str(place / "teacher"), read_method(content, {}), (str(place / "tokens.npy"),), stream=True)
    (plan,) = stage_plans(blank_teacher(job.teacher)[0], job.method)
    began = time.monotonic()
    start(place / "student", job, print, device=args.device, force=True)
    advance(place / "student", print, device=args.device, progress=False)
    print(f"planned: {amount(sum(plan.memory.values()))} with whole models, {amount(sum(plan.streamed.values()))} layer by layer")
    print(f"measured on {args.device}: {memory():.2f} GiB at most, {time.monotonic() - began:.0f} s for {plan.tokens:,} tokens a layer")
    shutil.rmtree(place / "student")


if __name__ == "__main__":
    main()

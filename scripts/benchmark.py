"""Time every operator, chunked against the definition, same inputs, one run, median of several; or weigh loading.

    python scripts/benchmark.py kernels [--ops NAME ...] [--length 8192] [--threads 2] [--device cpu] [--output FILE.json]

Width 512 as 8 heads of 64 (16 states a channel for the selective scan), batch 1, float32, forward without gradients.

    python scripts/benchmark.py loading [--size 1e9] [--output FILE.json]

Resident memory at its most while checkpoints of random weights are loaded, in several shards and in the layouts `llama`, whose
tensors only change their names, and `phi3`, whose tensors are split, and of a `llama` in another dtype than its own.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import safetensors
import torch
import transformers
from tqdm import tqdm

from zoo.evaluate.loading import measure, random_checkpoint
from zoo.ops import OPS

HEADS, KEYS, WIDTH, STATES = 8, 64, 512, 16


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def shapes(length: int, device: str) -> dict[str, tuple[str, dict]]:
    """Row name -> (operator, arguments)."""

    def heads():
        return torch.randn(1, length, HEADS, KEYS, device=device)

    def wide():
        return torch.randn(1, length, WIDTH, device=device)

    def decay(*shape):
        return -torch.rand(*shape, device=device)

    q, k, v, beta = heads(), unit(heads()), heads(), torch.rand(1, length, HEADS, device=device)
    decays = {"none": None, "head": decay(HEADS), "token": decay(1, length, HEADS), "channel": decay(1, length, HEADS, KEYS)}
    rows = {f"linear_attention, decay {n}": ("linear_attention", dict(q=q, k=k, v=v, log_decay=d)) for n, d in decays.items()}
    rows |= {f"delta_rule, decay {n}": ("delta_rule", dict(q=q, k=k, v=v, beta=beta, log_decay=d)) for n, d in decays.items()}
    a, b = -k, k * torch.rand(1, length, HEADS, 1, device=device)
    rows["general_delta_rule"] = ("general_delta_rule", dict(q=q, k=k, v=v, a=a, b=b, log_decay=decays["channel"]))
    phase = torch.randn(WIDTH, device=device)
    rows["scan"] = ("scan", dict(x=wide(), log_decay=decay(1, length, WIDTH)))
    rows["scan, complex"] = ("scan", dict(x=wide(), log_decay=torch.complex(decay(WIDTH), phase)))
    selective = dict(x=wide(), dt=wide().abs(), A=-torch.rand(WIDTH, STATES, device=device) - 0.1)
    rows["selective_scan"] = ("selective_scan", selective | {n: torch.randn(1, length, STATES, device=device) for n in "BC"})
    rows["long_conv"] = ("long_conv", dict(u=wide(), kernel=torch.randn(length, WIDTH, device=device)))
    rows["short_conv"] = ("short_conv", dict(x=wide(), weight=torch.randn(WIDTH, 4, device=device), activation="silu"))
    rows["attention, window 512"] = ("attention", dict(q=q, k=k, v=v, window=512))
    return rows


def median_ms(run, seconds: float, device: str) -> float:
    """Median wall time of at least three runs, after one that does not count."""
    run()
    times = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < seconds:
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def kernels(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = {n: row for n, row in shapes(args.length, args.device).items() if not args.ops or row[0] in args.ops}
    results = []
    for name, (op, arguments) in tqdm(rows.items(), unit="row", leave=False):
        row = {"row": name}
        for backend in ("reference", "chunked"):
            if backend == "chunked" or op != "long_conv":  # whose definition is a double loop
                run = partial(OPS[op].call, **arguments, backend=backend)
                with torch.no_grad():
                    row[f"{backend}_ms"] = median_ms(run, args.seconds, args.device)
        results.append(row)
        times = [row.get("reference_ms", float("nan")), row["chunked_ms"]]
        tqdm.write(f"{name:<32} reference {times[0]:>9.1f} ms   chunked {times[1]:>9.1f} ms {times[0] / times[1]:>7.1f}x")
    host = {"machine": platform.machine(), "torch": torch.__version__, "threads": args.threads, "device": args.device}
    command = f"python scripts/benchmark.py kernels --length {args.length} --threads {args.threads} --device {args.device}"
    return {"command": command, "host": host, "rows": results}


def loading(args: argparse.Namespace) -> dict:
    rows = []
    for kind, dtype in tqdm((("llama", "auto"), ("phi3", "auto"), ("llama", "float32")), unit="load", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            random_checkpoint(Path(folder), kind, int(args.size))
            result = measure(Path(folder), dtype)
        rows.append({"layout": kind, "dtype": dtype} | dataclasses.asdict(result) | {"bound": result.bound})
        sizes = "   ".join(f"{name} {rows[-1][name] / 2**20:,.0f} MiB" for name in ("model", "shard", "peak", "bound"))
        tqdm.write(f"{kind:<8} {dtype:<8} {result.shards} shards   {sizes}   {'within' if result.peak < result.bound else 'TOO MUCH'}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__}
    return {"command": f"python scripts/benchmark.py loading --size {args.size:g}", "host": versions, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kernels", "loading"])
    parser.add_argument("--ops", nargs="*", choices=sorted(OPS), help="only these operators")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to repeat each measurement")
    parser.add_argument("--size", type=float, default=1e9, help="bytes of the checkpoint to load")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    results = kernels(args) if args.what == "kernels" else loading(args)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

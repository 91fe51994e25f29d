"""Time operators and models, weigh loading.

python scripts/benchmark.py kernels               # on this CPU: every operator chunked, against its definition
python scripts/benchmark.py gpu --warm            # every operator and backend against the other libraries that are installed
python scripts/benchmark.py gpu --cases "decay by token" --peers fla --output results
python scripts/benchmark.py train                 # tokens per second that models learn from, beside others of the same size
python scripts/benchmark.py decode                # tokens per second that models write behind prompts
python scripts/benchmark.py prefill               # tokens per second that they read, up to a million
python scripts/benchmark.py merge FOLDER ... -o FOLDER   # several runs on one page
python scripts/benchmark.py loading               # resident memory at its most while checkpoints are loaded

`COMMAND --help` explains a command.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path

import safetensors
import torch
import transformers
from tqdm import tqdm

from zoo.evaluate.bench import decoding, report, throughput
from zoo.evaluate.bench.backends import compare
from zoo.evaluate.bench.case import ANYWHERE, chosen, lift_guard
from zoo.evaluate.bench.measure import Clock, contenders, measure
from zoo.evaluate.bench.warm import compiled_in, tuning_for, warm
from zoo.evaluate.loading import measure as measure_loading
from zoo.evaluate.loading import random_checkpoint
from zoo.ops import OPS

DTYPES = ("bfloat16", "float16", "float32")


def kernels(args: argparse.Namespace) -> None:
    """On this CPU: every operator chunked against its definition; width 512, batch 1, float32, forward."""
    torch.set_num_threads(args.threads)
    rows = []
    for row in compare(args.ops, args.length, Clock(args.device, args.seconds)):
        rows.append(row)
        times = row.get("reference_ms", float("nan")), row["chunked_ms"]
        print(f"{row['row']:<32} reference {times[0]:>9.1f} ms   chunked {times[1]:>9.1f} ms {times[0] / times[1]:>7.1f}x", flush=True)
    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": args.threads, "device": args.device}
    save(args, {"command": command(), "host": machine, "rows": rows})


def gpu(args: argparse.Namespace) -> None:
    """Every operator and backend against the other libraries that are installed, if their results are right."""
    started, dtype = time.monotonic(), getattr(torch, args.dtype)
    sizes = dict(args.sizes)
    cases, cuda = chosen(args.cases, sizes), torch.device(args.device).type == "cuda"
    backends = args.backends or (["fused", "chunked"] if cuda else ["chunked"])
    peers = [] if args.peers == ["none"] else args.peers if args.peers or cuda else ANYWHERE
    with compiled_in(args.cache), tuning_for(args.tune):
        if args.unguarded:
            lift_guard()
        firsts = {}
        if args.warm:
            for label, name, seconds, why in warm(cases, sizes, backends, peers, args.device, dtype, args.workers, args.unguarded):
                firsts[label, name] = seconds
                print(f"{label}: {name}, {why or f'first call {seconds:.2f} s'}", file=sys.stderr, flush=True)
        clock = Clock(args.device, args.seconds)
        results = started_here(args, bandwidth=clock.rate)
        print(f"{results['host']['device']}: memory copied at {clock.rate / 1e9:,.0f} GB/s\n", flush=True)
        for case in cases:
            rows = list(measure(case, contenders(case, backends, peers), clock, dtype, args.unguarded))
            for row in rows:
                row.first = firsts.get((row.case, row.contender)) or (None if args.cache else row.first)
            results["rows"] += map(dataclasses.asdict, rows)
            print(f"{report.table(rows)}\n", flush=True)
            if args.output:  # as far as it has come, should the time run out
                report.operators(args.output, results, picture=case is cases[-1])
        print(f"{time.monotonic() - started:.0f} s")


def train(args: argparse.Namespace) -> None:
    """Tokens per second that models learn from: forward and backward, no optimizer, beside others of the same size."""
    if args.unguarded:
        lift_guard()
    clock, rows, results = Clock(args.device, rate=1.0), [], started_here(args)
    settings = dict(batch=args.batch, length=args.length, dtype=getattr(torch, args.dtype), steps=args.steps)
    for who in throughput.contenders(args.models, peers=clock.cuda and args.peers != ["none"]):
        rows.append(throughput.throughput(who, clock, **settings, checkpointing=args.checkpointing))
        results["rows"].append(dataclasses.asdict(rows[-1]))
        clock.clean()
        print(f"{who.name}, {who.library}: {rows[-1].note or f'{rows[-1].tokens_per_second:,.0f} tokens/s'}", flush=True)
        if args.output:
            throughput.save(args.output, results)
    print(f"\n{throughput.table(rows)}")


def decode(args: argparse.Namespace) -> None:
    """Tokens per second that models write behind prompts, and how long the first takes, beside others of the same size."""
    serve(args, decoding.save, args.tokens, launched=args.launched)


def prefill(args: argparse.Namespace) -> None:
    """Tokens per second that models read of prompts of many lengths, beside others of the same size."""
    serve(args, decoding.save_reading, tokens=1)


def serve(args: argparse.Namespace, save, tokens: int, launched: bool = False) -> None:
    """Prompts of all lengths for one model after another."""
    clock, rows = Clock(args.device), []
    results = started_here(args, bandwidth=clock.rate)
    for who in decoding.contenders(args.models, peers=clock.cuda and args.peers != ["none"], launched=launched):
        for row in decoding.serve(who, clock, args.contexts, args.batches, getattr(torch, args.dtype), tokens):
            rows.append(row)
            results["rows"].append(dataclasses.asdict(row))
            print(f"{row.case}, {row.library}: {row.note or f'{row.written or row.read:,.0f} tokens/s'}", flush=True)
            if args.output:  # as far as it has come, should the time run out
                save(args.output, results, picture=False)
        clock.clean()
    if args.output:
        save(args.output, results)
    print(f"\n{decoding.table(rows)}")


def merge(args: argparse.Namespace) -> None:
    """Make one page of several runs' results on one machine; a case that was measured again counts as it was last. Draw pictures."""
    kinds = (
        ("operators", "case", report.operators), ("training", "model", throughput.save), ("decoding", "case", decoding.save),
        ("reading", "case", decoding.save_reading),
    )  # fmt: skip
    if not any((folder / f"{name}.json").exists() for folder in args.folders for name, *_ in kinds):
        names = " or ".join(f"{name}.json" for name, *_ in kinds)
        raise ValueError(f"no {names} in {', '.join(map(str, args.folders))}")
    for name, key, save in kinds:
        if files := [path for folder in args.folders if (path := folder / f"{name}.json").exists()]:
            print(f"wrote {', '.join(map(str, save(args.output, report.merge(files, key))))}")


def loading(args: argparse.Namespace) -> None:
    """Resident memory at its most while checkpoints of random weights are loaded, in several shards: `llama`, whose tensors only
    change their names, also in another dtype, and `phi3`, whose tensors are split."""
    rows = []
    for kind, dtype in tqdm((("llama", "auto"), ("phi3", "auto"), ("llama", "float32")), unit="load", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            random_checkpoint(Path(folder), kind, int(args.size))
            result = measure_loading(Path(folder), dtype)
        rows.append({"layout": kind, "dtype": dtype} | dataclasses.asdict(result) | {"bound": result.bound})
        sizes = "   ".join(f"{name} {rows[-1][name] / 2**20:,.0f} MiB" for name in ("model", "shard", "peak", "bound"))
        tqdm.write(f"{kind:<8} {dtype:<8} {result.shards} shards   {sizes}   {'within' if result.peak < result.bound else 'TOO MUCH'}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "safetensors": safetensors.__version__}
    save(args, {"command": command(), "host": versions, "rows": rows})


def size_of(text: str) -> tuple[str, int]:
    """`"T=64"` -> `("T", 64)`."""
    letter, _, size = text.partition("=")
    if not size.isdigit() or not int(size):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write a letter and a number, as in T=64")
    return letter, int(size)


def command() -> str:
    """This one, as it was typed."""
    return f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}"


def started_here(args: argparse.Namespace, **facts) -> dict:
    """Results without rows yet."""
    return {"host": report.host(args.device), "dtype": args.dtype, "runs": [{"command": command(), **facts}], "rows": []}


def save(args: argparse.Namespace, results: dict) -> None:
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(metavar="COMMAND", required=True)

    def add(run, output: str, required: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        one.set_defaults(run=run)
        one.add_argument("-o", "--output", type=Path, required=required, help=output)
        return one

    kernel = add(kernels, "write the results here as JSON")
    kernel.add_argument("--ops", nargs="*", choices=sorted(OPS), help="only these operators")
    kernel.add_argument("--length", type=int, default=8192)
    kernel.add_argument("--threads", type=int, default=2)
    kernel.add_argument("--seconds", type=float, default=2.0, help="how long to repeat each measurement (default: 2)")
    whole_gpu = add(gpu, "folder for operators.json, .md and .png")
    whole_gpu.add_argument("--cases", nargs="*", default=[], help="only those whose label contains one of these")
    whole_gpu.add_argument(
        "--sizes", nargs="*", type=size_of, default=[], metavar="LETTER=SIZE", help="other sizes for all cases: B=1 T=512"
    )
    whole_gpu.add_argument("--backends", nargs="*", choices=["fused", "chunked", "reference"], help="(default: fused and chunked)")
    whole_gpu.add_argument("--warm", action="store_true", help="compile first, everybody in parallel processes of their own")
    whole_gpu.add_argument("--workers", type=int, default=8, help="how many such processes at once (default: 8)")
    whole_gpu.add_argument("--cache", type=Path, help="folder to keep compiled kernels and tuned choices in (default: an empty one)")
    whole_gpu.add_argument("--tune", type=float, metavar="MS", help="for a configuration of what tunes itself (default: its own)")
    whole_gpu.add_argument("--seconds", type=float, default=0.1, help="how long to repeat each measurement (default: 0.1)")
    training = add(train, "folder for training.json, .md and .png")
    training.add_argument("--models", nargs="*", default=list(throughput.MODELS), help="presets of zoo.list_presets()")
    training.add_argument("--batch", type=int, default=8)
    training.add_argument("--length", type=int, default=2048)
    training.add_argument("--steps", type=int, default=5, help="to take the median of (default: 5)")
    training.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    writing, reading = add(decode, "folder for decoding.json, .md and .png"), add(prefill, "folder for reading.json, .md and .png")
    for one, contexts in ((writing, [2**10, 2**13, 2**16]), (reading, [2**10, 2**13, 2**16, 2**18, 2**20])):
        one.add_argument("--models", nargs="*", default=list(decoding.MODELS), help="presets of zoo.list_presets()")
        one.add_argument("--contexts", nargs="*", type=int, default=contexts, help="tokens of the prompts, rising")
        one.add_argument("--batches", nargs="*", type=int, default=[1], help="numbers of prompts (default: 1)")
    writing.add_argument("--tokens", type=int, default=128, help="to write (default: 128)")
    writing.add_argument("--launched", action="store_true", help="ours also with steps that are not recorded")
    for one in (whole_gpu, training, writing, reading):
        one.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        one.add_argument("--peers", nargs="*", help="other libraries' names, or none (default: all that are installed)")
    for one in (whole_gpu, training):
        one.add_argument("--unguarded", action="store_true", help="run what fla refuses to on this GPU, and time what is wrong too")
    for one, device in ((kernel, "cpu"), *((other, "cuda") for other in (whole_gpu, training, writing, reading))):
        one.add_argument("--device", default=device, help=f"(default: {device})")
    merging = add(merge, "folder for what comes of it", required=True)
    merging.add_argument("folders", nargs="+", type=Path, help="of earlier runs, the oldest first")
    add(loading, "write the results here as JSON").add_argument("--size", type=float, default=1e9, help="bytes of the checkpoint to load")
    return whole


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""Time operators and models, weigh loading; `COMMAND --help` explains a command.

python scripts/benchmark.py gpu --warm --cases "decay by token" --peers fla --output results
python scripts/benchmark.py decode --models gla-1.3b mamba2-1.3b --contexts 1024 65536 --output results
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import torch
import transformers

from zoo.evaluate.bench import decoding, report, runs, throughput
from zoo.evaluate.bench.backends import compare
from zoo.evaluate.bench.case import ANYWHERE, chosen, lift_guard, read_sizes
from zoo.evaluate.bench.measure import Clock, contenders, measure
from zoo.evaluate.bench.warm import compiled_in, tuning_for, warm
from zoo.evaluate.loading import weigh
from zoo.ops import OPS


def kernels(args: argparse.Namespace) -> None:
    """On this CPU: every operator chunked against its definition; width 512, batch 1, float32, forward."""
    torch.set_num_threads(args.threads)
    rows = []
    for row in compare(args.ops, args.length, Clock(args.device, args.seconds)):
        rows.append(row)
        slow, fast = row.get("reference_ms", float("nan")), row["chunked_ms"]
        print(f"{row['row']:<32} reference {slow:>9.1f} ms   chunked {fast:>9.1f} ms {slow / fast:>7.1f}x", flush=True)
    save(args, rows, machine=platform.machine(), torch=torch.__version__, threads=args.threads, device=args.device)


def loading(args: argparse.Namespace) -> None:
    """Resident memory at its most while checkpoints of random weights are loaded, in several shards: `llama`, whose tensors only
    change their names, also in another dtype, and `phi3`, whose tensors are split."""
    rows = []
    for row in weigh(int(args.size)):
        rows.append(row)
        sizes = "   ".join(f"{name} {row[name] / 2**20:,.0f} MiB" for name in ("model", "shard", "peak", "bound"))
        verdict = "within" if row["peak"] < row["bound"] else "TOO MUCH"
        print(f"{row['layout']:<8} {row['dtype']:<8} {row['shards']} shards   {sizes}   {verdict}", flush=True)
    save(args, rows, torch=torch.__version__, transformers=transformers.__version__, safetensors=safetensors.__version__)


def save(args: argparse.Namespace, rows: list[dict], **host) -> None:
    """As JSON, where a file is named."""
    if args.output:
        results = {"command": command(), "host": host, "rows": rows}
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def gpu(args: argparse.Namespace) -> None:
    """Every operator and backend against the other libraries that are installed, if their results are right."""
    started, dtype, sizes = time.monotonic(), getattr(torch, args.dtype), read_sizes(args.sizes)
    cases, cuda = chosen(args.cases, sizes), torch.device(args.device).type == "cuda"
    backends = args.backends or (["fused", "chunked"] if cuda else ["chunked"])
    peers = args.peers or (None if cuda else ANYWHERE)
    if args.unguarded:
        lift_guard()
    firsts = {}
    if args.warm:
        for label, name, seconds, why in warm(cases, sizes, backends, peers, args.device, dtype, args.workers, args.unguarded):
            firsts[label, name] = seconds
            print(f"{label}: {name}, {why or f'first call {seconds:.2f} s'}", file=sys.stderr, flush=True)
    clock = Clock(args.device, args.seconds)
    run = begin(args, "operators", bandwidth=clock.rate)
    print(f"{run.head['host']['device']}: memory copied at {clock.rate / 1e9:,.0f} GB/s\n", flush=True)
    for case in cases:
        rows = list(measure(case, contenders(case, backends, peers), clock, dtype, args.unguarded))
        for row in rows:
            row.first = firsts.get((row.case, row.contender)) or (None if args.cache else row.first)
        run.add(*rows)
        print(f"{report.table(rows)}\n", flush=True)
    run.save()
    print(f"{time.monotonic() - started:.0f} s")


def train(args: argparse.Namespace) -> None:
    """Tokens per second that models learn from: forward and backward, no optimizer, beside others of the same size."""
    if args.unguarded:
        lift_guard()
    clock, dtype = Clock(args.device, rate=1.0), getattr(torch, args.dtype)
    settings = dict(batch=args.batch, length=args.length, dtype=dtype, steps=args.steps, checkpointing=args.checkpointing)
    models = throughput.contenders(args.models, args.peers or (None if clock.cuda else []))
    rows = (throughput.throughput(who, clock, **settings) for who in models)
    race(args, begin(args, "training"), rows, clock, throughput.table)


def decode(args: argparse.Namespace) -> None:
    """Tokens per second that models write behind prompts, and how long the first takes, beside others of the same size."""
    serve(args, "decoding", args.tokens, launched=args.launched)


def prefill(args: argparse.Namespace) -> None:
    """Tokens per second that models read of prompts of many lengths, beside others of the same size."""
    serve(args, "reading", tokens=1)


def serve(args: argparse.Namespace, page: str, tokens: int, launched: bool = False) -> None:
    """Prompts of all lengths for one model after another."""
    clock, dtype = Clock(args.device), getattr(torch, args.dtype)
    models = decoding.contenders(args.models, args.peers or (None if clock.cuda else []), launched)
    rows = (row for who in models for row in decoding.serve(who, clock, args.contexts, args.batches, dtype, tokens))
    race(args, begin(args, page, bandwidth=clock.rate), rows, clock, decoding.table)


def race(args: argparse.Namespace, run: runs.Run, rows: Iterable, clock: Clock, table: Callable) -> None:
    """Print and keep one row after another, and in the end the table of all."""
    for row in rows:
        row.first = None if args.cache else row.first  # it may have found compiled kernels
        run.add(row)
        clock.clean()
        print(row, flush=True)
    run.save()
    print(f"\n{table(run.rows)}")


def merge(args: argparse.Namespace) -> None:
    """Make one page of several runs' results on one machine; a case that was measured again counts as it was last. Draw pictures."""
    print(f"wrote {', '.join(map(str, runs.merge(args.folders, args.output)))}")


def command() -> str:
    """This one, as it was typed."""
    return f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}"


def begin(args: argparse.Namespace, page: str, **facts: float) -> runs.Run:
    return runs.Run(page, args.output, command(), args.device, args.dtype, **facts)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole.set_defaults(cache=None, tune=None)
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    beside = argparse.ArgumentParser(add_help=False)  # what runs beside other libraries
    beside.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    beside.add_argument("--peers", nargs="+", help="other libraries' names, or none (default: all that are installed)")
    beside.add_argument("--device", default="cuda", help="(default: cuda)")
    beside.add_argument("--cache", type=Path, help="folder to keep compiled kernels and tuned choices in (default: an empty one)")
    beside.add_argument("--tune", type=float, metavar="MS", help="to time each configuration of what tunes itself (default: its own)")
    guarded = argparse.ArgumentParser(add_help=False)
    guarded.add_argument("--unguarded", action="store_true", help="run what fla refuses to on this GPU, and time what is wrong too")

    def add(run: Callable, output: str, *parents: argparse.ArgumentParser, required: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, parents=parents)
        one.set_defaults(run=run)
        one.add_argument("-o", "--output", type=Path, required=required, help=output)
        return one

    one = add(kernels, "write the results here as JSON")
    one.add_argument("--ops", nargs="*", choices=sorted(OPS), help="only these operators")
    one.add_argument("--length", type=int, default=8192)
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--seconds", type=float, default=2.0, help="how long to repeat each measurement (default: 2)")
    one.add_argument("--device", default="cpu", help="(default: cpu)")
    one = add(gpu, "folder for operators.json, .md and .png", beside, guarded)
    one.add_argument("--cases", nargs="*", default=[], help="only those whose label contains one of these")
    one.add_argument("--sizes", nargs="*", default=[], metavar="LETTER=SIZE", help="other sizes for all cases: B=1 T=512")
    one.add_argument("--backends", nargs="*", choices=["fused", "chunked", "reference"], help="(default: fused and chunked)")
    one.add_argument("--warm", action="store_true", help="compile first, everybody in parallel processes of their own")
    one.add_argument("--workers", type=int, default=8, help="how many such processes at once (default: 8)")
    one.add_argument("--seconds", type=float, default=0.1, help="how long to repeat each measurement (default: 0.1)")
    one = add(train, "folder for training.json, .md and .png", beside, guarded)
    one.add_argument("--models", nargs="*", default=list(throughput.MODELS), help="presets of zoo.list_presets()")
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("--length", type=int, default=2048)
    one.add_argument("--steps", type=int, default=5, help="to take the median of (default: 5)")
    one.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    writing = add(decode, "folder for decoding.json, .md and .png", beside)
    reading = add(prefill, "folder for reading.json, .md and .png", beside)
    for one, contexts in ((writing, [2**10, 2**13, 2**16]), (reading, [2**10, 2**13, 2**16, 2**18, 2**20])):
        one.add_argument("--models", nargs="*", default=list(decoding.MODELS), help="presets of zoo.list_presets()")
        one.add_argument("--contexts", nargs="*", type=int, default=contexts, help="tokens of the prompts, rising")
        one.add_argument("--batches", nargs="*", type=int, default=[1], help="numbers of prompts (default: 1)")
    writing.add_argument("--tokens", type=int, default=128, help="to write (default: 128)")
    writing.add_argument("--launched", action="store_true", help="ours also with steps that are not recorded")
    one = add(merge, "folder for what comes of it", required=True)
    one.add_argument("folders", nargs="+", type=Path, help="of earlier runs, the oldest first")
    one = add(loading, "write the results here as JSON")
    one.add_argument("--size", type=float, default=1e9, help="bytes of the checkpoint to load")
    return whole


def main() -> None:
    args = parser().parse_args()
    with compiled_in(args.cache), tuning_for(args.tune):
        args.run(args)


if __name__ == "__main__":
    main()

"""First calls of many contenders at once, each in a process with an empty cache of its own; what they compiled is kept together."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from zoo.evaluate.bench.case import Case, chosen, lift_guard
from zoo.evaluate.bench.measure import Clock, Problem, contenders, failure

OWN = {"FLA_FLASH_QLA": "0"}  # fla's kernels are its own; FlashQLA's, which it would call instead, have rows of their own
TUNING = {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}  # whoever tunes itself does so again, alone on the device


def warm(
    cases: Sequence[Case], sizes: dict[str, int], backends: Sequence[str], peers: Sequence[str] | None, device: str, dtype: torch.dtype,
    workers: int, unguarded: bool,
) -> Iterator[tuple[str, str, float | None, str]]:  # fmt: skip
    """Case, contender, seconds of its first forward and backward, or None and why there was none.

    The kernels of all of them end up in the folder that TRITON_CACHE_DIR names, which this process has to set before. Only our
    fused kernels are called at every batch and length; the others at one of each case.
    """
    jobs = {(case.label, who.name): case for case in cases for who in contenders(case, [b for b in backends if b == "fused"], [])}
    for case in {_kind(case): case for case in reversed(cases)}.values():
        jobs |= {(case.label, who.name): case for who in contenders(case, backends, peers)}
    kind = str(dtype).removeprefix("torch.")

    def first(case: Case, name: str) -> tuple[str, str, float | None, str]:
        what = {"case": case.label, "sizes": sizes, "contender": name, "device": device, "dtype": kind, "unguarded": unguarded}
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | TUNING | caches(cache)
            line = [sys.executable, "-m", __name__, json.dumps(what)]
            ran = subprocess.run(line, env=environment, capture_output=True, text=True)
            keep(Path(cache), Path(os.environ["TRITON_CACHE_DIR"]))
        if ran.returncode:
            return case.label, name, None, (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return case.label, name, float(ran.stdout.split()[-1]), ""

    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(first, case, name) for (_, name), case in jobs.items()]):
            yield done.result()


def keep(made: Path, folder: Path) -> None:
    """Copy what was compiled to what is kept. Triton lists a kernel's files by their whole paths, which change."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    for lists in made.rglob("__grp__*"):
        (folder / lists.relative_to(made)).write_text(lists.read_text().replace(str(made), str(folder)))


@contextmanager
def compiled_in(folder: Path | None) -> Iterator[None]:
    """Keep compiled kernels, and what tuners chose, in this folder; or in an empty one that vanishes, so that first calls compile."""
    where = nullcontext(folder.resolve()) if folder else tempfile.TemporaryDirectory()
    with where as cache, mock.patch.dict(os.environ, caches(str(cache)) | OWN):
        yield


@contextmanager
def tuning_for(milliseconds: float | None) -> Iterator[None]:
    """Let libraries that tune themselves time every configuration for so long, not for the tenth of a second that is Triton's own."""
    if milliseconds is None:
        yield
        return
    testing = importlib.import_module("triton.testing")
    with mock.patch.object(testing, "do_bench", partial(testing.do_bench, warmup=milliseconds / 4, rep=milliseconds)):
        yield


def caches(folder: str) -> dict[str, str]:
    """The environment in which Triton, torch.compile and TileLang keep there what they have compiled."""
    return {f"{compiler}_CACHE_DIR": folder for compiler in ("TRITON", "TORCHINDUCTOR", "TILELANG")}


def _kind(case: Case) -> tuple:
    """What cases of different batches and lengths have in common."""
    return case.op, case.name, *(pair for pair in case.sizes.items() if pair[0] not in "BT")


def first_call(case: str, sizes: dict[str, int], contender: str, device: str, dtype: str, unguarded: bool) -> float:
    """Seconds of one contender's first forward and backward in this process."""
    if unguarded:
        lift_guard()
    (found,) = (one for one in chosen([], sizes) if one.label == case)
    (who,) = (one for one in contenders(found, ("fused", "chunked", "reference")) if one.name == contender)
    run = who.load()
    torch.ones(1, device=device).sum().item()  # the device's own beginnings do not count
    started = Problem(found, who, run, Clock(device, rate=1.0), getattr(torch, dtype))
    if started.refused:
        raise RuntimeError(started.refused)
    return started.first


def main() -> None:
    try:
        seconds = first_call(**json.loads(sys.argv[1]))
    except Exception as error:  # its last line is the report
        sys.exit(failure(error))
    sys.stdout.write(f"{seconds}\n")


if __name__ == "__main__":
    main()

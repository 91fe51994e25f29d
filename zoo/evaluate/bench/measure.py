"""Measure a case: is the result right, how long does it take, how far is that from what memory allows."""

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.evaluate.bench.case import Case, Peer
from zoo.evaluate.closeness import assert_close
from zoo.kernels.dispatch import BackendError

CALLS = 50  # enqueued in a row to see what a call costs the host


@dataclass
class Row:
    """One contender on one case. Times are medians in milliseconds; None is what was not measured, and `note` says why.

    first: seconds of the first forward and backward; floor: times of reading every input and writing every output once; extra:
    bytes allocated on top of the inputs; error: relative L2 error of the output, and the largest of a gradient; wrong: what is
    too far from the definition; host: microseconds of a call for the host.
    """

    case: str
    contender: str
    ours: bool
    anchor: bool = False
    forward: float | None = None
    both: float | None = None
    forward_floor: float | None = None
    both_floor: float | None = None
    first: float | None = None
    extra: int | None = None
    forward_error: float | None = None
    gradient_error: float | None = None
    wrong: str = ""
    note: str = ""
    host_forward: float | None = None
    host_both: float | None = None

    @property
    def reads(self) -> bool:
        """Whether the output is right, whatever the gradients are."""
        return not self.wrong or self.wrong.startswith("gradient")


class Contender(NamedTuple):
    """Whoever computes a case: `run(*arrange(**inputs))`; `definition(**inputs)` says what is right."""

    name: str
    ours: bool
    load: Callable[[], Callable[..., Tensor]]
    arrange: Callable[..., tuple]
    definition: Callable[..., Tensor]
    anchor: bool = False


class Truth(NamedTuple):
    """The definition of a case at its small sizes, in float64 and in the tested dtype: outputs, and gradients of what they depend on."""

    inputs: dict[str, Tensor]
    cotangent: Tensor
    exact: tuple[Tensor, dict[str, Tensor]]
    plain: tuple[Tensor, dict[str, Tensor]]


def contenders(case: Case, backends: Iterable[str], peers: Iterable[str] | None = None) -> list[Contender]:
    """Our backends, then the case's peers that are installed: all of them, or those whose names contain one of these words."""

    def definition(**inputs: Tensor) -> Tensor:
        return case.call("reference", **inputs)

    def ours(backend: str) -> Contender:
        def load():
            names = list(case.inputs("cpu", torch.float32, small=True))
            return lambda *tensors: case.call(backend, **dict(zip(names, tensors, strict=True)))

        return Contender(f"zoo {backend}", True, load, lambda **inputs: tuple(inputs.values()), definition)

    def other(peer: Peer) -> Contender:
        return Contender(peer.name, False, peer.load, peer.arrange, peer.definition or definition, peer.definition is not None)

    asked = [peer for peer in case.peers if peer.installed and (peers is None or any(word in peer.name for word in peers))]
    return [*map(ours, backends), *map(other, asked)]


def measure(case: Case, who: list[Contender], clock: "Clock", dtype: torch.dtype, keep_wrong: bool = False) -> Iterator[Row]:
    """A row for every contender, one after another.

    Args:
        clock: of the device, with the rate of its memory.
        keep_wrong: time also peers whose results are wrong; their rows say so. Ours are never.
    """
    truths: dict[str, Truth] = {}
    for contender in who:
        row = Row(case.label, contender.name, contender.ours, contender.anchor)
        try:
            run = contender.load()
            started = Problem(case, contender, run, clock, dtype)
            row.first = started.first
            key = contender.name if contender.anchor else ""  # an anchor has a definition of its own
            truths[key] = truths.get(key) or truth(case, contender, clock.device, dtype)
            check(row, run, contender.arrange, truths[key])
            row.wrong = row.wrong or started.wrong
            started.time(row, wrong_too=keep_wrong and not contender.ours)
        except BackendError as error:
            row.note = str(error)
        except Exception as error:  # whatever another library raises belongs into its row, and the others go on
            row.note = failure(error)
        started = run = None  # so that what they hold can be freed
        clock.clean()
        yield row


def failure(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def truth(case: Case, contender: Contender, device: str, dtype: torch.dtype) -> Truth:
    """What is right at the case's small sizes. An anchor need not depend on all inputs."""
    inputs = case.inputs(device, dtype, small=True)
    out = contender.definition(**inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator(device).manual_seed(1), device=device).to(out.dtype)
    plain = out.detach(), gradients(out, inputs, cotangent, contender.anchor)
    wide = {
        name: (x.detach().double() if x.is_floating_point() else x).requires_grad_(x.requires_grad) for name, x in inputs.items()
    }  # lists and marks stay what they are
    out = contender.definition(**wide)
    return Truth(inputs, cotangent, (out.detach(), gradients(out, wide, cotangent, contender.anchor)), plain)


def gradients(out: Tensor, inputs: dict[str, Tensor], cotangent: Tensor, partial: bool = False) -> dict[str, Tensor]:
    """Of all inputs that learn; if `partial`, of those among them that the output depends on."""
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    found = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=partial)
    return {name: x for name, x in zip(leaves, found, strict=True) if x is not None}


def check(row: Row, run: Callable[..., Tensor], arrange: Callable[..., tuple], right: Truth) -> None:
    """Write errors into the row, and under `wrong` what the rule of closeness does not allow."""
    out = run(*arrange(**right.inputs))
    dtype = right.cotangent.dtype  # the output's; also of gradients in float32, which are sums of products in this one
    row.forward_error = relative(out, right.exact[0])
    row.wrong = complaint(out.detach(), right.plain[0], right.exact[0], "output", dtype=dtype)
    if row.wrong:
        return
    try:
        found = gradients(out, {name: right.inputs[name] for name in right.exact[1]}, right.cotangent)
    except Exception as error:  # a peer that reads but does not learn is still timed reading
        row.wrong = f"gradients: {failure(error)}"
        return
    row.gradient_error = max(relative(found[name], exact) for name, exact in right.exact[1].items())
    triples = {f"gradient of {name}": (found[name], right.plain[1][name], exact) for name, exact in right.exact[1].items()}
    row.wrong = "; ".join(filter(None, (complaint(*triple, what, gradient=True, dtype=dtype) for what, triple in triples.items())))


def complaint(result: Tensor, plain: Tensor, exact: Tensor, what: str, **options) -> str:
    """What the rule of closeness says, or nothing."""
    try:
        assert_close(result, plain, exact, what, **options)
    except AssertionError as error:
        return str(error)
    return ""


def relative(x: Tensor, exact: Tensor) -> float:
    return ((x.detach().double() - exact).norm() / exact.norm()).item()


class Problem:
    """A contender at the full size. Making it makes the first call, forward and backward: compilation and tuning."""

    def __init__(self, case: Case, contender: Contender, run: Callable[..., Tensor], clock: "Clock", dtype: torch.dtype):
        inputs = case.inputs(clock.device, dtype)
        self.run, self.clock, self.host = run, clock, case.host
        arranged = contender.arrange(**inputs)
        self.arguments = tuple(
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arranged
        )  # leaves of their own, so that arranging is not timed
        self.leaves = [x for x in self.arguments if isinstance(x, Tensor) and x.requires_grad]
        self.read = sum(x.nbytes for x in inputs.values())
        self.learned = sum(x.nbytes for x in inputs.values() if x.requires_grad)
        del inputs, arranged
        start = clock.now()
        out = self.run(*self.arguments)
        self.written = out.nbytes
        self.cotangent = torch.empty_like(out).normal_()
        self.refused, grads = "", ()
        try:
            grads = torch.autograd.grad(out, self.leaves, self.cotangent)
        except Exception as error:  # told by the check, which asks for gradients again
            self.refused = failure(error)
        self.first = clock.now() - start
        infinite = [what for what, x in [("output", out), *(("gradients", x) for x in grads)] if not torch.isfinite(x).all()]
        self.wrong = f"{infinite[0]} not finite at full size" if infinite else ""

    def forward(self) -> None:
        with torch.no_grad():
            self.run(*self.arguments)

    def both(self) -> None:
        torch.autograd.grad(self.run(*self.arguments), self.leaves, self.cotangent)

    def time(self, row: Row, wrong_too: bool = False) -> None:
        """Write times into the row: none of what is wrong, unless it is asked for."""
        if row.reads or wrong_too:
            row.forward_floor = self.clock.floor(self.read + self.written)
            row.forward = self.clock.median(self.forward)
            row.host_forward = self.clock.enqueue(self.forward) if self.host else None
        if (not row.wrong or wrong_too) and not self.refused:
            row.both_floor = self.clock.floor(2 * (self.read + self.written) + self.learned)
            row.both = self.clock.median(self.both)
            row.host_both = self.clock.enqueue(self.both) if self.host else None
            row.extra = self.clock.peak(self.both)


class Clock:
    """Of a device: medians of events on a GPU, of the wall clock elsewhere.

    Args:
        seconds: for which every measurement is repeated.
        rate: bytes that its memory reads and writes per second; measured by copying, unless it is given.
    """

    def __init__(self, device: str, seconds: float = 0.1, rate: float | None = None):
        self.device, self.seconds = device, seconds
        self.cuda = torch.device(device).type == "cuda"
        self.rate = rate or self._copy_rate()

    def _copy_rate(self) -> float:
        source = torch.ones(2**30 if self.cuda else 2**24, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        return 2e3 * source.nbytes / self.median(lambda: target.copy_(source))

    def floor(self, size: int) -> float:
        """Milliseconds for which so many bytes keep the memory busy."""
        return 1e3 * size / self.rate

    def now(self) -> float:
        """Seconds, after the device has caught up."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def median(self, run: Callable[[], object]) -> float:
        """Milliseconds of a call."""
        if self.cuda:
            testing = importlib.import_module("triton.testing")
            return testing.do_bench(run, warmup=int(250 * self.seconds), rep=int(1e3 * self.seconds), return_mode="median")
        run()
        times, start = [], self.now()
        while len(times) < 3 or self.now() - start < self.seconds:
            begin = self.now()
            run()
            times.append(1e3 * (self.now() - begin))
        return statistics.median(times)

    def enqueue(self, run: Callable[[], object]) -> float:
        """Microseconds that the host spends on a call: the median of five rounds of many, the device catching up between rounds."""
        rounds = []
        for _ in range(5):
            begin = self.now()
            for _ in range(CALLS):
                run()
            rounds.append(1e6 * (time.perf_counter() - begin) / CALLS)
        return statistics.median(rounds)

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes that a call allocates at its most, on a GPU."""
        if not self.cuda:
            return None
        self.clean()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.now()
        return torch.cuda.max_memory_allocated(self.device) - before

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

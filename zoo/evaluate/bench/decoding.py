"""How fast models read prompts and write behind them, as users have it: with `generate`, beside other libraries' models."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from zoo import decode
from zoo.auto import from_config
from zoo.config import ZooConfig
from zoo.evaluate.bench import report
from zoo.evaluate.bench.measure import Clock, failure
from zoo.evaluate.bench.report import number
from zoo.evaluate.bench.throughput import Contender, fla_layout, fla_model, llama_config, parameters, takes_part
from zoo.registry import build_config, get

MODELS = (
    "gla-1.3b", "mamba2-1.3b", "mamba-1.4b", "rwkv7-1.5b", "gated_deltanet-1.3b", "griffin-hawk-1.3b", "recurrent_gemma-2b",
    "hybrid-samba-1.3b",
)  # fmt: skip
LAUNCHED = "zoo, launched one by one"
PATIENCE = 60.0  # seconds; a longer prompt is not tried after a call that took so long, or when it would in proportion


@dataclass
class Row:
    """Of one model and one length of prompt. Times are None where they were not measured, and `note` says why.

    first: seconds of the first call; ready: milliseconds from the call to the first token; step: median milliseconds of those after
    it; floor: milliseconds in which memory gives the weights that a step reads; peak: bytes allocated at the most, weights included;
    held: bytes allocated beside the weights when the last token is there, that is the state, or the cache, and the tokens.
    """

    case: str
    model: str
    library: str
    context: int
    batch: int
    parameters: int = 0
    first: float | None = None
    ready: float | None = None
    step: float | None = None
    floor: float | None = None
    peak: int | None = None
    held: int | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.case}, {self.library}: {self.note or f'{self.written or self.read:,.0f} tokens/s'}"

    @property
    def read(self) -> float | None:
        """Tokens of the prompt per second."""
        return self.ready and 1e3 * self.batch * self.context / self.ready

    @property
    def written(self) -> float | None:
        """Tokens behind the prompt per second."""
        return self.step and 1e3 * self.batch / self.step


def contenders(names: Sequence[str], peers: Sequence[str] | None, launched: bool = False) -> Iterator[Contender]:
    """Ours; `launched`: also with steps that are not recorded; of the `peers` (None: all) the same architecture in transformers and
    in flash-linear-attention, where they have it, and one Llama of the first one's size. The arguments are those of `generate`."""
    configs = {name: build_config(name) for name in names}
    for name, config in configs.items():
        ours = lambda config=config: from_config(config)  # noqa: E731
        yield Contender(name, "zoo", ours, {})
        if launched:
            yield Contender(name, LAUNCHED, ours, {})
        if takes_part("transformers", peers) and (theirs := foreign_config(config)) is not None:
            yield Contender(name, "transformers", lambda theirs=theirs: AutoModelForCausalLM.from_config(theirs), {})
        if takes_part("fla", peers) and fla_layout(config) is not None:
            yield Contender(name, "fla", lambda config=config: fla_model(config), {})
    if not takes_part("transformers", peers):
        return
    llama, static = llama_config(next(iter(configs.values()))), {"cache_implementation": "static"}
    name, build = f"llama, {llama.num_hidden_layers} layers of {llama.hidden_size}", lambda: LlamaForCausalLM(llama)
    yield Contender(name, "transformers", build, {})
    yield Contender(name, "transformers, static cache", build, static | {"disable_compile": True})
    yield Contender(name, "transformers, static cache, compiled", build, static)


def foreign_config(config: ZooConfig):
    """The config of transformers' own model of this architecture and these sizes, if it has them."""
    for layout in get(config.name).layouts:
        if not layout.classes and layout.model_types and layout.model_types[0] in CONFIG_MAPPING:
            try:
                return CONFIG_MAPPING[layout.model_types[0]](**layout.config_back(config))
            except ValueError:  # it cannot say what ours does
                continue
    return None


class Stopwatch(BaseStreamer):
    """When each token was there, and what was allocated then; the first of `times` is when the prompt was handed in."""

    def __init__(self, clock: Clock):
        self.clock, self.times, self.allocated = clock, [], None

    def put(self, value) -> None:
        self.times.append(self.clock.now())
        self.allocated = torch.cuda.memory_allocated(self.clock.device) if self.clock.cuda else None

    def end(self) -> None:
        """Nothing is held back."""


@torch.no_grad()
def serve(who: Contender, clock: Clock, contexts: Sequence[int], batches: Sequence[int], dtype: torch.dtype, tokens: int) -> Iterator[Row]:
    """A row for every length of prompt and number of prompts: random tokens are read, and so many written, greedily."""
    model, plain = None, who.library == LAUNCHED
    for batch in batches:
        expected = 0.0
        for last, context in zip([0, *contexts], contexts, strict=False):
            expected *= context / max(last, 1)
            if expected > PATIENCE:
                break
            row = Row(f"{who.name}, {batch} x {context:,} tokens", who.name, who.library, context, batch)
            try:
                model = model or built(who, clock.device, dtype)
                with mock.patch.object(decode, "DEVICE", "none") if plain else nullcontext():
                    generate(row, model, clock, tokens, who.arguments)
            except Exception as error:  # out of memory, or whatever another library raises: the others go on
                row.note = failure(error)
            yield row
            clock.clean()
            if row.note or row.first > PATIENCE:
                break
            expected = row.ready / 1e3
    model = None  # so that what it holds can be freed
    clock.clean()


def built(who: Contender, device: str, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, which never ends by itself."""
    with torch.device(device):
        model = who.build().to(dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def generate(row: Row, model: nn.Module, clock: Clock, tokens: int, options: dict) -> None:
    """Write times into the row: of a first call, which writes few tokens, and of a second."""
    ids = torch.randint(3, model.config.vocab_size, (row.batch, row.context), device=clock.device)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    row.parameters, row.floor = parameters(model), clock.floor(step_bytes(model))
    start = clock.now()
    model.generate(ids, max_new_tokens=min(tokens, 4), **given)
    row.first = clock.now() - start
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats(clock.device)
    watch, start = Stopwatch(clock), clock.now()
    model.generate(ids, max_new_tokens=tokens, streamer=watch, **given)
    times = watch.times[1:]
    row.ready = 1e3 * (times[0] - start)
    if tokens > 1:
        row.step = 1e3 * statistics.median(after - before for before, after in pairwise(times))
    if clock.cuda:
        row.peak = torch.cuda.max_memory_allocated(clock.device)
        row.held = watch.allocated - sum(p.nbytes for p in model.parameters())


def step_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads at least: all but the table of embeddings, unless the head has the same."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters()) - (0 if table is head else table.nbytes)


WRITING = """Greedily, behind prompts of random tokens, with each library's `generate`; weights are random. `first call`: seconds until four
tokens were there. `first token`: from a later call on. `a token`: the median of those after the first. `of the floor`: the share of
it in which memory, copied at {rates} GB/s, could be read for every weight once. `held`: what was allocated beside the weights when the
last token was there, that is the state, or the cache."""
READING = """`generate` with prompts of random tokens until the first token is there, the weights being random; `first call`: the same
when it was called first."""


def save(folder: Path, results: dict, picture: bool = True) -> list[Path]:
    """Write rows as `decoding.json`, .md and .png: see `report.write`."""
    rates = " and ".join(dict.fromkeys(f"{run['bandwidth'] / 1e9:,.0f}" for run in results["runs"]))
    rows = [Row(**row) for row in results["rows"]]
    text = report.page("Decoding", results, WRITING.format(rates=rates), table(rows))
    return report.write(folder, "decoding", results, text, bars(rows, "written") if picture else {}, "tokens per second")


def save_reading(folder: Path, results: dict, picture: bool = True) -> list[Path]:
    """Write rows as `reading.json`, .md and .png."""
    rows = [Row(**row) for row in results["rows"]]
    text = report.page("Reading prompts", results, READING, table(rows))
    return report.write(folder, "reading", results, text, bars(rows, "read") if picture else {}, "tokens per second")


def bars(rows: Sequence[Row], what: str) -> dict[str, dict[str, float]]:
    """Prompts -> model and library -> tokens per second."""
    found: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: (row.batch, row.context)):
        if getattr(row, what):
            found.setdefault(f"{row.batch} x {row.context:,}", {})[f"{row.model}, {row.library}"] = getattr(row, what)
    return found


def table(rows: Sequence[Row]) -> str:
    """Of all models, and below it what went wrong."""
    writing = any(row.step for row in rows)
    head = ["model", "library", "prompts", "first call, s", "first token, ms"]
    head += ["a token, ms", "tokens/s", "of the floor"] if writing else ["tokens/s"]
    lines = [
        [row.model, row.library, f"{row.batch} x {row.context:,}", number(row.first, ".1f"), number(row.ready, ",.1f")]
        + ([number(row.step, ".3f"), number(row.written, ",.0f"), number(row.step and row.floor / row.step, ".0%")]
           if writing else [number(row.read, ",.0f")])
        + [number(row.peak, ".1f", 2**-30), number(row.held, ",.1f", 2**-20)]
        for row in rows
    ]  # fmt: skip
    notes = "\n".join(f"- {row}" for row in rows if row.note)
    return "\n\n".join(filter(None, [report.grid([*head, "peak, GiB", "held, MiB"], lines), notes]))

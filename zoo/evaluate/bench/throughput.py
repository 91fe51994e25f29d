"""How many tokens per second models learn from, forward and backward, beside other libraries' models of the same size."""

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.auto import from_config
from zoo.config import ZooConfig
from zoo.evaluate.bench import report
from zoo.evaluate.bench.measure import Clock, failure
from zoo.evaluate.bench.report import number
from zoo.registry import build_config, get

NEEDS = {"mamba2": "mamba_ssm"}  # without which flash-linear-attention's model falls back to plain torch
MODELS = ("gla-1.3b", "retnet-1.3b", "mamba2-1.3b")


@dataclass
class Row:
    """Of one model: seconds of the first step, median milliseconds of the others, bytes allocated at the most, weights included.

    Without a time `note` says why; a loss that is not finite has none.
    """

    model: str
    library: str
    parameters: int = 0
    first: float | None = None
    step: float | None = None
    tokens_per_second: float | None = None
    peak: int | None = None
    loss: float | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.model}, {self.library}: {self.note or f'{self.tokens_per_second:,.0f} tokens/s'}"


class Contender(NamedTuple):
    """A model to be built, and what its call is given beside tokens and labels, as its library's own trainer does."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    arguments: dict


def contenders(names: list[str], peers: Sequence[str] | None) -> Iterator[Contender]:
    """Ours; of the `peers` (None: all) also those of flash-linear-attention; and one Llama of the first one's size."""
    configs = {name: build_config(name) for name in names}
    for name, config in configs.items():
        yield Contender(name, "zoo", lambda config=config: from_config(config), {"skip_logits": True})
        if takes_part("fla", peers) and fla_layout(config) is not None:
            needed = NEEDS.get(config.name, "fla")
            library = "fla" if importlib.util.find_spec(needed) is not None else f"fla without {needed}"
            yield Contender(name, library, lambda config=config: fla_model(config), {})
    llama = llama_config(next(iter(configs.values())))
    build = lambda: LlamaForCausalLM._from_config(llama, attn_implementation="sdpa")  # noqa: E731
    yield Contender(f"llama, {llama.num_hidden_layers} layers of {llama.hidden_size}, SDPA", "transformers", build, {})


def takes_part(library: str, peers: Sequence[str] | None) -> bool:
    """Whether a library is installed, and one of these words is in its name; None: whatever its name."""
    return importlib.util.find_spec(library) is not None and (peers is None or any(word in library for word in peers))


def fla_layout(config: ZooConfig):
    """How flash-linear-attention lays this architecture out, if it has it."""
    return next((layout for layout in get(config.name).layouts if layout.name.startswith("fla-")), None)


def fla_model(config: ZooConfig) -> nn.Module:
    """Its model of the same sizes; where ours has another channel mixer than its gated MLP, that has the width it has by default."""
    models, layout = importlib.import_module("fla.models"), fla_layout(config)
    fields = layout.config_back(config)
    if config.channel_mixer != "swiglu":
        fields.pop("intermediate_size", None)
    theirs = getattr(models, f"{layout.classes}Config")(**fields)
    return getattr(models, f"{layout.classes}ForCausalLM")(theirs)


def llama_config(config: ZooConfig) -> LlamaConfig:
    """A Llama of the same width with as many layers as come nearest to the same number of parameters."""
    width = config.hidden_size
    sizes = dict(
        hidden_size=width, intermediate_size=-(-8 * width // 768) * 256, num_attention_heads=max(width // 128, 1),
        vocab_size=config.vocab_size, tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        wanted = parameters(from_config(config))
        one, two = (parameters(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))) for layers in (1, 2))
    return LlamaConfig(**sizes, num_hidden_layers=max(1, round((wanted - one) / (two - one)) + 1))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def throughput(
    who: Contender, clock: Clock, batch: int, length: int, dtype: torch.dtype, steps: int = 5, checkpointing: bool = False
) -> Row:
    """Train one model on random tokens for a few steps, without an optimizer; the first does not count."""
    row = Row(who.name, who.library)
    try:
        with torch.device(clock.device):
            model = who.build().to(dtype).train()
        row.parameters = parameters(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.randint(3, model.config.vocab_size, (batch, length), device=clock.device)

        def step() -> float:
            start = clock.now()
            loss = model(input_ids=ids, labels=ids, use_cache=False, **who.arguments).loss
            loss.backward()
            seconds = clock.now() - start
            model.zero_grad(set_to_none=True)
            row.loss = loss.item()
            return seconds

        row.first = step()
        if clock.cuda:
            torch.cuda.reset_peak_memory_stats(clock.device)
        seconds = statistics.median(step() for _ in range(steps))
        if not math.isfinite(row.loss):
            row.note = f"WRONG, the loss is {row.loss}"
            return row
        row.step, row.tokens_per_second = 1e3 * seconds, batch * length / seconds
        row.peak = torch.cuda.max_memory_allocated(clock.device) if clock.cuda else None
    except Exception as error:  # out of memory, or whatever another library raises: the others go on
        row.note = failure(error)
    return row


OPENING = """Forward and backward on random tokens, no optimizer; medians. The loss is taken as each library's trainer takes it: ours
in chunks of tokens, the others' from all logits at once."""
HEADER = ("model", "library", "parameters", "first step, s", "step, ms", "tokens/s", "peak, GiB", "loss")


def save(folder: Path, results: dict, picture: bool = True) -> list[Path]:
    """Write rows as `training.json`, .md and .png: see `report.write`."""
    rows, speeds = [Row(**row) for row in results["rows"]], {}
    for row in rows:
        if row.tokens_per_second and picture:
            speeds.setdefault(row.model, {})[row.library] = row.tokens_per_second
    return report.write(folder, "training", results, report.page("Training", results, OPENING, table(rows)), speeds, "tokens per second")


def table(rows: Sequence[Row]) -> str:
    """Of all models, and below it what went wrong."""
    notes = "\n".join(f"- {row}" for row in rows if row.note)
    return "\n\n".join(filter(None, [report.grid(HEADER, [cells(row) for row in rows]), notes]))


def cells(row: Row) -> list[str]:
    return [
        row.model, row.library, f"{row.parameters:,}", number(row.first, ".2f"), number(row.step, ".1f"),
        number(row.tokens_per_second, ",.0f"), number(row.peak, ".1f", 2**-30), number(row.loss, ".2f"),
    ]  # fmt: skip

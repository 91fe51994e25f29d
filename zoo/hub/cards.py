"""Model cards: what an architecture is, what a checkpoint of it weighs, how to load it, and the numbers that lie beside it."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from zoo.catalogue import human_bytes, insert, meta_model, paper_link
from zoo.config import ZooConfig
from zoo.evaluate.speed import state_bytes
from zoo.hub.files import read_json
from zoo.registry import AUTO, get

BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"
LENGTHS = (1024, 8192)  # tokens at which a state is weighed
PIPELINES = {
    "Model": "feature-extraction",
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "text2text-generation",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about: a checkpoint's config and its class's suffix; for a foreign one also the layout it is in, and whether
    transformers loads it."""

    config: ZooConfig
    suffix: str
    layout: str | None = None
    native: bool = False


def render(repo_id: str, subject: Subject, previous: str, folder: Path, fields: dict) -> str:
    """The card of a checkpoint.

    Args:
        previous: the card there is, or ""; what its author wrote stays, the part between the markers and `fields` are written anew.
        folder: the JSON files in it that hold `rows` are results.
        fields: license, base_model, tags and the like; None leaves what the card says.
    """
    if not previous.startswith("---"):
        previous = "---\n{}\n---\n" + (previous or f"# {repo_id.rpartition('/')[2]}\n")
    card = ModelCard(previous)
    fields = fields | {"tags": list(dict.fromkeys([*(card.data.tags or []), "seqzoo", subject.config.name, *fields["tags"]]))}
    card.data.library_name = "transformers" if subject.native else "seqzoo"
    card.data.pipeline_tag = PIPELINES[subject.suffix]
    for name, value in fields.items():
        if value is not None:
            card.data[name] = value
    section = "\n\n".join([facts(subject), usage(repo_id, subject), *results(folder)])
    card.text = "\n" + insert(card.text.lstrip(), section, BEGIN, END)
    return str(card).rstrip() + "\n"


def facts(subject: Subject) -> str:
    """What the checkpoint is, as a table."""
    config, entry = subject.config, get(subject.config.name)
    model = meta_model(config, subject.suffix)
    layers = Counter(layer.name or "channel mixer alone" for layer in config.layer_configs())
    rows = {
        "architecture": f"`{entry.name}`: {entry.title}" + ("" if entry.paper == "none" else f", {paper_link(entry.paper)}"),
        "layers": f"{config.num_hidden_layers}: " + ", ".join(f"{count} {name}" for name, count in layers.items()),
        "width": f"{config.hidden_size:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }
    if config.causal:
        sizes = [f"{human_bytes(state_bytes(model, length, torch.bfloat16))} after {length:,} tokens" for length in LENGTHS]
        rows["state of one sequence"] = ", ".join(sizes)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def usage(repo_id: str, subject: Subject) -> str:
    """How to load it."""
    auto = AUTO[subject.suffix].__name__
    load = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("{repo_id}")']
    text = "`import zoo` tells transformers about the architecture; `trust_remote_code=True` does that import instead."
    if subject.layout:
        load = [f'model = zoo.from_pretrained("{repo_id}")']
        text = f"Its files are in the layout `{subject.layout}`" + (f"; transformers' `{auto}` loads them too." if subject.native else ".")
    return "\n".join(["## Load", "", "```sh", "pip install seqzoo", "```", "", "```python", "import zoo", *load, "```", "", text])


def results(folder: Path) -> list[str]:
    """A section for each JSON file of `folder` with `rows`: the `command` that wrote it, tables, and the picture of the same name."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        rows = content.get("rows") if isinstance(content, dict) else None
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) and rows:
            lines = [f"## Numbers in {path.name}"]
            lines += ["", f"    {content['command']}"] if "command" in content else []
            for head, group in groupby(map(flat, rows), key=tuple):  # a table for each kind of row
                lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
                lines += [f"| {' | '.join(map(number, row.values()))} |" for row in group]
            lines += ["", f"![]({path.stem}.png)"] if path.with_suffix(".png").exists() else []
            sections.append("\n".join(lines))
    return sections


def flat(row: dict) -> dict:
    """`{"a": {"b": 1}} -> {"a b": 1}`."""
    return {
        f"{k} {inner}".strip(): v for k, value in row.items() for inner, v in (value.items() if isinstance(value, dict) else [("", value)])
    }


def number(value) -> str:
    """A cell: four digits of a float, thousands of an int apart, other things as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", r"\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

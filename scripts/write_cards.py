"""Write what the registry knows into README.md and model_cards/<name>.md, between the markers; the rest belongs to their authors.

python scripts/write_cards.py              # all of them
python scripts/write_cards.py gla mamba2   # these cards only
python scripts/write_cards.py --check      # change nothing, exit 1 if anything is out of date
"""

import argparse
import sys
from pathlib import Path

import torch

import zoo
from zoo.catalogue import direction, human_bytes, insert, meta_model, paper_link, state_kind
from zoo.evaluate.speed import state_bytes
from zoo.registry import Architecture, get

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin generated: make cards -->", "<!-- end generated -->"
LENGTHS = (1024, 8192)


def preset_row(entry: Architecture, preset: str) -> str:
    """One line of a card's table of presets."""
    config = zoo.build_config(f"{entry.name}-{preset}")
    model = meta_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    states = [human_bytes(state_bytes(model, length, torch.bfloat16)) if config.causal else "none" for length in LENGTHS]
    return f"| `{entry.name}-{preset}` | {config.num_hidden_layers} | {config.hidden_size} | {parameters:,} | {' | '.join(states)} |"


def card_section(entry: Architecture) -> str:
    """The generated part of a model card."""
    channel = zoo.build_config(f"{entry.name}-tiny").channel_mixer
    targets = ", ".join(f"`{name}`" for name in entry.mixer.lora_targets) if entry.mixer else "those of its layers"
    head = [
        f"*{entry.title}*. {'' if entry.paper == 'none' else 'Paper: ' + paper_link(entry.paper) + '.'}".rstrip(),
        "",
        f"- Direction: {direction(entry)}",
        f"- State: {state_kind(entry)}",
        f"- Channel mixer by default: {f'`{channel}`' if channel else 'none'}",
        f"- LoRA targets: {targets or 'none'}",
        *(
            [f"- Checkpoint layouts it reads and writes: {', '.join(f'`{layout.name}`' for layout in entry.layouts)}"]
            if entry.layouts
            else []
        ),
        "",
        "| preset | layers | width | parameters | state at 1k tokens | state at 8k tokens |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return "\n".join(head + [preset_row(entry, preset) for preset in entry.presets])


def catalogue_section() -> str:
    """The generated part of the README: one row per architecture."""
    rows = [f"{len(zoo.list_models())} architectures.", "", "| name | publication | direction | state | presets |", "|---|---|---|---|---|"]
    for entry in map(get, zoo.list_models()):
        source = entry.title if entry.paper == "none" else f"{entry.title}, {paper_link(entry.paper)}"
        presets = ", ".join(f"`{preset}`" for preset in entry.presets)
        rows.append(f"| [`{entry.name}`](model_cards/{entry.name}.md) | {source} | {direction(entry)} | {state_kind(entry)} | {presets} |")
    return "\n".join(rows)


def render(path: Path) -> str:
    """What README.md or a card should say; a card that is not there yet starts with its name as heading."""
    if path.name == "README.md":
        return insert(path.read_text(encoding="utf-8"), catalogue_section(), BEGIN, END)
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {path.stem}\n"
    return insert(text, card_section(get(path.stem)), BEGIN, END)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="architectures; by default all, and README.md")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file is out of date")
    options = parser.parse_args(arguments)
    paths = [ROOT / "model_cards" / f"{name}.md" for name in options.names or zoo.list_models()]
    stale = []
    for path in paths if options.names else [*paths, ROOT / "README.md"]:
        text = render(path)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if options.check else 'wrote'}: {path.relative_to(ROOT)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

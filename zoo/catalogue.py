"""What the cards of architectures and of checkpoints say alike."""

import re

import torch

from zoo.auto import model_class
from zoo.config import ZooConfig
from zoo.registry import Architecture, get


def meta_model(config: ZooConfig, suffix: str | None = None) -> torch.nn.Module:
    """The model of a config, by default its language model, without memory for its weights."""
    cls = model_class(config) if suffix is None else get(config.name).models[suffix]
    with torch.device("meta"):
        return cls(config)


def human_bytes(count: int) -> str:
    """`1536 -> '1.5 KiB'`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def paper_link(paper: str) -> str:
    """A link for `arXiv:<id>`, other references as they are."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def direction(entry: Architecture) -> str:
    """Which way the mixer may look."""
    if entry.config.is_encoder_decoder:
        return "encoder-decoder"
    if entry.mixer is None:
        return "as its layers"
    ways = [name for name in ("causal", "bidirectional") if getattr(entry.mixer.traits, name)]
    return " or ".join(ways)


def state_kind(entry: Architecture) -> str:
    """Whether the state grows with the sequence."""
    if entry.config.is_encoder_decoder:
        return "as its decoder's"
    if entry.mixer is None:
        return "as its layers"
    if not entry.mixer.traits.causal:
        return "none"
    return "constant" if entry.mixer.traits.constant_state else "grows"


def insert(text: str, section: str, begin: str, end: str) -> str:
    """`text` with `section` between the markers; without markers they go below the first heading."""
    block = f"{begin}\n{section}\n{end}"
    if begin in text:
        before, _, rest = text.partition(begin)
        return before + block + rest.partition(end)[2]
    heading, _, rest = text.partition("\n")
    return f"{heading}\n\n{block}\n\n{rest.lstrip()}"

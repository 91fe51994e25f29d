"""What the versions of RWKV have in common: the files in which its authors publish them, and how decay and bonus start."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.fla import BODY, layer
from zoo.layout import Layout, Rule, mapped, rename

BLOCK = "blocks.{}."


def as_vector(foreign: str, own: str) -> Rule:
    """A rule for a vector stored as `[1, 1, D]`."""
    return mapped(foreign, own, torch.flatten, lambda x: x[None, None])


def file_layout(
    name: str, matches: Callable[[dict], bool], further: Callable[[dict], dict], rules: tuple[Rule, ...]
) -> Layout:  # fmt: skip
    """The layout `<name>-pth`: a file of tensors without a config, whose sizes are read off their shapes. Token 0 ends a text.

    Args:
        matches: shapes by key -> whether they are of this version.
        further: shapes by key -> our fields beyond the widths, the vocabulary and the depth.
        rules: for the keys of the mixers and the channel mixers' mixes.
    """

    def read(foreign: dict) -> dict:
        shapes = foreign["tensors"]
        vocabulary, width = shapes["emb.weight"]
        return {
            "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": sum(name.endswith(".ln1.weight") for name in shapes),
            "intermediate_size": shapes["blocks.0.ffn.key.weight"][0], "bos_token_id": 0, "eos_token_id": 0,
        } | further(shapes)  # fmt: skip

    shell = (
        rename("emb.weight", "model.embed_tokens.weight"),
        rename("blocks.0.ln0.{weight,bias}", "model.embed_norm.{weight,bias}"),
        layer("ln{1,2}.{weight,bias}", "{mixer,channel}_norm.{weight,bias}", BLOCK),
        layer("ffn.{key,receptance,value}.weight", "channel_mixer.{key,receptance,value}.weight", BLOCK),
        rename("ln_out.{weight,bias}", "model.norm.{weight,bias}"),
        rename("head.weight", "lm_head.weight"),
        rename("score.{weight,bias}", "score.{weight,bias}"),
    )
    return Layout(
        f"{name}-pth", (), read, lambda config: {}, shell + rules, prefix="", file=f"{name}.pth", complete=dict,
        matches=lambda foreign: "tensors" in foreign and matches(foreign["tensors"]),
    )  # fmt: skip


def channel_mixes(foreign: str) -> Rule:
    """The rule for the channel mixer's mixes of key and receptance, whose names start like this."""
    return as_vector(f"{BLOCK}ffn.{foreign}_{{k,r}}", BODY + "channel_mixer.{key,receptance}_mix")


def initial_decay(width: int, index: int, depth: int) -> Tensor:
    """`log(-log w)` of every channel of layer `index`, from those that remember to those that forget (RWKV-5 and RWKV-6)."""
    return -6 + 5 * (torch.arange(width) / (width - 1)) ** (0.7 + 1.3 * index / max(depth - 1, 1))


def initial_bonus(width: int, index: int, depth: int) -> Tensor:
    """u of every channel of layer `index`: zigzags around a slope that the last layer has and the first does not."""
    channel = torch.arange(width)
    return index / max(depth - 1, 1) * (1 - channel / (width - 1)) + 0.1 * ((channel + 1) % 3 - 1)

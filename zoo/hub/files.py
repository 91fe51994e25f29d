"""Which files make a checkpoint."""

import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from zoo.hub.errors import HubError
from zoo.stored import read_index

CODE = "modeling_zoo.py"
SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja", ".md", ".png")
WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")  # those of other names are a second copy of the same


def carried(name: str) -> bool:
    """Whether a file travels: weights in safetensors, configuration, tokenizer, card and numbers; not pickles, code or subfolders."""
    if "/" in name or name.startswith("."):
        return False
    return name == CODE or name.endswith(SUFFIXES) or any(fnmatch(name, pattern) for pattern in WEIGHTS)


def check_weights(folder: Path, names: Collection[str]) -> None:
    """Raise HubError unless these files of `folder` have a config and all weights that an index names."""
    if "config.json" not in names:
        raise HubError(f"{folder} has no config.json, so it is not a checkpoint; name the folder that save_pretrained wrote")
    if not any(name.endswith(".safetensors") for name in names):
        raise HubError(f"{folder} has no safetensors; load it with zoo.from_pretrained and save it again with save_pretrained")
    for name in names:
        if name.endswith(".safetensors.index.json") and (absent := {*read_index(str(folder / name)).values()} - {*names}):
            raise HubError(f"{folder} lacks {', '.join(sorted(absent))}, which {name} names; save the checkpoint again")


def read_json(path: Path):
    """What a JSON file says."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{path} is not JSON ({error}); write it again or take it out of the folder") from error

"""The tensors of a checkpoint, wherever its files lie, mapped into memory rather than loaded."""

import json
import os
import pickle
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from zoo.keys import SHOWN, State

CODE = re.compile(r"unsupported global:? (?:GLOBAL )?(\S+)", re.IGNORECASE)  # in torch's message about a pickle


def locate(path_or_id: str | os.PathLike, name: str, hub: dict) -> str | None:
    """The file of this name, downloaded if need be; None if there is none."""
    return cached_file(path_or_id, name, **hub, _raise_exceptions_for_missing_entries=False)


def read(path_or_id: str | os.PathLike, hub: dict) -> State:
    """Every tensor of a checkpoint in safetensors or pickles of tensors, whole or in shards.

    Args: hub: where to download from, of transformers' `cached_file`.
    Raises: ValueError: there is no weight file, or one is truncated, corrupt or more than tensors by name.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if single := locate(path_or_id, stem, hub):
            return Stored([single])
        if index := locate(path_or_id, stem + ".index.json", hub):
            names = read_index(index)
            stored = Stored(cached_file(path_or_id, shard, **hub) for shard in sorted(set(names.values())))
            if absent := sorted(names.keys() - stored.keys()):
                raise ValueError(f"{index} names {', '.join(absent[:SHOWN])}, which its shards do not hold; they are not of one checkpoint")
            return stored
    if single := locate(path_or_id, "model.pt", hub):
        return read_file(single)
    raise ValueError(f"{path_or_id} has neither model.safetensors nor pytorch_model.bin, whole or in shards; download its weights")


def read_gguf(path: Path) -> nn.Module:
    """The language model of transformers in a GGUF file, in float32; its config still says that it was quantised.

    Raises: ValueError: there is no such file, a tensor is missing in it, or a package that transformers needs to read it.
    """
    check_gguf(path)
    model, info = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True)
    if absent := sorted(info["missing_keys"]):
        raise ValueError(f"{path} lacks {len(absent)} tensors, such as {absent[0]}; transformers cannot read this file whole")
    return model


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with the special tokens that the file names: transformers 5.17 ends with the one that begins.

    Raises: ValueError: there is no such file, or a package is missing that is needed to read it.
    """
    check_gguf(path)
    from gguf import GGUFReader

    tokenizer, fields = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), GGUFReader(path).fields
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        token = None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))
        if token is not None:
            setattr(tokenizer, f"{name}_token", token)
            tokenizer.init_kwargs.pop(f"{name}_token_id", None)  # it would be saved beside the token
    return tokenizer


def check_gguf(path: Path) -> None:
    """Raise ValueError unless there is such a file and what reads it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a .gguf file")
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ValueError(f"reading {path.name} needs the package {package}; run: pip install {package}")


def read_index(path: str) -> dict[str, str]:
    """Key -> the shard that holds it, a file beside the index."""
    try:
        shards = json.loads(Path(path).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of shards ({error!r}); download or save it again") from error
    if outside := [shard for shard in shards.values() if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts]:
        raise ValueError(f"{path} names the shard {outside[0]}, which does not lie beside it")
    return shards


class Stored(dict):
    """The tensors of some files, mapped into memory: what is read of a file stays resident as long as any of its tensors is kept."""

    def __init__(self, paths: Iterable[str]):
        self.files = {}
        for path in paths:
            tensors = read_file(path)
            self.update(tensors)
            self.files |= dict.fromkeys(tensors, path)

    def loan(self, name: str) -> Tensor:
        """A tensor mapped once more, by itself, so that its memory goes with it."""
        if not self.files[name].endswith(".safetensors"):
            return self[name]
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def read_file(path: str) -> State:
    """The tensors of one file; of a pickle only tensors are read, and code in it is refused."""
    try:
        if not path.endswith((".bin", ".pth", ".pt")):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dictionary)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        if found := CODE.search(str(error)):
            raise ValueError(f"{path} asks for {found[1]} to be called, and is refused: a checkpoint holds tensors, not code") from error
        raise ValueError(f"{path} is truncated or corrupt ({error}); download or save it again") from error
    if isinstance(loaded, dict):
        loaded = loaded.get("model_state_dict", loaded)
        others = [f"{name} is of {type(value).__name__}" for name, value in loaded.items() if not isinstance(value, Tensor)]
    if not isinstance(loaded, dict) or others:
        held = ", ".join(others[:SHOWN]) if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise ValueError(f"{path} must hold tensors by name and nothing else: {held}; save the model's state_dict() alone")
    return loaded

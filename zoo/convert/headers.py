"""A teacher without its weights: its model on the meta device, from config.json and the headers of its safetensors files."""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from zoo.auto import model_class, raw_config
from zoo.convert.teacher import PACKAGED, check_teacher, plain_config
from zoo.foreign import with_defaults
from zoo.keys import TIED, Plan, Report, refuse
from zoo.layout import Layout, find_layout
from zoo.stored import read_index

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
LARGEST = 100 * 2**20  # bytes of a header; safetensors allows no more


@dataclass
class Blueprint:
    """A teacher as its files describe it.

    Args:
        model: one of ours on the meta device.
        layout: whose checkpoint it is.
        tensors: key of the files -> an empty tensor of its shape and dtype.
        report: what became of every key.
    """

    model: nn.Module
    layout: str
    tensors: dict[str, Tensor]
    report: Report

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def read_blueprint(folder: str) -> Blueprint:
    """Read a folder's config and headers; no weight is touched.

    Raises:
        ValueError: it is no folder of safetensors, no transformer, or its keys and shapes are not those of its config.
    """
    if folder in PACKAGED or not Path(folder, "config.json").is_file():
        raise ValueError(
            f"{folder} is no folder with a config.json; a plan reads one with safetensors files. "
            "Download the teacher, or let `init` write a GGUF one as a folder"
        )
    (model, layout), tensors = blank_teacher(folder), read_headers(Path(folder))
    if layout is None:
        tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
        blank = model.state_dict()
        refuse(f"the files of {folder} do not fit its config", blank.keys() - tensors.keys() - tied, tensors.keys() - blank.keys())
        if wrong := [name for name, tensor in tensors.items() if tensor.shape != blank[name].shape]:
            raise ValueError(f"{folder}: {wrong[0]} is {list(tensors[wrong[0]].shape)}, its config says {list(blank[wrong[0]].shape)}")
        return Blueprint(model, "zoo", tensors, Report(taken={name: name for name in tensors}))
    repeated = {name for name in tensors if name in Plan(layout, model).tied}  # whether these are equal only weights can tell
    _, report = layout.to_zoo({name: tensor for name, tensor in tensors.items() if name not in repeated}, model)
    report.dropped |= dict.fromkeys(repeated, TIED)
    return Blueprint(model, layout.name, tensors, report)


def blank_teacher(path: str) -> tuple[nn.Module, Layout | None]:
    """The teacher of a folder's or Hub id's config.json on the meta device, and the layout of its files; None: our own."""
    raw = raw_config(path, None, {})
    if str(raw.get("model_type")).startswith("zoo_"):
        layout, config = None, AutoConfig.from_pretrained(path)
    else:
        entry, layout = find_layout(raw)
        config = entry.config(**layout.config_map(with_defaults(raw, layout)))
    config = plain_config(config)
    with torch.device("meta"):
        model = model_class(config, "causal_lm")(config)
    check_teacher(model)
    return model, layout


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every key of a folder's safetensors files, whole or in shards, as an empty tensor."""
    index = folder / "model.safetensors.index.json"
    files = sorted({folder / name for name in read_index(str(index)).values()}) if index.is_file() else [folder / "model.safetensors"]
    tensors = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing; a plan reads the headers of safetensors files")
        with path.open("rb") as file:
            start = file.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST + 1
            text = file.read(size) if size <= LARGEST else b""
        try:
            header = json.loads(text)
            entries = {name: (DTYPES[entry["dtype"]], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has no readable header ({error!r}); download or save it again") from error
        tensors |= {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in entries.items()}
    return tensors


def write_headers(folder: str | os.PathLike, model: nn.Module) -> None:
    """A checkpoint of this model in bfloat16 whose file ends with its header: enough for a plan, and for nothing else."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    header, at = {}, 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            end = at + 2 * tensor.numel()
            header[name], at = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def size(tensors) -> int:
    """Bytes of some tensors."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)

"""What a run is told: flags named as TrainingArguments', from YAML files and from the command line, which wins."""

import json
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from zoo.config import nearest


@dataclass
class RunArguments(TrainingArguments):
    """transformers' own, with a line for every step."""

    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the display."})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s of one device, to tell the share that is used; known for common GPUs in bf16."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.disable_tqdm = True  # the display has a line for every step
        self.remove_unused_columns = False  # rows have none
        self.logging_nan_inf_filter = False  # which would hide losses that are not finite
        self.dataloader_pin_memory &= torch.cuda.is_available()
        self.use_cache = True  # of the config that is saved; training never uses one
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel: the loss is computed in chunks already, and the zoo's kernels are its own; leave it out")
        if self.lr_scheduler_type == "warmup_stable_decay" and "num_decay_steps" not in (self.lr_scheduler_kwargs or {}):
            raise ValueError(
                "lr_scheduler_type=warmup_stable_decay needs the steps of its decay: --lr_scheduler_kwargs '{\"num_decay_steps\": 100}'"
            )


@dataclass
class DataArguments:
    """What is learned."""

    train_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Files: .jsonl of texts, prompts and completions or chats; .bin or .npy of tokens; others are texts."},
    )
    validation_file: list[str] = field(default_factory=list, metadata={"help": "As train_file, to evaluate on (with --eval_strategy)."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset for the package datasets instead; or pydoc, the reference topics of Python's help()."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a row; a sequence never gets longer."})
    packing: bool = field(default=True, metadata={"help": "Documents share rows; they never see one another either way."})
    drop_long: bool = field(default=False, metadata={"help": "Leave out chats and completions longer than a row instead of failing."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A folder or Hub id, or bytes: every byte a token; by default that of the model."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "A file with the Jinja template of chats, saved with the tokenizer."})

    def __post_init__(self):
        if bool(self.train_file) == bool(self.dataset_name):
            raise ValueError("name what to learn: either --train_file or --dataset_name")


@dataclass
class PretrainArguments:
    """What is trained from random weights."""

    architecture: str | None = field(default=None, metadata={"help": "An architecture or preset, such as gla-340m (zoo.list_presets())."})
    model_args: str = field(default="{}", metadata={"help": "Fields of its config on top, as JSON: '{\"hidden_size\": 512}'."})


@dataclass
class FinetuneArguments:
    """What is trained further, and which part of it."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A folder or Hub id, of the zoo or in a layout that it reads."})
    lora_r: int = field(default=0, metadata={"help": "Rank of low-rank adapters; 0 trains the weights themselves."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Their scale times r; by default 2 r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before them."})
    lora_target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "What gets adapters: mixers, channel_mixers, or names of linear layers; by default all that these declare."},
    )
    merge: bool = field(default=False, metadata={"help": "Add the adapters to the weights at the end, and save the whole model."})
    learn_state: bool = field(
        default=False, metadata={"help": "Learn the states that sequences begin from; nothing else, unless --train_only says so."}
    )
    train_only: list[str] = field(default_factory=list, metadata={"help": "Parameters that are trained, as patterns: '*.mixer.*'."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Parameters that are not: 'model.embed_tokens.*'."})


def parse(kinds: tuple[type, ...], arguments: list[str] | None = None) -> tuple:
    """One object of every kind, from `--config FILE.yaml ...` and flags; a flag wins over a file, a later file over an earlier.

    Raises:
        ValueError: a file that is not there or not a mapping, or a field that no kind has.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    written: list[str] = []
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("--config needs a YAML file behind it")
        written += as_flags(Path(arguments[at + 1]), {f.name for kind in kinds for f in fields(kind) if f.init})
        del arguments[at : at + 2]
    return HfArgumentParser(kinds).parse_args_into_dataclasses(written + arguments)


def as_flags(path: Path, known: set[str]) -> list[str]:
    """A YAML mapping as the flags that say the same."""
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping, one `flag: value` a line; it is {type(content).__name__}")
    flags = []
    for name, value in content.items():
        if name not in known:
            raise ValueError(f"{path}: no flag {name!r}{nearest(name, known)}")
        if value is not None:
            flags += [f"--{name}", *map(as_word, value if isinstance(value, list) else [value])]
    return flags


def as_word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def check_output(args: TrainingArguments) -> str | None:
    """The checkpoint to continue from, if any, once the output folder is known to take one.

    Raises:
        ValueError: the folder cannot be written, holds another run, or has no such checkpoint.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}); name another folder") from error
    last = get_last_checkpoint(folder)
    if wanted is None:
        if last is not None:
            raise ValueError(
                f"{folder} holds {Path(last).name} of another run; go on with --resume_from_checkpoint last, or name another folder"
            )
        return None
    if wanted == "last":
        finished = [path for path in folder.glob("checkpoint-*") if (path / RUN).is_file()]
        if not finished:
            raise ValueError(f"{folder} has no finished checkpoint to resume from; leave --resume_from_checkpoint out")
        return str(max(finished, key=lambda path: int(path.name.split("-")[1])))
    if not (Path(wanted) / RUN).is_file():
        raise ValueError(f"{wanted} is no finished checkpoint of such a run ({RUN} is missing); name another, or last")
    return wanted


RUN = "run.json"  # written last into every checkpoint: what must be the same when it is resumed

"""A whole run: flags in, a trained model with its numbers out."""

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed
from transformers.convert_slow_tokenizer import bytes_to_unicode

from zoo.auto import from_config, from_pretrained
from zoo.convert.texts import pydoc_topics
from zoo.train.adapt import add_lora, choose_parameters, learn_states
from zoo.train.arguments import DataArguments, FinetuneArguments, PretrainArguments, RunArguments, check_output
from zoo.train.data import Rows, check_ids, documents, pieces, text_rows, token_rows
from zoo.train.display import Display, draw, summary
from zoo.train.trainer import ZooTrainer

Say = Callable[[str], None]  # gets a line at a time


def pretrain(args: RunArguments, data: DataArguments, new: PretrainArguments, say: Say) -> ZooTrainer:
    """Train an architecture from random weights; see `train`."""
    if new.architecture is None:
        raise ValueError("name what to train: --architecture gla-340m, say; zoo.list_presets() has them all")
    set_seed(args.seed)
    tokenizer = open_tokenizer(data, None)
    try:
        fields = dict(json.loads(new.model_args))
    except ValueError as error:
        raise ValueError(f"--model_args {new.model_args} is no JSON object: {error}") from error
    if tokenizer is not None:
        fields = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | fields
    return train(args, data, from_config(new.architecture, task="causal_lm", **fields), tokenizer, say)


def finetune(args: RunArguments, data: DataArguments, part: FinetuneArguments, say: Say) -> ZooTrainer:
    """Train a model further, whole or in part, or adapters of it; see `train`."""
    if part.model_name_or_path is None:
        raise ValueError("name what to train further: --model_name_or_path, a folder or Hub id")
    if part.lora_r and (part.train_only or part.freeze or part.learn_state):
        raise ValueError("adapters leave all weights as they are; give either --lora_r, or --train_only, --freeze and --learn_state")
    if part.merge and not part.lora_r:
        raise ValueError("--merge adds adapters to the weights, but there are none; give --lora_r too")
    set_seed(args.seed)
    tokenizer = open_tokenizer(data, part.model_name_or_path)
    model = from_pretrained(part.model_name_or_path, task="causal_lm", dtype=torch.float32)  # bf16 computes from float32 masters
    if part.lora_r:
        model, coverage = add_lora(model, part.lora_target_modules, r=part.lora_r, alpha=part.lora_alpha, dropout=part.lora_dropout)
        if args.process_index == 0:
            say(f"LoRA: {coverage}")
    else:
        if part.learn_state:
            learn_states(model)
        choose_parameters(model, part.train_only or ["*.start.*"] * part.learn_state, part.freeze)
    return train(args, data, model, tokenizer, say, merge=part.merge)


def train(args: RunArguments, data: DataArguments, model: nn.Module, tokenizer, say: Say, merge: bool = False) -> ZooTrainer:
    """Read the data, train, and leave in the output folder the model, its tokenizer, `losses.json` and `losses.png`.

    Args:
        merge: save the model with its adapters added to the weights, instead of the adapters.

    Returns:
        the trainer; `trainer.interrupted` tells whether there are steps left.

    Raises:
        ValueError: data, folder, checkpoint or model that do not fit; before any step is taken.
        FloatingPointError: a loss that is not finite.
    """
    checkpoint = check_output(args)
    rows, held_out = read_data(data, tokenizer, model.config.vocab_size)
    if args.eval_strategy != "no" and held_out is None:
        raise ValueError(f"eval_strategy={args.eval_strategy.value} needs text to evaluate on; name --validation_file")
    trainer = ZooTrainer(model, args, rows, held_out, tokenizer, [Display(say)])
    if merge and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("--merge needs the whole weights in one place, and they are in shards; merge the saved adapters afterwards")
    first, start, folder = trainer.is_world_process_zero(), time.monotonic(), Path(args.output_dir)
    if first:
        total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
        say(f"{total:,} parameters, {trained:,} of them trained ({100 * trained / total:.3g}%)")
        say(f"data: {rows.describe()}{'' if held_out is None else f'; held out: {held_out.describe()}'}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.interrupted and not merge:
        trainer.save_model()
    if first:
        history = trainer.state.log_history
        (folder / "losses.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
        if find_spec("matplotlib") is not None:
            draw(history, folder / "losses.png")
        if trainer.interrupted:
            say(f"interrupted after step {trainer.state.global_step}; go on with --resume_from_checkpoint last")
            return trainer
        if merge:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        say(summary(history, time.monotonic() - start, args.output_dir))
    return trainer


# -- data ----------------------------------------------------------------------------------------------------------------


def open_tokenizer(data: DataArguments, model: str | None):
    """The tokenizer that was asked for, or the model's; None where the data are tokens already and none was named."""
    name = data.tokenizer_name or model
    only_tokens = data.train_file and all(Path(file).suffix in (".bin", ".npy") for file in data.train_file)
    if name is None and not only_tokens:
        raise ValueError("text needs a tokenizer: --tokenizer_name, a folder, a Hub id, or bytes")
    if name is None or (only_tokens and data.tokenizer_name is None and not Path(name, "tokenizer_config.json").is_file()):
        return None
    tokenizer = byte_tokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    if data.chat_template is not None:
        if not Path(data.chat_template).is_file():
            raise ValueError(f"--chat_template {data.chat_template}: no such file")
        tokenizer.chat_template = Path(data.chat_template).read_text(encoding="utf-8")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte of UTF-8 is the token of its value; 256 begins and ends a document."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in bytes_to_unicode().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def read_data(data: DataArguments, tokenizer, vocab_size: int) -> tuple[Rows, Rows | None]:
    """Rows to train on, and rows held out if there are any."""
    if data.dataset_name is None:
        train, held_out = (files_rows(files, data, tokenizer, vocab_size) for files in (data.train_file, data.validation_file))
        return train, held_out
    if data.dataset_name == "pydoc":
        splits = [[(f"pydoc:{i}", "text", [(text, True)]) for i, text in enumerate(texts)] for texts in pydoc_topics()]
    else:
        splits = hub_documents(data, tokenizer)
    train, held_out = (text_rows(found, tokenizer, data.block_size, packing=data.packing, drop_long=data.drop_long) if found else None
                       for found in splits)  # fmt: skip
    for rows in filter(None, (train, held_out)):
        check_ids(rows.tokens, vocab_size, data.dataset_name)
    return train, held_out


def hub_documents(data: DataArguments, tokenizer) -> list[list]:
    """The splits train and validation (or test) of a dataset of the package datasets, its records as those of a .jsonl file."""
    if find_spec("datasets") is None:
        raise ValueError(f"--dataset_name {data.dataset_name} needs the package datasets; run: pip install datasets")
    from datasets import load_dataset

    splits = load_dataset(data.dataset_name, data.dataset_config_name)
    if "train" not in splits:
        raise ValueError(f"{data.dataset_name} has no split train, only {', '.join(splits)}; use --train_file")
    chosen = ("train", "validation" if "validation" in splits else "test")
    found = []
    for split in chosen:
        named = ((f"{data.dataset_name}/{split}:{i}", record) for i, record in enumerate(splits.get(split, ())))
        found.append([(where, *pieces(record, where, tokenizer)) for where, record in named])
    return found


def files_rows(files: list[str], data: DataArguments, tokenizer, vocab_size: int) -> Rows | None:
    """Rows of these files, all tokens (then one file) or all text; None where there are no files."""
    if not files:
        return None
    tokens = [Path(file) for file in files if Path(file).suffix in (".bin", ".npy")]
    if tokens and len(files) > 1:
        raise ValueError(f"{tokens[0]} holds tokens and must stand alone; concatenate the token files into one")
    if tokens:
        end = None if tokenizer is None or not data.packing else tokenizer.eos_token_id
        return token_rows(tokens[0], data.block_size, vocab_size, end)
    found = (document for file in files for document in documents(Path(file), tokenizer))
    try:
        rows = text_rows(found, tokenizer, data.block_size, packing=data.packing, drop_long=data.drop_long)
    except ValueError as error:
        if str(error).startswith("the data is empty"):
            raise ValueError(f"{', '.join(files)}: {error}") from error
        raise
    check_ids(rows.tokens, vocab_size, ", ".join(files))
    return rows

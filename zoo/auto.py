"""Models by name and by path."""

import os
import sys

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from zoo import registry
from zoo.config import ZooConfig
from zoo.keys import OTHER_HEAD, Report

TASKS = {
    "base": "Model",
    "causal_lm": "ForCausalLM",
    "masked_lm": "ForMaskedLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "seq2seq_lm": "ForConditionalGeneration",
}


ALONE = (".pth", ".gguf")  # a file of these stands for a whole checkpoint


def model_class(config: ZooConfig, task: str | None = None) -> type:
    """The class of `config`'s architecture for a task; by default the language model that it allows."""
    task = task or default_task(config)
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    models = registry.get(config.name).models
    if TASKS[task] not in models:
        known = ", ".join(name for name, suffix in TASKS.items() if suffix in models)
        raise ValueError(f"{config.name!r} has no model for the task {task!r}; it has {known}")
    return models[TASKS[task]]


def default_task(config: ZooConfig) -> str:
    """That of the language model which the config allows."""
    if config.is_encoder_decoder:
        return "seq2seq_lm"
    return "causal_lm" if config.causal else "masked_lm"


def from_config(name: str | ZooConfig, *, task: str | None = None, **fields):
    """A freshly initialised model.

    Args:
        name: an architecture (`"gla"`), a preset (`"gla-340m"`) or a config.
        task: causal_lm, masked_lm, sequence_classification, token_classification, question_answering or base; of an
            encoder-decoder seq2seq_lm or base.
        fields: config fields on top, when `name` is a string.
    """
    if isinstance(name, ZooConfig):
        if fields:
            raise ValueError(f"from_config got a config and also fields {sorted(fields)}; set them on the config")
        config = name
    else:
        config = registry.build_config(name, **fields)
    return model_class(config, task)(config)


def from_pretrained(path_or_id: str | os.PathLike, *, task: str | None = None, verbose: bool = False, **kwargs):
    """A model with its weights, from a folder or a Hub id.

    Args:
        path_or_id: a zoo checkpoint, or one in a foreign layout that `zoo.layouts()` lists, which is translated; or a file that
            stands alone: a `.pth` of tensors, or a `.gguf` of a language model that transformers reads and a layout knows.
        task: as in `from_config`; by default what the checkpoint was saved as.
        verbose: write to the standard output what became of every key; `output_loading_info=True` returns it with the model.
        kwargs: of transformers' `from_pretrained`: dtype, device_map, revision, token, cache_dir... For a foreign checkpoint that
            holds only what was added to a base model also `base`, the folder or Hub id of that model; or a list of it and of what
            was added before.
    """
    hub = {n: kwargs[n] for n in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if n in kwargs}
    raw = {} if str(path_or_id).endswith(ALONE) else raw_config(path_or_id, kwargs.get("base"), hub)
    if not str(raw.get("model_type")).startswith("zoo_"):
        from zoo.foreign import load_foreign  # the files of others are needed by few

        return load_foreign(path_or_id, raw, task=task, verbose=verbose, **kwargs)
    config = AutoConfig.from_pretrained(path_or_id, **hub)
    if task is None and config.architectures:
        saved = {cls.__name__: suffix for suffix, cls in registry.get(config.name).models.items()}
        suffix = saved.get(config.architectures[0])
        task = next((t for t, s in TASKS.items() if s == suffix), None)
    cls, info = model_class(config, task), kwargs.pop("output_loading_info", False)
    model, found = cls.from_pretrained(path_or_id, output_loading_info=True, **kwargs)
    if verbose:
        fresh, names = sorted(found["missing_keys"]), model.state_dict().keys()
        dropped = dict.fromkeys(sorted(found["unexpected_keys"]), OTHER_HEAD)
        report = Report({name: name for name in names if name not in fresh}, fresh=fresh, dropped=dropped)
        sys.stdout.write(f"{path_or_id}: {config.name}\n{report}\n")
    return (model, found) if info else model


def raw_config(path_or_id: str | os.PathLike, base: str | os.PathLike | list | None, hub: dict) -> dict:
    """config.json as it is written, or where there is none that of the base model; a ValueError where there is neither."""
    raw = PreTrainedConfig.get_config_dict(path_or_id, **hub)[0]
    if not raw and base is not None:
        elsewhere = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
        raw = PreTrainedConfig.get_config_dict(base[0] if isinstance(base, list) else base, **elsewhere)[0]
    if not raw:
        raise ValueError(f"{path_or_id} has no config.json; if it holds only what was added to a base model, name that model with base=")
    return raw

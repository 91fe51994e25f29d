"""Checkpoints of others, read from and written to files."""

import json
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as HEADS  # some are called ...LMHeadModel

from zoo.auto import ALONE, TASKS, model_class
from zoo.layout import Layout, State, find_layout, get_layout
from zoo.registry import ARCHITECTURES, AUTO, get
from zoo.saving import CheckpointMixin, whole_or_nothing
from zoo.stored import locate, read, read_file, read_gguf

HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
LABELS = ("id2label", "label2id", "problem_type", "dtype")  # what any config may say, whatever its architecture


def load_foreign(
    path_or_id: str | os.PathLike, config: dict, *, task: str | None = None, base: str | os.PathLike | list | None = None,
    num_labels: int | None = None, output_loading_info: bool = False, verbose: bool = False, **kwargs,
):  # fmt: skip
    """One of our models with the weights of a foreign checkpoint, which is read as it is needed and never held twice.

    Args:
        path_or_id: a folder or Hub id with safetensors or `.bin` files, sharded or not, or with a `model.pt`; or a `.pth` or `.gguf` file.
        config: its config.json, or without one the base model's; a file that stands alone has none.
        task: as in `zoo.from_config`; by default what the checkpoint was saved as.
        base: checkpoint of the model beside which this one was trained, where this one holds only what was added; in a list,
            what was added before comes behind it.
        num_labels: of the head of a classifier, where it is another than the checkpoint's.
        output_loading_info: return `(model, Report)`.
        verbose: write the report to the standard output.
        kwargs: of transformers' `from_pretrained`.

    Raises:
        ValueError: no layout knows the model type, the config asks for what we cannot express, a file is truncated, or a
            key is missing, surplus or misshapen.
    """
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    base, *before = base if isinstance(base, list) else [base]
    config, weights = opened(path_or_id, config, [] if base is None else [*before, path_or_id], hub)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "some method")
        raise ValueError(
            f"{path_or_id} is quantised with {method}; load its original, or dequantise it with that library and save it again"
        )
    entry, layout = find_layout(config)
    config = with_defaults(config, layout)
    saved = saved_task(config)
    if task not in (None, "base"):  # what the layout is told, as some models attend otherwise to another task
        config["architectures"] = [layout.classes + TASKS.get(task, "")]
    own = entry.config(**layout.config_map(config), **{name: config[name] for name in LABELS if config.get(name) is not None})
    own.num_labels = own.num_labels if num_labels is None else num_labels
    cls = model_class(own, task or saved)
    with torch.device("meta"):
        skeleton = cls(own)
    other_task = task is not None and saved is not None and task != saved
    weights = read(path_or_id, hub) if weights is None else weights
    weights = joined(weights, layout, config, base, hub)
    asked = kwargs.get("dtype", kwargs.get("torch_dtype", "auto"))
    dtype = own.dtype if asked in (None, "auto") else getattr(torch, asked, None) if isinstance(asked, str) else asked
    state, report = layout.to_zoo(weights, skeleton, other_task=other_task, dtype=dtype)
    if verbose:
        sys.stdout.write(f"{path_or_id}: {layout.name} -> {entry.name}\n{report}\n")
    # past our own from_pretrained, which would refuse what a layout declares fresh; the report has accounted for every key
    model = super(CheckpointMixin, cls).from_pretrained(None, config=own, state_dict=state, **kwargs)
    model.name_or_path = model.config.name_or_path = str(path_or_id)
    alone = str(path_or_id).endswith(ALONE)
    if model.can_generate() and not alone and locate(path_or_id, "generation_config.json", hub):
        model.generation_config = GenerationConfig.from_pretrained(path_or_id, **hub)
    return (model, report) if output_loading_info else model


def save_foreign(model, folder: str | os.PathLike, layout: str, *, max_shard_size: int | str = "5GB", delta: bool = False,
                 **fields) -> None:  # fmt: skip
    """Write `model` as its foreign library would.

    Args:
        layout: one of `zoo.layouts()` that belongs to the model's architecture.
        delta: write only what was trained beside a base model.
        fields: of the foreign config, where ours does not know them (`max_position_embeddings=8192`).

    Raises:
        ValueError: the layout is not one of this architecture, it cannot express the model's config, or it knows no delta.
    """
    table, entry = get_layout(get(model.config.name), layout), get(model.config.name)
    foreign = ({"model_type": table.model_types[0]} if table.model_types else {}) | table.config_back(model.config) | fields
    alone = table.file.endswith(".pth")
    if delta and (table.delta is None or table.delta.join is not None):
        raise ValueError(f"the layout {layout!r} cannot tell what was trained from its base model; save without delta=True")
    if alone:
        foreign = described(table.to_foreign(model.state_dict(), model))
    known = None if table.complete else config_class(foreign.get("model_type"))
    classes = known.__name__.removesuffix("Config") if known else table.classes
    if classes:
        suffix = next(suffix for suffix, cls in entry.models.items() if isinstance(model, cls))
        other = HEADS.get(foreign.get("model_type")) if known and suffix == "ForCausalLM" else None
        foreign["architectures"] = [other or classes + suffix]
    table.check_expressible(model.config, with_defaults(foreign, table))
    if table.model_types:  # other configs may hold what their library knows, and nothing else
        foreign |= {name: getattr(model.config, name) for name in LABELS if getattr(model.config, name, None) is not None}
        foreign["dtype"] = str(model.dtype).removeprefix("torch.")
    state = table.to_foreign(model.state_dict(), model)
    if delta:
        state = {name: tensor for name, tensor in state.items() if table.delta.own(name)}
    files = {name: foreign.pop(name) for name in table.beside}
    with whole_or_nothing(folder) as stage:
        if table.file.endswith(".safetensors"):
            save_torch_state_dict(state, stage, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size)
        else:
            torch.save(state, stage / table.file)
        for name, content in files.items():
            Path(stage, name).write_text(json.dumps(content, indent=4) + "\n")
        if known is not None:
            known(**{name: value for name, value in foreign.items() if name != "model_type"}).save_pretrained(stage)
        elif not alone:
            Path(stage, "config.json").write_text(json.dumps(foreign, indent=2, default=str) + "\n")
        if model.can_generate() and not alone:
            model.generation_config.save_pretrained(stage)


def opened(path_or_id: str | os.PathLike, config: dict, added: list, hub: dict) -> tuple[dict, State | None]:
    """The config by which the layout is found, and the weights if finding it takes them.

    `added`: checkpoints of what was added to a base model, the last one being this; empty where there is none.
    """
    if str(path_or_id).endswith(".pth"):
        weights = read_file(str(path_or_id))
        return described(weights), weights
    if str(path_or_id).endswith(".gguf"):
        model = read_gguf(Path(path_or_id))
        return model.config.to_dict() | {"architectures": [type(model).__name__], "quantization_config": None}, model.state_dict()
    weights = None
    if added:
        *before, last = added
        weights = {name: tensor for path in before for name, tensor in read(path, elsewhere(hub)).items()} | read(last, hub)
        config = config | {"tensors": described(weights)["tensors"]}  # the base's config does not speak of what was added
    return config | read_beside(path_or_id, config, hub), weights


def config_class(model_type: str | None) -> type | None:
    """The class transformers has for this type."""
    return CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 (its get finds nothing)


def described(state: State) -> dict:
    """What stands for the config of a file that has none: the shapes of its tensors. Such files hold language models."""
    return {"tensors": {name: list(tensor.shape) for name, tensor in state.items()}, "architectures": ["ForCausalLM"]}


def with_defaults(config: dict, layout: Layout) -> dict:
    """The config with the fields it leaves out, where the layout or transformers knows them."""
    if layout.complete is not None:
        return layout.complete(config)
    known = config_class(config.get("model_type"))
    if known is None:
        return config
    kept = {name: config[name] for name in ("architectures", *layout.beside) if name in config}
    return known.from_dict({name: value for name, value in config.items() if name not in layout.beside}).to_dict() | kept


def saved_task(config: dict) -> str | None:
    """Which of our tasks the checkpoint was saved as."""
    written = (config.get("architectures") or [""])[0]
    suffix = next((suffix for suffix in AUTO if written.endswith(suffix)), None)
    if written and written == HEADS.get(config.get("model_type")):
        suffix = "ForCausalLM"
    if written.endswith("ForPreTraining"):  # masked tokens, and a question about sentences
        suffix = "ForMaskedLM"
    return next((task for task, own in TASKS.items() if own == suffix), None)


def read_beside(path_or_id: str | os.PathLike, config: dict, hub: dict) -> dict:
    """What lies beside config.json for a layout of this model type: file name -> content."""
    every = (layout for entry in ARCHITECTURES.values() for layout in entry.layouts if config.get("model_type") in layout.model_types)
    found = {name: locate(path_or_id, name, hub) for layout in every for name in layout.beside}
    return {name: json.loads(Path(path).read_text()) for name, path in found.items() if path is not None}


def elsewhere(hub: dict) -> dict:
    """How to reach another repository than the one these arguments are of."""
    return {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}


def joined(weights: State, layout: Layout, config: dict, base: str | os.PathLike | None, hub: dict) -> State:
    """The weights with those of a base checkpoint, where they are only a part."""
    if base is not None and layout.delta is None:
        raise ValueError(f"checkpoints of the layout {layout.name!r} are whole; leave base= out")
    if base is None:
        if layout.delta is not None and all(map(layout.delta.own, weights)):
            raise ValueError(f"this {layout.name!r} checkpoint holds only what was added to a base model; name that model's with base=")
        return weights
    whole = read(base, elsewhere(hub))
    return whole | weights if layout.delta.join is None else layout.delta.join(whole, weights, config)

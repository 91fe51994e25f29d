"""Text in, text out: a language model with its tokenizer, and what it writes behind prompts."""

import os
import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from zoo.auto import ALONE, from_pretrained, raw_config
from zoo.registry import ARCHITECTURES
from zoo.stored import read_gguf_tokenizer
from zoo.world_tokenizer import WorldTokenizer


def load_language_model(
    path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None, original: bool = False, device: str = "cpu", **kwargs
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model, ready to be evaluated, and its tokenizer.

    Args:
        path: a folder or Hub id, or a file as for `zoo.from_pretrained`. What the zoo or one of `zoo.layouts()` can read becomes
            a zoo model, anything else a model of transformers.
        tokenizer: folder or Hub id of the tokenizer, where `path` has none.
        original: load with transformers' own class, also what the zoo can read.
        device: where to put it.
        kwargs: of `zoo.from_pretrained`: dtype, revision, base...

    Raises:
        ValueError: the folder does not exist, holds no model, or there is no tokenizer.
    """
    path = os.fspath(path)
    if not Path(path).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise ValueError(f"{path} does not exist; name a folder with a model, or a Hub id")
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    try:
        kind = "" if path.endswith(ALONE) else raw_config(path, kwargs.get("base"), hub).get("model_type", "")
    except OSError as error:
        raise ValueError(f"{path} is no folder here, and nothing that loads from the Hub: {error}") from error
    layouts = (layout for entry in ARCHITECTURES.values() for layout in entry.layouts)
    foreign = kind and not kind.startswith("zoo_") and all(kind not in layout.model_types for layout in layouts)
    texts = load_tokenizer(tokenizer or path, **hub if tokenizer is None else {})
    if original or foreign:
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    else:
        model = from_pretrained(path, task="causal_lm", **kwargs)
    return model.to(device).eval(), texts


def load_tokenizer(path: str | os.PathLike, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id; a ValueError where there is none."""
    file = Path(path)
    try:
        if file.suffix == ".gguf":
            return read_gguf_tokenizer(file)
        known = get_tokenizer_config(path, **hub).get("tokenizer_class")
        return (WorldTokenizer if known == WorldTokenizer.__name__ else AutoTokenizer).from_pretrained(path, **hub)
    except (OSError, ValueError) as error:  # whichever of its files is missing
        raise ValueError(f"{path} has no tokenizer that loads; name the folder or Hub id of one with tokenizer= ({error})") from error


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that a learned table of positions allows; None where there is no table."""
    names = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    if not any(re.search(r"wpe|(?<!relative_)pos", name) for name in names):
        return None
    return model.config.max_position_embeddings - getattr(model.config, "position_offset", 0)


def check_length(model: nn.Module, length: int, what: str) -> None:
    """Raise ValueError unless the model can read `length` tokens; `what` says whose length it is."""
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise ValueError(f"{what} has {length} tokens, but the model's table of positions ends at {limit}; shorten it")


def encode(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Token ids of a text, or of a conversation (`[{"role": "user", "content": ...}, ...]`) up to where the answer begins.

    Raises:
        ValueError: nothing to begin with, no chat template, or ids that the model has no embedding for.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"] or begin(tokenizer)
    elif tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; give the prompt as plain text, or take a model that was trained to chat")
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no token to begin with; write something")
    check_ids(model, ids)
    return ids


def check_ids(model: nn.Module, ids: list[int]) -> None:
    """Raise ValueError unless the model has an embedding for each token."""
    rows = model.get_input_embeddings().num_embeddings
    if max(ids, default=0) >= rows:
        raise ValueError(f"token {max(ids)} is beyond the model's vocabulary of {rows}; the tokenizer belongs to another model")


def begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token a text begins with: the one for that, else the one that ends texts, else none."""
    found = (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None)
    return list(found)[:1]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str | list[dict]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch: int = 8,
    streamer=None,
    **options,
) -> list[str]:
    """What the model writes behind each prompt, without the prompt.

    Args:
        prompts: texts, or conversations as for `encode`.
        temperature: 0 is greedy; then top_k and top_p must be None. Without them sampling is from the whole distribution.
        batch: prompts at a time, padded on the left.
        streamer: of transformers; only with a single prompt.
        options: further ones of `generate`: repetition_penalty, num_beams, stop_strings...

    Raises:
        ValueError: no prompt, an empty one, a negative temperature, or more tokens than the model has positions for.
    """
    if temperature < 0 or (temperature == 0 and (top_k, top_p) != (None, None)):
        raise ValueError(f"temperature={temperature}: it must be positive to sample (top_k, top_p), or 0 to be greedy")
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    rows = [encode(model, tokenizer, prompt) for prompt in prompts]
    check_length(model, max(map(len, rows)) + max_new_tokens, "the longest prompt with its continuation")
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    chosen = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    options |= chosen if temperature else dict.fromkeys(chosen)  # None also where the checkpoint says how to sample
    written = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in some], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some], device=model.device)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=temperature > 0, pad_token_id=pad, eos_token_id=end,
            streamer=streamer, **options,
        )  # fmt: skip
        written += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return written

"""BERT and RoBERTa made long: the same encoder as a Longformer, whose attention sees a window and a few global tokens.

Rows of the position table are laid end to end until there are enough, and the projections of global tokens begin as copies of
the others (Longformer, arXiv:2004.05150, section 5). Until a text is longer than one side of the window the result computes
what the encoder did; beyond that it wants further training on long texts.
"""

import os
import re

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, LongformerConfig
from transformers.configuration_utils import PreTrainedConfig

from zoo.keys import SHOWN, State, nearest
from zoo.saving import whole_or_nothing
from zoo.stored import locate, read

TABLE = "embeddings.position_embeddings.weight"
PROJECTION = re.compile(r"(.*\.attention\.self\.(?:query|key|value))\.(weight|bias)")
SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "id2label", "label2id",
)  # fmt: skip
HEADS = ("Model", "ForMaskedLM", "ForTokenClassification")
TASKS = {  # model type -> ending of the class it was saved as -> that of the Longformer's
    "bert": {head: head for head in HEADS} | {"ForPreTraining": "ForMaskedLM"},
    "roberta": {head: head for head in (*HEADS, "ForSequenceClassification")},
}
RENAMED = (  # old endings, then beginnings of the keys of BERT's head
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^cls\.predictions\.", "lm_head."),
)
LEFT_OUT = r"(.*embeddings\.(position_ids|token_type_ids)|cls\.seq_relationship\..*)"  # counts, and a question about sentences
POOLER = r"(.*\.)?pooler\.dense\.(weight|bias)"  # read by that question, and by nobody where there is another head


def lengthen(source: str | os.PathLike, folder: str | os.PathLike, *, window: int = 512, positions: int = 4096, firsts: int = 1) -> None:
    """Write a BERT or RoBERTa as a Longformer, in the layout that transformers and `zoo.from_pretrained` read.

    Args:
        source: a folder or Hub id; its tokenizer, where there is one, comes along.
        folder: appears once everything is written.
        window: neighbours that a token sees on both sides together.
        positions: tokens of the longest text.
        firsts: first tokens that are global. transformers wants them in its own `global_attention_mask`; ours reads this.

    Raises:
        ValueError: another kind of model or head, no more positions than before, an odd window, or a key that fits nowhere.
    """
    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind not in TASKS:
        raise ValueError(f"{source} is of model_type {kind!r}; only {' and '.join(TASKS)} can be made a Longformer")
    config = AutoConfig.from_pretrained(source)
    if window < 2 or window % 2:
        raise ValueError(f"window={window} must be even and at least 2, half of it on either side")
    wanted = longformer_config(config, window, positions, firsts)
    state = longformer_state(read(source, {}), config, wanted)
    with whole_or_nothing(folder) as stage:
        save_torch_state_dict(state, stage)
        wanted.save_pretrained(stage)
        if locate(source, "tokenizer_config.json", {}) or locate(source, "tokenizer.json", {}):
            tokenizer = AutoTokenizer.from_pretrained(source)
            tokenizer.model_max_length = positions
            tokenizer.save_pretrained(stage)


def longformer_config(config: PreTrainedConfig, window: int, positions: int, firsts: int) -> LongformerConfig:
    """The config of the Longformer. Its positions count from the row behind that of padding, as RoBERTa's do."""
    saved = (config.architectures or ["Model"])[0]
    head = next((own for theirs, own in TASKS[config.model_type].items() if saved.endswith(theirs)), None)
    if head is None:
        raise ValueError(f"a {saved} has no counterpart among Longformers; load and save its body alone first")
    if getattr(config, "position_embedding_type", "absolute") != "absolute" or config.is_decoder or config.add_cross_attention:
        raise ValueError("only encoders with absolute positions can be made a Longformer")
    if config.pad_token_id is None:
        raise ValueError("the config has no pad_token_id, from which positions are counted; set it")
    known = config.max_position_embeddings - first_row(config)
    if positions <= known:
        raise ValueError(f"positions={positions} is no more than the {known} there are; ask for more, or keep the model")
    return LongformerConfig(
        **{name: getattr(config, name) for name in SAME}, architectures=[f"Longformer{head}"],
        attention_window=[window] * config.num_hidden_layers, max_position_embeddings=positions + config.pad_token_id + 1,
        num_global_tokens=firsts,
    )  # fmt: skip


def first_row(config: PreTrainedConfig) -> int:
    """The row of the position table for the first token."""
    return config.pad_token_id + 1 if config.model_type == "roberta" else 0


def longformer_state(state: State, config: PreTrainedConfig, wanted: LongformerConfig) -> State:
    """The Longformer's tensors. Every one of the encoder has a place in it, or a reason to have none."""
    result: dict[str, Tensor] = {}
    headed = not wanted.architectures[0].endswith("Model")
    for name, tensor in state.items():
        if re.fullmatch(LEFT_OUT, name) or (headed and re.fullmatch(POOLER, name)):
            continue
        own = re.sub(rf"^{config.model_type}\.", "longformer.", name)
        for old, new in RENAMED:
            own = re.sub(old, new, own)
        if own.endswith(TABLE):
            tensor = longer_table(tensor, first_row(config), wanted)
        result[own] = tensor
        if part := PROJECTION.fullmatch(own):
            result[f"{part[1]}_global.{part[2]}"] = tensor.clone()
    check(result, wanted)
    return result


def longer_table(table: Tensor, first: int, wanted: LongformerConfig) -> Tensor:
    """The rows from `first` on over and over, behind as many rows as padding takes up."""
    rows = wanted.max_position_embeddings - wanted.pad_token_id - 1
    known = table[first:]
    before = table[:first] if first else table.new_zeros(wanted.pad_token_id + 1, table.shape[1])
    return torch.cat([before, known.repeat(-(-rows // len(known)), 1)[:rows]])


def check(state: State, wanted: LongformerConfig) -> None:
    """Raise ValueError unless these are the tensors of the model that the config describes."""
    with torch.device("meta"):
        model = getattr(transformers, wanted.architectures[0])(wanted)
    tied = set(model.all_tied_weights_keys) if wanted.tie_word_embeddings else set()
    needed = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith("position_ids")}
    bare = {name.removeprefix("longformer."): name for name in state}
    found = {name: state[bare.get(name, name)] for name in needed if name in bare or name in state}
    absent = sorted(needed.keys() - found.keys() - tied)
    surplus = sorted(set(state) - {bare.get(name, name) for name in found})
    if absent or surplus:
        hints = [name + nearest(name, surplus) for name in absent[:SHOWN]]
        raise ValueError(f"the checkpoint does not fit its config.json: missing {', '.join(hints) or 'none'}; unknown {surplus[:SHOWN]}")
    if bad := [name for name, tensor in found.items() if tensor.shape != needed[name]]:
        raise ValueError(f"{bad[0]} is {list(found[bad[0]].shape)} in the checkpoint, its config.json says {list(needed[bad[0]])}")

"""The files of foreign checkpoints: where they are loaded to, what is reported, and damage that is named."""

import errno
import json
import os
import pickle
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo.evaluate.parity import close
from zoo.evaluate.trial import find, make_trial
from zoo.generate import load_tokenizer
from zoo.keys import Report


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of transformers, saved by it, and ours."""
    return make_trial(find("llama"), "plain", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of its folder, to be damaged."""
    return shutil.copytree(tiny.folder, tmp_path / "copy")


def sharded(folder, tiny) -> dict:
    """Make several shards of the weights; their index."""
    (folder / "model.safetensors").unlink()
    tiny.theirs.save_pretrained(folder, max_shard_size="20KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())


def pickled(folder, content) -> None:
    """Put `content` in place of the weights."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": "disk"}])
def test_a_device_map_places_the_weights(tiny, tmp_path, device_map):
    ids = tiny.tokens(1, 9)
    model = zoo.from_pretrained(tiny.folder, device_map=device_map, offload_folder=tmp_path, dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == ({"meta"} if device_map == {"": "disk"} else {"cpu"})
    assert torch.equal(model(ids).logits, zoo.from_pretrained(tiny.folder, dtype=torch.bfloat16)(ids).logits)


def test_on_the_meta_device_nothing_is_held(tiny):
    model = zoo.from_pretrained(tiny.folder, device_map="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


def test_verbose_says_what_became_of_every_key(tiny, tmp_path, capsys):
    zoo.from_pretrained(tiny.folder, verbose=True, task="sequence_classification", num_labels=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny.folder}: llama -> transformer"
    assert lines[1].startswith("20 tensors as they were: model.embed_tokens.weight, ") and lines[1].endswith(" and 16 more")
    assert lines[2:] == ["1 start untrained: score.weight", "1 not needed, head of another task: lm_head.weight"]
    tiny.ours.save_pretrained(tmp_path / "own")
    zoo.from_pretrained(tmp_path / "own", verbose=True)
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path / 'own'}: transformer"
    assert str(Report(transformed={"a": ["b", "c"]})) == "1 made from 2 others: a"


def write_gguf(path, model, quantise: bool = False, complete: bool = True) -> None:
    """A Llama as llama.cpp stores it: its own names, and the rows of q and k in pairs; matrices in blocks of 8 bits if asked for."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for which, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if which in name:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        array, kind = tensor.contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0
        blocks = quantise and array.ndim == 2 and not array.shape[1] % 32
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(
            new if complete else new + "x", gguf.quants.quantize(array, kind) if blocks else array, raw_dtype=kind if blocks else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
@pytest.mark.parametrize("quantise", [False, True])
def test_a_gguf_file_is_read_as_transformers_reads_it(tiny, tmp_path, quantise):
    path, ids = tmp_path / "tiny.gguf", tiny.tokens(2, 17)
    write_gguf(path, tiny.theirs, quantise)
    ours, report = zoo.from_pretrained(path, output_loading_info=True)
    assert type(ours).__name__ == "TransformerForCausalLM" and len(report.taken) == 21 and not report.dropped
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    close(ours(ids).logits, theirs(ids).logits, "logits")
    error = (ours(ids).logits - tiny.ours(ids).logits).abs().max()
    assert error > 1e-3 if quantise else error < 1e-5


def test_a_gguf_tokenizer_ends_with_the_token_that_the_file_names(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "words.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<begin>", "<end>", "<fill>", "<unknown>", "na", "ve"])
    writer.add_token_merges(["n a", "v e"])
    for add, token in (("bos", 256), ("eos", 257), ("pad", 258), ("unk", 259)):
        getattr(writer, f"add_{add}_token_id")(token)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = load_tokenizer(tmp_path / "words.gguf")
    read.save_pretrained(tmp_path)
    for tokenizer in (read, AutoTokenizer.from_pretrained(tmp_path)):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
        assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "naïve"


def test_a_gguf_file_that_is_not_there_or_not_whole(tiny, tmp_path):
    write_gguf(tmp_path / "part.gguf", tiny.theirs, complete=False)
    for name, message in (("none", "does not exist"), ("part", r"lacks 21 tensors, such as lm_head\.weight")):
        with pytest.raises(ValueError, match=rf"{name}\.gguf {message}"):
            zoo.from_pretrained(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "lama"}, ["no layout", "'lama'", "did you mean 'llama'", "looked at", "hidden_act", "known"]),
        ({"model_type": None}, ["no layout", "model_type None", "looked at"]),
        ({"hidden_size": 64}, ["[97, 32] in the checkpoint", "[97, 64] in the model its config.json describes"]),
        ({"num_hidden_layers": 3}, ["missing 9", "model.layers.2.input_layernorm.weight"]),
        ({"num_hidden_layers": 1}, ["unknown 9", "model.layers.1.input_layernorm.weight"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight is tied", "differs"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised with gptq"]),
    ],
)
def test_a_config_that_contradicts_the_weights(folder, changes, words):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, words)


def refused(folder, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        zoo.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


class Code:
    """What a pickle must not do."""

    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda state: {"weight": Code()}, [f"{os.mkdir.__module__}.mkdir", "is refused"]),
        (lambda state: {"model": state, "step": 3}, ["model is of", "step is of int", "state_dict() alone"]),
        (lambda state: list(state.values()), ["a list"]),
        (lambda state: state | {"model.norm.weight": 3}, ["model.norm.weight is of int"]),
        (lambda state: state | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, ["torch.int8", "quantised"]),
        (lambda state: state | {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, ["torch.float8_e4m3fn", "quantised"]),
    ],
)
def test_a_pickle_of_more_than_tensors(tiny, folder, monkeypatch, content, words):
    monkeypatch.chdir(folder)
    pickled(folder, content(dict(tiny.theirs.state_dict())))
    refused(folder, [*words, "model.norm.weight" if "quantised" in words else "pytorch_model.bin"])
    assert not (folder / "made by a pickle").exists()


def test_what_is_no_file_of_torch(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps("no tensors", protocol=2))
    refused(folder, ["pytorch_model.bin", "truncated or corrupt"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda index: {}, ["model.safetensors.index.json", "not an index of shards"]),
        (lambda index: index | {"weight_map": index["weight_map"] | {"x": "y"}}, ["y"]),
        (
            lambda index: index | {"weight_map": index["weight_map"] | {"x": next(iter(index["weight_map"].values()))}},
            ["index.json names x", "do not hold"],
        ),
        (
            lambda index: index | {"weight_map": {name: f"../{shard}" for name, shard in index["weight_map"].items()}},
            ["names the shard ../model-0000", "does not lie beside it"],
        ),
    ],
)
def test_an_index_that_does_not_fit(tiny, folder, change, words):
    index = sharded(folder, tiny)
    (folder / "model.safetensors.index.json").write_text(json.dumps(change(index)))
    with pytest.raises((ValueError, OSError)) as caught:
        zoo.from_pretrained(folder)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_shard_of_another_checkpoint(tiny, folder):
    shard = folder / sharded(folder, tiny)["weight_map"]["model.norm.weight"]
    save_file({name + "x": tensor for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    refused(folder, ["model.norm.weight", "do not hold"])


@pytest.mark.parametrize("layout", ["llama", "rwkv4-pth"])
def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path, monkeypatch, layout):
    model, folder = zoo.from_config(f"{zoo.layouts()[layout]}-tiny"), tmp_path / "model"
    model.save_pretrained(folder, layout=layout)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = []

    def full(content, path, *args, **kwargs):
        written.append(path)
        with open(path, "wb") as file:
            file.write(b"half")
        if layout != "llama" or len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder, layout=layout, **({"max_shard_size": "20KB"} if layout == "llama" else {}))
    assert written and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the unfinished folder was left behind"

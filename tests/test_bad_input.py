"""Bad input gets an error that names the thing and the remedy, and nothing is lost."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import zoo
from zoo import ops
from zoo.block import Block
from zoo.config import ZooConfig
from zoo.models import GLAConfig, GLAForCausalLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    return zoo.from_config("gla-tiny").eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: GLAConfig(num_head=4), ["num_head", "num_heads"]),
        (lambda: GLAConfig(num_heads="four"), ["num_heads", "int"]),
        (lambda: GLAConfig(hidden_size=0), ["hidden_size", "positive"]),
        (lambda: GLAConfig(norm="batchnorm"), ["batchnorm", "rmsnorm"]),
        (lambda: zoo.from_config("glaa"), ["glaa", "gla"]),
        (lambda: zoo.from_config("gla-tinny"), ["tinny", "tiny"]),
        (lambda: zoo.from_config("gla-tiny", num_heads=5), ["num_heads=5", "divisible"]),
        (lambda: zoo.from_config("gla-tiny", channel_mixer="swigl"), ["swigl", "swiglu"]),
        (lambda: zoo.from_config("gla-tiny", channel_args={"actt": "relu"}), ["actt"]),
        (lambda: zoo.from_config("gla-tiny", task="translation"), ["translation", "causal_lm"]),
        (lambda: zoo.from_config("nemotron_h-tiny", pattern="M-"), ["'M-'", "num_hidden_layers=4"]),
        (lambda: zoo.from_config("nemotron_h-tiny", pattern="Mx*-"), ["'Mx*-'", "M, *, -, E"]),
        (lambda: zoo.from_config("zamba2-tiny", attention_layers=[2, 1]), ["attention_layers=[2, 1]"]),
        (
            lambda: zoo.from_config(
                "hybrid-tiny", num_hidden_layers=2, plan=["transformer", {"mixer": "zamba2", "attention_layers": [0, 1]}]
            ),
            ["layer 1", "layer 0", "attention_layers"],
        ),
        (lambda: Block(ZooConfig(channel_mixer=None), 3), ["layer 3", "channel mixer"]),
        (lambda: zoo.from_config("gla-tiny", causal=False), ["causal"]),
        (lambda: zoo.from_config("gla-tiny", max_position_embeddings=4, position_offset=4), ["position_offset=4", "row"]),
        (lambda: zoo.from_config("gla-tiny", position_offset=1), ["position_offset=1", "max_position_embeddings=None"]),
        (lambda: zoo.from_config("gla-tiny", token_types=-1), ["token_types", "negative"]),
        (lambda: zoo.from_config("longformer-tiny", first_norm=False), ["post_norm", "first_norm=True"]),
        (lambda: zoo.from_config("longformer-tiny", head_args={"act": "gellu"}), ["gellu", "gelu"]),
        (lambda: zoo.from_config("hybrid-tiny", num_hidden_layers=2, plan=["gla"] * 3), ["3 entries", "num_hidden_layers=2"]),
        (lambda: zoo.from_config("hybrid-tiny", num_hidden_layers=2, plan=["gla"]), ["1 entries", "num_hidden_layers=2"]),
        (lambda: zoo.from_config("hybrid-tiny", num_hidden_layers=2, plan=["gla", "glaa"]), ["glaa", "gla"]),
        (
            lambda: zoo.from_config("hybrid-tiny", num_hidden_layers=2, plan=["gla", {"mixer": "gla", "num_head": 2}]),
            ["entry 1", "num_head", "num_heads"],
        ),
        (lambda: zoo.from_config("hybrid-tiny", num_hidden_layers=2, plan=["gla", {"num_heads": 2}]), ["entry 1", "mixer"]),
        (lambda: zoo.from_config("hybrid-tiny", num_hidden_layers=2, plan=["gla", "hybrid"]), ["hybrid", "no mixer"]),
    ],
)
def test_wrong_names_and_sizes(build, words):
    with pytest.raises((ValueError, TypeError, StrictDataclassError)) as caught:
        build()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


def test_wrong_tensors(model):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"k is torch.float64 but q is torch.float32"):
        ops.linear_attention(q, q.double(), q)
    with pytest.raises(ValueError, match=r"k is on meta"):
        ops.linear_attention(q, q.to("meta"), q)
    with pytest.raises(ValueError, match="log_decay is"):
        ops.linear_attention(q, q, q, torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match=r"state is torch\.bfloat16"):
        ops.linear_attention(q, q, q, state=torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="does not divide"):
        ops.linear_attention(q, torch.randn(1, 4, 3, 8), q)
    with pytest.raises(ValueError, match="empty"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="attention_mask is"):
        model(torch.ones(2, 5, dtype=torch.long), attention_mask=torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"DynamicCache.*ZooCache"):
        model(torch.ones(1, 5, dtype=torch.long), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="one row"):
        model(torch.ones(2, 5, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"restart at 0"):
        model(torch.ones(1, 5, dtype=torch.long), position_ids=torch.tensor([[3, 4, 5, 6, 7]]))
    cache = model(torch.ones(1, 5, dtype=torch.long)).past_key_values
    with pytest.raises(ValueError, match="cache"):
        model(torch.ones(1, 5, dtype=torch.long), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 5]))


def test_a_sequence_longer_than_the_position_table():
    model = zoo.from_config("gla-tiny", max_position_embeddings=8)
    cache = model(torch.ones(1, 8, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"9 tokens exceeds max_position_embeddings=8"):
        model(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"9 tokens exceeds max_position_embeddings=8"):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    model = zoo.from_config("gla-tiny", max_position_embeddings=8, position_offset=2)
    with pytest.raises(ValueError, match=r"7 tokens exceeds max_position_embeddings=8 behind position_offset=2"):
        model(torch.ones(1, 7, dtype=torch.long))


def test_token_types_of_another_shape_or_without_a_table(model):
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="no token types"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"token_type_ids is \[1, 5\], expected \[2, 5\]"):
        zoo.from_config("gla-tiny", token_types=2)(ids, token_type_ids=torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("model.layers.1.mixer.q_proj.weight"), ["missing", "model.layers.1.mixer.q_proj.weight"]),
        (lambda t: t.update({"model.layers.1.mixer.r_proj.weight": torch.zeros(2)}), ["r_proj", "did you mean"]),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), ["model.norm.weight", "[7]", "[32]"]),
    ],
)
def test_a_checkpoint_that_does_not_fit(saved, change, words):
    rewrite(saved, change)
    for load in (zoo.from_pretrained, AutoModelForCausalLM.from_pretrained, GLAForCausalLM.from_pretrained):
        with pytest.raises(ValueError) as caught:
            load(saved)
        for word in words:
            assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


def test_another_tasks_head_is_no_error(saved):
    classifier = zoo.from_pretrained(saved, task="sequence_classification", num_labels=3)
    assert classifier.score.weight.shape == (3, 32)


@pytest.mark.parametrize("keep", [0.5, 0.0005])
def test_a_truncated_file(saved, keep):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        zoo.from_pretrained(saved)


def test_an_interrupted_save_leaves_the_old_checkpoint(model, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    import transformers.modeling_utils as modeling

    def interrupted(tensors, filename, **kwargs):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(modeling, "safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"], "the unfinished folder was left behind"


def test_saving_again_replaces_the_weights_and_nothing_else(model, saved):
    (saved / "notes.txt").write_text("mine")
    model.save_pretrained(saved, max_shard_size="20KB")
    assert (saved / "notes.txt").read_text() == "mine"
    assert not (saved / "model.safetensors").exists() and (saved / "model.safetensors.index.json").exists()
    ids = torch.ones(1, 4, dtype=torch.long)
    assert torch.equal(zoo.from_pretrained(saved)(ids).logits, model(ids).logits)
    model.save_pretrained(saved)
    assert not list(saved.glob("model-*.safetensors")) and not (saved / "model.safetensors.index.json").exists()


def test_a_config_of_another_version(saved):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate_ranks": 3}))
    with pytest.raises(ValueError, match=r"gate_ranks.*gate_rank"):
        zoo.from_pretrained(saved)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="fast"), ops.use_backend("fast"):
        pass

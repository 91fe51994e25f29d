"""BERT and RoBERTa as Longformers: the same function within one side of the window, in our class and in transformers'."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import zoo
from zoo.convert.lengthen import lengthen
from zoo.evaluate.closeness import assert_close

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52,
    "type_vocab_size": 2, "max_position_embeddings": 34, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SOURCES = {
    "bert": ("BertModel", {}),
    "bert-masked": ("BertForMaskedLM", {"hidden_act": "gelu"}),
    "bert-untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
    "bert-pretraining": ("BertForPreTraining", {}),
    "bert-tokens": ("BertForTokenClassification", {"num_labels": 5}),
    "roberta": ("RobertaModel", {"pad_token_id": 1}),
    "roberta-masked": ("RobertaForMaskedLM", {"pad_token_id": 1}),
    "roberta-sequences": ("RobertaForSequenceClassification", {"pad_token_id": 1, "num_labels": 3}),
}


def saved(name: str, folder) -> torch.nn.Module:
    kind, fields = SOURCES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind.split("For")[0].removesuffix("Model") + "Config")(**SIZES | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def answer(model, ids, **inputs):
    with torch.no_grad():
        out = model(ids, **inputs)
    return next(out[name] for name in ("logits", "prediction_logits", "last_hidden_state") if name in out)


@pytest.mark.parametrize("firsts", [0, 1])
@pytest.mark.parametrize("name", SOURCES)
def test_same_function_while_short(name, firsts, tmp_path):
    source = saved(name, tmp_path / "short")
    lengthen(tmp_path / "short", tmp_path / "long", window=24, positions=100, firsts=firsts)
    ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(1))
    plain, exact = answer(source, ids), answer(source.double(), ids)
    own, info = zoo.from_pretrained(tmp_path / "long", output_loading_info=True)
    assert not info.fresh, f"untrained: {info.fresh}"
    assert_close(answer(own.eval(), ids), plain, exact, "ours")
    kind = transformers.AutoConfig.from_pretrained(tmp_path / "long").architectures[0]
    theirs, loading = getattr(transformers, kind).from_pretrained(tmp_path / "long", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    marks = torch.zeros_like(ids)
    marks[:, :firsts] = 1
    assert_close(answer(theirs.eval(), ids, global_attention_mask=marks), plain, exact, "transformers'")


@pytest.mark.parametrize("name", ["bert", "roberta-masked"])
def test_positions_repeat(name, tmp_path):
    source = saved(name, tmp_path / "short")
    lengthen(tmp_path / "short", tmp_path / "long", window=8, positions=100)
    first, offset = (0, 1) if name == "bert" else (2, 2)
    table = next(x for key, x in source.state_dict().items() if key.endswith("position_embeddings.weight"))[first:]
    model = zoo.from_pretrained(tmp_path / "long", task="base")
    for position in (0, 1, len(table) - 1, len(table), 99):
        assert torch.equal(model.embed_positions.weight[offset + position], table[position % len(table)])
    assert torch.isfinite(answer(model.eval(), torch.full((1, 100), 7))).all()
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.full((1, 101), 7))


def test_old_names_of_norms(tmp_path):
    """As the first checkpoints of BERT have them."""
    source = saved("bert-masked", tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    names = {"weight": "gamma", "bias": "beta"}
    old = {}
    for name, tensor in load_file(file).items():
        stem, _, last = name.rpartition(".")
        old[f"{stem}.{names[last]}" if stem.endswith("LayerNorm") else name] = tensor
    assert any(name.endswith("gamma") for name in old)
    save_file(old, file, metadata={"format": "pt"})
    lengthen(tmp_path / "short", tmp_path / "long", window=24, positions=100)
    ids = torch.arange(3, 16).unsqueeze(0)
    own = zoo.from_pretrained(tmp_path / "long").eval()
    assert_close(answer(own, ids), answer(source, ids), answer(source.double(), ids), "old names")


def test_says_what_it_cannot_do(tmp_path):
    saved("bert", tmp_path / "short")
    for fields, word in (({"window": 7}, "window"), ({"positions": 34}, "positions")):
        with pytest.raises(ValueError, match=word):
            lengthen(tmp_path / "short", tmp_path / "long", **fields)
    sizes = transformers.BertConfig(**SIZES)
    transformers.BertForSequenceClassification(sizes).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="BertForSequenceClassification"):
        lengthen(tmp_path / "classifier", tmp_path / "long")
    transformers.GPT2Config().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="gpt2"):
        lengthen(tmp_path / "other", tmp_path / "long")
    file = tmp_path / "short" / "model.safetensors"
    state = load_file(file)
    state["encoder.layer.0.attention.self.extra.weight"] = state.pop("encoder.layer.0.attention.self.key.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="extra"):
        lengthen(tmp_path / "short", tmp_path / "long")
    assert not (tmp_path / "long").exists()

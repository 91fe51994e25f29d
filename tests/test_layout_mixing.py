"""Foreign encoders that mix by landmarks, Fourier transforms or windows, beyond what their trials say."""

import json

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import zoo
from zoo.evaluate.parity import close
from zoo.evaluate.trial import SIZES, push


def foreign(kind: str, suffix: str, **fields):
    """A tiny model of transformers, with no parameter at a special value."""
    known = CONFIG_MAPPING[kind].__dataclass_fields__.keys()
    config = CONFIG_MAPPING[kind](**{name: value for name, value in SIZES.items() if name in known} | fields)
    torch.manual_seed(0)
    model = getattr(transformers, type(config).__name__.removesuffix("Config") + suffix)(config).eval()
    push(model, [])
    return model


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("landmarks", [6, 8, 24])
def test_landmarks_equal_those_of_transformers(landmarks, tmp_path):
    """At the one length it takes, and in batches of one: it begins its iteration at a maximum over the batch."""
    theirs = foreign("nystromformer", "ForMaskedLM", num_landmarks=landmarks, segment_means_seq_len=48, max_position_embeddings=48)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = zoo.from_pretrained(tmp_path / "theirs"), token_ids(3, 48)
    assert ours.config.num_landmarks == landmarks
    with torch.no_grad():
        expected = torch.cat([theirs(row).logits for row in ids.split(1)])
        close(ours(ids).logits, expected, "logits")
        exactly = zoo.from_pretrained(tmp_path / "theirs")
        for layer in exactly.model.layers:
            layer.mixer.landmarks = None
        assert (exactly(ids).logits - expected).abs().max() > 1e-3, "the landmarks make no difference"
    for model in (theirs, ours):
        model(ids[:1]).logits.square().mean().backward()
    found = ours.model.layers[0].mixer.k_proj.weight.grad
    expected = theirs.nystromformer.encoder.layer[0].attention.self.key.weight.grad
    close(found / expected.abs().max(), expected / expected.abs().max(), "gradient of the keys")
    ours.save_pretrained(tmp_path / "back", layout="nystromformer")
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert {name: new[name] for name in ("num_landmarks", "segment_means_seq_len", "max_position_embeddings")} == {
        name: old[name] for name in ("num_landmarks", "segment_means_seq_len", "max_position_embeddings")
    }
    again = type(theirs).from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.state_dict().items())


def test_an_fnet_from_pretraining_leaves_one_head_behind(tmp_path):
    theirs = foreign("fnet", "ForPreTraining")
    theirs.save_pretrained(tmp_path)
    ours, report = zoo.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(report.dropped) == ["cls.seq_relationship.bias", "cls.seq_relationship.weight"]
    ids = token_ids(2, 19)
    types = ids % 4
    with torch.no_grad():
        close(ours(ids, token_type_ids=types).logits, theirs(ids, token_type_ids=types).prediction_logits, "logits")
        body = zoo.from_pretrained(tmp_path, task="base")
        close(body(ids).pooler_output, theirs.fnet(ids).pooler_output, "pooled")


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_a_pretrained_modernbert_keeps_its_transform_for_another_task(task, tmp_path):
    theirs = foreign("modernbert", "ForMaskedLM", cls_token_id=1, sep_token_id=2, classifier_pooling="mean")
    theirs.save_pretrained(tmp_path)
    ours, report = zoo.from_pretrained(tmp_path, task=task, output_loading_info=True)
    assert sorted(report.fresh) == ["score.bias", "score.weight"]
    assert torch.equal(ours.classifier.dense.weight, theirs.head.dense.weight)
    assert ours.config.classifier_mean


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("modernbert", {"decoder_bias": False}, "decoder_bias"),
        ("modernbert", {"hidden_activation": "swiglu"}, "swiglu"),
        (
            "modernbert",
            {"rope_parameters": {kind: {"rope_type": "linear", "factor": 2.0} for kind in ("full_attention", "sliding_attention")}},
            "local layers",
        ),
        ("nystromformer", {"inv_coeff_init_option": True}, "inv_coeff_init_option"),
        ("nystromformer", {"add_cross_attention": True}, "add_cross_attention"),
        ("nystromformer", {"num_landmarks": 7}, "num_landmarks=7 needs a multiple"),
        ("nystromformer", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("nystromformer", {"conv_kernel_size": 4}, "conv_kernel=4 must be an odd number"),
        ("fnet", {"use_tpu_fourier_optimizations": True}, "use_tpu_fourier_optimizations"),
        ("fnet", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)
def test_what_we_cannot_express_is_refused(kind, changes, message, tmp_path):
    config = CONFIG_MAPPING[kind](vocab_size=97, architectures=[CONFIG_MAPPING[kind].__name__.removesuffix("Config") + "ForMaskedLM"])
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(Exception, match=message) as caught:
        zoo.from_pretrained(tmp_path)
    assert isinstance(caught.value, ValueError) or "Validation" in type(caught.value).__name__


@pytest.mark.parametrize(
    "name, fields, layout, message",
    [
        ("modernbert", {"embedding_norm": False, "first_norm": True}, "modernbert", "first_norm"),
        ("fnet", {"embedding_projection": False}, "fnet", "embedding_projection"),
        ("nystromformer", {"position_offset": 0}, "nystromformer", "position_offset=0"),
    ],
)
def test_what_they_cannot_express_is_refused(name, fields, layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        zoo.from_config(f"{name}-tiny", **fields).save_pretrained(tmp_path / "out", layout=layout)

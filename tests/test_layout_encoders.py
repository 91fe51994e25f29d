"""Foreign encoders, beyond what their trials say: token types, poolers, tokens that attend globally, decoders of their own."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import zoo
from zoo.evaluate.parity import SIZES, close

FIELDS = {
    "longformer": {"attention_window": 4},
}
every_kind = pytest.mark.parametrize("kind", FIELDS)


def pushed(model):
    """The model, with no parameter at a special value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def foreign(kind: str, suffix: str, **fields):
    """A tiny model of transformers."""
    known = CONFIG_MAPPING[kind].__dataclass_fields__.keys()
    config = CONFIG_MAPPING[kind](**{name: value for name, value in SIZES.items() if name in known} | FIELDS[kind] | fields)
    torch.manual_seed(0)
    model = getattr(transformers, type(config).__name__.removesuffix("Config") + suffix)(config).eval()
    return pushed(model)


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


@every_kind
@torch.no_grad()
def test_token_types_and_poolers(kind, tmp_path):
    theirs = foreign(kind, "Model")
    theirs.save_pretrained(tmp_path)
    ours, ids = zoo.from_pretrained(tmp_path, task="base"), token_ids(3, 19)
    types = (ids > 40).long()
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    ids = ids.masked_fill(mask == 0, SIZES["pad_token_id"])
    given = {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}
    expected, result = theirs(**given), ours(**given)
    close(result.last_hidden_state[mask == 1], expected.last_hidden_state[mask == 1], "states")
    close(result.pooler_output, expected.pooler_output, "pooled")
    left = {name: tensor.flip(1) for name, tensor in given.items()}
    row = {name: tensor[1:2, 6:] for name, tensor in left.items()}
    close(ours(**left).pooler_output[1:2], theirs(**row).pooler_output, "pooled behind padding")


@every_kind
@torch.no_grad()
def test_a_decoder_that_is_not_tied(kind, tmp_path):
    """What it computes is kept on the way there and back; a bias beside it that transformers does not use is not."""
    theirs = foreign(kind, "ForMaskedLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = zoo.from_pretrained(tmp_path / "theirs"), token_ids(2, 17)
    close(ours(ids).logits, theirs(ids).logits, "logits")
    ours.save_pretrained(tmp_path / "back", layout=kind)
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    "task, suffix", [("sequence_classification", "ForSequenceClassification"), ("token_classification", "ForTokenClassification")]
)
@every_kind
@torch.no_grad()
def test_a_pretrained_encoder_learns_another_task(kind, task, suffix, tmp_path):
    """A new head on the body of a masked language model, which transformers reads with that head."""
    foreign(kind, "ForMaskedLM").save_pretrained(tmp_path / "theirs")
    ours, report = zoo.from_pretrained(tmp_path / "theirs", task=task, output_loading_info=True)
    assert report.fresh and all(not name.startswith("model.") for name in report.fresh)
    pushed(ours)
    ours.save_pretrained(tmp_path / "back", layout=kind)
    cls = getattr(transformers, type(foreign(kind, "Model")).__name__.removesuffix("Model") + suffix)
    again, info = cls.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = token_ids(2, 17)
    close(ours(ids).logits, again.eval()(ids).logits, "logits")


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_the_first_tokens_of_a_longformer_are_global(count, tmp_path):
    theirs = foreign("longformer", "ForMaskedLM", num_global_tokens=count)
    theirs.save_pretrained(tmp_path)
    ours, ids = zoo.from_pretrained(tmp_path), token_ids(3, 26)
    mask = torch.ones_like(ids)
    mask[1, 21:], mask[2, 2:] = 0, 0
    ids = ids.masked_fill(mask == 0, SIZES["pad_token_id"])
    chosen = torch.zeros_like(ids)
    chosen[:, :count] = 1
    expected = theirs(ids, attention_mask=mask, global_attention_mask=chosen).logits
    close(ours(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1], "logits")
    assert zoo.from_pretrained(tmp_path, task="sequence_classification").config.num_global_tokens == 1


@torch.no_grad()
def test_a_longformer_is_not_written_as_another(tmp_path):
    ours = zoo.from_config("longformer-tiny", task="sequence_classification", pad_token_id=1, position_offset=2, num_global_tokens=2,
                           token_types=1, classifier_args={"act": "tanh", "norm": None})  # fmt: skip
    with pytest.raises(ValueError, match="cannot express num_global_tokens=2"):
        ours.save_pretrained(tmp_path, layout="longformer")
    ours = zoo.from_config("longformer-tiny", pad_token_id=1, position_offset=3, token_types=1)
    with pytest.raises(ValueError, match="cannot express position_offset=3"):
        ours.save_pretrained(tmp_path, layout="longformer")
    with pytest.raises(ValueError, match="needs a pad_token_id"):
        zoo.from_config("longformer-tiny", token_types=1).save_pretrained(tmp_path, layout="longformer")

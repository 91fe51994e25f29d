"""Encoders, beyond what the trials of their layouts say: token types, poolers, decoders of their own; what sparse attention sees."""

import copy

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

import zoo
from zoo import registry
from zoo.evaluate.parity import close
from zoo.evaluate.trial import SIZES

FIELDS = {
    "longformer": {"attention_window": 4},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
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
    mask = torch.ones_like(ids)
    mask[1, :6] = mask[2, 16:] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, SIZES["pad_token_id"]), "token_type_ids": (ids > 40).long()}
    result = ours(**given, attention_mask=mask)
    for row, keep in enumerate(mask == 1):
        alone = copy.deepcopy(theirs)(**{name: tensor[row : row + 1, keep] for name, tensor in given.items()})
        close(result.last_hidden_state[row, keep], alone.last_hidden_state[0], f"row {row}")
        close(result.pooler_output[row], alone.pooler_output[0], f"row {row}, pooled")


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


def seen(drawn: bool, heads: int = 1, layer: int = 0) -> torch.Tensor:
    """`[19, 19]`: which blocks of two tokens a BigBird's blocks see, found by its gradients; the last has one token."""
    config = registry.build_config("big_bird-tiny", num_heads=heads, num_random_blocks=2, drawn=drawn)
    torch.manual_seed(0)
    mixer = pushed(registry.get("big_bird").mixer(config, layer))
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x)[0].sum((0, 2)), torch.randn(1, 37, config.hidden_size))
    pairs = torch.nn.functional.pad(jacobian[:, 0].abs().sum(-1), (0, 1, 0, 1)).unflatten(0, (19, 2)).unflatten(2, (19, 2))
    return pairs.sum((1, 3)) > 0


def test_a_big_bird_sees_neighbours_edges_and_blocks_of_its_own():
    near = (torch.arange(19) - torch.arange(19)[:, None]).abs() <= 1
    near[[0, 18]] = near[:, [0, 18]] = True
    assert torch.equal(seen(drawn=False), near)
    drawn = seen(drawn=True)
    assert (drawn >= near).all() and ((drawn & ~near).sum(1)[1:-1] == 2).all()
    assert not torch.equal(drawn, seen(drawn=True, layer=1)), "every layer draws the same"
    assert (seen(drawn=True, heads=2) & ~near).sum() > (drawn & ~near).sum(), "every head draws the same"


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("lengths", [(40, 9, 0, 23, 15), (37, 15)], ids=str)
@torch.no_grad()
def test_long_and_short_big_birds_in_one_batch(lengths, drawn):
    """Padding apart, a row is what it is alone, be it so short that it sees everything or not."""
    torch.manual_seed(0)
    model = pushed(zoo.from_config("big_bird-tiny", task="base", drawn=drawn, pooler_args={"act": "tanh", "norm": None})).eval()
    ids = token_ids(len(lengths), max(lengths))
    for flip in (False, True):
        mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
        mask = mask.flip(1) if flip else mask
        out = model(ids, attention_mask=mask)
        for row, keep in enumerate(mask == 1):
            if keep.any():
                alone = model(ids[row : row + 1, keep])
                close(out.last_hidden_state[row, keep], alone.last_hidden_state[0], f"{lengths[row]} tokens")
                close(out.pooler_output[row], alone.pooler_output[0], f"{lengths[row]} tokens, pooled")


@every_kind
@torch.no_grad()
def test_answers_are_marked(kind, tmp_path):
    """The question is told apart by the caller: transformers looks for a separator, and bars its tokens in a BigBird."""
    theirs = foreign(kind, "ForQuestionAnswering")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, ids = zoo.from_pretrained(tmp_path / "theirs"), token_ids(3, 26)
    mask = torch.ones_like(ids)
    mask[1, 21:], mask[2, 9:] = 0, 0
    ids = ids.masked_fill(mask == 0, SIZES["pad_token_id"])
    question = (torch.arange(26) < torch.tensor([[4], [7], [0]])) | (torch.arange(26) == torch.tensor([[24], [19], [3]]))
    given = {"longformer": {"global_attention_mask": question.long()}, "big_bird": {"token_type_ids": question.long()}}[kind]
    barred = {"question_lengths": torch.zeros(1, 1)} if kind == "big_bird" else {}
    result = ours(ids, attention_mask=mask, **given)
    for row, keep in enumerate(mask == 1):
        alone = {name: tensor[row : row + 1, keep] for name, tensor in given.items()}
        expected = copy.deepcopy(theirs)(ids[row : row + 1, keep], **alone, **barred)
        close(result.start_logits[row, keep], expected.start_logits[0], f"begin, row {row}")
        close(result.end_logits[row, keep], expected.end_logits[0], f"end, row {row}")
    ours.save_pretrained(tmp_path / "back", layout=kind)
    again, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = theirs.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_global_tokens_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="leave global_attention_mask out"):
        zoo.from_config("big_bird-tiny")(token_ids(1, 5), global_attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="set num_global_tokens"):
        zoo.from_config("longformer-tiny", causal=True)(token_ids(1, 5), global_attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"global_attention_mask is \[1, 4\]"):
        zoo.from_config("longformer-tiny")(token_ids(1, 5), global_attention_mask=torch.ones(1, 4))

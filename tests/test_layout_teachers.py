"""Checkpoints of further teachers: parity with transformers, bits kept both ways, and strictness about what cannot be said."""

import copy
import json

import pytest
import torch
from test_layout import token_ids, write_config
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

import zoo
from zoo.evaluate.closeness import assert_close
from zoo.layout import get_layout
from zoo.registry import get

TOKENS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
SIZES = {
    "phi3": ATTENTION,
}  # fmt: skip
CASES = {
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 5, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.7}}),
}
MERGED = {"phi3": ("qkv_proj", "gate_up_proj")}  # foreign keys that change more than their name
ROUNDED = ()  # transformers computes parts of these in float32, whatever their dtype
UNMASKED = ()  # transformers ignores the mask of these, and decodes one sequence at a time
FORGOTTEN = {"max_position_embeddings", "_name_or_path", "attention_dropout"}
every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("kind", SIZES)


def foreign_model(kind: str, **fields):
    """A tiny model of transformers with no parameter at a special value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**TOKENS | SIZES[kind] | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (model of transformers, folder it saved itself to)."""
    cache = {}

    def load(case: str):
        if case not in cache:
            kind, fields = CASES[case]
            cache[case] = foreign_model(kind, **fields), tmp_path_factory.mktemp(case)
            cache[case][0].save_pretrained(cache[case][1])
        return cache[case]

    return load


def layout_of(kind: str):
    return get_layout(get(zoo.layouts()[kind]), kind)


def assert_parity(result, theirs, given: dict, kind: str, rows=slice(None)) -> None:
    """`result` are the logits of `theirs`: by the rule of closeness, or to 1e-5 where transformers has no exact answer."""
    plain = theirs(**given).logits[rows]
    if kind in ROUNDED:
        assert result.shape == plain.shape
        assert (result - plain).abs().max() <= 1e-5 * max(1.0, plain.abs().max())
    else:
        assert_close(result, plain, copy.deepcopy(theirs).double()(**given).logits[rows], "logits")


@every_case
@torch.no_grad()
def test_logits_equal_those_of_transformers(saved, case):
    theirs, folder = saved(case)
    ours, kind = zoo.from_pretrained(folder), CASES[case][0]
    for shape in ((2, 23), (1, 1), (3, 64)):
        ids = token_ids(*shape)
        assert_parity(ours(ids).logits, theirs, {"input_ids": ids}, kind)


@every_case
@torch.no_grad()
def test_left_padding_and_greedy_continuation_equal_those_of_transformers(saved, case):
    theirs, folder = saved(case)
    ours, kind = zoo.from_pretrained(folder), CASES[case][0]
    ids = token_ids(1 if kind in UNMASKED else 2, 11)
    mask = torch.ones_like(ids)
    if kind not in UNMASKED:
        mask[0, :4] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    real = mask.bool()
    counted = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if kind in ("gpt2", "gpt_neox") else {}
    assert_parity(ours(**given).logits[real], theirs, given | counted, kind, real)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**given, **options), theirs.generate(**given, **options))


@every_case
def test_written_back_it_is_what_it_was(saved, case, tmp_path):
    theirs, folder = saved(case)
    zoo.from_pretrained(folder).save_pretrained(tmp_path, layout=CASES[case][0])
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert not {n: (v, new.get(n)) for n, v in old.items() if n not in FORGOTTEN and new.get(n) != v}


@every_case
def test_every_key_has_one_counterpart(saved, case):
    theirs, folder = saved(case)
    ours, report = zoo.from_pretrained(folder, output_loading_info=True)
    kind, tied = CASES[case][0], theirs.config.tie_word_embeddings
    heads = {name for name in theirs.state_dict() if tied and name.split(".")[-2] in ("lm_head", "head")}
    changed = {name for names in report.transformed.values() for name in names}
    assert set(report.taken) | changed == set(theirs.state_dict()) - heads
    assert set(report.taken.values()) | set(report.transformed) == set(ours.state_dict()) - ({"lm_head.weight"} if tied else set())
    assert changed == {name for name in theirs.state_dict() if any(part in name for part in MERGED[kind])}
    assert not (report.fresh or report.dropped)
    back = layout_of(kind).to_foreign(ours.state_dict(), ours)
    there, _ = layout_of(kind).to_zoo(back, ours)
    assert all(torch.equal(there[name], tensor) for name, tensor in ours.state_dict().items() if name in there)
    assert all(tensor.is_contiguous() for made in (back, there) for tensor in made.values())


@every_kind
def test_half_precision_and_bare_bodies_keep_their_bits(kind, tmp_path):
    theirs = foreign_model(kind).bfloat16()
    theirs.save_pretrained(tmp_path / "half")
    ours = zoo.from_pretrained(tmp_path / "half", task="base")
    assert ours.dtype == torch.bfloat16
    ours.save_pretrained(tmp_path / "back", layout=kind)
    body = AutoModel.from_pretrained(tmp_path / "back")
    expected = theirs.base_model.state_dict()
    assert body.dtype == torch.bfloat16 and body.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in body.state_dict().items())


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("phi3", {"rope_parameters": LONG}, "rope_type 'longrope' is not supported"),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, kind, changes, message):
    foreign_model(kind).save_pretrained(tmp_path)
    write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, fields, layout, message",
    [
        ("transformer", {"qk_norm": True}, "phi3", "cannot express qk_norm=True"),
        ("transformer", {"qkv_bias": True}, "phi3", "cannot express qkv_bias=True"),
    ],
)
def test_what_they_cannot_express_is_refused(tmp_path, name, fields, layout, message):
    with pytest.raises(ValueError, match=message):
        zoo.from_config(name + "-tiny", **fields).save_pretrained(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()

"""Every layout holds every property of `zoo.evaluate.parity`; ids read `[llama]`."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

import zoo
from zoo.evaluate.loading import KINDS, measure, random_checkpoint
from zoo.evaluate.parity import properties
from zoo.evaluate.proof import Proof, prove, table
from zoo.evaluate.trial import find, has_oracle, make_trial, sampled, trial_names
from zoo.layout import mapped, rename
from zoo.registry import ARCHITECTURES, get

NAMES = sorted(zoo.layouts())
each_layout = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True, scope="module")
def silence():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def check(proof: Proof) -> None:
    """Fail with everything that does not hold."""
    assert not proof.failures, "\n".join(f"{trial}, {label}:\n{text}" for (trial, label), text in proof.failures.items())
    assert proof.errors.keys() == properties(find(proof.layout)).keys()


@each_layout
def test_layout(name):
    check(prove(find(name), [sampled(find(name))]))


@pytest.mark.slow
@each_layout
def test_all_trials_of_a_layout(name):
    check(prove(find(name)))


@pytest.mark.parametrize("name", [name for name in NAMES if has_oracle(find(name))])
def test_there_is_more_than_one_trial(name):
    assert len(trial_names(find(name))) > 1


LLAMA = find("llama")


def with_rule(rule) -> dict:
    """A change of Llama's layout: this rule in place of the one for the same key of ours."""
    kept = [old for old in LLAMA.rules if not {p.text for p in old.own} & {p.text for p in rule.own}]
    assert len(kept) == len(LLAMA.rules) - 1
    return {"rules": (*kept, rule)}


NORM = "model.norm.weight"
MLP = "model.layers.{{}}.{}.{{{}}}_proj.{{weight,bias}}"


@pytest.mark.parametrize(
    "change, label",
    [
        ({"config_map": lambda foreign: LLAMA.config_map(foreign) | {"norm_eps": 1e-2}}, "logits_are_equal"),
        ({"config_map": lambda foreign: LLAMA.config_map(dict(foreign))}, "options_are_read"),
        ({"config_back": lambda config: LLAMA.config_back(config) | {"num_key_value_heads": 4}}, "written_back_it_is_what_it_was"),
        ({"config_back": lambda config: LLAMA.config_back(config) | {"mlp_bias": True}}, "written_back_it_is_what_it_was"),
        (with_rule(rename(MLP.format("mlp", "up,gate,down"), MLP.format("channel_mixer", "gate,up,down"))), "logits_are_equal"),
        (with_rule(mapped(NORM, NORM, lambda x: 2 * x, lambda x: x / 2)), "padded_rows_are_as_alone"),
        (with_rule(mapped(NORM, NORM, torch.neg, torch.neg)), "greedy_continuations_are_equal"),
        (with_rule(mapped(NORM, NORM, torch.clone, lambda x: x + 1)), "accounts_for_every_key"),
        (with_rule(mapped(NORM, NORM, torch.Tensor.detach, torch.clone)), "gradients_are_equal"),
        (with_rule(mapped(NORM, NORM, lambda x: x * 1.5 if x.dtype == torch.bfloat16 else x, torch.clone)), "half_precision_stays_half"),
    ],
)
def test_a_layout_that_is_wrong_is_found_out(monkeypatch, change, label):
    entry, wrong = get("transformer"), dataclasses.replace(LLAMA, **change)
    others = tuple(other for other in entry.layouts if other is not LLAMA)
    monkeypatch.setitem(ARCHITECTURES, "transformer", dataclasses.replace(entry, layouts=(wrong, *others)))
    assert ("plain", label) in prove(wrong, ["plain"]).failures


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no layout 'lama' .did you mean 'llama'"):
        find("lama")
    with pytest.raises(ValueError, match=r"'llama' has no trial 'plan' .did you mean 'plain'.*it has plain, "):
        make_trial(LLAMA, "plan", tmp_path)


def test_the_table_has_a_row_for_each_proof():
    good, bad = prove(find("fla-gla")), Proof("llama", "transformer", True, 2, {"loads": 0.0}, {("plain", "logits_are_equal"): "off"})
    heading, _, first, second = (line.strip("| ").split(" | ") for line in table([good, bad]))
    assert [cell.strip() for cell in first] == ["`fla-gla`", "`gla`", "", "yes", "", "", "", "yes", "yes", str(good.trials)]
    assert len(heading) == len(second) and second[2].strip() == "fails"
    merged = table([good], "\n".join([*table([bad, dataclasses.replace(good, trials=7)]), "| `gone` | `gone` |"]))
    assert [line.split("|")[1].strip() for line in merged[2:]] == ["`fla-gla`", "`llama`"] and " 7 " not in merged[2]


@pytest.mark.slow
def test_the_table_of_all_layouts_is_up_to_date():
    page = Path(zoo.__file__).resolve().parent.parent / "docs" / "layouts.md"
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.read_text().splitlines() if line.startswith("| `")]
    assert {row[0]: int(row[-1]) for row in rows} == {name: len(trial_names(find(name))) for name in zoo.layouts()}
    assert not [row[0] for row in rows if "fails" in row]


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", KINDS)
def test_loading_holds_the_weights_once(tmp_path, kind, dtype):
    random_checkpoint(tmp_path, kind)
    result = measure(tmp_path, dtype)
    assert result.shards > 3 and result.model < result.peak < result.bound

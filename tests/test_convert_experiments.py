"""Experiments: many conversions in slices of time, known by their results, written as tables and pictures."""

import importlib
import json

import pytest
import torch

import zoo
from zoo.convert.card import Measures
from zoo.convert.experiment import MIXERS, Experiment, list_trials, read_results
from zoo.train.run import byte_tokenizer

CHANGES = {"align.length": 72, "align.batch": 2, "distil.length": 72, "distil.batch": 2}


@pytest.fixture
def experiment(tmp_path):
    torch.manual_seed(0)
    teacher = zoo.from_config("transformer-tiny", num_hidden_layers=3, vocab_size=257)
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 23) + (" " if i % 5 == 0 else "") for i in range(4000)))
    trials = list_trials(288, 288, best="gated_deltanet_window", counts=[1, 2])

    def make(**kwargs) -> Experiment:
        return Experiment(
            tmp_path / "root", str(tmp_path / "teacher"), (str(tmp_path / "text.txt"),), trials, lambda line: None, changes=dict(CHANGES),
            also=(str(tmp_path / "text.txt"),), measures=Measures((32, 48), trials=1, prompts=2, written=4), **kwargs,
        )  # fmt: skip

    return make


def test_trials_are_of_equal_tokens_and_name_what_they_begin_from():
    trials = list_trials(100, 300)
    assert set(MIXERS) < set(trials) and len(trials) == len(set(trials))
    for trial in trials.values():
        whole = sum(trial.changes[f"{stage}.tokens"] for stage in trial.stages)
        before = trials[trial.aligned].changes["align.tokens"] if trial.aligned else 0
        assert whole + before == (100 if trial.group == "align" else 400), trial.name
        assert trial.aligned is None or (trials[trial.aligned].stages == ("align",) and trial.stages == ("distil",))
    for wrong, message in (({"best": "glaa"}, "no student 'glaa' .did you mean 'gla'"), ({"align": 0}, "there must be some of both")):
        with pytest.raises(ValueError, match=message):
            list_trials(**{"align": 1, "distil": 1} | wrong)


def test_trials_in_slices_are_known_by_their_results(experiment, tmp_path):
    names, calls = ["likelihood", "mispaired"], 0
    while not experiment(lean=True).take(names, lambda: True):  # a step at a time
        calls += 1
    assert calls > 3
    results = read_results(tmp_path / "root", experiment().trials)
    assert list(results) == ["teacher", "mispaired", "likelihood"]
    late, early = results["likelihood"], results["mispaired"]
    assert (late["tokens"], early["tokens"]) == (288, 576) and late["kept"] == [] and late["seconds"] > 0
    assert list(late["stages"]) == ["teacher", "converted", "distil"] and list(early["stages"])[2:] == ["align", "distil"]
    assert late["also"].keys() == {"text"} and "gates" not in late
    left = {path.parent.name for path in (tmp_path / "root" / "runs").glob("*/model.safetensors")}
    assert left == {"align_gated_deltanet_window"}, "lean, but weights were left or taken that others begin from"
    (tmp_path / "root" / "runs").rename(tmp_path / "root" / "gone")
    assert experiment().take(names) and not (tmp_path / "root" / "runs").exists(), "a result was not known without its folder"
    experiment().result("likelihood").unlink()
    assert experiment().take(names), "what it begins from was not made anew"
    again = json.loads(experiment().result("likelihood").read_text())
    assert all(again[name] == late[name] for name in ("perplexity", "divergence", "digest", "also"))


def test_what_is_refused_is_a_result(experiment, tmp_path):
    broken = experiment()
    broken.changes["align.length"] = 8  # never leaves the window
    assert broken.take(["gated_deltanet_window"])
    results = json.loads(broken.result("gated_deltanet_window").read_text())
    assert "never leave the window of 64" in results["refused"]
    with pytest.raises(ValueError, match=r"no trial 'keep1_unifrom' \(did you mean 'keep1_uniform'\?\)"):
        broken.take(["keep1_unifrom"])
    with pytest.raises(ValueError, match="has no results yet"):
        read_results(tmp_path / "root", broken.trials)


def test_the_command_runs_lists_and_reports(experiment, tmp_path, monkeypatch, capsys):
    experiment()
    script = importlib.import_module("zoo.scripts.convert_experiments")
    sizes = ["--align-tokens", "288", "--distil-tokens", "288", "--counts", "1", "2", "--best", "gated_deltanet_window"]

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["convert_experiments.py", *words, *sizes])
        return script.main()

    assert call("list") == 0 and "hybrid    keep2_restore" in capsys.readouterr().out
    changes = [word for name, given in CHANGES.items() for word in ("--set", f"{name}={given}")]
    run = ["run", str(tmp_path / "teacher"), "-o", str(tmp_path / "root"), "--data", str(tmp_path / "text.txt"), *changes]
    run += ["--only", "gated_deltanet_window", "keep2_restore", "--distances", "32", "48", "--trials", "1"]
    assert call(*run, "--minutes", "0") == 3 and "out of time; go on with" in capsys.readouterr().out
    assert call(*run) == 0 and "done" in capsys.readouterr().out
    assert call("report", "-o", str(tmp_path / "root"), "--docs", str(tmp_path / "docs")) == 0
    shown = capsys.readouterr().out
    assert "## Students" in shown and "| keep2_restore |" in shown and shown == (tmp_path / "docs" / "results.md").read_text() + "\n"
    assert list(json.loads((tmp_path / "docs" / "results.json").read_text())) == [
        "teacher", "gated_deltanet_window", "keep2_restore",
    ]  # fmt: skip
    for name in ("students.png", "hybrids.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")

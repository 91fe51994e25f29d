"""A conversion in its folder: made, interrupted, resumed to the same weights, and refused where it would be another."""

import json
import signal

import numpy as np
import pytest
import torch

import zoo
from zoo.__main__ import main
from zoo.convert import converted_layers
from zoo.convert.arguments import read_layers, read_value
from zoo.convert.data import read_tokens, rows_of
from zoo.convert.fit import Fit
from zoo.convert.job import PROGRESS
from zoo.train.run import byte_tokenizer

SMALL = ["--set", "align.length=32", "--set", "align.batch=2", "--set", "distil.length=24", "--set", "distil.batch=2", "--set", "window=8"]
SMALL += ["--set", "align.tokens=384", "--set", "distil.tokens=192", "--keep-attention", "1"]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=3, vocab_size=257)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 23) + (" " if i % 5 == 0 else "") for i in range(4000)))
    return str(path)


def convert(command: str, *arguments: str) -> int:
    return main(["convert", command, *arguments])


def weights(folder) -> dict[str, torch.Tensor]:
    return zoo.from_pretrained(folder).state_dict()


def assert_same(first, second) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt_at(monkeypatch, step: int) -> None:
    """Send this process SIGINT, as Ctrl-C does, within the update of one step."""
    update, count = Fit._update, iter(range(10**6))

    def signalled(self, *arguments):
        if next(count) == step:
            signal.raise_signal(signal.SIGINT)
        update(self, *arguments)

    monkeypatch.setattr(Fit, "_update", signalled)


@pytest.mark.parametrize("step", [2, 7])  # of 6 steps of alignment and 4 of distillation
def test_resumed_is_as_uninterrupted(teacher, text, tmp_path, monkeypatch, capsys, step):
    assert convert("run", teacher, *SMALL, "--data", text, "-o", str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert convert("run", teacher, *SMALL, "--data", text, "-o", str(tmp_path / "parts")) == 1
    before = signal.getsignal(signal.SIGINT)
    shown = capsys.readouterr().out
    assert f"interrupted after step {[3, 2][step > 5]} of" in shown and f"resume {tmp_path / 'parts'}" in shown
    assert convert("status", str(tmp_path / "parts")) == 0
    shown = capsys.readouterr().out
    assert (f"align: {[3, 6][step > 5]} of 6 steps" in shown) and "finished" not in shown and "perplexity of teacher" in shown
    assert convert("resume", str(tmp_path / "parts")) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(tmp_path / "whole", tmp_path / "parts")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "parts")]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert list(map(len, reports[0]["losses"].values())) == [6, 4]
    assert [row["perplexity"] for row in reports[0]["rows"]] == [row["perplexity"] for row in reports[1]["rows"]]
    assert [row["name"] for row in reports[0]["rows"]] == ["teacher", "converted", "align", "distil"]


def test_init_then_resume_is_run(teacher, text, tmp_path, capsys):
    assert convert("run", teacher, *SMALL, "--data", text, "-o", str(tmp_path / "run")) == 0
    assert "finished" in capsys.readouterr().out
    assert convert("init", teacher, *SMALL, "--data", text, "-o", str(tmp_path / "init")) == 0
    student = zoo.from_pretrained(tmp_path / "init")
    assert len(converted_layers(student)) == 2
    source = zoo.from_pretrained(teacher)
    assert torch.equal(student.model.layers[0].channel_mixer.up_proj.weight, source.model.layers[0].channel_mixer.up_proj.weight)
    assert convert("status", str(tmp_path / "init")) == 0
    assert "align: 0 of 6 steps" in capsys.readouterr().out
    assert convert("resume", str(tmp_path / "init")) == 0
    assert_same(tmp_path / "run", tmp_path / "init")
    assert (tmp_path / "init" / "report.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "init" / PROGRESS).exists()
    assert convert("resume", str(tmp_path / "init")) == 2
    assert "is finished; its report.json has the results" in capsys.readouterr().err


def test_a_changed_recipe_is_refused_without_force(teacher, text, tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "out")
    interrupt_at(monkeypatch, 2)
    assert convert("run", teacher, *SMALL, "--data", text, "-o", folder) == 1
    left = (tmp_path / "out" / PROGRESS).read_bytes()
    changed = [*SMALL, "--set", "align.learning_rate=1e-4"]
    assert convert("run", teacher, *changed, "--data", text, "-o", folder) == 2
    assert "holds another conversion (stages was" in (error := capsys.readouterr().err) and "--force" in error
    assert convert("run", teacher, *SMALL, "--data", text, "--seed", "1", "-o", folder) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert (tmp_path / "out" / PROGRESS).read_bytes() == left
    path = tmp_path / "text.txt"
    path.write_text("b" + path.read_text()[1:])
    assert convert("resume", folder) == 2
    assert "the data changed since" in capsys.readouterr().err
    assert convert("init", teacher, "--recipe", "halo", "-o", folder, "--force") == 2
    assert (tmp_path / "out" / PROGRESS).read_bytes() == left, "what was refused took something away"
    (tmp_path / "out" / "report.json").write_text("{}")
    assert convert("init", teacher, *changed, "--data", text, "-o", folder, "--force") == 0
    assert not (tmp_path / "out" / PROGRESS).exists()
    assert convert("run", teacher, *changed, "--data", text, "-o", folder) == 0


def test_a_run_goes_on_when_it_is_asked_for_again(teacher, text, tmp_path, monkeypatch):
    arguments = [teacher, *SMALL, "--data", text]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert convert("run", *arguments, "-o", str(tmp_path / "again")) == 1
    assert convert("run", *arguments, "-o", str(tmp_path / "again")) == 0
    assert convert("run", *arguments, "-o", str(tmp_path / "whole")) == 0
    assert_same(tmp_path / "again", tmp_path / "whole")


def test_published_recipes_run_at_a_small_scale(teacher, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, 2000).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    for name in ("radlads", "t2r"):
        stages = {"radlads": ("align", "distil", "extend"), "t2r": ("finetune",)}[name]
        small = [word for stage in stages for word in ("--set", f"{stage}.length=16", "--set", f"{stage}.batch=2")]
        out = tmp_path / name
        assert (
            convert(
                "run", teacher, "--recipe", name, *small, "--tokens-scale", "1e-9", "--data", str(tmp_path / "tokens.npy"), "-o", str(out)
            )
            == 0
        )
        assert {type(block.mixer).__name__ for block in zoo.from_pretrained(out).model.layers} == {
            "radlads": {"QRWKV7Mixer"}, "t2r": {"LinearAttentionMixer"},
        }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "halo"], "select=recall reads an aligned student; align every layer first"),
        (["--recipe", "lolcat"], "no recipe 'lolcat' (did you mean 'lolcats'?)"),
        (["--recipe", "ahn"], "would teach this student nothing: stage 'distil': rows of 512 tokens never leave the window of 32640"),
        (["--mixer", "glaa"], "no mixer 'glaa' (did you mean 'gla'?)"),
        (["--set", "align.tokens"], "must be FIELD=VALUE"),
        (["--set", "align.token=1"], "no field 'token' (did you mean 'tokens'?)"),
        (["--keep-attention", "9"], "keep=9 of 3 layers"),
        (["--tokens-scale", "0"], "scaled by 0.0"),
        (["--data", "missing.txt"], "missing.txt is no file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(teacher, tmp_path, capsys, arguments, message):
    assert convert("run", teacher, "-o", str(tmp_path / "out"), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_conversion(tmp_path, capsys):
    for command in ("resume", "status"):
        assert convert(command, str(tmp_path)) == 2
        assert "has no conversion.json" in capsys.readouterr().err


def test_data_are_split_and_checked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "defghij"}\n')
    train, held = read_tokens((str(path),), byte_tokenizer(), 257)
    assert bytes(train[train < 256].tolist() + held[held < 256].tolist()) == b"abcdefghij" and len(held) == (len(train) + len(held)) // 10
    with pytest.raises(ValueError, match="token id 256 is outside the vocabulary of 100"):
        read_tokens((str(path),), byte_tokenizer(), 100)
    with pytest.raises(ValueError, match="has no tokenizer"):
        read_tokens((str(path),), None, 257)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        read_tokens((str(path),), byte_tokenizer(), 257)
    assert rows_of(torch.arange(7).int(), 3, "text").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="the text has 7 tokens, a row needs 8"):
        rows_of(torch.arange(7), 8, "text")


def test_plan_and_list_print(teacher, tmp_path, capsys):
    assert convert("list") == 0
    assert "radlads         arXiv:2505.03005" in capsys.readouterr().out
    path = tmp_path / "own.yaml"
    path.write_text("title: mine\npaper: none\nmixer: gla\nneeds: [the moon]\nstages: [{name: a, target: tokens, loss: ce, train: all}]\n")
    assert convert("plan", teacher, "--recipe", str(path)) == 0
    assert "Cannot be run yet, for want of\n  the moon" in capsys.readouterr().out
    assert convert("init", teacher, "--recipe", str(path), "-o", str(tmp_path / "out")) == 2
    assert "cannot be run yet, for want of: the moon" in capsys.readouterr().err
    assert convert("plan", teacher, "--keep-attention", "0,2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["strip"] == "A X A"


def test_arguments_are_read():
    assert [read_value(text) for text in ("1e-4", "3", "null", "l2", "[0.9, 0.95]", "true")] == [1e-4, 3, None, "l2", [0.9, 0.95], True]
    assert [read_layers(text) for text in ("0.25", "10", "3,8", "8,")] == [0.25, 10, [3, 8], [8]]

"""What a conversion learns from: tokens that stay on the disk, what the teacher writes, and what is wrong with either."""

import hashlib
import json

import numpy as np
import pytest
import torch

import zoo
from zoo.__main__ import main
from zoo.convert.data import deadline, fingerprint, read_tokens, rows_of, sample_tokens, spread


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=1).eval().requires_grad_(False)
    model.lm_head.weight.data.mul_(20)  # else all tokens are as likely
    return model


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_tokens_stay_on_the_disk(tmp_path, suffix):
    ids = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint16)
    path = tmp_path / f"tokens{suffix}"
    ids.tofile(path) if suffix == ".bin" else np.save(path, ids)
    train, held = read_tokens((str(path),), None, 256)
    assert torch.cat([train.int(), held.int()]).tolist() == ids.tolist() and len(held) == 100
    rows = rows_of(train, 32, "text")
    assert rows.shape == (28, 32) and rows.data_ptr() == train.data_ptr(), "the rows were copied"
    assert spread(rows, 3).tolist() == [rows[i].tolist() for i in (0, 14, 27)] and spread(rows, 3).dtype == torch.int64
    assert fingerprint(train) == fingerprint(train.long()) != fingerprint(held)


def test_several_files_are_joined(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.full(20, ord(name), dtype=np.int64))
    train, held = read_tokens((str(tmp_path / "a.npy"), str(tmp_path / "b.npy")), None, 256)
    assert bytes(train.tolist()) == b"a" * 18 + b"b" * 18 and bytes(held.tolist()) == b"aabb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(0, np.uint16), "is empty; name another file of tokens"),
        (np.full(9, 300, np.uint16), "token id 300 is outside the vocabulary of 256; was it made by another tokenizer"),
    ],
)
def test_token_files_that_do_not_fit_are_named(tmp_path, content, message):
    path = tmp_path / "tokens.bin"
    content.tofile(path)
    with pytest.raises(ValueError, match=message):
        read_tokens((str(path),), None, 256)


def test_sampled_once_with_seed_and_hash(teacher, tmp_path):
    path, lines = tmp_path / "own.bin", []
    asked = dict(first=7, length=8, batch=3, source="tiny")
    assert sample_tokens(teacher, path, 70, **asked, say=lines.append)
    ids, notes = np.fromfile(path, np.uint16).reshape(-1, 8), json.loads((tmp_path / "own.json").read_text())
    assert len(ids) == 9 and (ids[:, 0] == 7).all() and notes["tokens"] == 72
    assert notes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and (notes["teacher"], notes["seed"]) == ("tiny", 0)
    before = path.read_bytes()
    assert sample_tokens(teacher, path, 70, **asked) and path.read_bytes() == before, "sampled twice"
    assert sample_tokens(teacher, tmp_path / "other.bin", 70, **asked, seed=1)
    assert (tmp_path / "other.bin").read_bytes() != before
    with pytest.raises(ValueError, match=r"was sampled with temperature=1\.0, not 2\.0; name another file"):
        sample_tokens(teacher, path, 70, **asked, temperature=2.0)
    train, held = read_tokens((str(path),), None, 256)
    assert len(train) + len(held) == 72


def test_sampling_goes_on_where_it_was_left(teacher, tmp_path):
    asked = dict(length=8, batch=2)
    assert sample_tokens(teacher, tmp_path / "whole.bin", 64, **asked)
    for _ in range(3):
        assert not sample_tokens(teacher, tmp_path / "parts.bin", 64, **asked, stop=lambda: True)
        with (tmp_path / "parts.bin").open("ab") as file:
            file.write(b"cut")  # as if the next batch had been interrupted
    assert sample_tokens(teacher, tmp_path / "parts.bin", 64, **asked)
    assert (tmp_path / "parts.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_samples_follow_the_teacher(teacher, tmp_path):
    """Cold samples are its greedy continuations; as many first tokens are drawn as there are texts."""
    sample_tokens(teacher, tmp_path / "cold.bin", 40, length=10, batch=4, temperature=1e-6)
    ids = torch.from_numpy(np.fromfile(tmp_path / "cold.bin", np.uint16).astype(np.int64)).view(4, 10)
    assert torch.equal(teacher(ids).logits[:, :-1].argmax(-1), ids[:, 1:]) and len(ids[:, 0].unique()) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "tokens.npy"}, "sampled tokens go into a .bin file"),
        ({"temperature": 0.0}, "temperature=0.0.*all must be positive"),
        ({"count": 0}, "tokens=0"),
    ],
)
def test_what_cannot_be_sampled(teacher, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(teacher, tmp_path / arguments.pop("path", "tokens.bin"), arguments.pop("count", 8), **arguments)


def test_the_command_samples_and_run_learns_from_it(teacher, tmp_path, capsys):
    teacher.save_pretrained(tmp_path / "teacher")
    folder, path = str(tmp_path / "teacher"), str(tmp_path / "own.bin")
    sampled = ["convert", "sample", folder, "-o", path, "--tokens", "600", "--length", "20", "--batch", "10"]
    assert main([*sampled, "--minutes", "0"]) == 1 and "200 tokens are in" in capsys.readouterr().out
    assert main(sampled) == 0 and "600 tokens are in" in capsys.readouterr().out
    small = ["--set", "align.length=32", "--set", "align.batch=2", "--set", "align.tokens=128", "--set", "window=8", "--stages", "align"]
    run = ["convert", "run", folder, *small, "--keep-attention", "0", "-o", str(tmp_path / "out")]
    assert main([*run, "--data", path]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data_hash"] == fingerprint(read_tokens((path,), None, 256)[0])
    assert main([*run, "--data", f"teacher:{400}", "--force", "--seed", "3"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["data"] == [str(tmp_path / "out" / "sampled-400-3.bin")]


def test_minutes_pass():
    assert deadline(0)() and not deadline(60)() and not deadline(None)()

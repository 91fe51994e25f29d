"""Alignment that holds one layer at a time: the same as with both models whole, and nothing more in memory than it says."""

import gc
import json
import signal
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import zoo
from zoo.__main__ import main
from zoo.convert import convert as make_student
from zoo.convert import load_teacher, stream
from zoo.convert.fit import Fit
from zoo.convert.folder import advance, open_student, start
from zoo.convert.headers import blank_teacher
from zoo.convert.job import Job, read_job
from zoo.convert.plan import blank_student, check_memory, layout_config, must_stream, stage_plans
from zoo.convert.recipe import Stage, load_recipe, settled
from zoo.convert.stream import Activations, Shelf, fitting, write_student
from zoo.evaluate.perplexity import perplexity

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=52, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
}
SMALL = ["--set", "align.length=24", "--set", "align.batch=2", "--set", "align.tokens=384"]
OWN = """
title: alignment alone
paper: none
mixer: gla
window: 6
sinks: 2
stages: [{name: align, target: mixer_out, loss: rel_mse, train: mixer, paced: true, learning_rate: 1.0e-2}]
"""


def save_teacher(kind: str, folder: Path, dtype=torch.float32) -> str:
    cls, config = KINDS[kind]
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return str(folder)


@pytest.fixture
def tokens(tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 97, 1200).astype(np.int32))
    return str(tmp_path / "tokens.npy")


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    return str(tmp_path / "own.yaml")


def convert(command: str, *arguments: str) -> int:
    return main(["convert", command, *arguments])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_layer_by_layer_is_the_model(kind, tmp_path):
    path = save_teacher(kind, tmp_path / "teacher")
    shelf, whole = Shelf(path), load_teacher(path, dtype=torch.float32)
    rows = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    for index in range(4):
        for name, weight in shelf.block(index).state_dict().items():
            assert torch.equal(weight, whole.model.layers[index].state_dict()[name]), name
    assert shelf.perplexity(rows, "cpu") == pytest.approx(perplexity(whole, rows), rel=1e-5)
    known = shelf.outside()
    assert {name for name in whole.state_dict() if ".layers." not in name} - {"lm_head.weight"} <= known.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_as_in_memory(kind, tmp_path, tokens, recipe):
    """From the same student, with the same rows: the same losses and weights, bit by bit."""
    path, out = save_teacher(kind, tmp_path / "teacher"), tmp_path / "out"
    arguments = [path, "--recipe", recipe, *SMALL, "--data", tokens, "--keep-attention", "1,", "-o", str(out), "--stream"]
    assert convert("init", *arguments) == 0
    student, teacher, job = open_student(out, "cpu"), load_teacher(path, dtype=torch.float32), read_job(out)
    fresh = blank_student(teacher, student.config)[1].fresh
    rows = torch.from_numpy(np.load(tokens))[:1080].view(45, 24)
    whole = Fit(teacher, student, rows, job.method.stages[0], fresh=fresh, seed=job.seed)
    whole.run()
    assert convert("resume", str(out)) == 0
    report = json.loads((out / "report.json").read_text())
    ours, plain = (torch.tensor(losses) for losses in (report["losses"]["align"], whole.history))
    assert ours.shape == plain.shape == (8, 3)
    assert torch.equal(ours, plain)
    trained = zoo.from_pretrained(out).state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(trained[name], weight), name
    assert [row["name"] for row in report["rows"]] == ["teacher", "converted", "align"]
    assert not list(out.glob(".activations*")) and not (out / "streamed.json").exists()


def test_two_blocks_live_at_a_time(tmp_path, tokens, recipe, monkeypatch):
    path = save_teacher("llama", tmp_path / "teacher")
    live, most = weakref.WeakSet(), []
    read = Shelf.block

    def counted(self, index, device="cpu"):
        gc.collect()
        most.append(len(live) + 1)
        live.add(block := read(self, index, device))
        return block

    monkeypatch.setattr(Shelf, "block", counted)
    for name in ("load_teacher", "open_teacher", "open_student"):
        monkeypatch.setattr(f"zoo.convert.folder.{name}", lambda *_: pytest.fail("a model was read whole"))
    out = str(tmp_path / "out")
    assert convert("run", path, "--recipe", recipe, *SMALL, "--data", tokens, "-o", out, "--stream") == 0
    assert len(most) >= 4 + 4 + 4 + 8 and max(most) <= 4, "one of the teacher and one of the student, and the next while these still stand"
    gc.collect()
    assert not live


def test_interrupted_it_goes_on_with_the_next_layer(tmp_path, tokens, recipe, monkeypatch, capsys):
    path = save_teacher("llama", tmp_path / "teacher")
    arguments = [path, "--recipe", recipe, *SMALL, "--data", tokens, "--stream"]
    assert convert("run", *arguments, "-o", str(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        update, count = Fit._update, iter(range(10**6))

        def signalled(self, *given):
            if next(count) == 19:  # within the third layer
                signal.raise_signal(signal.SIGINT)
            update(self, *given)

        patch.setattr("zoo.convert.fit.Steps._update", signalled)
        assert convert("run", *arguments, "-o", str(tmp_path / "parts")) == 1
    assert "interrupted after 2 layers of align" in capsys.readouterr().out
    assert convert("status", str(tmp_path / "parts")) == 0
    assert "layer by layer: 0 stages, and 2 layers of the next" in capsys.readouterr().out
    before = [
        (tmp_path / "parts" / name).stat().st_mtime_ns for name in ("model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors")
    ]
    assert convert("resume", str(tmp_path / "parts")) == 0
    after = [
        (tmp_path / "parts" / name).stat().st_mtime_ns for name in ("model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors")
    ]
    assert before == after, "a layer was trained again"
    first, second = (zoo.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_that_is_not_finite_is_named_and_not_saved(tmp_path, tokens, recipe):
    path, out = save_teacher("llama", tmp_path / "teacher"), tmp_path / "out"
    assert convert("init", path, "--recipe", recipe, *SMALL, "--data", tokens, "--stream", "-o", str(out)) == 0
    file = out / "model-00003-of-00005.safetensors"
    state = load_file(file)
    state["model.layers.2.mixer.branches.1.v_proj.weight"][0, 0] = float("nan")
    save_file(state, file, {"format": "pt"})
    before = file.read_bytes()
    with pytest.raises(FloatingPointError, match="layer 2: the loss is nan at step 1"):
        advance(out, print, progress=False)
    assert file.read_bytes() == before and not list(out.glob(".activations*"))


def test_later_stages_go_on_in_memory(tmp_path, tokens):
    path = save_teacher("qwen2", tmp_path / "teacher", torch.bfloat16)
    small = [word for name in ("align", "distil", "extend") for word in ("--set", f"{name}.length=16", "--set", f"{name}.batch=2")]
    out = tmp_path / "out"
    assert convert("run", path, "--recipe", "radlads", *small, "--tokens-scale", "1e-6", "--data", tokens, "-o", str(out), "--stream") == 0
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["teacher", "converted", "align", "distil", "extend"]
    assert {name: len(losses) for name, losses in report["losses"].items()} == {"align": 3, "distil": 16, "extend": 3}
    assert sum(report["losses"]["align"][-1]) < sum(report["losses"]["align"][0])


def test_too_little_memory_streams_by_itself(tmp_path, tokens, recipe, monkeypatch):
    path = save_teacher("llama", tmp_path / "teacher")
    model, method = blank_teacher(path)[0], settled(load_recipe(recipe, {"align.length": 24, "align.batch": 2, "align.tokens": 96}), 1)
    (plan,) = stage_plans(model, method)
    least, whole = sum(plan.streamed.values()), sum(plan.memory.values())
    assert least < whole / 2 and plan.streamed["teacher"] == 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert must_stream(model, method, least) and must_stream(model, method, whole - 1)
    assert not must_stream(model, method, whole) and not must_stream(model, method, least - 1)
    check_memory(model, method, least, stream=True)
    with pytest.raises(ValueError, match="stage 'align' needs about"):
        check_memory(model, method, least - 1, stream=True)
    two = replace(method, stages=(*method.stages, Stage("distil", "logits", "fkl", "all", tokens=96, length=24, batch=2)))
    with pytest.raises(ValueError, match="stage 'distil' needs about"):
        check_memory(model, two, whole, stream=True)
    monkeypatch.setattr("zoo.convert.folder.memory", lambda device: whole - 1)
    said = []
    start(tmp_path / "out", Job(path, method, (tokens,)), said.append)
    assert "layer by layer" in said[0] and read_job(tmp_path / "out").stream


def test_starts_are_measured_layer_by_layer(tmp_path):
    path = save_teacher("llama", tmp_path / "teacher")
    rows = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    method = load_recipe("zoo", {"keep": 0, "window": None, "sinks": 0})
    shelf = Shelf(path)
    config = layout_config(shelf.model, method)
    write_student(tmp_path / "out", shelf, config, inits={"decay": "measured"}, seed=0, rows=rows, device="cpu")
    teacher = load_teacher(path, dtype=torch.float32)
    plain = make_student(teacher, mixer="gated_deltanet", window=None, starts={"decay": "measured"}, rows=rows)
    found = zoo.from_pretrained(tmp_path / "out")
    for index in range(4):
        ours, theirs = found.model.layers[index].mixer, plain.model.layers[index].mixer
        assert torch.allclose(ours.decay.dt_bias, theirs.decay.dt_bias, rtol=1e-4) and not ours.decay.A_log.any()
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight)


def test_activations_take_what_the_disk_has(tmp_path, monkeypatch):
    rows = torch.zeros(10, 8)
    usage = type("Usage", (), {"free": 2 * 8 * 32 * 4 * 3 / 0.9 + 1})
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda place: usage)
    assert len(fitting(tmp_path, rows, 32, torch.float32)) == 3 and len(fitting(tmp_path, rows, 32, torch.bfloat16)) == 6
    usage.free = 10
    with pytest.raises(ValueError, match="too little for the activations of one row of 8 tokens"):
        fitting(tmp_path, rows, 32, torch.float32)
    known = Activations(str(tmp_path), torch.tensor([2, 5]), 7, 3, 4, torch.bfloat16)
    known.put(torch.tensor([5]), torch.full((1, 3, 4), 1.5), torch.full((1, 3, 2), 2.5))
    x, carry = known.split(known[torch.tensor([5, 2])])
    assert x[0].eq(1.5).all() and not x[1].any() and carry[0].eq(2.5).all() and x.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "t2r"], "stage 'finetune' has no layers that learn apart"),
        (["--recipe", "zoo", "--keep-attention", "1"], "keeps layers that are named or uniform"),
        (["--mixer", "falcon_h1", "--set", "window=null", *SMALL], "FalconH1Mixer has mixer.mamba.scales.vector in no file"),
    ],
)
def test_what_cannot_go_layer_by_layer_is_refused(tmp_path, tokens, recipe, capsys, arguments, message):
    path = save_teacher("llama", tmp_path / "teacher")
    assert convert("run", path, "--recipe", recipe, *arguments, "--data", tokens, "-o", str(tmp_path / "out"), "--stream") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

"""Recipes of conversion: each can be read, and what is wrong in one is named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.convert import load_teacher
from zoo.convert.folder import advance, start
from zoo.convert.gates import run_gates
from zoo.convert.job import Job
from zoo.convert.recipe import Method, list_recipes, load_recipe, read_method, settled
from zoo.convert.show import recipes_text

PUBLISHED = {
    "t2r", "supra", "hedgehog", "lolcats", "liger", "lizard", "lawcat", "mohawk", "mamba_in_llama", "radlads", "arwkv", "halo", "ahn",
    "taylor",
}  # fmt: skip


def test_the_published_recipes_are_there():
    assert set(list_recipes()) == PUBLISHED | {"zoo"}
    assert all(load_recipe(name).paper.startswith("arXiv:") for name in PUBLISHED)
    assert not any(load_recipe(name).missing() for name in list_recipes())


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_survives_being_written(name):
    method = load_recipe(name)
    again = read_method(json.loads(json.dumps(method.to_dict())), {})
    assert again.to_dict() == method.to_dict()
    assert {value for key, value in method.origin.items() if "." not in key} <= {"recipe", "default"}


def test_changes_are_remembered():
    method = load_recipe("radlads", {"mixer": "gated_deltanet", "align.tokens": 4096, "mixer_args.conv_kernel": None, "keep": [1, 2]})
    assert (method.mixer, method.mixer_args, method.keep) == ("gated_deltanet", {"conv_kernel": None}, (1, 2))
    assert method.stages[0].tokens == 4096 and method.stages[0].learning_rate == 1e-3
    assert method.origin["align.tokens"] == method.origin["mixer"] == "command line"
    assert method.origin["align.learning_rate"] == "recipe" and method.origin["distil.warmup"] == "default"
    assert load_recipe("arwkv", {"mixer": "gla"}).mixer_args == {}, "fields of another mixer stayed"


def test_tokens_follow_from_the_teacher_where_none_are_stated():
    method = settled(load_recipe("lawcat"), 7 * 10**9, 0.5)
    assert [stage.tokens for stage in method.stages] == [50_000_000, 250_000_000]
    assert method.origin["align.tokens"] == "size of the teacher x 0.5"
    assert settled(load_recipe("lawcat"), 1000).stages[0].tokens == 2_000_000
    scaled = settled(load_recipe("zoo"), 1000, 1e-3)
    assert [stage.tokens for stage in scaled.stages] == [5000, 20000] and scaled.stages[0].steps == 1
    with pytest.raises(ValueError, match="scaled by 0"):
        settled(method, 1000, 0)


def test_layers_that_stay():
    assert load_recipe("zoo").kept(30) == 8 and load_recipe("zoo", {"keep": 3}).kept(30) == 3
    assert load_recipe("zoo", {"keep": [0, 5]}).kept(30) == (0, 5)
    with pytest.raises(ValueError, match="keep=40 of 30 layers"):
        load_recipe("zoo", {"keep": 40}).kept(30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixr": "gla"}, "no field 'mixr' .did you mean 'mixer'"),
        ({"mixer": "glaa"}, "no mixer 'glaa' .did you mean 'gla'"),
        ({"algin.tokens": 1}, "stage to change is 'algin' .did you mean 'align'"),
        ({"align.token": 1}, "stage has no field 'token' .did you mean 'tokens'"),
        ({"align.tokens": 0}, "tokens is 0, it must be a positive number"),
        ({"align.loss": "fkl"}, "loss of mixer_out is 'fkl'.*choose one of rel_mse, mse, l2, cos"),
        ({"align.train": "lora"}, "train: lora and lora_rank go together"),
        ({"align.accumulate": 3}, "batch=8 is not divisible by accumulate=3"),
        ({"align.warmup": 1.5}, "a share of the steps"),
        ({"select": "best"}, "choose one of none, uniform, window, recall"),
        ({"align.name": "distil"}, "no name twice"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("zoo", changes)


def test_a_file_that_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe .radlad. .did you mean .radlads."):
        load_recipe("radlad")
    path = tmp_path / "own.yaml"
    path.write_text("mixer: gla\n")
    with pytest.raises(ValueError, match="list of stages"):
        load_recipe(str(path))
    path.write_text("mixer: gla\nstages: [{name: a, target: tokens, loss: ce, train: all}]\n")
    with pytest.raises(ValueError, match="lacks title, paper"):
        load_recipe(str(path))
    path.write_text("title: mine\npaper: none\nmixer: gla\nstages: [{name: a, target: tokens, loss: ce, train: all}]\n")
    assert load_recipe(str(path)).name == "own"


# -- each of them, run ---------------------------------------------------------------------------------------------------

WINDOWS = {
    "ahn": {"mixer_args.window": 6, "mixer_args.sinks": 2}, "lolcats": {"mixer_args.window": 6}, "liger": {"mixer_args.window": 6},
    "lizard": {"window": 6, "sinks": 2}, "zoo": {"window": 6, "sinks": 2, "select": "uniform"}, "halo": {"select": "uniform"},
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=2, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 256, 900).astype(np.int32))
    return folder


def small(name: str) -> Method:
    """The recipe with windows, rows and steps for a teacher of a few thousand weights; every stage takes three steps."""
    changes = WINDOWS.get(name, {})
    for stage in load_recipe(name).stages:
        changes |= {f"{stage.name}.length": 16, f"{stage.name}.batch": 2, f"{stage.name}.tokens": 96}
    return load_recipe(name, changes)


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_runs_interrupted_as_uninterrupted_and_its_gates_hold(name, teacher, tmp_path):
    job = Job(str(teacher), small(name), (str(teacher / "tokens.npy"),))
    steps = 3 * len(job.method.stages)
    for folder, stops in (("whole", []), ("parts", [1, 4])):
        start(tmp_path / folder, job, print)
        taken = iter(range(1, 1000))
        while not advance(tmp_path / folder, print, progress=False, stop=lambda taken=taken, stops=stops: next(taken) in stops):
            pass
        assert next(taken) == steps + 1, "a step was taken twice"
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("whole", "parts")]
    assert reports[0]["losses"] == reports[1]["losses"] and [len(each) for each in reports[0]["losses"].values()] == [3] * (steps // 3)
    whole, parts = (zoo.from_pretrained(tmp_path / folder).eval() for folder in ("whole", "parts"))
    assert all(torch.equal(weight, parts.state_dict()[key]) for key, weight in whole.state_dict().items())
    assert whole.config.tie_word_embeddings and len(whole.state_dict()) == len(parts.state_dict())
    ids = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(2))
    found = run_gates(load_teacher(str(teacher), dtype=torch.float32), whole, ids)
    assert not any(found.values()), found


def test_the_documents_name_every_recipe_and_whether_it_differs():
    text = (Path(__file__).parent.parent / "docs" / "convert.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    said = {row[1].strip(" `"): row[4].strip() for row in rows if len(row) == 6}
    for name in set(list_recipes()) - {"zoo"}:
        method = load_recipe(name)
        assert bool(said[name]) == bool(method.differs) and not method.missing(), name


def test_what_a_recipe_does_otherwise_is_said():
    assert "otherwise than its paper: sinks of the window are the first tokens" in recipes_text()
    assert load_recipe("lizard").differs and not load_recipe("radlads").differs


def test_halo_aligns_every_layer_and_keeps_the_best_without_positions(teacher, tmp_path):
    changes = {
        f"{name}.{field}": value
        for name in ("align", "distil", "extend")
        for field, value in (("length", 16), ("batch", 2), ("tokens", 96))
    }
    whole = load_recipe("halo", changes)
    data = (str(teacher / "tokens.npy"),)
    start(tmp_path / "aligned", Job(str(teacher), replace(whole, keep=0, stages=whole.stages[:1]), data), print)
    assert advance(tmp_path / "aligned", print, progress=False)
    method = replace(whole, keep=1, stages=whole.stages[1:], mixer_args=whole.mixer_args)
    start(tmp_path / "hybrid", Job(str(teacher), method, data, aligned=str(tmp_path / "aligned")), print)
    assert advance(tmp_path / "hybrid", print, progress=False)
    student, aligned = (zoo.from_pretrained(tmp_path / name) for name in ("hybrid", "aligned"))
    kept = [entry["mixer"] for entry in student.config.plan].index("transformer")
    assert student.config.plan[kept]["rope_theta"] is None and student.model.layers[1 - kept].mixer.rope is not None
    assert [entry["mixer"] for entry in aligned.config.plan] == ["linearized"] * 2

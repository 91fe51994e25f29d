"""Recipes of conversion: each can be read, and what is wrong in one is named."""

import json

import pytest

from zoo.convert.recipe import list_recipes, load_recipe, read_method, settled

PUBLISHED = {
    "t2r", "supra", "hedgehog", "lolcats", "liger", "lizard", "lawcat", "mohawk", "mamba_in_llama", "radlads", "arwkv", "halo", "ahn",
    "taylor",
}  # fmt: skip


def test_the_published_recipes_are_there():
    assert set(list_recipes()) == PUBLISHED | {"zoo"}
    assert all(load_recipe(name).paper.startswith("arXiv:") for name in PUBLISHED)
    assert not load_recipe("zoo").missing() and not load_recipe("radlads").missing()


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

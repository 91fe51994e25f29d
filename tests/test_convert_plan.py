"""Plans of conversions: told from config and headers alone, and true of the conversion that follows."""

import importlib
import json
import struct
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import zoo
from zoo.__main__ import main
from zoo.convert import convert, converted_layers, load_teacher
from zoo.convert.cost import assumed, duration, measure_pace
from zoo.convert.fit import Fit
from zoo.convert.headers import read_blueprint, read_headers, write_headers
from zoo.convert.plan import blank_student, check_memory, layout_config, make_plan, smaller
from zoo.convert.recipe import load_recipe, settled
from zoo.convert.select import even
from zoo.convert.show import amount, plan_text, recipes_text
from zoo.evaluate.speed import state_bytes

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=52, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
}
BILLION = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
)


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    cls, config = KINDS[request.param]
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("recipe", ["zoo", "radlads"])
def test_a_plan_is_true_of_the_conversion(folder, recipe):
    method = load_recipe(recipe, {"keep": [1]})
    plan, teacher = make_plan(read_blueprint(str(folder)), method), load_teacher(str(folder))
    student = convert(teacher, mixer=method.mixer, keep=[1], window=method.window, sinks=method.sinks, inherit=method.inherit)
    assert plan.strip == "X A X X" and converted_layers(student) == [0, 2, 3]
    assert plan.weights["student"].parameters == sum(p.numel() for p in student.parameters())
    given = sum(plan.weights[name].parameters for name in ("copied", "transformed", "dropped"))
    assert given == plan.teacher["parameters"] == sum(p.numel() for p in teacher.parameters())
    assert plan.weights["dropped"].tensors == 0 and not plan.missing
    assert plan.state_bytes[4096] == (state_bytes(teacher, 4096, teacher.dtype), state_bytes(student, 4096, teacher.dtype))
    rows = torch.zeros(1, 16, dtype=torch.long)
    for stage, planned in zip(settled(method, plan.teacher["parameters"]).stages, plan.stages, strict=True):
        fit = Fit(teacher, student, rows, stage)
        weights = [p for group in fit.optimizer.param_groups for p in group["params"]]
        assert planned.trained == sum(p.numel() for p in weights) and planned.steps == fit.steps
        assert planned.memory["gradients"] == 4 * planned.trained and planned.memory["moments"] == 8 * planned.trained
        assert planned.memory["student"] == sum(4 * p.numel() for p in student.parameters())
        fit.close()
    text = plan_text(plan)
    assert "X A X X" in text and f"all {len(dict(teacher.named_parameters()))} tensors of the teacher are accounted for" in text
    assert json.loads(json.dumps(plan.to_dict()))["weights"]["copied"]["tensors"] == plan.weights["copied"].tensors


@pytest.mark.parametrize(("cls", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_a_billion_parameters_need_their_headers_only(cls, config, tmp_path):
    with torch.device("meta"):
        model = cls(config(**BILLION, tie_word_embeddings=True))
    write_headers(tmp_path, model)
    assert (tmp_path / "model.safetensors").stat().st_size < 2**16
    plan = make_plan(read_blueprint(str(tmp_path)), load_recipe("zoo"))
    count = sum(p.numel() for p in model.parameters())
    assert plan.teacher["parameters"] == count > 10**9 and plan.teacher["bytes"] == 2 * count
    before, after = plan.state_bytes[131072]
    assert before == (2 * 2 * 131072 * 8 * 64 + 8) * 16  # keys and values, and the position
    assert after / before == pytest.approx(0.25, abs=0.01)
    heads = 2 * 4096 * BILLION["vocab_size"] * BILLION["hidden_size"]
    layers = 2 * 4096 * 16 * (2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192)
    assert plan.flops[0] > heads + layers and plan.flops[0] < 1.5 * (heads + layers)
    assert [plan.stages[i].memory["teacher"] for i in (0, 1)] == [4 * count] * 2
    assert "embedding and head are tied, and are trained tied" in plan.warnings


def test_teachers_of_our_own_and_in_shards(tmp_path):
    model = zoo.from_config("transformer-tiny")
    model.save_pretrained(tmp_path / "own", max_shard_size="20KB")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    blueprint = read_blueprint(str(tmp_path / "own"))
    assert blueprint.layout == "zoo" and {n: t.shape for n, t in blueprint.tensors.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert make_plan(blueprint, load_recipe("zoo")).weights["copied"].tensors == len(blueprint.tensors)


def test_a_repeated_head_is_dropped_by_name(tmp_path):
    write_headers(tmp_path, KINDS["qwen2"][0](KINDS["qwen2"][1]))
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8:])
    text = json.dumps(header | {"lm_head.weight": header["model.embed_tokens.weight"]}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert read_blueprint(str(tmp_path)).report.dropped == {"lm_head.weight": "tied to the embedding"}


def test_what_a_mixer_cannot_take_is_dropped_with_a_reason(folder):
    plan = make_plan(read_blueprint(str(folder)), load_recipe("zoo", {"mixer": "mamba", "window": None, "sinks": 0, "keep": 0}))
    assert plan.weights["dropped"].tensors == sum(plan.dropped.values()) > 0
    assert any("MambaMixer has no q_proj.weight" in why for why in plan.dropped)
    assert any("layers [0, 1] lose attention" in warning for warning in plan.warnings)
    assert any("mamba has no rotary positions" in warning for warning in plan.warnings)


def test_tokens_and_settings_say_where_they_are_from(folder):
    plan = make_plan(read_blueprint(str(folder)), load_recipe("lawcat", {"align.batch": 4}), 0.5)
    assert plan.settings["align.batch"] == (4, "command line")
    assert plan.settings["align.tokens"] == (1_000_000, "size of the teacher x 0.5")
    assert plan.settings["align.length"] == (1024, "recipe") and plan.settings["align.warmup"][1] == "default"
    assert "otherwise than the paper: the feature map is Hedgehog's" in plan_text(plan) and not plan.missing


def test_rows_within_the_window_teach_nothing(folder):
    plan = make_plan(read_blueprint(str(folder)), load_recipe("zoo", {"align.length": 64}))
    assert plan.missing == ["stage 'align': rows of 64 tokens never leave the window of 64; lengthen them"]
    assert "window of 32640" in make_plan(read_blueprint(str(folder)), load_recipe("ahn")).missing[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "is missing; a plan reads the headers"),
        (lambda path: path.write_bytes(b"short"), "has no readable header"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"), "missing 2?\\d"),
    ],
)
def test_files_that_do_not_fit_are_named(folder, spoil, message):
    spoil(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_blueprint(str(folder))


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder with a config\.json"):
        read_blueprint(str(tmp_path))
    zoo.from_config("gla-tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a zoo transformer"):
        read_blueprint(str(tmp_path))
    assert all(tensor.device.type == "meta" for tensor in read_headers(tmp_path).values())


def test_too_little_memory_names_what_would_fit(folder):
    blueprint, method = read_blueprint(str(folder)), settled(load_recipe("zoo"), 10**6)
    needs = [sum(stage.memory.values()) for stage in make_plan(blueprint, method).stages]
    check_memory(blueprint.model, method, max(needs))
    with pytest.raises(ValueError, match=r"stage 'distil' needs about 0\.3 GiB.*--set distil\.accumulate=2 would fit"):
        check_memory(blueprint.model, method, max(needs) - 1)
    with pytest.raises(
        ValueError, match=r"stage 'align' needs.*even --set align\.accumulate=8 --set align\.length=256 needs.*smaller teacher"
    ):
        check_memory(blueprint.model, method, 1000)
    less = load_recipe("zoo", {"distil.accumulate": 2})
    assert make_plan(blueprint, less).stages[1].memory["activations"] == make_plan(blueprint, method).stages[1].memory["activations"] // 2


def test_what_is_smaller_changes_as_little_as_it_can(folder):
    blueprint, method = read_blueprint(str(folder)), settled(load_recipe("zoo", {"distil.batch": 4}), 10**6)
    forms = list(smaller(method.stages[1], 64))
    assert [settings for _, settings in forms] == [
        "--set distil.accumulate=2", "--set distil.accumulate=4", "--set distil.accumulate=4 --set distil.length=256",
        "--set distil.accumulate=4 --set distil.length=256 --set distil.train=mixer",
    ]  # fmt: skip
    every = [method.stages[1], *(form for form, _ in forms)]
    needs = [sum(make_plan(blueprint, replace(method, stages=(stage,))).stages[0].memory.values()) for stage in every]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    only = replace(method, stages=method.stages[1:])
    for need, (_, settings) in zip(needs[1:], forms, strict=True):
        with pytest.raises(ValueError, match=f"{settings} would fit"):
            check_memory(blueprint.model, only, need)


def test_times_follow_from_a_speed(folder):
    blueprint, method = read_blueprint(str(folder)), load_recipe("zoo", {"align.length": 96})
    plan = make_plan(blueprint, method)
    text = plan_text(plan, assumed(plan.stages[1].flops / 7200))
    assert f"{plan.stages[1].flops:.3g} FLOPs, 2 h" in text and "as you said" in text
    assert "at 30 TFLOP/s, assumed; --device measures it" in plan_text(plan)
    pace = measure_pace(blueprint, method, "cpu", repeats=1)
    assert pace.rate > 1e3 and "measured on this machine: a layer with a row of 96 tokens" in pace.describe()
    assert [duration(seconds) for seconds in (3.21, 200, 7200, 10**6)] == ["3.21 s", "3.33 min", "2 h", "11.6 days"]
    with pytest.raises(ValueError, match="a speed of 0 FLOP/s is none"):
        assumed(0)


def test_the_command_refuses_what_does_not_fit_and_tells_times(folder, capsys):
    assert main(["convert", "plan", str(folder), "--memory", "0.2"]) == 2
    assert "--set distil.accumulate=" in capsys.readouterr().err
    assert main(["convert", "plan", str(folder), "--memory", "2", "--speed", "1e12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] == {stage["name"]: stage["flops"] / 1e12 for stage in found["stages"]}


def test_plans_in_the_documents_are_what_plan_says():
    script = importlib.import_module("zoo.scripts.write_plans")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    assert script.written(text) == text, "run python scripts/write_plans.py"


def test_a_choice_can_be_bound(folder):
    def strip(**changes) -> str:
        return make_plan(read_blueprint(str(folder)), load_recipe("zoo", changes)).strip

    assert strip(keep=2) == "X A X A" and strip(keep=2, must_keep=[0]) == "A A X X"
    assert strip(keep=2, must_keep=[0], min_gap=3) == "A X X A"
    with pytest.raises(ValueError, match="cannot keep 3 of 4 layers"):
        strip(keep=3, min_gap=2)
    with pytest.raises(ValueError, match="keep names the layers that stay, so must_keep and min_gap bind nothing"):
        strip(keep=[1], min_gap=2)


def test_an_even_spread():
    assert even(30, 3) == (5, 15, 25) and even(4, 4) == (0, 1, 2, 3) and even(8, 0) == ()
    assert [amount(n) for n in (5, 2048, 3 * 2**20, 2**31)] == ["5 B", "2.00 KiB", "3.00 MiB", "2.00 GiB"]
    assert all(f"\n{name} " in "\n" + recipes_text() for name in ("zoo", "radlads", "ahn"))


def test_fresh_weights_are_those_nothing_fills(folder):
    teacher = load_teacher(str(folder))
    config = layout_config(teacher, load_recipe("radlads"))
    fresh = blank_student(teacher, config)[1].fresh
    assert fresh and all(".mixer." in name for name in fresh)
    assert not any(name.endswith(("mixer.q_proj.weight", "mixer.out_proj.weight")) for name in fresh)

"""Conversion, on teachers of a few thousand random weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import zoo
from zoo.convert import (
    align,
    convert,
    converted_layers,
    load_teacher,
    most_sensitive,
    prepare_teacher,
    pydoc_topics,
    seed_student,
    token_rows,
    window_sensitivity,
)
from zoo.convert.report import Row, table, write_report
from zoo.convert.texts import HELD_OUT
from zoo.convert.weights import fit
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.perplexity import perplexity
from zoo.evaluate.speed import generation_speed, state_bytes

WINDOW, SINKS = 6, 2
MIXERS = ("gla", "gated_deltanet")


@pytest.fixture
def teacher():
    """Three layers of two grouped heads, with weights large enough that attention is not flat."""
    return make_teacher()


def make_teacher(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=3, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.to(dtype).eval().requires_grad_(False)


def tokens(rows: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(2))


def test_a_student_that_keeps_all_layers_is_its_teacher(teacher):
    student = convert(teacher, mixer="gla", keep=range(3))
    assert converted_layers(student) == []
    assert torch.equal(student(tokens()).logits, teacher(tokens()).logits)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_window_wider_than_the_text_starts_as_the_teacher(teacher, mixer):
    exact = make_teacher(torch.float64)(tokens()).logits
    student = convert(teacher, mixer=mixer, keep=[1], window=64)
    assert converted_layers(student) == [0, 2]
    assert_close(student(tokens()).logits, teacher(tokens()).logits, exact, "student whose window hides nothing")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("window", [WINDOW, None])
def test_every_weight_is_accounted_for(mixer, window):
    teacher = make_teacher(qkv_bias=True, tie_word_embeddings=True)
    student = convert(teacher, mixer=mixer, keep=[1], window=window, sinks=SINKS)
    account = seed_student(teacher, student)
    parts = [account.copied, account.seeded, set(account.dropped)]
    assert set().union(*parts) == set(teacher.state_dict())
    assert sum(map(len, parts)) == len(teacher.state_dict()), "a weight is counted twice"
    replaced = {"model.layers.0.mixer", "model.layers.2.mixer"}
    assert {key.rsplit(".", 1)[0].split(".mixer")[0] + ".mixer" for key in account.fresh} == replaced
    if window is None:
        assert set(account.dropped) == {f"{part}.{role}_proj.bias" for part in replaced for role in "qkv"}
        assert account.seeded == {f"{part}.{role}_proj.weight" for part in replaced for role in ("q", "k", "v", "out")}
    else:
        assert account.copied == set(teacher.state_dict())


def test_grouped_heads_are_repeated_for_the_heads_they_serve():
    weight = torch.arange(4.0).repeat_interleave(2).unsqueeze(1)  # 4 rows pairs: groups 0..3 of two channels each
    assert fit(weight, torch.Size([16, 1]), 2, 8).flatten().tolist() == [g for g in range(4) for _ in range(4)]
    with pytest.raises(ValueError, match="number and width of heads"):
        fit(weight, torch.Size([12, 1]), 2, 8)
    with pytest.raises(ValueError, match="number and width of heads"):
        fit(weight, torch.Size([24, 1]), 2, 8)  # 12 blocks that 8 heads cannot share


def test_weights_that_do_not_fit_are_dropped_with_a_reason(teacher, caplog):
    student = convert(teacher, mixer="mamba", window=None)
    dropped = seed_student(teacher, student).dropped
    assert "MambaMixer has no q_proj.weight" in dropped["model.layers.0.mixer.q_proj.weight"]
    assert "number and width of heads" in dropped["model.layers.0.mixer.out_proj.weight"]
    assert "12 teacher weights have no place" in caplog.text


def test_the_recurrent_branch_holds_the_teachers_projections(teacher):
    source, branch = teacher.model.layers[0].mixer, convert(teacher, mixer="gla").model.layers[0].mixer.branches[1]
    assert torch.equal(branch.q_proj.weight, source.q_proj.weight)
    assert torch.equal(branch.out_proj.weight, source.out_proj.weight)
    heads = branch.k_proj.weight.unflatten(0, (4, -1))
    groups = source.k_proj.weight.unflatten(0, (2, -1))
    for h in range(4):
        assert torch.equal(heads[h], groups[h // 2])


@pytest.mark.parametrize("mixer", MIXERS)
def test_alignment_lowers_the_loss_and_leaves_the_rest_alone(teacher, mixer):
    student = convert(teacher, mixer=mixer, keep=[1], window=WINDOW, sinks=SINKS)
    before = {name: p.clone() for name, p in student.named_parameters()}
    history = align(teacher, student, tokens(), steps=30, learning_rate=1e-2)
    assert len(history) == 30
    for first, last in zip(history[0], history[-1], strict=True):
        assert last < first
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".0.mixer." in name or ".2.mixer." in name}
    assert not teacher.model.layers[0].mixer._forward_hooks
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_a_loss_that_is_not_finite_names_its_layer(teacher):
    student = convert(teacher, mixer="gla", keep=[0], window=WINDOW)
    with torch.no_grad():
        student.model.layers[2].mixer.branches[1].v_proj.weight[0, 0] = float("nan")
    before = student.model.layers[1].mixer.gate.clone()
    with pytest.raises(FloatingPointError, match="layer 2"):
        align(teacher, student, tokens(), steps=3)
    assert torch.equal(student.model.layers[1].mixer.gate, before), "the step that failed was taken"


def test_sensitivity_finds_the_layer_that_looks_far(teacher):
    with torch.no_grad():  # layers 0 and 2 attend to nothing in particular, and add nothing
        for index in (0, 2):
            teacher.model.layers[index].mixer.out_proj.weight.zero_()
    scores = window_sensitivity(teacher, tokens(), window=WINDOW, sinks=SINKS)
    assert most_sensitive(scores, 1) == [1]
    assert scores[1] > max(scores[0], scores[2])
    assert most_sensitive([0.1, 0.3, 0.2], 2) == [1, 2]


def test_student_survives_saving_and_counts_its_state(teacher, tmp_path):
    student = convert(teacher, mixer="gla", keep=[1], window=WINDOW, sinks=SINKS)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits) and converted_layers(loaded) == [0, 2]
    grown = [state_bytes(model, 32768) - state_bytes(model, 1024) for model in (teacher, loaded)]
    assert grown[0] == 3 * grown[1] > 0, "only the kept layer's cache grows"


def test_report_writes_the_numbers_and_the_picture(tmp_path):
    rows = [Row(name, 10.0 + i, {1024: 2**20, 8192: 2**23}, 300.0, 30.0) for i, name in enumerate(("teacher", "converted", "aligned"))]
    numbers, picture = write_report(rows, {"align": [[1.0, 2.0], [0.5, 1.0]], "distil": [[3.0]]}, {"seed": 1}, tmp_path)
    content = json.loads(numbers.read_text())
    assert content["rows"][2]["perplexity"] == 12.0
    assert content["rows"][0]["state_bytes"] == {"1024": 2**20, "8192": 2**23}
    assert content["losses"]["align"][1] == [0.5, 1.0]
    assert content["seed"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = table(rows)
    assert "11.00" in text and "8.0 MiB" in text and len(text.splitlines()) == 5


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(teacher):
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
    value = torch.tensor(perplexity(teacher, tokens()))
    assert_close(value, value, torch.tensor(value.item()).double(), "itself")
    assert round(value.item(), 3) == 256.0
    assert perplexity(teacher, tokens(), batch=3) == pytest.approx(value.item())


def test_speed_and_state_are_positive(teacher):
    speed = generation_speed(teacher, tokens(1, 16), tokens=2)
    assert speed.read > 0 and speed.write > 0
    assert state_bytes(teacher, 1024) >= 3 * 2 * 1024 * 16 * 4  # 3 layers, k and v, 2 groups of 8 channels in float32


def test_held_out_topics_are_not_trained_on():
    training, held = pydoc_topics()
    assert len(held) == len(HELD_OUT)
    trained = {paragraph for text in training for paragraph in text.split("\n\n")}
    assert not trained & {p for text in held for p in text.split("\n\n") if p.strip()}
    assert sum(map(len, training)) > 5 * sum(map(len, held))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "gla", "keep": [3]}, r"layers \[3\], the teacher has 0 to 2"),
        ({"mixer": "gla", "keep": [-1]}, "the teacher has 0 to 2"),
        ({"mixer": "glaa"}, "did you mean 'gla'"),
        ({"mixer": "hybrid"}, "no mixer 'hybrid'"),
        ({"mixer": "gla", "mixer_args": {"num_heads": 3}}, "num_heads"),
        ({"mixer": "gla", "window": 0}, "window=0"),
    ],
)
def test_what_cannot_be_converted_says_why(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(teacher, **arguments)


def test_a_teacher_must_be_a_transformer(tmp_path):
    model = zoo.from_config("gla-tiny")
    with pytest.raises(ValueError, match=r"must be a zoo transformer.*gla"):
        convert(model, mixer="gla")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a zoo transformer"):
        load_teacher(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        prepare_teacher(tmp_path / "none.gguf", tmp_path / "folder")
    assert prepare_teacher(tmp_path, tmp_path / "folder") == str(tmp_path)


def test_too_little_text_is_an_error(teacher):
    class Tokenizer:
        eos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    with pytest.raises(ValueError, match="longest piece has 5 tokens, a row needs 8"):
        token_rows(Tokenizer(), ["abc", "abcde"], 8, join=False)
    assert token_rows(Tokenizer(), ["abc", "abcde"], 8, join=True).shape == (1, 8)
    with pytest.raises(ValueError, match="too short"):
        perplexity(teacher, tokens(1, 1))
    with pytest.raises(ValueError, match="too short to probe a window of 64"):
        window_sensitivity(teacher, tokens(), window=64, sinks=4)
    with pytest.raises(ValueError, match="0 rows of text"):
        align(teacher, convert(teacher, mixer="gla"), tokens()[:0], steps=1)


def test_parallel_refuses_what_cannot_be_a_branch():
    for branches, message in (
        (["gla"], "at least two"),
        (["gla", "hybrid"], "'hybrid' cannot be a branch"),
        (["gla", {"mixer": "parallel"}], "'parallel' cannot be a branch"),
        (["gla", {"num_heads": 2}], "names no mixer"),
        (["gla", {"mixer": "gla", "head": 2}], r"branch 1 \(gla\).*head"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.from_config("parallel-tiny", branches=branches)


def test_parallel_starts_as_its_first_branch_and_takes_its_traits_from_all():
    mixer = zoo.from_config("parallel-tiny").model.layers[0].mixer
    x = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mixer(x)[0], mixer.branches[0](x)[0])
    assert mixer.traits.constant_state
    wide = zoo.from_config("parallel-tiny", branches=[{"mixer": "transformer", "num_heads": 2}, {"mixer": "gla", "num_heads": 2}])
    assert not wide.model.layers[0].mixer.traits.constant_state

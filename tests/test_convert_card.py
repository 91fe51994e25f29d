"""Result cards: what they measure, the gates before a conversion is called done, and students that are worse on purpose."""

import json
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.__main__ import main
from zoo.convert import convert
from zoo.convert import gates as gates_module
from zoo.convert.card import Bench, Measures, gap_closed
from zoo.convert.control import CONTROLS
from zoo.convert.gates import GATES, run_gates
from zoo.convert.teacher import RELEASES, licence
from zoo.evaluate.compare import agreement, compare_writing, greedy, read_rows, repeated_bigrams
from zoo.evaluate.perplexity import perplexity
from zoo.train.run import byte_tokenizer

SMALL = ["--set", "align.length=32", "--set", "align.batch=2", "--set", "align.tokens=128", "--set", "window=8", "--keep-attention", "1"]
SMALL += ["--set", "distil.length=32", "--set", "distil.batch=2", "--set", "distil.tokens=128"]
QUICK = ["--distances", "32", "400", "--trials", "1", "--prompts", "2", "--written", "6"]


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=2, vocab_size=257)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def student(teacher):
    torch.manual_seed(3)
    return convert(teacher, mixer="gla", keep=[1], window=6, sinks=2).requires_grad_(False)


def tokens(rows: int = 3, length: int = 40, most: int = 257) -> torch.Tensor:
    return torch.randint(0, most, (rows, length), generator=torch.Generator().manual_seed(2))


# -- measures ------------------------------------------------------------------------------------------------------------


def test_bigrams_that_were_there_before():
    rows = tokens(4, 60, most=5)
    pairs = [list(pairwise(row)) for row in rows.tolist()]
    expected = [[pair in row[:i] for i, pair in enumerate(row)] for row in pairs]
    assert repeated_bigrams(rows).tolist() == expected and any(map(any, expected)) and not all(map(all, expected))


def test_repeated_and_other_tokens_make_up_the_whole(teacher):
    rows = tokens(most=9)
    found, share = read_rows(teacher, rows), repeated_bigrams(rows).double().mean()
    logs = torch.tensor(found, dtype=torch.float64).log()
    assert found.perplexity == pytest.approx(perplexity(teacher, rows), rel=1e-5)
    assert logs[0].item() == pytest.approx((share * logs[1] + (1 - share) * logs[2]).item(), rel=1e-6)
    assert read_rows(teacher, torch.arange(40)[None]).repeated is None
    with pytest.raises(ValueError, match="the text is too short"):
        read_rows(teacher, tokens(1, 1))


def test_agreement_is_the_divergence_of_the_predictions(teacher, student):
    found, wanted = (F.log_softmax(model(tokens()).logits.double(), -1) for model in (student, teacher))
    both = agreement(teacher, student, tokens())
    assert both.divergence == pytest.approx((wanted.exp() * (wanted - found)).sum(-1).mean().item(), rel=1e-4)
    assert both.top1 == (found.argmax(-1) == wanted.argmax(-1)).double().mean().item()
    assert agreement(teacher, teacher, tokens()).top1 == 1 and abs(agreement(teacher, teacher, tokens()).divergence) < 1e-6


def test_continuations_are_greedy_and_compared_by_place(student):
    written = greedy(student, tokens(2, 12), 7)
    assert torch.equal(written, student.generate(tokens(2, 12), max_new_tokens=7, do_sample=False, eos_token_id=None)[:, 12:])
    ours = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12]])
    theirs = torch.tensor([[1, 2, 3, 5, 1, 2, 3, 4], [6, 6, 7, 8, 9, 10, 11, 12]])
    found = compare_writing(ours, theirs)
    assert (found.equal, found.prefix, found.repetition) == (14 / 16, 1.5, 1 / 10)


def test_the_teacher_beside_itself_agrees(teacher):
    found = Bench(teacher, byte_tokenizer(), tokens(), Measures((32, 400), trials=1, prompts=2, written=6)).measure(teacher)
    assert found["equal"] == 1 and found["prefix"] == 6 and "divergence" not in found
    assert list(found["copying"]) == ["32", "400"] and list(found["passkey"]) == ["400"], "32 bytes have no room for the question"
    assert Bench(teacher, None, tokens(), Measures((32,), trials=1, prompts=2, written=6)).measure(teacher)["passkey"] == {}
    with pytest.raises(ValueError, match="a distance is at least the span"):
        Measures((16,))


def test_the_gap_is_counted_in_logarithms():
    models = {name: {"perplexity": value} for name, value in (("teacher", 10.0), ("final", 20.0), ("twin", 40.0))}
    assert gap_closed(models) == pytest.approx(0.5)


def test_licences_are_those_of_the_folder(tmp_path):
    assert licence(tmp_path) == "not stated in its folder"
    (tmp_path / "LICENSE.txt").write_text("free")
    assert licence(tmp_path) == "see its LICENSE.txt"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence(tmp_path) == "mit"
    assert all(licence(tmp_path / name) == text for name, text in RELEASES.items())


# -- gates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2", "qrwkv7"])
def test_gates_hold(teacher, mixer):
    torch.manual_seed(3)
    window = {"window": None, "inherit": ["num_kv_heads", "rope_theta"]} if mixer == "qrwkv7" else {"window": 6}
    assert run_gates(teacher, convert(teacher, mixer=mixer, keep=[1], **window), tokens(1, 50)) == dict.fromkeys(GATES)


def forgets(student):
    """Every call of the first mixer begins anew."""
    forward = student.model.layers[0].mixer.forward
    student.model.layers[0].mixer.forward = lambda x, state=None, packing=None: forward(x, None, packing)


def sees_pads(student):
    """Documents of a packed row run into one another."""
    forward = student.model.layers[0].mixer.forward
    student.model.layers[0].mixer.forward = lambda x, state=None, packing=None: forward(x, state, None)


def saves_another(student):
    kept = student.save_pretrained

    def save(folder):
        with torch.no_grad():
            student.lm_head.weight[0, 0] += 1
            kept(folder)
            student.lm_head.weight[0, 0] -= 1

    student.save_pretrained = save


@pytest.mark.parametrize(
    ("spoil", "failing"),
    [
        (forgets, {"step_by_step_is_the_whole", "prefill_and_steps_are_the_whole"}),
        (sees_pads, {"padded_is_alone"}),
        (saves_another, {"saved_and_loaded_is_equal"}),
    ],
)
def test_gates_fall(teacher, student, spoil, failing):
    spoil(student)
    found = run_gates(teacher, student, tokens(1, 50))
    assert failing <= {name for name, why in found.items() if why}
    assert not found["softmax_in_every_layer_is_the_teacher"]


def test_a_map_that_pairs_heads_wrongly_falls(teacher, student, monkeypatch):
    def wrong(*args, **kwargs):
        same = convert(*args, **kwargs)
        weight = same.model.layers[0].mixer.k_proj.weight
        weight.data = weight.data.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
        return same

    monkeypatch.setattr(gates_module, "convert", wrong)
    found = run_gates(teacher, student, tokens(1, 50))
    assert "the logits differ" in found.pop("softmax_in_every_layer_is_the_teacher") and not any(found.values())
    with pytest.raises(ValueError, match="a row of at least 48 tokens"):
        run_gates(teacher, student, tokens(1, 20))


# -- the card ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 23) + (" " if i % 5 == 0 else "") for i in range(4000)))
    assert main(["convert", "run", str(tmp_path / "teacher"), *SMALL, "--data", str(text), "-o", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_a_card_says_what_was_asked_and_found(finished, capsys):
    assert main(["convert", "card", str(finished), "--twin", *QUICK]) == 0
    assert "every gate holds: done" in capsys.readouterr().out
    card, report = (json.loads((finished / name).read_text()) for name in ("card.json", "report.json"))
    models = card["models"]
    assert list(models) == ["teacher", "converted", "after align", "final", "twin"] and card["done"] and card["tokens"] == 256
    known = {row["name"]: row["perplexity"] for row in report["rows"]}
    measured = {
        name: models[ours]["perplexity"] for name, ours in (("teacher", "teacher"), ("converted", "converted"), ("distil", "final"))
    }
    assert measured == pytest.approx({name: known[name] for name in measured}, rel=1e-5), "the card measures otherwise than the run"
    assert set(models["final"]) == {*models["converted"], "gap_closed"} == {*models["twin"], "gap_closed"}
    assert card["data_hash"] == report["data_hash"] and card["job"]["seed"] == 0 and len(card["replaced"]) == 1
    text = (finished / "card.md").read_text()
    assert "# teacher to gated_deltanet" in text and "Every gate holds." in text and "passkey at 400" in text and "| twin |" in text
    assert (finished / "card.png").read_bytes().startswith(b"\x89PNG")
    twin = json.loads((finished / "twin" / "report.json").read_text())
    assert twin["control"] == "scratch" and twin["kept"] == report["kept"] and list(twin["losses"]) == ["scratch"]
    (finished / "twin" / "model.safetensors").touch()
    assert main(["convert", "card", str(finished), "--twin", *QUICK]) == 0
    again = json.loads((finished / "card.json").read_text())["models"]["twin"]
    assert again["perplexity"] == models["twin"]["perplexity"]


def test_a_student_that_fails_a_gate_is_not_done(finished, monkeypatch, capsys):
    monkeypatch.setitem(GATES, "padded_is_alone", lambda case: case.check(case.whole(9)[2] + 1, "rows"))
    assert main(["convert", "card", str(finished), *QUICK]) == 1
    assert "not done, for these gates do not hold" in capsys.readouterr().out
    assert not json.loads((finished / "card.json").read_text())["done"]
    assert "**Not done**" in (finished / "card.md").read_text() and "padded is alone: fails" in (finished / "card.md").read_text()


def test_only_what_is_finished_has_a_card(finished, tmp_path, capsys):
    assert main(["convert", "card", str(tmp_path)]) == 2
    assert "has no conversion.json" in capsys.readouterr().err
    (finished / "report.json").unlink()
    assert main(["convert", "card", str(finished)]) == 2
    assert f"is not finished; go on with: resume {finished}" in capsys.readouterr().err


# -- controls ------------------------------------------------------------------------------------------------------------


def test_controls_take_away_what_they_name(teacher, student):
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    changed = {}
    for name, spoil in CONTROLS.items():
        student.load_state_dict(before)
        torch.manual_seed(0)
        spoil(teacher, student)
        changed[name] = {key for key, weight in student.state_dict().items() if not torch.equal(weight, before[key])}
    assert changed["mispaired"] == {f"model.layers.0.mixer.branches.1.{part}_proj.weight" for part in "kv"}
    assert changed["mispaired"] < changed["uncopied"] < changed["scratch"]
    assert {key.split("mixer.")[0] for key in changed["uncopied"]} == {"model.layers.0."}
    fresh = zoo.from_config(student.config)
    for part in [*fresh.modules(), *fresh.parameters(), *fresh.buffers()]:
        part._is_hf_initialized = False
    torch.manual_seed(0)
    fresh.initialize_weights()
    torch.manual_seed(0)
    CONTROLS["scratch"](teacher, student)
    assert all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in student.state_dict().items())


def test_wrong_pairs_are_of_the_group_that_remains():
    teacher = zoo.from_config("transformer-tiny", num_hidden_layers=1)
    student = convert(teacher, mixer="gla", window=None)
    CONTROLS["mispaired"](teacher, student)
    groups = teacher.model.layers[0].mixer.k_proj.weight.unflatten(0, (2, -1))
    heads = student.model.layers[0].mixer.k_proj.weight.unflatten(0, (4, -1))
    assert all(torch.equal(heads[h], groups[h % 2]) for h in range(4))
    with pytest.raises(ValueError, match="none can be paired wrongly"):
        CONTROLS["mispaired"](teacher, convert(teacher, keep=[0]))

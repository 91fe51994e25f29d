"""Which layers stay: scores by every signal against their definition, the choice against all choices, hybrids of one alignment."""

import itertools
import json
import random

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.__main__ import main
from zoo.convert import convert, converted_layers
from zoo.convert.recipe import SELECTORS
from zoo.convert.select import ALIGNED, FLOOR, LARGEST, SIGNALS, hybrid, layer_scores, most_sensitive, select_layers
from zoo.train.run import byte_tokenizer

SMALL = ["--set", "align.length=32", "--set", "align.batch=2", "--set", "align.tokens=192", "--set", "window=8"]
SMALL += ["--set", "distil.length=24", "--set", "distil.batch=2", "--set", "distil.tokens=96"]


def pushed(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture
def teacher():
    return pushed(zoo.from_config("transformer-tiny", num_hidden_layers=3, vocab_size=257))


@pytest.fixture
def aligned(teacher):
    torch.manual_seed(3)
    return pushed(convert(teacher, mixer="gla", keep=(), window=6, sinks=2))


def tokens(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(2))


def divergence(student, teacher, start: int = 0) -> float:
    found, wanted = (F.log_softmax(model(tokens()).logits[:, start:], -1) for model in (student, teacher))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def test_a_swap_is_a_hybrid_with_one_layer_replaced(teacher, aligned):
    scores = layer_scores("swap", teacher, tokens(), aligned=aligned)
    for index in range(3):
        kept = [other for other in range(3) if other != index]
        with torch.no_grad():
            changed = hybrid(teacher, teacher_but_mixers(teacher, aligned), kept)
        assert scores[index] == pytest.approx(divergence(changed, teacher), rel=1e-4)


def teacher_but_mixers(teacher, aligned):
    """The aligned mixers among the teacher's other weights, as an alignment leaves them."""
    state = aligned.state_dict() | {name: weight for name, weight in teacher.state_dict().items() if ".mixer." not in name}
    aligned.load_state_dict(state)
    return aligned


def test_both_is_the_sum_of_shares(teacher):
    window, restore, both = (torch.tensor(layer_scores(s, teacher, tokens(), window=6, sinks=2)) for s in ("window", "restore", "both"))
    torch.testing.assert_close(both, window / window.abs().sum() + restore / restore.abs().sum())


def test_a_restored_layer_is_a_hybrid_that_keeps_one(teacher, aligned):
    scores = layer_scores("restore", teacher, tokens(), aligned=aligned)
    whole = divergence(aligned, teacher)
    for index in range(3):
        assert scores[index] == pytest.approx(whole - divergence(hybrid(teacher, aligned, [index]), teacher), rel=1e-3, abs=1e-6)


def test_without_an_aligned_student_windows_give_way(teacher):
    """The same, on a student whose every layer is the teacher's attention with a window."""

    def narrow(kept: list[int]):
        fields = {"inherit": ["num_kv_heads"], "mixer_args": {"window": 6, "sinks": 2}}
        return convert(teacher, mixer="transformer", keep=kept, window=None, **fields)

    scores = layer_scores("restore", teacher, tokens(), window=6, sinks=2)
    whole = divergence(narrow([]), teacher, 12)
    for index in range(3):
        assert scores[index] == pytest.approx(whole - divergence(narrow([index]), teacher, 12), rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="too short to probe a window of 20"):
        layer_scores("restore", teacher, tokens(), window=20, sinks=2)


def test_a_bypass_leaves_the_mixer_out(teacher):
    scores = layer_scores("bypass", teacher, tokens())
    for index in range(3):
        silent = convert(teacher, keep=range(3))
        silent.model.layers[index].mixer.out_proj.weight.data.zero_()
        assert scores[index] == pytest.approx(divergence(silent, teacher), rel=1e-4)


def test_recall_weighs_what_is_copied_against_all_else(teacher, aligned):
    scores = layer_scores("recall", teacher, tokens(), aligned=aligned, seed=4)
    drawn = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(4))
    right = []
    for ids, start in ((drawn.repeat(1, 2), 20), (tokens(), 1)):
        chances = []
        for index in range(3):
            one = hybrid(teacher, teacher_but_mixers(teacher, aligned), [other for other in range(3) if other != index])
            found = F.softmax(one(ids).logits[:, start - 1 : -1], -1)
            chances.append(found.gather(-1, ids[:, start:, None]).mean())
        right.append(torch.stack(chances))
    recall, rest = (found.max() - found for found in right)
    assert scores == pytest.approx((recall / rest.clamp_min(FLOOR)).clamp_max(LARGEST).tolist(), rel=2e-3)


def test_scores_leave_the_models_alone(teacher, aligned):
    before = [model(tokens()).logits for model in (teacher, aligned)]
    for signal in SIGNALS:
        assert len(layer_scores(signal, teacher, tokens(), aligned=aligned, window=6, sinks=2)) == 3
    assert all(torch.equal(model(tokens()).logits, known) for model, known in zip((teacher, aligned), before, strict=True))
    assert set(SELECTORS) == {"none", *SIGNALS}


def test_the_choice_is_the_best_there_is():
    draw = random.Random(0)
    for _ in range(200):
        layers = draw.randint(1, 9)
        scores, count, gap = [draw.random() for _ in range(layers)], draw.randint(0, layers), draw.randint(1, 3)
        must = draw.sample(range(layers), draw.randint(0, min(2, layers)))
        possible = [
            some
            for some in itertools.combinations(range(layers), count)
            if set(must) <= set(some) and all(b - a >= gap for a, b in itertools.pairwise(some))
        ]
        if possible:
            best = max(possible, key=lambda some: sum(scores[index] for index in some))
            assert most_sensitive(scores, count, must_keep=must, min_gap=gap) == list(best)
        else:
            with pytest.raises(ValueError, match="cannot keep"):
                most_sensitive(scores, count, must_keep=must, min_gap=gap)


def test_uniform_is_even_unless_something_binds():
    scores = [0.0] * 30
    assert select_layers("uniform", scores, 3) == [5, 15, 25]
    assert select_layers("uniform", scores, 3, must_keep=[0])[0] == 0
    assert select_layers("uniform", scores, 0) == []


def test_one_alignment_serves_every_hybrid(teacher, aligned):
    assert torch.equal(hybrid(teacher, teacher_but_mixers(teacher, aligned), range(3))(tokens()).logits, teacher(tokens()).logits)
    assert torch.equal(hybrid(teacher, aligned, [])(tokens()).logits, aligned(tokens()).logits)
    one = hybrid(teacher, aligned, [1])
    assert converted_layers(one) == [0, 2]
    assert torch.equal(one.model.layers[1].mixer.q_proj.weight, teacher.model.layers[1].mixer.q_proj.weight)
    assert torch.equal(one.model.layers[2].mixer.gate, aligned.model.layers[2].mixer.gate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signal": "swop"}, "no signal 'swop' .did you mean 'swap'"),
        ({"signal": "swap"}, "run --keep-attention 0 --stages align"),
        ({"signal": "window", "window": 20}, "too short to probe a window of 20"),
    ],
)
def test_what_cannot_be_scored_says_why(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_scores(arguments.pop("signal"), teacher, tokens(), **arguments)


def test_students_that_do_not_fit_are_refused(teacher, aligned):
    with pytest.raises(ValueError, match="has replaced 2 of 3 layers; align all"):
        layer_scores("swap", teacher, tokens(), aligned=hybrid(teacher, aligned, [1]))
    carrying = convert(teacher, mixer="qrwkv7", keep=(), window=None, inherit=["num_kv_heads", "rope_theta"])
    with pytest.raises(ValueError, match="qrwkv7 hands values from layer to layer"):
        layer_scores("restore", teacher, tokens(), aligned=carrying)
    with pytest.raises(ValueError, match=r"layers \[3\] cannot be kept, the teacher has 0 to 2"):
        hybrid(teacher, aligned, [3])
    for wrong, message in (({"must_keep": [4]}, r"must_keep names layers \[4\]"), ({"min_gap": 0}, "min_gap is 0")):
        with pytest.raises(ValueError, match=message):
            most_sensitive([1.0, 2.0], 1, **wrong)


def test_the_command_aligns_once_and_begins_from_it(teacher, tmp_path, capsys):
    folder, text = str(tmp_path / "teacher"), tmp_path / "text.txt"
    teacher.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text.write_text("".join(chr(97 + i * i % 23) + (" " if i % 5 == 0 else "") for i in range(3000)))
    run = ["convert", "run", folder, *SMALL, "--data", str(text)]
    assert main([*run, "--keep-attention", "0", "--select", "recall", "--stages", "align", "-o", str(tmp_path / "aligned")]) == 0
    capsys.readouterr()
    chosen = ["--aligned", str(tmp_path / "aligned"), "--keep-attention", "1", "2", "--length", "32", "--data", str(text)]
    assert main(["convert", "select", folder, "--signal", "swap", *chosen, "--json", "-o", str(tmp_path / "selected")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "selected" / "layers.json").read_text())
    assert len(found["scores"]) == 3 and list(map(len, found["kept"].values())) == [1, 2]
    assert (tmp_path / "selected" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert main(["convert", "select", folder, "--keep-attention", "1", "--window", "8", "--length", "32", "--data", str(text)]) == 0
    assert "A stays, u would at even distances" in capsys.readouterr().out
    begin = ["--keep-attention", "1", "--select", "restore", "--aligned", str(tmp_path / "aligned")]
    assert main([*run, *begin, "-o", str(tmp_path / "hybrid")]) == 0
    assert "looking for 1 layers to keep, by restore" in (shown := capsys.readouterr().out) and "align:" not in shown
    report = json.loads((tmp_path / "hybrid" / "report.json").read_text())
    assert report["aligned"] == str(tmp_path / "aligned") and list(report["losses"]) == ["distil"]
    assert len(converted_layers(zoo.from_pretrained(tmp_path / "hybrid"))) == 2
    assert main([*run, *begin, "--mixer", "gla", "-o", str(tmp_path / "other")]) == 2
    assert "was aligned with mixer='gated_deltanet', this conversion asks for 'gla'" in capsys.readouterr().err
    assert main([*run, "--keep-attention", "1", "--select", "recall", "-o", str(tmp_path / "other")]) == 2
    assert "reads an aligned student" in capsys.readouterr().err and set(ALIGNED) < set(SIGNALS)
    assert main([*run, "--stages", "algin", "-o", str(tmp_path / "other")]) == 2
    assert "stage to take is 'algin' (did you mean 'align'?)" in capsys.readouterr().err and not (tmp_path / "other").exists()

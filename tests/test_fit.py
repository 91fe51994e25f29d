"""The stages of a conversion: what they compare, which weights they move, and that a stage goes on where it was left."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.convert import convert
from zoo.convert.fit import Fit, order, pace, trained
from zoo.convert.objectives import ERRORS, divergence
from zoo.convert.recipe import Stage
from zoo.evaluate.closeness import assert_close

FITS = [
    ("mixer_out", "l2", "mixer"),
    ("mixer_out", "cos", "mixer"),
    ("logits", "fkl", "all"),
    ("logits", "rkl", "new"),
    ("tokens", "ce", "all"),
]


def make_teacher(**fields):
    torch.manual_seed(0)
    model = zoo.from_config("transformer-tiny", num_hidden_layers=3, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def tokens(rows: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(2))


def make_fit(target: str, loss: str, train: str, steps: int = 6, mixer: str = "gla", **fields) -> Fit:
    teacher = make_teacher()
    torch.manual_seed(3)
    student = convert(teacher, mixer=mixer, keep=[1], window=None, **fields)
    fresh = {name for name, _ in student.named_parameters() if ".0.mixer.decay" in name or ".2.mixer.norm" in name}
    stage = Stage("s", target, loss, train, tokens=steps * 48, length=24, batch=2, learning_rate=3e-3, warmup=0.1)
    return Fit(teacher, student, tokens(), stage, fresh=fresh, seed=5)


@pytest.mark.parametrize(("target", "loss", "train"), FITS)
def test_a_stage_lowers_its_loss_and_moves_what_it_names(target, loss, train):
    fit = make_fit(target, loss, train, steps=12)
    before = {name: p.clone() for name, p in fit.student.named_parameters()}
    fit.run()
    assert len(fit.history) == 12 and fit.done
    assert sum(map(sum, fit.history[-3:])) < sum(map(sum, fit.history[:3]))
    moved = {name for name, p in fit.student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(fit.names) == set(trained(fit.student, fit.stage, set(fit.names)))
    assert {name.split(".")[2] for name in moved if ".mixer." in name} == ({"0", "2"} if train != "all" else {"0", "1", "2"})
    assert all(p.requires_grad and p.grad is None for p in fit.student.parameters())
    assert not any(block.mixer._forward_hooks for block in fit.teacher.model.layers)


@pytest.mark.parametrize(("target", "loss", "train"), FITS)
def test_a_stage_goes_on_where_it_was_left(target, loss, train, tmp_path):
    whole = make_fit(target, loss, train)
    whole.run()
    first = make_fit(target, loss, train)
    first.run(after=lambda fit: len(fit.history) == 2)
    assert not first.done
    torch.save({"weights": first.student.state_dict(), "state": first.state()}, tmp_path / "left.pt")
    left = torch.load(tmp_path / "left.pt", weights_only=True)
    second = make_fit(target, loss, train)
    second.student.load_state_dict(left["weights"])
    second.load(left["state"])
    assert second.run() == whole.history
    for name, weight in second.student.state_dict().items():
        assert torch.equal(weight, whole.student.state_dict()[name]), name


@pytest.mark.parametrize("reverse", [False, True])
def test_divergence_in_chunks_is_the_plain_one(reverse):
    def drawn(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    heads = [torch.nn.Linear(8, 2**18, bias=False) for _ in range(2)]  # so large a vocabulary takes 64 rows a chunk
    for seed, head in enumerate(heads):
        head.weight.data = drawn(seed, 2**18, 8).float()
    expected, results = drawn(3, 2, 40, 8).float(), []
    for chunked in (True, False):
        states = drawn(4, 2, 40, 8).float().requires_grad_()
        if chunked:
            value = divergence(states, expected, *heads, 2**18, reverse=reverse)
        else:
            found, wanted = (F.log_softmax(head(x), -1) for head, x in zip(heads, (states, expected), strict=True))
            p, q = (found, wanted) if reverse else (wanted, found)
            loss = (p.exp() * (p - q)).sum(-1).mean()
            value = loss.item()
            loss.backward()
        results.append((value, states.grad, heads[0].weight.grad.clone()))
        heads[0].weight.grad = None
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and results[0][0] > 0
    for ours, plain in zip(results[0][1:], results[1][1:], strict=True):
        assert (ours - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize(("target", "loss"), [("mixer_out", "mse"), ("logits", "fkl"), ("tokens", "ce")])
def test_a_batch_in_several_passes_is_the_batch(target, loss):
    whole, parts = make_fit(target, loss, "mixer"), make_fit(target, loss, "mixer")
    parts.stage = replace(parts.stage, accumulate=2)
    for fit in (whole, parts):
        fit.optimizer = torch.optim.SGD([{"params": fit.optimizer.param_groups[0]["params"], "pace": 1.0}], lr=1.0)
        fit.run(after=lambda fit: len(fit.history) == 1)
    assert parts.history[0] == pytest.approx(whole.history[0], rel=1e-5)
    before = dict(make_fit(target, loss, "mixer").student.named_parameters())
    for name, p in whole.student.named_parameters():
        moved = (p - before[name]).abs().max()
        assert (dict(parts.student.named_parameters())[name] - p).abs().max() <= 1e-4 * moved, name
    assert any(not torch.equal(p, before[name]) for name, p in whole.student.named_parameters())


def test_errors_are_what_their_names_say():
    y, target = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 0.0]]])
    assert ERRORS["mse"](y, target) == 12.5
    assert ERRORS["l2"](y, target).item() == pytest.approx(5 / 2**0.5)
    assert ERRORS["rel_mse"](y, 2 * y).item() == pytest.approx(0.25)
    assert ERRORS["cos"](y, -y).item() == pytest.approx(2.0)


def test_mixers_that_hand_on_values_are_aligned_with_them():
    teacher = make_teacher(qkv_bias=True)
    torch.manual_seed(3)
    student = convert(teacher, mixer="qrwkv7", keep=[1], window=None, inherit=["num_kv_heads", "rope_theta", "qkv_bias"])
    stage = Stage("align", "mixer_out", "l2", "mixer", tokens=20 * 48, length=24, batch=2, learning_rate=3e-3)
    fit = Fit(teacher, student, tokens(), stage)
    fit.run(after=lambda fit: len(fit.history) == 1)
    x, seen = {}, []
    hooks = [
        block.mixer.register_forward_hook(lambda m, i, o, n=n: x.update({n: (i[0], o[0])})) for n, block in enumerate(teacher.model.layers)
    ]
    torch.manual_seed(3)
    alone = convert(teacher, mixer="qrwkv7", keep=[1], window=None, inherit=["num_kv_heads", "rope_theta", "qkv_bias"])
    picked = next(order(4, 2, 1, 0))
    with torch.no_grad():
        teacher.model(tokens()[picked])
        carry = None
        for index in (0, 2):
            y, _, carry = alone.model.layers[index].mixer(x[index][0], None, None, carry)
            seen.append(ERRORS["l2"](y, x[index][1]))
    for hook in hooks:
        hook.remove()
    ours = torch.tensor(fit.history[0])
    assert_close(ours, torch.stack(seen), torch.stack(seen).double(), "losses of layers that share values")
    fit.run()
    assert sum(fit.history[-1]) < sum(fit.history[0])


def test_the_rate_rises_and_falls():
    stage = Stage("s", "logits", "fkl", "all", tokens=1, learning_rate=1e-3, final_rate=1e-5, warmup=0.1)
    rates = [pace(step / 100, 1 / 100, stage) for step in range(100)]
    assert rates[0] < 0.1 and max(rates) == rates[10] == 1.0 and rates[-1] == pytest.approx(0.01, abs=2e-3)
    flat = Stage("s", "logits", "fkl", "all", tokens=1, schedule="constant", warmup=0.1)
    assert {pace(step / 100, 1 / 100, flat) for step in range(10, 100)} == {1.0}


def test_what_the_engine_lacks_is_refused():
    with pytest.raises(ValueError, match="cannot be run yet: stage 's': target 'block_out'"):
        make_fit("block_out", "l2", "mixer")
    with pytest.raises(ValueError, match="0 weights to train"):
        fit = make_fit("logits", "fkl", "new")
        Fit(fit.teacher, fit.student, fit.rows, fit.stage)


def test_a_loss_that_is_not_finite_is_named_and_not_taken():
    fit = make_fit("logits", "fkl", "all")
    with torch.no_grad():
        fit.student.model.norm.weight[0] = float("nan")
    before = fit.student.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match="stage 's': the loss is nan at step 1"):
        fit.run()
    assert torch.equal(fit.student.lm_head.weight, before)

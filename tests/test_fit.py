"""The stages of a conversion: what they compare, which weights they move, and that a stage goes on where it was left."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo import registry
from zoo.convert import convert
from zoo.convert.fit import Fit, order, pace, plateau
from zoo.convert.maps import READ, operators_seen, weights_of
from zoo.convert.objectives import ERRORS, divergence
from zoo.convert.recipe import Stage
from zoo.convert.trainable import count_trained, trained
from zoo.evaluate.closeness import assert_close
from zoo.ops import OPS

HEDGEHOG = {"mixer": "linear_attention", "mixer_args": {"feature_map": "paired_softmax"}}
FITS = {  # name -> fields of the stage, and of the conversion
    "l2": ({"loss": "l2"}, {}),
    "cosine": ({"loss": "cos", "schedule": "linear"}, {}),
    "blocks": ({"target": "block_out", "loss": "rel_mse", "train": "mixer+mlp", "schedule": "stable"}, {}),
    "pairs": ({"target": "block_out", "loss": "mse", "scope": 2}, {}),
    "whole": ({"target": "block_out", "loss": "cos", "scope": "model", "train": "mixer+attention+norms"}, {}),
    "student-forced": ({"loss": "mse", "inputs": "student", "scope": "model", "schedule": "plateau"}, {}),
    "step-by-step": ({"loss": "rel_mse", "inputs": "student"}, {}),
    "maps": ({"target": "attention_map", "loss": "xent", "train": "features"}, HEDGEHOG),
    "matrices": ({"target": "attention_map", "loss": "frobenius"}, {}),
    "carried": ({"loss": "l2", "scope": "model"}, {"mixer": "qrwkv7", "inherit": ["num_kv_heads", "rope_theta", "qkv_bias"]}),
    "divergence": ({"target": "logits", "loss": "fkl", "train": "all"}, {}),
    "reverse": ({"target": "logits", "loss": "rkl", "train": "new"}, {}),
    "both": ({"target": "logits", "loss": "ce+fkl", "train": "mixer+attention+norms+embeddings", "kl_weight": 0.5}, {}),
    "untied": ({"target": "logits", "loss": "fkl", "train": "all", "untie": True}, {"tied": True}),
    "adapters": ({"target": "tokens", "loss": "ce", "train": "lora", "lora_rank": 2}, {}),
    "some-adapters": (
        {
            "target": "logits",
            "loss": "fkl",
            "train": "lora+new",
            "lora_rank": 2,
            "lora_alpha": 8.0,
            "lora_targets": ["q_proj", "channel_mixer.up_proj"],
        },
        {"tied": True},
    ),
    "tokens": ({"target": "tokens", "loss": "ce", "train": "all"}, {}),
    "half": ({"target": "block_out", "loss": "l2", "precision": "bfloat16"}, {}),
    "half-logits": ({"target": "logits", "loss": "fkl", "train": "all", "precision": "bfloat16"}, {}),
}
each = pytest.mark.parametrize("name", FITS)


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


def fit_of(name: str, steps: int = 6, **changes) -> Fit:
    fields, conversion = FITS[name]
    return make_fit(steps=steps, **conversion, **fields | changes)


def make_fit(
    target: str = "mixer_out", loss: str = "mse", train: str = "mixer", steps: int = 6, mixer: str = "gla", mixer_args: dict | None = None,
    inherit: tuple = (), tied: bool = False, **fields,
) -> Fit:  # fmt: skip
    teacher = make_teacher(tie_word_embeddings=tied, qkv_bias=bool(inherit))
    torch.manual_seed(3)
    student = convert(teacher, mixer=mixer, keep=[1], window=None, mixer_args=mixer_args, inherit=inherit)
    fresh = {name for name, _ in student.named_parameters() if ".0.mixer.decay" in name or ".2.mixer.norm" in name}
    given = {"learning_rate": 3e-3, "warmup": 0.1} | fields
    stage = Stage("s", target, loss, train, tokens=steps * 48, length=24, batch=2, **given)
    return Fit(teacher, student, tokens(), stage, fresh=fresh, seed=5)


@each
def test_a_stage_lowers_its_loss_and_moves_what_it_names(name):
    fit = fit_of(name, steps=12)
    before = {name: p.clone() for name, p in fit.student.named_parameters()}
    assert set(fit.names) == set(trained(fit.student, fit.stage, set(fit.names)))
    fit.run()
    assert len(fit.history) == 12 and fit.done
    assert sum(map(sum, fit.history[-3:])) < sum(map(sum, fit.history[:3]))
    moved = {name for name, p in fit.student.named_parameters() if not torch.equal(p, before[name])}
    read = fit.stage.target == "attention_map"  # weights are compared, not what is read with them
    assert moved == {name for name in fit.names if not (read and any(part in name for part in ("v_proj", "out_proj", "gate_proj", "norm")))}
    assert all(p.requires_grad and p.grad is None for p in fit.student.parameters())
    assert not any(block.mixer._forward_hooks for model in (fit.teacher, fit.student) for block in model.model.layers)
    assert {p.dtype for p in fit.student.parameters()} == {torch.float32}
    fit.close()
    plain = make_fit(**FITS[name][1]).student
    assert fit.student.state_dict().keys() == plain.state_dict().keys() and fit.student.config.to_dict() == plain.config.to_dict()


@each
def test_a_stage_goes_on_where_it_was_left(name, tmp_path):
    whole = fit_of(name)
    whole.run()
    first = fit_of(name)
    first.run(after=lambda fit: len(fit.history) == 2)
    assert not first.done
    torch.save({"weights": first.student.state_dict(), "state": first.state()}, tmp_path / "left.pt")
    left = torch.load(tmp_path / "left.pt", weights_only=True)
    second = fit_of(name)
    second.student.load_state_dict(left["weights"])
    second.load(left["state"])
    assert second.run() == whole.history
    for fit in (whole, second):
        fit.close()
    for name, weight in second.student.state_dict().items():
        assert torch.equal(weight, whole.student.state_dict()[name]), name


def test_adapters_are_merged():
    fit = fit_of("adapters")
    fit.run()
    before = fit.student(tokens()).logits
    exact = copy.deepcopy(fit.student).double()(tokens()).logits
    fit.close()
    assert_close(fit.student(tokens()).logits, before, exact, "adapters merged")
    assert {name.split(".")[2] for name in fit.names} == {"0", "2"}, "adapters outside the replaced layers"
    assert {name.split(".lora_")[0].rsplit(".")[-1] for name in fit.names} == set(registry.get("gla").mixer.lora_targets)


def test_an_untied_head_is_dropped_for_the_embedding():
    fit = fit_of("untied")
    assert count_trained(make_fit(tied=True).student, fit.stage, set()) == sum(p.numel() for p in fit.parameters.values())
    fit.run()
    assert not torch.equal(fit.student.lm_head.weight, fit.student.model.embed_tokens.weight)
    fit.close()
    assert fit.student.lm_head.weight is fit.student.model.embed_tokens.weight and fit.student.config.tie_word_embeddings


@pytest.mark.parametrize("mixer", ["transformer", "linear_attention", "gla", "retnet", "delta_net"])
def test_weights_are_what_the_output_is_made_with(mixer):
    layer = make_teacher().model.layers[0].mixer if mixer == "transformer" else make_fit(mixer=mixer).student.model.layers[0].mixer
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        weights = weights_of(layer, lambda: layer(x))
    assert not any("execute" in op.__dict__ for op in OPS.values())
    assert weights.shape == (2, 4, 10, 10) and torch.equal(weights, weights.tril())
    if mixer in ("transformer", "linear_attention"):
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
    found = []
    with torch.no_grad(), operators_seen(lambda op, tensors, options: found.append((op, tensors, options))):
        layer(x)
    op, inputs, options = next(each for each in found if each[0].name in READ)
    with torch.no_grad():
        o, _ = op.execute(inputs, options, None, "reference")
        wide = {name: t if t is None or not t.is_floating_point() else t.double() for name, t in inputs.items()}
        exact, _ = op.execute(wide, options, None, "reference")
    v = inputs["v"].repeat_interleave(4 // inputs["v"].shape[2], dim=2)
    assert_close(torch.einsum("bhtj,bjhv->bthv", weights, v), o, exact, f"weights of {mixer} times values")


def test_maps_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="do not sum to one"):
        make_fit("attention_map", "xent").run()
    with pytest.raises(ValueError, match=r"GSAMixer has no one set of weights.*calls 2 of the operators"):
        make_fit("attention_map", "frobenius", mixer="gsa", mixer_args={"num_slots": 4}).run()
    with pytest.raises(ValueError, match="finds no weight in this student"):
        make_fit(train="features")
    with pytest.raises(ValueError, match="has none"):
        fit = make_fit()
        Fit(fit.teacher, convert(fit.teacher, mixer="gla", keep=range(3)), fit.rows, fit.stage)
    with pytest.raises(ValueError, match="swallows small updates"):
        Fit(fit.teacher, convert(fit.teacher.bfloat16(), mixer="gla"), fit.rows, fit.stage)


@pytest.mark.parametrize(("reverse", "both"), [(False, False), (True, False), (False, True)])
def test_divergence_in_chunks_is_the_plain_one(reverse, both):
    def drawn(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    heads = [torch.nn.Linear(8, 2**18, bias=False) for _ in range(2)]  # so large a vocabulary takes 64 rows a chunk
    for seed, head in enumerate(heads):
        head.weight.data = drawn(seed, 2**18, 8).float()
    expected, results = drawn(3, 2, 40, 8).float(), []
    labels = torch.randint(0, 2**18, (2, 40), generator=torch.Generator().manual_seed(5)) if both else None
    for chunked in (True, False):
        states = drawn(4, 2, 40, 8).float().requires_grad_()
        if chunked:
            value = divergence(states, expected, *heads, 2**18, reverse=reverse, labels=labels, weight=0.25 if both else 1.0)
        else:
            found, wanted = (F.log_softmax(head(x), -1) for head, x in zip(heads, (states, expected), strict=True))
            p, q = (found, wanted) if reverse else (wanted, found)
            loss = (p.exp() * (p - q)).sum(-1).mean()
            if both:
                loss = 0.25 * loss + F.nll_loss(found[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            value = loss.item()
            loss.backward()
        results.append((value, states.grad, heads[0].weight.grad.clone()))
        heads[0].weight.grad = None
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5) and results[0][0] > 0
    for ours, plain in zip(results[0][1:], results[1][1:], strict=True):
        assert (ours - plain).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize(("target", "loss"), [("mixer_out", "mse"), ("block_out", "mse"), ("logits", "fkl"), ("tokens", "ce")])
def test_a_batch_in_several_passes_is_the_batch(target, loss):
    whole, parts = make_fit(target, loss), make_fit(target, loss)
    parts.stage = replace(parts.stage, accumulate=2)
    for fit in (whole, parts):
        fit.optimizer = torch.optim.SGD([{"params": fit.optimizer.param_groups[0]["params"], "pace": 1.0}], lr=1.0)
        fit.run(after=lambda fit: len(fit.history) == 1)
    assert parts.history[0] == pytest.approx(whole.history[0], rel=1e-5)
    before = dict(make_fit(target, loss).student.named_parameters())
    for name, p in whole.student.named_parameters():
        moved = (p - before[name]).abs().max()
        assert (dict(parts.student.named_parameters())[name] - p).abs().max() <= 1e-4 * moved, name
    assert any(not torch.equal(p, before[name]) for name, p in whole.student.named_parameters())


@pytest.mark.parametrize(("target", "loss"), [("mixer_out", "mse"), ("attention_map", "frobenius"), ("logits", "fkl")])
def test_gradients_are_clipped_by_what_learns_by_itself(target, loss):
    fit = make_fit(target, loss, clip=1e-3)
    before = {name: p.detach().clone() for name, p in fit.parameters.items()}
    fit.optimizer = torch.optim.SGD([{"params": list(fit.parameters.values()), "pace": 1.0}], lr=1.0)
    fit.stage = replace(fit.stage, learning_rate=1.0, warmup=0.0)
    fit.run(after=lambda fit: len(fit.history) == 1)
    moved = {layer: [p - before[name] for name, p in fit.parameters.items() if f".{layer}.mixer" in name] for layer in (0, 2)}
    norms = [torch.cat([each.flatten() for each in some]).norm().item() for some in moved.values()]
    assert (norms if target != "logits" else [sum(n * n for n in norms) ** 0.5]) == pytest.approx(
        [1e-3] * (1 + (target != "logits")), rel=1e-3
    )


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
    line = replace(stage, schedule="linear")
    assert pace(0.55, 0.01, line) == pytest.approx((1 + 0.01) / 2) and pace(0.1, 0.01, line) == 1.0
    stable = replace(stage, schedule="stable")
    assert {pace(step / 100, 1 / 100, stable) for step in range(10, 91)} == {1.0} and pace(0.95, 0.01, stable) == pytest.approx(0.505)


def test_a_plateau_lowers_the_rate():
    falling, flat = [[1.0 / (step + 1)] for step in range(50)], [[1.0]] * 50
    assert plateau(falling, 50) == 1.0 and plateau([], 50) == 1.0
    assert [plateau(flat[:steps], 50) for steps in (11, 12, 22, 23)] == [1.0, 0.1, 0.1, pytest.approx(0.01)]
    assert plateau(flat, 5000) == 1.0, "a hundredth of the steps is one reading"


def test_what_the_engine_lacks_is_refused():
    with pytest.raises(ValueError, match="finds no weight"):
        fit = make_fit("logits", "fkl", "new")
        Fit(fit.teacher, fit.student, fit.rows, fit.stage)


@pytest.mark.parametrize("name", ["blocks", "student-forced", "matrices"])
def test_a_layer_that_is_not_finite_is_named(name):
    fit = fit_of(name)
    with torch.no_grad():
        fit.student.model.layers[2].mixer.q_proj.weight[0, 0] = float("nan")
    before = fit.student.model.layers[0].mixer.q_proj.weight.clone()
    with pytest.raises(FloatingPointError, match="layer 2: the loss is nan at step 1"):
        fit.run()
    assert torch.equal(fit.student.model.layers[0].mixer.q_proj.weight, before)


def test_a_loss_that_is_not_finite_is_named_and_not_taken():
    fit = make_fit("logits", "fkl", "all")
    with torch.no_grad():
        fit.student.model.norm.weight[0] = float("nan")
    before = fit.student.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match="stage 's': the loss is nan at step 1"):
        fit.run()
    assert torch.equal(fit.student.lm_head.weight, before)

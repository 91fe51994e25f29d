"""Arithmetic that is put off: the same numbers, in as few launches as it takes, whatever happens to tensors in between."""

import copy
from contextlib import nullcontext
from types import MethodType
from unittest import mock

import pytest
import torch
from test_fused import DEVICE, pytestmark  # noqa: F401 (on which devices)
from torch.nn import functional as F

from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject
from zoo.few_rows import FewRows
from zoo.kernels.deferral import VALUES, Deferral, current, fused
from zoo.layers import GatedNorm, RMSNorm

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts numbers off where it should round them to bfloat16
LAUNCH = "zoo.kernels.deferral.fused.launch"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr("zoo.few_rows.DEVICE", DEVICE)
    with torch.no_grad():
        yield


def random(*shape, seed: int = 0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def both(compute, *given, launches: int | None = None):
    """`compute` at once and put off, with copies of the same tensors; holds the numbers to the rule, and returns the latter."""
    exact, plain = (compute(*(x.clone().to(dtype) for x in given)) for dtype in (torch.float64, given[0].dtype))
    with mock.patch(LAUNCH, side_effect=fused.launch) as called, Deferral(DEVICE):
        result = compute(*(x.clone() for x in given))
    assert launches is None or called.call_count == launches
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (result, plain, exact)), strict=True)
    for i, (one, other, wide) in enumerate(pairs):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert_close(one.cpu().float(), other.cpu().float(), wide.cpu().double(), f"result {i}")
    return result


CALLS = {
    "add": lambda a, b: torch.add(a, b, alpha=0.3), "sub": lambda a, b: torch.sub(a, b, alpha=2), "rsub": lambda a, b: 1.5 - a,
    "mul": lambda a, b: a * b, "div": lambda a, b: a / (b.abs() + 1), "neg": lambda a, b: -a, "abs": lambda a, b: a.abs(),
    "exp": lambda a, b: a.exp(), "expm1": lambda a, b: (a * 1e-3).expm1(), "log": lambda a, b: a.abs().log(),
    "log1p": lambda a, b: (a.abs() * 1e-3).log1p(), "sqrt": lambda a, b: a.abs().sqrt(), "rsqrt": lambda a, b: (a.abs() + 0.1).rsqrt(),
    "reciprocal": lambda a, b: (a.abs() + 0.1).reciprocal(), "sin": lambda a, b: a.sin(), "cos": lambda a, b: a.cos(),
    "pow": lambda a, b: (a**2, a.abs() ** 0.5, a**3), "sigmoid": lambda a, b: a.sigmoid(), "silu": lambda a, b: F.silu(a),
    "tanh": lambda a, b: ((a * 0.1).tanh(), (a * 3).tanh()), "relu": lambda a, b: F.relu(a),
    "gelu": lambda a, b: (F.gelu(a), F.gelu(a, approximate="tanh")), "softplus": lambda a, b: F.softplus(4 * a),
    "log_sigmoid_forward": lambda a, b: F.logsigmoid(4 * a), "maximum": torch.maximum, "minimum": torch.minimum,
    "clamp": lambda a, b: (a.clamp(-0.5, 0.5), a.clamp(min=0.1), a.clamp(max=0.1)), "clamp_min": lambda a, b: a.clamp_min(0.2),
    "clamp_max": lambda a, b: a.clamp_max(0.2), "where": lambda a, b: torch.where(a > b, a, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.7),
    "lerp": lambda a, b: (torch.lerp(a, b, b.sigmoid()), torch.lerp(a, a + b, 0.3), torch.lerp(a, a + b, 0.7)),
    "eq": lambda a, b: torch.where(a == b, a, b), "ne": lambda a, b: torch.where(a != b, a, b),
    "lt": lambda a, b: torch.where(a < 0.1, a, b), "le": lambda a, b: torch.where(a <= b, a, b),
    "gt": lambda a, b: torch.where(a > 0.1, a, b), "ge": lambda a, b: torch.where(a >= b, a, b),
    "_to_copy": lambda a, b: a.to(torch.float64 if b.dtype == torch.float64 else torch.float32) + 0, "clone": lambda a, b: a.clone(),
}  # fmt: skip


def test_every_operation_has_a_call():
    assert CALLS.keys() == VALUES.keys()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_operations(dtype):
    """All of them side by side."""

    def compute(a, b):
        results = [call(a, b) for call in CALLS.values()]
        return [x for one in results for x in (one if isinstance(one, tuple) else (one,))]

    both(compute, random(2, 1, 3, 5, dtype=dtype), random(3, 5, seed=1, dtype=dtype), launches=1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, y: (x.mean(-1, keepdim=True) * x, (x * y).sum(-1), x.amax(-1)),
        lambda x, y: x.transpose(1, 2).reshape(2, -1) + 1,
        lambda x, y: torch.cat([x[..., 2:] * 2, y.expand_as(x)[..., :2]], dim=-1) + 1,
        lambda x, y: torch.stack([x, x + 1], dim=1).unbind(1)[1] * 2,
        lambda x, y: (x + y).flatten(1).unflatten(1, (2, -1)).sum(-1),
        lambda x, y: x.exp().transpose(-1, -2).contiguous().mean(-1),
        lambda x, y: (x + 1).split([1, 3], dim=-1)[1] * y[..., 1:].float(),
        lambda x, y: x[:, :, :1] + y.exp().exp().exp().exp().exp().exp().exp().exp()[:, :2].sigmoid(),
    ],
)
def test_layouts(compute):
    both(compute, random(2, 2, 3, 4), random(1, 3, 4, seed=1) / 9)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rows, width", [(1, 2048), (2, 700), (3, 40), (8, 12), (1, 4100)])
def test_norm_products_gate_and_sum(rows, width, dtype):
    """A channel mixer in its block: where the norm is small it is part of the products, the residual always is part of one."""

    def compute(x, norm, up, gate, bias, down):
        with FewRows():
            n = x.float() if x.dtype == HALF else x
            n = (n * (n * n).mean(-1, keepdim=True).add(1e-5).rsqrt() * norm).to(x.dtype)
            return x + F.linear(F.silu(F.linear(n, gate, bias)) * F.linear(n, up), down)

    given = (
        random(rows, 1, width, dtype=dtype),
        random(width, seed=1, dtype=dtype),
        *(random(9, width, seed=s, dtype=dtype) / width**0.5 for s in (2, 3)),
    )
    given += random(9, seed=4, dtype=dtype), random(width, 9, seed=5, dtype=dtype)
    exact, plain = (compute_plainly(*(x.to(kind) for x in given)) for kind in (torch.float64, dtype))
    with mock.patch(LAUNCH, side_effect=fused.launch) as called:
        result = compute(*given)
    assert_close(result.cpu().float(), plain.cpu().float(), exact.cpu(), "block")
    small = width <= 4096 and rows * width <= 2048
    assert called.call_count == (2 if small else 3)


def compute_plainly(x, norm, up, gate, bias, down):
    n = x if x.dtype == torch.float64 else x.float()
    n = (n * (n * n).mean(-1, keepdim=True).add(1e-5).rsqrt() * norm).to(x.dtype)
    return x + F.linear(F.silu(F.linear(n, gate, bias)) * F.linear(n, up), down)


def test_norms_are_put_off():
    for norm in (RMSNorm(12), GatedNorm(12, groups=3, kind="layer", bias=True)):
        with mock.patch(LAUNCH, side_effect=fused.launch) as called, Deferral(DEVICE):
            x = random(2, 1, 12)
            result = norm.to(DEVICE)(x + 1)
        assert called.call_count == 1
        assert_close(result.cpu(), norm(x + 1).cpu(), copy.deepcopy(norm).double()(x.double() + 1).cpu(), "norm")


def test_what_is_overwritten_was_read_before():
    def compute(x, y):
        doubled, state = x * 2, y * 1
        before = state + x
        state.copy_(doubled)
        after = state + x
        x.mul_(3)
        state[1:].fill_(7)
        return before, doubled, after, x, state

    both(compute, random(3, 4), random(3, 4, seed=1))


def test_what_nobody_can_see_is_not_written():
    x = random(2, 4)
    with Deferral(DEVICE) as deferral:
        y = ((x * 2).exp() + 1)[:, 1:]
        x + 5
        deferral.flush = lambda flush=deferral.flush: (needed.extend(deferral.nodes), flush())
        needed = []
    assert [node.needed for node in needed] == [False, False, True, False]
    torch.testing.assert_close(y, ((x * 2).exp() + 1)[:, 1:])


def test_what_was_put_off_when_something_failed_is_forgotten():
    with pytest.raises(ZeroDivisionError), Deferral(DEVICE):
        random(2, 4) * 2 / (1 // 0)
    assert current() is None


class Doubled(torch.nn.Linear):
    """As somebody's adapter is: a linear map and something more."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change, rows, launches",
    [("none", 1, 2), ("none", 8, 2), ("none", 9, 1), ("outside", 1, 0), ("class", 3, 0), ("forward", 2, 2), ("hook", 2, 2)],
)
def test_who_multiplies_few_rows(change, rows, launches):
    """A gated channel mixer is two launches, in which whatever else layers do has room; unless nobody knows a layer's kind."""
    mixer = Subject("gla").model("base").layers[0].channel_mixer.to(DEVICE)
    up = mixer.up_proj
    if change == "class":
        mixer.up_proj = Doubled(up.in_features, up.out_features, bias=False, device=DEVICE)
        mixer.up_proj.weight = up.weight
    elif change == "forward":
        up.forward = MethodType(lambda layer, x: torch.nn.Linear.forward(layer, x) + 1, up)
    elif change == "hook":
        up.register_forward_hook(lambda module, args, y: y - 1)
    x = Subject("gla").inputs(rows, 1).to(DEVICE)
    plain, exact = mixer(x)[0], copy.deepcopy(mixer).double()(x.double())[0]
    with mock.patch(LAUNCH, side_effect=fused.launch) as called, nullcontext() if change == "outside" else FewRows(mixer):
        result = mixer(x)[0]
    assert called.call_count == launches
    assert_close(result.cpu(), plain.cpu(), exact.cpu(), change)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rows, width, sizes, launches", [(1, 2100, (5, 3), 1), (3, 12, (4, 1, 6), 1), (8, 40, (2, 3, 4, 5, 1), 1), (9, 12, (2, 3), 0)]
)
def test_maps_of_one_input_are_one_launch(rows, width, sizes, launches, bias):
    layers = [torch.nn.Linear(width, size, bias=bias).to(DEVICE) for size in sizes]
    x = random(rows, 1, width)
    plain = [layer(x) for layer in layers]
    with mock.patch(LAUNCH, side_effect=fused.launch) as called, FewRows():
        result = [layer(x) for layer in layers]
    assert called.call_count == launches
    for layer, y, other in zip(layers, result, plain, strict=True):
        assert_close(y.cpu(), other.cpu(), layer.double()(x.double()).cpu(), f"{layer.out_features} columns")

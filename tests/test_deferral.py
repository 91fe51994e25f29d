"""Arithmetic that is put off: the same numbers, in as few launches as it takes, whatever happens to tensors in between."""

import copy
import threading
from contextlib import nullcontext
from types import MethodType
from unittest import mock

import pytest
import torch
from test_fused import DEVICE, pytestmark  # noqa: F401 (on which devices)
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject
from zoo.few_rows import FewRows
from zoo.kernels.deferral import Deferral, current, fused
from zoo.kernels.deferral.operations import VALUES
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
    with mock.patch(LAUNCH, side_effect=fused.launch) as called, FewRows():
        result = compute(*(x.clone() for x in given))
    assert launches is None or called.call_count == launches
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (result, plain, exact)), strict=True)
    for i, (one, other, wide) in enumerate(pairs):
        assert one.dtype == other.dtype and one.shape == other.shape and lies(one) == lies(other)
        assert_close(one.cpu().float(), other.cpu().float(), wide.cpu().double(), f"result {i}")
    return result


def lies(x):
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


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


@pytest.mark.parametrize("strange", [float("nan"), float("inf")])
def test_numbers_that_are_none(strange):
    """They stay what they are, wherever arithmetic meets them."""
    x = random(2, 5)
    x[0, 3] = strange
    skipped = () if strange != strange else ("gelu",)  # torch's differs from kind to kind of processor
    for name, call in {name: call for name, call in CALLS.items() if name not in skipped}.items():
        plain = call(x, x.flip(0))
        with Deferral(DEVICE):
            result = call(x, x.flip(0))
        torch.testing.assert_close(result, plain, equal_nan=True, msg=name)
    with Deferral(DEVICE):
        result = x.amax(-1), x.sum(-1)
    torch.testing.assert_close(result, (x.amax(-1), x.sum(-1)), equal_nan=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
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
        lambda x, y: (x.transpose(1, 3) + 1).transpose(1, 3).view(-1) * 2,
        lambda x, y: x[:, :, :1] + y.exp().exp().exp().exp().exp().exp().exp().exp()[:, :2].sigmoid(),
    ],
)
def test_layouts(compute, context):
    with context():
        both(compute, random(2, 2, 3, 4), random(1, 3, 4, seed=1) / 9)


def test_numbers_far_apart():
    """Few of them, in a memory with more than 32 bits count."""
    apart = 2**30
    memory = torch.empty(3 * apart + 8, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((4, 4), (apart, 2))
    given = random(4, 4, dtype=torch.float16)
    with Deferral(DEVICE):
        x.copy_(given)
        y = x * 2
    assert torch.equal(y, given * 2) and all(torch.equal(memory[i * apart :][:8:2], given[i]) for i in range(4))


@pytest.mark.parametrize(
    "rows, width, dtype",
    [(1, 2048, torch.float32), (2, 700, HALF), (3, 40, torch.float32), (8, 12, HALF), (1, 4100, HALF), (2, 700, torch.float32)],
)
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


class Wrapped(torch.Tensor):
    """Somebody's kind of tensor, whose numbers are another's."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*tree_map_only(Wrapped, lambda x: x.inner, args), **(kwargs or {}))


@torch.library.custom_op("deferral_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """An operator that looks into memory past torch."""
    return torch.from_dlpack(x.detach()).clone() * 2 if x.is_cuda else torch.from_numpy(x.detach().numpy() * 2)


def with_gradients(x, y):
    with torch.enable_grad():
        weight, scale = y.clone().requires_grad_(), x.new_ones(()).requires_grad_()
        total = (F.linear(x * scale, weight).sigmoid() + x.sum()).sum()
    total.backward()
    return total.detach(), weight.grad, scale.grad


def with_autocast(x, y):
    before = x * 3
    with torch.autocast(DEVICE, HALF):
        return F.linear(before, y), before + 1


def within_another(x, y):
    before = x + 1
    with Deferral(DEVICE):
        inner = before * y[0]
    return inner - before


def overwritten_in_other_ways(x, y):
    results = [x + 1, y * 2, (x + y[0]).transpose(0, 1)]
    torch.add(x, 1, out=y[:3])
    torch._foreach_mul_([x, y], 2)
    square = y[:, :3] + 0
    square[:3].copy_(square[:3].t().clone())
    x[:, 0], x[:, 1] = x[:, 1] * 2, x[:, 0] * 3
    x.data = y[:3] + 1
    return *results, x, y, square


SURROUNDINGS = {
    "gradients": with_gradients, "autocast": with_autocast, "another": within_another, "overwritten": overwritten_in_other_ways,
    "class": lambda x, y: Wrapped(x * 2) * 3 + y[0], "sparse": lambda x, y: (x * 2).relu().to_sparse().to_dense() + 1,
    "bits": lambda x, y: (x * 2).view(torch.int16).clone().view(x.dtype) + 1,
    "complex": lambda x, y: torch.view_as_real(torch.view_as_complex((x * 2).view(3, 2, 2)) * 1j) + 1,
    "device": lambda x, y: (x * 2).cpu().to(x.device) + (x * 3).to("meta").new_ones(1, device=x.device),
    "operator": lambda x, y: doubled(x + 1) + 1, "overlap": lambda x, y: (y[1:] + 1) * 2 + y[:-1].copy_(y[1:].clone()),
    "vmap": lambda x, y: torch.vmap(lambda row: (row * 2).softmax(-1) + row)(x + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_whatever_surrounds_it(name):
    both(SURROUNDINGS[name], random(3, 4), random(5, 4, seed=1))


@pytest.mark.parametrize("surrounding, kinds", [("gradients", []), ("paused", []), ("another", []), ("autocast", ["value"])])
def test_where_less_is_put_off(surrounding, kinds):
    """Of a product in a dtype that autocast chooses, what is number by number."""
    x, weight = random(3, 4), random(5, 4, seed=1)
    with FewRows() as mode:
        other = {
            "gradients": torch.enable_grad, "paused": lambda: mode.deferral.pause([x]), "another": lambda: Deferral("meta"),
            "autocast": lambda: torch.autocast(DEVICE, HALF),
        }[surrounding]  # fmt: skip
        with other():
            result = F.linear(x, weight) + 1
            assert [node.kind for node in mode.deferral.nodes] == kinds
        x * 2
        assert len(mode.deferral.nodes) == len(kinds) + 1
    with other():
        torch.testing.assert_close(result, F.linear(x, weight) + 1)


def test_what_was_put_off_when_something_failed_is_done_all_the_same():
    x = random(2, 4)
    with pytest.raises(ZeroDivisionError), Deferral(DEVICE):
        y = x * 2
        y / (1 // 0)
    assert current() is None and torch.equal(y, x * 2)


def test_what_cannot_be_done_is_not_tried_again():
    x = random(2, 4)
    with Deferral(DEVICE) as deferral:
        y = x * 2
        with mock.patch(LAUNCH, side_effect=RuntimeError), pytest.raises(RuntimeError):
            y.tolist() if DEVICE == "cuda" else y.sort()
        assert not deferral.nodes and not deferral.paused
        z = x * 3
    assert torch.equal(z, x * 3)


def test_threads_put_off_for_themselves():
    x, seen = random(2, 4), []

    def work():
        seen.append((current(), x + 1))
        with Deferral(DEVICE) as own, torch.no_grad():
            seen.append((len(own.nodes), x + 2, len(own.nodes)))

    with Deferral(DEVICE) as deferral:
        y = x * 2
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(deferral.nodes) == 1
    (nobody, plain), (before, late, after) = seen
    assert nobody is None and (before, after) == (0, 1)
    assert all(torch.equal(*pair) for pair in ((y, x * 2), (plain, x + 1), (late, x + 2)))


def test_compiled_functions_run_as_they_were_written():
    calls = []
    compute = torch.compile(lambda x: (x * 2).exp(), backend=lambda graph, given: lambda *args: calls.append(1) or graph(*args))
    x = random(2, 4)
    compute(x)
    with Deferral(DEVICE):
        y = compute(x + 1) + 1
    assert len(calls) == 1
    torch.testing.assert_close(y, ((x + 1) * 2).exp() + 1)


class Doubled(torch.nn.Linear):
    """As somebody's adapter is: a linear map and something more."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "change, rows, launches",
    [("none", 1, 2), ("none", 8, 2), ("none", 9, 1), ("outside", 1, 0), ("class", 3, 0), ("forward", 2, 0), ("hook", 2, 2)],
)
def test_who_multiplies_few_rows(change, rows, launches):
    """A gated channel mixer is two launches, in which whatever else layers do has room; unless nobody knows a layer's kind or method."""
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

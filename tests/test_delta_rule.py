"""What only the delta rules promise: one is a case of the other, a step is a token, segments compose."""

import pytest
import torch
from torch import Tensor

from zoo.evaluate.closeness import assert_close
from zoo.kernels import chunking
from zoo.kernels import delta_rule as family
from zoo.kernels.delta_rule import delta_rule, general, general_delta_rule
from zoo.ops import OPS

LENGTH = 71
MODULES = {"delta_rule": family, "general_delta_rule": general}
every_case = pytest.mark.parametrize("name, case", [(name, case) for name in MODULES for case in OPS[name].cases if case != "grouped"])


def draw(name: str, case: str) -> dict:
    return OPS[name].cases[case](torch.Generator().manual_seed(3), 2, LENGTH, torch.float64)


def single(x):
    return x.float() if isinstance(x, Tensor) else x


def token(given: dict, t: int) -> dict:
    """What `step` takes of token t."""
    return {n: x[:, t] if isinstance(x, Tensor) and x.ndim > 1 else x for n, x in given.items() if n != "state"}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_delta_rule_is_a_case_of_the_general_one(backend):
    given = draw("delta_rule", "channel")

    def as_general(q, k, v, beta, log_decay, state):
        written = beta.unsqueeze(-1) * k
        return general_delta_rule(q, written, v, -log_decay.exp() * k, written, log_decay, state=state, backend=backend)

    exact = delta_rule(**given, backend="reference")
    given = {n: single(x) for n, x in given.items()}
    plain = delta_rule(**given, backend="reference")
    for x, p, r in zip(as_general(**given), plain, exact, strict=True):
        assert_close(x, p, r, backend)


@every_case
def test_step_is_one_token(name, case):
    given = draw(name, case)
    exact, exact_state = OPS[name].call(**given, backend="reference")
    given = {n: single(x) for n, x in given.items()}
    plain, plain_state = OPS[name].call(**given, backend="reference")
    state = given["state"].clone()
    address = state.data_ptr()
    outs = [MODULES[name].step(**token(given, t), state=state) for t in range(LENGTH)]
    assert_close(torch.stack(outs, dim=1), plain, exact, "outputs")
    assert_close(state, plain_state, exact_state, "state")
    assert state.data_ptr() == address


@every_case
def test_summaries_compose(name, case):
    given = draw(name, case)
    _, exact = OPS[name].call(**given, backend="reference")
    given = {n: single(x) for n, x in given.items()}
    _, plain = OPS[name].call(**given, backend="reference")
    inputs = {n: x for n, x in given.items() if n not in ("q", "state")}

    def segment(piece: slice) -> tuple[Tensor, Tensor]:
        return MODULES[name].summarize(**{n: x[:, piece] if isinstance(x, Tensor) and x.ndim > 1 else x for n, x in inputs.items()})

    (first, change), (second, second_change) = segment(slice(0, 40)), segment(slice(40, LENGTH))
    combined = second @ first, second @ change + second_change
    for transition, contribution in (combined, segment(slice(0, LENGTH))):
        assert_close(transition @ given["state"] + contribution, plain, exact, "state")


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_beta_says_how_much_is_replaced(backend):
    """Under the key last written: 0 keeps the memory, 1 holds the new value alone, 2 reflects the old through the new."""
    given = draw("delta_rule", "plain")
    state, last_key, last_value = given["state"], given["k"][:, -1:], given["v"][:, -1:]

    def held(memory: Tensor) -> Tensor:
        return torch.einsum("bthk,bhkv->bthv", last_key, memory)

    for beta in (0.0, 1.0, 2.0):
        given["beta"] = torch.full_like(given["beta"], beta)
        _, before = delta_rule(**{n: x[:, :-1] if n in ("q", "k", "v", "beta") else x for n, x in given.items()}, backend=backend)
        _, after = delta_rule(**given, backend=backend)
        expected = (1 - beta) * held(before) + beta * last_value
        assert_close(held(after), expected, expected, f"beta {beta}")
        if beta == 0:
            assert torch.equal(after, state)


@pytest.mark.parametrize("form", ["head", "token", "channel"])
def test_segments_of_time_do_not_show(form, monkeypatch):
    """`chunked` works through long rows piece by piece; the pieces here are short enough to be many."""
    given = draw("delta_rule", form)
    exact = delta_rule(**given, backend="reference")
    given = {n: single(x) for n, x in given.items()}
    plain = delta_rule(**given, backend="reference")
    monkeypatch.setattr(chunking, "SEGMENT_CPU", 1)
    for x, p, r in zip(delta_rule(**given, backend="chunked"), plain, exact, strict=True):
        assert_close(x, p, r, form)

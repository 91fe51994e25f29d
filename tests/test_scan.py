"""Scans and long convolutions beyond what every operator is tested for."""

import pytest
import torch
from torch import Tensor

from zoo.evaluate.closeness import assert_close
from zoo.kernels import long_conv as convolution
from zoo.kernels import scan as scans
from zoo.kernels.long_conv import long_conv
from zoo.kernels.long_conv.chunked import fft_length
from zoo.kernels.scan import OP, scan, selective_scan, selective_step, selective_summarize
from zoo.kernels.scan.chunked import CHUNK
from zoo.kernels.scan.selective import OP as SELECTIVE
from zoo.ops import Packing

WIDE, NARROW = torch.float64, torch.float32
SCANS = pytest.mark.parametrize("case", OP.cases)
SELECTIVES = pytest.mark.parametrize("case", SELECTIVE.cases)


def drawn(op, case: str, length: int, batch: int = 2) -> dict:
    return op.cases[case](torch.Generator().manual_seed(3), batch, length, WIDE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def narrow(given: dict) -> dict:
    """The same inputs in single precision."""

    def convert(value):
        return value.to(torch.complex64 if value.is_complex() else NARROW) if isinstance(value, Tensor) else value

    return {n: convert(v) for n, v in given.items()}


def per_token(tensor: Tensor, piece) -> Tensor:
    return tensor[:, piece] if tensor.ndim > 2 else tensor


@SCANS
def test_scan_steps_in_place(case):
    given = drawn(OP, case, 7)
    expected, last = scan(**given)
    state, order = given["state"].clone(), range(7)[::-1] if given["reverse"] else range(7)
    place = state.data_ptr()
    for t in order:
        h = scans.step(given["x"][:, t], per_token(given["log_decay"], t), state=state)
        assert_close(h, expected[:, t], expected[:, t], f"token {t}")
    assert_close(state, last, last, "state")
    assert state.data_ptr() == place


@SCANS
def test_scan_segments_compose(case):
    given = drawn(OP, case, 30)
    exact = *scans.summarize(given["x"], given["log_decay"], reverse=given["reverse"]), scan(**given)[1]
    given = narrow(given)
    x, log_decay, reverse, state = (given[n] for n in ("x", "log_decay", "reverse", "state"))
    plain = *scans.summarize(x, log_decay, reverse=reverse), scan(**given)[1]
    parts = [scans.summarize(x[:, p], per_token(log_decay, p), reverse=reverse) for p in (slice(0, 11), slice(11, 30))]
    (a1, s1), (a2, s2) = parts[::-1] if reverse else parts
    result = a2 * a1, a2 * s1 + s2, a2 * (a1 * state + s1) + s2
    for name, r, p, e in zip(("decay", "contribution", "state"), result, plain, exact, strict=True):
        assert_close(r, p, e, name)


@SCANS
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_reverse_is_the_flipped_scan(case, backend):
    given = drawn(OP, case, 75) | {"reverse": False, "backend": backend}
    flipped = given | {"x": given["x"].flip(1), "reverse": True}
    if given["log_decay"].ndim == 3:
        flipped["log_decay"] = given["log_decay"].flip(1)
    (h, last), (h_flipped, last_flipped) = scan(**given), scan(**flipped)
    assert_close(h_flipped.flip(1), h, h, "states")
    assert_close(last_flipped, last, last, "last state")


def test_scan_gradient_differentiates_twice():
    given = drawn(OP, "complex-token", 5, batch=1)
    leaves = [given[n].clone().requires_grad_() for n in ("x", "log_decay", "state")]
    assert torch.autograd.gradgradcheck(lambda x, d, s: scan(x, d, state=s, backend="chunked"), leaves, fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_wide_tokens_are_scanned_in_one_pass(reverse):
    """Wide enough that the chunked scan keeps to one chunk; gradients too."""
    x, decay, state = normal(2, 19, 2500), -normal(2, 19, 2500, seed=1).abs(), normal(2, 2500, seed=2)
    results = {}
    for dtype, backend in ((WIDE, "reference"), (NARROW, "reference"), (NARROW, "chunked")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, decay, state)]
        outs = scan(leaves[0], leaves[1], state=leaves[2], reverse=reverse, backend=backend)
        results[dtype, backend] = (*outs, *torch.autograd.grad(outs, leaves, [o.detach() for o in outs]))
    names = ("h", "last", "dx", "dlog_decay", "dstate")
    for name, exact, plain, result in zip(names, *results.values(), strict=True):
        assert_close(result, plain, exact, name, gradient=name.startswith("d"))


@SELECTIVES
def test_selective_scan_is_a_scan_read_out(case):
    given = drawn(SELECTIVE, case, 70)
    x, dt, A, B, C, D = (given[n] for n in ("x", "dt", "A", "B", "C", "D"))
    B, C = (g.unsqueeze(2) if g.ndim == 3 else g for g in (B, C))
    B, C = (g.repeat_interleave(x.shape[2] // g.shape[2], dim=2) for g in (B, C))
    writes, log_decay = (dt * x).unsqueeze(-1) * B, dt.unsqueeze(-1) * A
    h, last = scan(writes.flatten(2), log_decay.flatten(2), state=given["state"].flatten(1), backend="reference")
    y = (h.unflatten(2, A.shape) * C).sum(-1)
    y = (2 * y.real if y.is_complex() else y) + (0 if D is None else D * x)
    for backend in ("reference", "chunked"):
        out, state = selective_scan(**given, backend=backend)
        assert_close(out, y, y, f"{backend} output")
        assert_close(state.flatten(1), last, last, f"{backend} state")


@SELECTIVES
def test_selective_scan_steps_in_place(case):
    given = drawn(SELECTIVE, case, 7)
    expected, last = selective_scan(**given)
    state = given["state"].clone()
    for t in range(7):
        token = {n: given[n][:, t] for n in ("x", "dt", "B", "C")}
        y = selective_step(**token, A=given["A"], D=given["D"], state=state)
        assert_close(y, expected[:, t], expected[:, t], f"token {t}")
    assert_close(state, last, last, "state")


@SELECTIVES
def test_selective_segments_compose(case):
    given = drawn(SELECTIVE, case, 30)
    exact = *selective_summarize(*(given[n] for n in ("x", "dt", "A", "B"))), selective_scan(**given)[1]
    given = narrow(given)
    x, dt, A, B, state = (given[n] for n in ("x", "dt", "A", "B", "state"))
    plain = *selective_summarize(x, dt, A, B), selective_scan(**given)[1]
    (a1, s1), (a2, s2) = (selective_summarize(x[:, p], dt[:, p], A, B[:, p]) for p in (slice(0, 11), slice(11, 30)))
    result = a2 * a1, a2 * s1 + s2, a2 * (a1 * state + s1) + s2
    for name, r, p, e in zip(("decay", "contribution", "state"), result, plain, exact, strict=True):
        assert_close(r, p, e, name)


@SELECTIVES
def test_selective_scan_crosses_its_own_chunks(case):
    """Whose states come from chunk to chunk, and whose gradients go back so."""
    given = drawn(SELECTIVE, case, 2 * CHUNK + 7, batch=1)
    results = []
    for precision, backend in ((dict, "reference"), (narrow, "reference"), (narrow, "chunked")):
        leaves = {n: v.requires_grad_() for n, v in precision(given).items() if v is not None}
        outs = selective_scan(**leaves, backend=backend)
        grads = torch.autograd.grad(outs, list(leaves.values()), [o.detach() for o in outs])
        results.append([o.detach() for o in outs] + list(grads))
        given = {n: None if v is None else v.detach() for n, v in given.items()}
    for i, (exact, plain, result) in enumerate(zip(*results, strict=True)):
        assert_close(result, plain, exact, f"output or gradient {i}", gradient=i > 1)


@pytest.mark.parametrize("rate", [0.0, -1e-6, -80.0, -1e4])
def test_selective_scan_survives_hostile_rates(rate):
    given = drawn(SELECTIVE, "grouped", 67)
    given["A"][..., ::2] = rate
    exact = selective_scan(**given, backend="reference")
    given = narrow(given)
    plain, result = (selective_scan(**given, backend=backend) for backend in ("reference", "chunked"))
    for name, x, p, r in zip(("output", "state"), result, plain, exact, strict=True):
        assert_close(x, p, r, name)


def test_selective_scan_keeps_chunks_not_tokens_for_the_gradient():
    """What the graph holds between forward and backward grows by far less than one [D, N] state a token."""
    given = {n: v.requires_grad_() for n, v in narrow(drawn(SELECTIVE, "skip", 4 * CHUNK, batch=1)).items()}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, _ = selective_scan(**given, backend="chunked")
    states = given["A"].numel() * 4 * CHUNK * given["A"].element_size()
    inputs = sum(given[n].numel() * 4 for n in ("x", "dt", "B", "C"))
    assert sum(saved.values()) < inputs + states / 4
    assert out.requires_grad


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"B": normal(2, 4, 4, 3)}, "B"),
        ({"C": normal(2, 4, 1, 3)}, "groups"),
        ({"B": normal(2, 4, 2, 3).to(torch.complex128)}, "B is complex"),
        ({"A": normal(6, 3).to(torch.complex128)}, "state"),
        ({"dt": normal(2, 4, 6).float()}, "dt"),
    ],
    ids=["groups-divide", "groups-agree", "real-A", "state-dtype", "dt-dtype"],
)
def test_selective_scan_names_what_is_wrong(changed, named):
    with pytest.raises(ValueError, match=named):
        selective_scan(**drawn(SELECTIVE, "grouped", 4) | changed)


@pytest.mark.parametrize("taps", [1, 5, 64, 150])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_long_conv_is_conv1d(taps, causal, backend):
    taps -= 0 if causal else 1 - taps % 2
    u, kernel, skip = normal(2, 64, 3), normal(taps, 3, seed=1), normal(3, seed=2)
    out, state = long_conv(u, kernel, skip=skip, causal=causal, backend=backend)
    weight = kernel.flip(0).T.unsqueeze(1)
    around = (taps - 1, 0) if causal else (taps // 2, taps // 2)
    expected = torch.nn.functional.conv1d(torch.nn.functional.pad(u.transpose(1, 2), around), weight, groups=3).transpose(1, 2) + skip * u
    assert_close(out, expected, expected, "output")
    keep = min(64, taps - 1) if causal else 0
    assert torch.equal(state, u[:, 64 - keep :])


def test_long_conv_grows_its_past():
    """From nothing, piece by piece, packed and not, up to the longest past that can matter."""
    u, kernel = normal(1, 40, 3), normal(25, 3, seed=1)
    whole, last = long_conv(u, kernel, backend="reference")
    outs, state = [], None
    for start, stop, keep in ((0, 10, 10), (10, 11, 11), (11, 30, 24), (30, 40, 24)):
        out, state = long_conv(u[:, start:stop], kernel, state=state)
        assert state.shape == (1, keep, 3)
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole, whole, "pieces")
    assert torch.equal(state, last)

    packing = Packing.from_lengths([3, 0, 10])
    row = torch.cat([u[:, :3], u[:, :10]], dim=1)
    _, states = long_conv(row, kernel, packing=packing)
    assert states.shape == (3, 10, 3)
    assert not states[1].any() and not states[0, :7].any()
    following = Packing.from_lengths([7, 2, 1])
    row = torch.cat([u[:, 3:10], u[:, :2], u[:, 10:11]], dim=1)
    out, _ = long_conv(row, kernel, state=states, packing=following)
    expected = torch.cat([whole[:, 3:10], whole[:, :2], whole[:, 10:11]], dim=1)
    assert_close(out, expected, expected, "packed pieces")


def test_long_conv_steps_in_place():
    u, kernel, skip = normal(2, 12, 3), normal(6, 3, seed=1), normal(3, seed=2)
    expected, last = long_conv(u, kernel, skip=skip, backend="reference")
    state, outs = u.new_zeros(2, 5, 3), []
    for t in range(12):
        outs.append(convolution.step(u[:, t], kernel, state=state, skip=skip))
    assert_close(torch.stack(outs, 1), expected, expected, "outputs")
    assert torch.equal(state, last)
    with pytest.raises(ValueError, match="state"):
        convolution.step(u[:, 0], kernel, state=state[:, 1:])


def test_long_conv_names_what_is_wrong():
    u, kernel = normal(1, 8, 3), normal(5, 3, seed=1)
    with pytest.raises(ValueError, match="odd"):
        long_conv(u, kernel[1:], causal=False)
    with pytest.raises(ValueError, match="state"):
        long_conv(u, kernel, causal=False, state=u)
    with pytest.raises(ValueError, match="kernel is"):
        long_conv(u, kernel.to(torch.complex128))


def test_transforms_are_short_and_long_enough():
    for least in range(1, 300):
        n = fft_length(least)
        assert least <= n <= max(1.34 * least, 4)
        while n % 2 == 0:
            n //= 2
        assert n in (1, 3, 5)

"""Properties every registered operator holds, in every one of its cases."""

import inspect

import pytest
import torch
from torch import Tensor

from zoo.evaluate.closeness import assert_close
from zoo.ops import OPS, BackendError, Packing, use_backend

CASES = [pytest.param(op, draw, id=f"{op.name}-{case}") for op in OPS.values() for case, draw in op.cases.items()]
OPERATORS = [pytest.param(op, id=op.name) for op in OPS.values()]
CHUNK = 64  # the largest chunk of any family; lengths are chosen around it
LENGTHS = (1, 2, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
every_case = pytest.mark.parametrize("op, draw", CASES)
every_op = pytest.mark.parametrize("op", OPERATORS)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory nobody has written holds NaN, so that an output cell left out cannot pass."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(draw, batch: int, length: int, dtype=torch.float64, seed: int = 0) -> dict:
    return draw(torch.Generator().manual_seed(seed), batch, length, dtype)


def lead(given: dict) -> Tensor:
    """The first argument: laid out [B, T, ...]."""
    return next(iter(given.values()))


def is_state(name: str, value) -> bool:
    return name == "state" and isinstance(value, Tensor)


def cast(given: dict, dtype: torch.dtype) -> dict:
    """Floating and complex tensors in this precision; states in its accumulator."""
    wide = dtype == torch.float64
    state_dtype = torch.float64 if wide else torch.float32

    def convert(name, value):
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        target = state_dtype if is_state(name, value) else dtype
        if value.is_complex():
            return value.to(torch.complex128 if target == torch.float64 else torch.complex64)
        return value.to(target)

    return {name: convert(name, value) for name, value in given.items()}


def differentiable(given: dict) -> dict:
    return {n: v for n, v in given.items() if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())}


def run(op, given: dict, **kwargs) -> list[Tensor]:
    outs = op.call(**given, **kwargs)
    return [outs] if isinstance(outs, Tensor) else [x for x in outs if x is not None]


def thrice(op, given: dict) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The definition in float64, the definition in float32, and chunked in float32."""
    exact = run(op, cast(given, torch.float64), backend="reference")
    given = cast(given, torch.float32)
    return exact, run(op, given, backend="reference"), run(op, given, backend="chunked")


def gradients(op, given: dict, **kwargs) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient of a random projection of them (state included) with respect to every tensor."""
    leaves = {n: v.clone().requires_grad_() for n, v in differentiable(given).items()}
    outs = run(op, given | leaves, **kwargs)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outs], dict(zip(leaves, grads, strict=True))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backends_agree(op, draw, dtype):
    """Chunked against the definition in float64, outputs, states and gradients, by the one rule."""
    given = cast(inputs(draw, 2, CHUNK + 5), dtype)
    exact, exact_grads = gradients(op, cast(given, torch.float64), backend="reference")
    plain, plain_grads = gradients(op, given, backend="reference")
    result, result_grads = gradients(op, given, backend="chunked")
    for i, (x, p, r) in enumerate(zip(result, plain, exact, strict=True)):
        assert_close(x, p, r, f"output {i}")
    for name in result_grads:
        assert_close(result_grads[name], plain_grads[name], exact_grads[name], f"gradient of {name}", gradient=True)


@every_case
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradient_is_right(op, draw, backend):
    """Against finite differences in float64."""
    given = inputs(draw, 1, 5)
    leaves = {n: v.clone().requires_grad_() for n, v in differentiable(given).items()}

    def function(*tensors):
        return tuple(run(op, given | dict(zip(leaves, tensors, strict=True)), backend=backend))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@every_case
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(op, draw, length):
    given = inputs(draw, 2, length)
    exact, plain, result = thrice(op, given)
    for x, p, r in zip(result, plain, exact, strict=True):
        assert_close(x, p, r, f"length {length}")


@every_case
def test_pieces_equal_the_whole(op, draw):
    """A sequence cut anywhere, the state passed on; a case drawn without a state is one that cannot go on."""
    if not is_state("state", inputs(draw, 1, 1).get("state")):
        return
    length = 2 * CHUNK
    given = inputs(draw, 2, length)
    (exact, last), (plain, plain_last), _ = thrice(op, given)
    given = cast(given, torch.float32)
    for backend in ("reference", "chunked"):
        for cut in (1, CHUNK - 1, CHUNK, CHUNK + 1, length - 1):
            pieces, state = {}, given["state"]
            order = (slice(0, cut), slice(cut, length))
            for piece in order[::-1] if given.get("reverse") else order:
                own = {n: v[:, piece] if _along_time(op, n, v) else v for n, v in given.items()}
                pieces[piece.start], state = op.call(**own | {"state": state}, backend=backend)
            pieces = [pieces[piece.start] for piece in order]
            assert_close(torch.cat(pieces, 1), plain, exact, f"{backend} cut at {cut}")
            assert_close(state, plain_last, last, f"{backend} state after a cut at {cut}")


@every_case
def test_packed_equals_separate(op, draw):
    """Documents in one row never see one another, gradients included; an empty one hands its state on."""
    if "packing" not in inspect.signature(op.call).parameters:
        return
    lengths = [1, 5, 0, CHUNK, CHUNK + 3]
    packing = Packing.from_lengths(lengths)
    given = inputs(draw, 1, sum(lengths))
    if is_state("state", given.get("state")):
        states = [inputs(draw, 1, 1, seed=n)["state"] for n in range(len(lengths))]
        given["state"] = torch.cat(states)
    exact, exact_grads = gradients(op, given, packing=packing, backend="reference")
    given = cast(given, torch.float32)
    plain, plain_grads = gradients(op, given, packing=packing, backend="reference")
    result, result_grads = gradients(op, given, packing=packing, backend="chunked")
    for x, p, r in zip(result, plain, exact, strict=True):
        assert_close(x, p, r, "packed")
    for name in result_grads:
        assert_close(result_grads[name], plain_grads[name], exact_grads[name], f"gradient of {name}", gradient=True)
    for n, piece in packing.split():
        if piece.start == piece.stop:
            continue
        own = {name: v[:, piece] if _along_time(op, name, v) else v for name, v in given.items()}
        if is_state("state", given.get("state")):
            own["state"] = given["state"][n : n + 1]
        exact, plain, _ = thrice(op, own)
        assert_close(result[0][:, piece], plain[0], exact[0], f"document {n}")
        if "state" in op.names:
            assert_close(result[1][n : n + 1], plain[1], exact[1], f"state of document {n}")


def _along_time(op, name: str, value) -> bool:
    return (
        isinstance(value, Tensor) and name in op.along_time and value.ndim >= (3 if value.is_floating_point() or value.is_complex() else 2)
    )


@every_case
def test_inputs_are_kept_and_strides_do_not_matter(op, draw):
    given = cast(inputs(draw, 2, 20), torch.float32)
    before = {n: v.clone() for n, v in given.items() if isinstance(v, Tensor)}
    for backend in ("reference", "chunked"):
        expected = run(op, given, backend=backend)
        exact = run(op, cast(given, torch.float64), backend="reference")
        strided = {
            n: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) and v.ndim > 1 else v for n, v in given.items()
        }
        for x, p, r in zip(run(op, strided, backend=backend), expected, exact, strict=True):
            assert_close(x, p, r, f"{backend} strided")
        again = run(op, given, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), "two runs differ"
        assert all(torch.equal(given[n], v) for n, v in before.items()), "an input was modified"


@every_case
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -80.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_hostile_decays(op, draw, log_decay, dtype):
    """From keeping all to forgetting all, alone and beside gentle decays: finite, and equal to the definition."""
    given = cast(inputs(draw, 1, CHUNK + 3), dtype)
    decays = {n: v.clone() for n, v in differentiable(given).items() if n.endswith("log_decay")}
    if not decays:
        return
    for decay in decays.values():
        decay[..., ::2] = log_decay
    given |= decays
    exact = run(op, cast(given, torch.float64), backend="reference")
    plain = run(op, given, backend="reference")
    for x, p, r in zip(run(op, given, backend="chunked"), plain, exact, strict=True):
        assert_close(x, p, r, f"log_decay {log_decay}")


@every_case
def test_compiles(op, draw):
    given = cast(inputs(draw, 2, 20), torch.float32)
    leaves = {n: v.clone().requires_grad_() for n, v in differentiable(given).items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors: tuple(run(op, given | tensors)), fullgraph=True, backend="aot_eager")
    outs, expected = compiled(leaves), run(op, given | leaves)
    for x, p, r in zip(outs, expected, run(op, cast(given, torch.float64), backend="reference"), strict=True):
        assert_close(x, p, r, "compiled")
    compiled_grads, grads = (
        torch.autograd.grad([o.abs().sum() for o in many], list(leaves.values()), allow_unused=True) for many in (outs, expected)
    )
    for name, x, r in zip(leaves, compiled_grads, grads, strict=True):
        assert (x is None) == (r is None), f"compiled and eager disagree on whether {name} has a gradient"
        if r is not None:
            assert_close(x, r, r, f"compiled gradient of {name}", gradient=True)


@every_case
def test_passes_opcheck(op, draw, monkeypatch):
    """torch.library's own checks of the custom op behind the operator."""
    given = cast(inputs(draw, 2, 20), torch.float32)
    seen = []
    monkeypatch.setattr(op, "execute", lambda *args: seen.append(args) or type(op).execute(op, *args))
    run(op, given, backend="chunked")
    ((tensors, options, _, backend),) = seen
    leaves = [None if t is None else t.clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors.values()]
    torch.library.opcheck(op.custom_op, (*leaves, None, *options.values(), backend))


@every_case
def test_contract_is_enforced(op, draw):
    given = inputs(draw, 2, 4)
    first = next(iter(given))
    with pytest.raises(ValueError, match=first):
        op.call(**given | {first: lead(given)[0]})
    with pytest.raises(TypeError):
        op.call(**given, misspelt=1)
    with pytest.raises(ValueError, match="backend"):
        op.call(**given, backend="quick")
    with pytest.raises(BackendError, match="fused"):
        op.call(**given, backend="fused")
    with use_backend("fused"), pytest.raises(BackendError, match="fused"):
        op.call(**given)


@every_op
def test_contract_is_documented(op):
    documentation = inspect.getdoc(op.call)
    parameters = list(inspect.signature(op.call).parameters)
    for section in ("Args:", "Returns:", "Source:"):
        assert section in documentation, f"{op.name} has no {section}"
    missing = [p for p in parameters if p not in documentation]
    assert not missing, f"{op.name} does not document {missing}"

"""Properties of the Triton kernels, of every operator that has some: compiled on a CUDA device (`-m gpu`), interpreted elsewhere.

Kernels multiply in the dtype of their inputs, so a float32 state of bfloat16 inputs is held to the rule for bfloat16.
"""

import importlib
import inspect
import itertools
from unittest import mock

import pytest
import torch
from test_ops import _along_time, cast, differentiable, inputs, is_state, poisoned_memory, run  # noqa: F401 (a fixture)

import zoo
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject
from zoo.few_rows import FewRows
from zoo.kernels.dispatch import Op, states_in_place
from zoo.ops import OPS, Packing, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy, on which the interpreter runs, warns of its own idioms and of masked lanes
INTERPRETER = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else INTERPRETER

CHUNK = 64


def takes(op, draw) -> bool:
    names = dict.fromkeys(op.names)
    given = cast(inputs(draw, 1, 2), torch.float32)
    return bool(op.fused) and op.obstacle(names | {n: v for n, v in given.items() if n in names}) is None


CASES = [
    pytest.param(op, draw, id=f"{op.name}-{case}") for op in OPS.values() if op.fused for case, draw in op.cases.items() if takes(op, draw)
]


def sampled(offset: int, always: tuple = (), **axes: list):
    """Every case with all values of some arguments: all of them on a GPU, elsewhere a quarter, the rest being `slow`.

    Args: offset: which quarter, so that properties share the cases out among them; always: values that are never left out.
    """
    rows = []
    for i, case in enumerate(CASES):
        for j, values in enumerate(itertools.product(*axes.values())):
            kept = DEVICE == "cuda" or (i + j + offset) % 4 == 0 or any(value in always for value in values)
            marks = () if kept else pytest.mark.slow
            rows.append(pytest.param(*case.values, *values, id="-".join([case.id, *map(str, values)]), marks=marks))
    return pytest.mark.parametrize(", ".join(["op, draw", *axes]), rows)


def on_device(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def learnt(op, given: dict) -> dict:
    """Copies that ask for gradients, but for what kernels take as constants."""
    leaves = {n: v.clone().requires_grad_() for n, v in differentiable(given).items()}
    names = {n: v for n, v in given.items() if n in op.names}
    return {n: v for n, v in leaves.items() if op.obstacle(dict.fromkeys(op.names) | names | {n: v}) is None}


def with_gradients(op, given: dict, backend: str, packing: Packing | None = None) -> tuple[list, dict]:
    """Outputs, and gradients of a random projection of them, the kernels' brought back to the CPU."""
    more = {} if packing is None else {"packing": packing}
    if backend == "fused":
        given = {n: on_device(v) for n, v in given.items()}
        more = {n: Packing(p.cu_seqlens.to(DEVICE)) for n, p in more.items()}
    leaves = learnt(op, given)
    outs = run(op, given | leaves, backend=backend, **more)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
    return [o.detach().cpu() for o in outs], {n: g.cpu() for n, g in zip(leaves, grads, strict=True)}


def compare(op, given: dict, dtype: torch.dtype, packing: Packing | None = None) -> None:
    """Fused against the definition in float64, outputs, states and gradients, by the one rule."""
    given = cast(given, dtype)
    exact, exact_grads = with_gradients(op, cast(given, torch.float64), "reference", packing)
    plain, plain_grads = with_gradients(op, given, "reference", packing)
    result, result_grads = with_gradients(op, given, "fused", packing)
    for i, (x, p, r) in enumerate(zip(result, plain, exact, strict=True)):
        assert_close(x, p, r, f"output {i}", dtype=dtype)
    for name in result_grads:
        assert_close(result_grads[name], plain_grads[name], exact_grads[name], f"gradient of {name}", gradient=True, dtype=dtype)


@sampled(0, always=(torch.float32,), dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_agrees(op, draw, dtype):
    compare(op, inputs(draw, 2, CHUNK + 5), dtype)


@sampled(0, length=[1, 2, CHUNK - 1, CHUNK, 3 * CHUNK + 7])
def test_any_length(op, draw, length):
    given = inputs(draw, 1, length)
    if length == 1 and op.name.endswith("attention"):  # whose gradient is exactly nothing then, beside which every rounding is too much
        outs = [run(op, cast(given, d), backend="reference") for d in (torch.float64, torch.float32)]
        result = run(op, {n: on_device(v) for n, v in cast(given, torch.float32).items()}, backend="fused")
        for x, p, r in zip(result, outs[1], outs[0], strict=True):
            assert_close(x.cpu(), p, r, "a single token")
        return
    compare(op, given, torch.float32)


STEPS = [
    pytest.param(op, draw, id=f"{op.name}-{case}")
    for op in OPS.values()
    for case, draw in op.cases.items()
    if op.step and not any(v.is_complex() for v in differentiable(inputs(draw, 1, 1)).values())
]


@pytest.mark.parametrize("op, draw", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_single_token(op, draw, dtype):
    """By a kernel of its own, which leaves the state that it was given alone, or puts the new one there if it is told to."""
    given = cast(inputs(draw, 3, 1), dtype)
    exact, plain = (run(op, cast(given, d), backend="reference") for d in (torch.float64, dtype))
    given = {n: on_device(v) for n, v in given.items()}
    before = {n: v.clone() for n, v in given.items() if isinstance(v, torch.Tensor)}
    strided = {n: v.transpose(0, 1).contiguous().transpose(0, 1) if n in before and v.ndim > 1 else v for n, v in given.items()}
    with torch.no_grad():
        result, other = (run(op, own, backend="fused") for own in (given, strided))
        assert all(torch.equal(given[n], v) for n, v in before.items()), "an input was modified"
        empty, fresh = (run(op, given | own, backend="fused") for own in blank(op, given))
        with states_in_place():
            again = run(op, given, backend="fused")
    if op.recurrent:
        moves = given.get("normalize") or before["state"].dtype != result[1].dtype  # sums of weights are read till the end
        assert (again[1] is given["state"]) != bool(moves)
    for i, (x, p, r) in enumerate(zip(result, plain, exact, strict=True)):
        assert_close(x.cpu(), p, r, f"output {i}", dtype=dtype)
    assert all(torch.equal(x, r) for many in (other, again) for x, r in zip(many, result, strict=True))
    assert all(torch.equal(x, r) for x, r in zip(empty, fresh, strict=True))


def blank(op, given: dict) -> tuple[dict, dict]:
    """Two ways to say that nothing was seen, where a state could say something else."""
    return ({"state": None}, {"state": torch.zeros_like(given["state"])}) if op.recurrent else ({}, {})


SAMPLED = {"based", "gla", "jet_nemotron", "mamba", "mamba2", "rwkv6", "rwkv7"}
MODELS = [
    pytest.param(name, marks=() if name in SAMPLED else pytest.mark.slow)
    for name in zoo.list_models(encoder_decoder=False)
    if Subject(name).traits().causal
]


@pytest.mark.parametrize("name", MODELS)
def test_models_step_by_kernels(name, monkeypatch):
    """Which write new states where the old ones were: whatever a mixer still needs of these, it has to take before."""
    monkeypatch.setattr("zoo.few_rows.DEVICE", DEVICE)
    subject = Subject(name)
    ids = subject.tokens(2, 8).to(DEVICE)
    results = []

    def kernels(op, backend, tensors, packing=None):
        return "fused" if op.steps(tensors, packing) or op.fused_obstacle(tensors) is None else "chunked"

    for dtype, context in (
        (torch.float64, use_backend("reference")),
        (torch.float32, use_backend("reference")),
        (torch.float32, mock.patch.object(Op, "resolve", kernels)),
    ):
        model = subject.model(dtype=dtype).to(DEVICE)
        with torch.no_grad():
            cache = model(ids[:, :5], use_cache=True).past_key_values
            with context:
                steps = [model.step(ids[:, t : t + 1], cache) for t in range(5, 7)]
                with FewRows(model):
                    results.append([*steps, model.step(ids[:, 7:], cache)])
    for i, (exact, plain, result) in enumerate(zip(*results, strict=True)):
        assert_close(result, plain, exact, f"step {i}")


@sampled(0)
def test_segments_of_one_sequence(op, draw, monkeypatch):
    """Long enough to be cut up among programs."""
    module = importlib.import_module(op.fused)
    if hasattr(module, "ANCHOR"):
        monkeypatch.setattr(module, "ANCHOR", 128)
    compare(op, inputs(draw, 1, 2 * (128 if hasattr(module, "ANCHOR") else 512) + 9), torch.float32)


@sampled(1)
def test_packed_equals_separate(op, draw):
    if "packing" not in inspect.signature(op.call).parameters:
        return
    lengths = [1, 5, 0, CHUNK, CHUNK + 3]
    given = inputs(draw, 1, sum(lengths))
    if is_state("state", given.get("state")):
        given["state"] = torch.cat([inputs(draw, 1, 1, seed=n)["state"] for n in range(len(lengths))])
    compare(op, given, torch.float32, Packing.from_lengths(lengths))


@sampled(2)
def test_pieces_equal_the_whole(op, draw):
    length, cut = CHUNK + 9, 30
    given = inputs(draw, 1, length)
    if not is_state("state", given.get("state")):
        return
    exact, plain = (run(op, cast(given, dtype), backend="reference") for dtype in (torch.float64, torch.float32))
    given = {n: on_device(v) for n, v in cast(given, torch.float32).items()}
    outs, state = {}, given["state"]
    order = (slice(0, cut), slice(cut, length))
    for piece in order[::-1] if given.get("reverse") else order:
        own = {n: v[:, piece] if _along_time(op, n, v) else v for n, v in given.items()}
        outs[piece.start], state = op.call(**own | {"state": state}, backend="fused")
    assert_close(torch.cat([outs[piece.start] for piece in order], 1).cpu(), plain[0], exact[0], "pieces")
    assert_close(state.cpu(), plain[1], exact[1], "state")


@sampled(3)
def test_inputs_are_kept_strides_do_not_matter_and_runs_repeat(op, draw):
    given = {n: on_device(v) for n, v in cast(inputs(draw, 2, CHUNK + 5), torch.bfloat16).items()}
    before = {n: v.clone() for n, v in given.items() if isinstance(v, torch.Tensor)}
    expected = run(op, given, backend="fused")
    strided = {
        n: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, torch.Tensor) and v.ndim > 1 else v for n, v in given.items()
    }
    for other in (strided, given):
        assert all(torch.equal(x, y) for x, y in zip(run(op, other, backend="fused"), expected, strict=True))
    assert all(torch.equal(given[n], v) for n, v in before.items()), "an input was modified"


@pytest.mark.parametrize("case", ["layer-bias", "gate-first"])
@pytest.mark.parametrize("absent", ["gate", "weight", "bias", "gate weight", "gate weight bias"])
def test_norms_without_some_of_their_parts(case, absent):
    op = OPS["gated_norm"]
    compare(op, inputs(op.cases[case], 2, 20) | dict.fromkeys(absent.split()), torch.float32)


@sampled(0, log_decay=[0.0, -1e-6, -80.0, -1e4])
def test_hostile_decays(op, draw, log_decay):
    """From keeping all to forgetting all, alone and beside gentle decays."""
    given = inputs(draw, 1, CHUNK + 3)
    decays = {n: v.clone() for n, v in differentiable(given).items() if n.endswith(("log_decay", "log_forget"))}
    if not decays:
        return
    for decay in decays.values():
        decay[..., ::2] = log_decay
    for dtype in (torch.float32, torch.bfloat16):
        compare(op, given | decays, dtype)


@pytest.mark.parametrize("filled", [0, 1 << 30], ids=["whole", "in pieces"])
def test_listed_blocks_that_are_tiles(filled, monkeypatch):
    """Blocks as long as a tile; lists turned around, of which one holds every block of queries, each whole or in pieces."""
    monkeypatch.setattr(importlib.import_module("zoo.kernels.attention.fused_blocks"), "FILLED", filled)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, heads, 16, generator=generator, dtype=torch.float64) for heads in (2, 1, 1))
    chosen = torch.randint(-1, 3, (1, 2, 3, 2), generator=generator)
    chosen[..., 0] = 0
    compare(OPS["block_attention"], {"q": q, "k": k, "v": v, "chosen": chosen, "size": 32, "causal": True}, torch.float32)


@pytest.mark.parametrize("options", [{"window": 20}, {"window": 7, "causal": False}, {"return_lse": True}], ids=str)
def test_attention_by_descriptors(options, monkeypatch):
    """Strides that a descriptor takes, tiles that reach over the end of a row, and gradients of outputs with other strides."""
    fused, made = importlib.import_module("zoo.kernels.attention.fused"), []
    described = fused.described
    monkeypatch.setattr(fused, "described", lambda x, size: made.append(described(x, size)) or made[-1])
    monkeypatch.setattr(fused, "MUCH", 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 72, heads, 16, generator=generator, dtype=torch.float64) for heads in (2, 1, 1))
    compare(OPS["attention"], {"q": q, "k": k, "v": v, **options}, torch.bfloat16)
    assert len(made) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_slopes_that_favour_the_far(dtype):
    """Log-sum-exps of hundreds, and a gradient in which distances weigh what a row of gradients misses its sum by."""
    generator = torch.Generator().manual_seed(0)
    given = {n: torch.randn(1, 90, heads, 32, generator=generator, dtype=torch.float64) for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    given |= {"slopes": torch.tensor([-3.0, -1.0, 0.1, 2.0], dtype=torch.float64), "return_lse": dtype == torch.float32}
    compare(OPS["attention"], given, dtype)


@sampled(1)
def test_compiles(op, draw):
    given = {n: on_device(v) for n, v in cast(inputs(draw, 2, 20), torch.float32).items()}
    leaves = learnt(op, given)
    torch._dynamo.reset()
    with use_backend("fused"):
        compiled = torch.compile(lambda tensors: tuple(run(op, given | tensors)), fullgraph=True, backend="aot_eager")
        outs, expected = compiled(leaves), run(op, given | leaves)
        assert all(torch.equal(x, r) for x, r in zip(outs, expected, strict=True))
        grads, plain = (
            torch.autograd.grad([o.sum().real for o in many], list(leaves.values()), allow_unused=True) for many in (outs, expected)
        )
    for name, x, r in zip(leaves, grads, plain, strict=True):
        assert (x is None) == (r is None) and (r is None or torch.equal(x, r)), f"gradient of {name}"


@pytest.mark.parametrize("groups, per_token", [(1, True), (2, True), (2, False)])
def test_gradients_of_strong_decays(groups, per_token):
    """Which are sums over pairs of tokens that decays leave little of, beside outputs made of what a token gives itself."""
    draw, length, heads = torch.Generator().manual_seed(0), 200, 2
    shapes = {"q": (1, length, groups, 32), "k": (1, length, groups, 32), "v": (1, length, heads, 48)}
    given = {n: torch.randn(*x, generator=draw, dtype=torch.float64) for n, x in shapes.items()}
    given["log_decay"] = torch.full((1, length, heads) if per_token else (heads,), -3.0, dtype=torch.float64)
    compare(OPS["linear_attention"], given, torch.bfloat16)


@pytest.mark.parametrize("launch", [{}, {"WHOLE": 1}, {"ANCHOR": 64}, {"ANCHOR": 64, "FILLED": 4}, {"ANCHOR": 64, "WHOLE": 1}], ids=str)
@pytest.mark.parametrize("keys, values", [(80, 128), (128, 96)])
def test_wide_heads_without_decay(keys, values, launch, monkeypatch):
    """Launches that hold transposes: of half a head and of a whole one, cut up never, always, or for the gradients of k and v only."""
    op, length = OPS["linear_attention"], 150
    for name, value in launch.items():
        monkeypatch.setattr(importlib.import_module(op.fused), name, value)
    packing = Packing.from_lengths([3, 64, 0, length - 67]) if launch == {"WHOLE": 1} else None
    shapes = {"q": (1, length, 1, keys), "k": (1, length, 2, keys), "v": (1, length, 2, values)}
    shapes["state"] = (4 if packing else 1, 2, keys, values)
    draw = torch.Generator().manual_seed(0)
    compare(op, {n: torch.randn(*x, generator=draw, dtype=torch.float64) for n, x in shapes.items()}, torch.bfloat16, packing)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
@pytest.mark.parametrize(
    "keys, values", [(16, 16), (48, 80), (64, 64), (64, 128), (128, 64), (128, 128), (256, 256), (256, 512), (512, 64)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_configuration_of_linear_attention(decay, keys, values, dtype):
    """Each head size selects a launch; each is checked, with a sequence in one piece and in several, bonus and groups of heads."""
    op = OPS["linear_attention"]
    for batch, heads, length in ((70, 2, 130), (1, 2, 1100)):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = {"none": None, "head": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, keys)}[decay]
        given = {"q": normal(batch, length, 1, keys), "k": normal(batch, length, heads, keys), "v": normal(batch, length, heads, values)}
        given |= {"log_decay": None if shape is None else -normal(*shape).abs(), "state": normal(batch, heads, keys, values)}
        given |= {"bonus": normal(heads, keys)} if decay == "channel" and length == 130 else {}
        compare_on_device(op, given, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
@pytest.mark.parametrize("keys, values", [(16, 32), (48, 80), (64, 64), (64, 128), (96, 48), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_configuration_of_the_delta_rule(decay, keys, values, dtype):
    """As above: slices of values are wide where there are many sequences and heads."""
    for batch, heads, length in ((70, 2, 130), (1, 2, 300)):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = {"none": None, "head": (heads,), "token": (batch, length, heads), "channel": (batch, length, heads, keys)}[decay]
        k = torch.nn.functional.normalize(normal(batch, length, 1, keys), dim=-1)
        given = {"q": normal(batch, length, heads, keys), "k": k, "v": normal(batch, length, heads, values)}
        given |= {"beta": 2 * normal(batch, length, heads).sigmoid(), "log_decay": None if shape is None else -normal(*shape).abs()}
        compare_on_device(OPS["delta_rule"], given | {"state": normal(batch, heads, keys, values)}, dtype)


def compare_on_device(op, given: dict, dtype: torch.dtype) -> None:
    """As `compare`, the definition on the device too, its gradients by the chunked form in float64, which is tested against it."""
    given = {n: on_device(v) for n, v in cast(given, dtype).items()}
    results = []
    for own, backend in ((cast(given, torch.float64), "chunked"), (given, "chunked"), (given, "fused")):
        leaves = learnt(op, own)
        outs = run(op, own | leaves, backend=backend)
        generator = torch.Generator(DEVICE).manual_seed(7)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64, device=DEVICE).to(o.dtype) for o in outs]
        cotangents = [c.to(dtype).to(o.dtype) if i == 0 else c for i, (c, o) in enumerate(zip(cotangents, outs, strict=True))]
        grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
        results.append((outs, dict(zip(leaves, grads, strict=True))))
    (exact, exact_grads), (plain, plain_grads), (result, result_grads) = results
    for i, (x, p, r) in enumerate(zip(result, plain, exact, strict=True)):
        assert_close(x, p, r, f"output {i}", dtype=dtype)
    for n in result_grads:
        assert_close(result_grads[n], plain_grads[n], exact_grads[n], f"gradient of {n}", gradient=True, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")  # one at a time
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_more_than_2_to_the_31_elements(decay):
    """The last rows of tensors too large for 32-bit offsets are those of the same rows alone."""
    batch, length, heads, keys = 130, 16384, 8, 128
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, keys, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    decays = {"none": None, "token": (batch, length, heads), "channel": (batch, length, heads, keys)}[decay]
    decays = None if decays is None else -torch.rand(decays, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    call = OPS["linear_attention"].call

    def last(*tensors):
        leaves = [t.requires_grad_() for t in tensors if t is not None]
        out, _ = call(*tensors, backend="fused")
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out).mul_(0.01))
        return [x[-1].clone() for x in (out, *grads)]

    small = last(*(None if x is None else x[-1:].clone() for x in (q, k, v, decays)))
    large = last(q, k, v, decays)
    for x, r in zip(large, small, strict=True):
        assert_close(x, r, r.double(), "the last row", gradient=True)

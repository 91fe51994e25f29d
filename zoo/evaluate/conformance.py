"""The battery: properties that every registered architecture holds without writing a test.

A property is a function of a `Subject` that raises AssertionError where the architecture fails it. A capability that an
architecture denies is not skipped: the property then asserts that asking for it is refused.
"""

import traceback
from collections.abc import Callable
from contextlib import nullcontext

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject, by_definition, mix, pieces
from zoo.kernels.packing import Packing

MIXER_PROPERTIES: dict[str, Callable[[Subject], None]] = {}
LENGTH = 21


def of_mixers(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Enter a property of mixers under its name."""
    MIXER_PROPERTIES[function.__name__] = function
    return function


def refused(function: Callable[[], object], word: str) -> None:
    """Assert that the call raises ValueError (or TypeError) and that the message speaks of `word`."""
    try:
        function()
    except (ValueError, TypeError, StrictDataclassError) as error:
        assert word in str(error), f"refused, but without naming {word!r}: {error}"
    else:
        raise AssertionError(f"expected an error that names {word!r}, got none")


def run(name: str, properties: dict[str, Callable], kind: type = Subject) -> dict[str, str | None]:
    """Property -> None where it holds, else the last lines of what went wrong; `kind`: what the properties are given, by its name."""
    results = {}
    for label, check in properties.items():
        try:
            check(kind(name))
            results[label] = None
        except Exception:  # a property may fail in any way; the caller reports it
            results[label] = traceback.format_exc(limit=-2)
    return results


@of_mixers
def keeps_shape_and_dtype(subject: Subject) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        mixer, x = subject.mixer(dtype, push=False), subject.inputs(2, LENGTH, dtype)
        y, _ = mix(mixer, x)
        assert y.shape == x.shape, f"{list(x.shape)} became {list(y.shape)}"
        assert y.dtype == dtype, f"{dtype} became {y.dtype}"
        assert torch.isfinite(y).all(), f"not finite in {dtype}"
        larger = bool(y.float().var() > 100 * x.float().var())
        assert larger == mixer.traits.amplifies, f"the output is {'' if larger else 'not '}far larger than the input at initialisation"


@of_mixers
def sees_no_future(subject: Subject) -> None:
    """Causal: y[:t] does not move with x[t:]. Bidirectional: y[0] does move with the last token."""
    traits = subject.entry.mixer.traits
    if traits.causal:
        mixer, x = subject.mixer(torch.float64, causal=True), subject.inputs(1, LENGTH, torch.float64)
        y, _ = mix(mixer, x)
        for cut in (1, LENGTH // 2, LENGTH - 1):
            changed = x.clone()
            changed[:, cut:] = subject.inputs(1, LENGTH - cut, torch.float64, seed=9)
            past, expected = mix(mixer, changed)[0][:, :cut], y[:, :cut]
            assert_close(past, expected, expected, f"outputs before {cut} when inputs from {cut} on change")
    if traits.bidirectional:
        mixer, x = subject.mixer(torch.float64, causal=False), subject.inputs(1, 4, torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(mix(mixer, x)[0][:, 0].sum(), x)
        assert gradient[:, -1].abs().max() > 0, "bidirectional, but the first output ignores the last input"
    else:
        refused(lambda: subject.mixer(causal=False), "causal")
    if not traits.causal:
        refused(lambda: subject.mixer(causal=True), "causal")


@of_mixers
def prefill_then_steps_equal_the_whole(subject: Subject) -> None:
    if not subject.entry.mixer.traits.causal:
        return
    with torch.no_grad():
        mixer, x = subject.mixer(), subject.inputs(2, LENGTH)
        with by_definition():
            plain, plain_state = mix(mixer, x)
            exact, exact_state = mix(subject.mixer(torch.float64), x.double())
        whole, whole_state = mix(mixer, x)
        assert_close(whole, plain, exact, "the whole at once")
        for prefill in (0, 1, 13, LENGTH - 1):
            result, state = pieces(mixer, x, list(range(prefill, LENGTH)))
            assert_close(result, (plain, whole), exact, f"prefill of {prefill}, then steps")
            for name in state:
                plains = (plain_state[name], whole_state[name])
                assert_close(state[name], plains, exact_state[name], f"state {name} after a prefill of {prefill} and steps")


@of_mixers
def any_split_of_a_prefill_is_the_whole(subject: Subject) -> None:
    if not subject.entry.mixer.traits.causal:
        return
    with torch.no_grad():
        length = 150
        mixer, x = subject.mixer(), subject.inputs(1, length)
        with by_definition():
            plain, _ = mix(mixer, x)
            exact, _ = mix(subject.mixer(torch.float64), x.double())
        plain = (plain, mix(mixer, x)[0])
        for cuts in ([1], [64], [65, 66], [3, 70, 149]):
            assert_close(pieces(mixer, x, cuts)[0], plain, exact, f"cut at {cuts}")


@of_mixers
def state_passes_gradients(subject: Subject) -> None:
    """The gradient of the first piece, through the state, is that of the whole; fp32 states included."""
    if not subject.entry.mixer.traits.causal:
        return
    grads = []
    for dtype, cuts in (
        (torch.float64, None),
        (torch.float32, None),
        (torch.float32, []),
        (torch.float32, [8]),
        (torch.float32, [8, 9, 10]),
    ):
        mixer, x = subject.mixer(dtype), subject.inputs(1, LENGTH, dtype).requires_grad_()
        with by_definition() if cuts is None else nullcontext():
            y, _ = pieces(mixer, x, cuts or [])
        weight = subject.inputs(1, LENGTH, dtype, seed=5)
        grads.append(torch.autograd.grad((y * weight)[:, 8:].sum(), x)[0])
    exact, plain, whole, *results = grads
    assert_close(whole, plain, exact, "gradient of the whole", gradient=True)
    for result in results:
        assert_close(result, (plain, whole), exact, "gradient through the state", gradient=True)


@of_mixers
def declares_its_state(subject: Subject) -> None:
    """Names, shapes and dtypes of the state are those declared, and it grows only if its traits say so."""
    if not subject.entry.mixer.traits.causal:
        return
    with torch.no_grad():
        mixer = subject.mixer()
        sizes = []
        for length in (8, 200):
            _, state = mix(mixer, subject.inputs(2, length))
            declared = mixer.initial_state(2, length, torch.float32, "meta")
            assert state.keys() == declared.keys(), f"state {sorted(state)} but declared {sorted(declared)}"
            for name, tensor in state.items():
                same = tensor.shape == declared[name].shape or not tensor.numel()  # without elements a shape is a mere count
                assert same, f"{name} is {list(tensor.shape)}, declared {list(declared[name].shape)}"
                assert tensor.dtype == declared[name].dtype, f"{name} is {tensor.dtype}, declared {declared[name].dtype}"
            sizes.append(mixer.state_bytes(length))
        constant = sizes[0] == sizes[1]
        assert constant == mixer.traits.constant_state, f"bytes {sizes} at 8 and 200 tokens, constant_state={mixer.traits.constant_state}"


@of_mixers
def initial_state_is_nothing_seen(subject: Subject) -> None:
    if not subject.entry.mixer.traits.causal:
        return
    with torch.no_grad():
        mixer, x = subject.mixer(), subject.inputs(2, LENGTH)
        with by_definition():
            plain, _ = mix(mixer, x)
            exact, _ = mix(subject.mixer(torch.float64), x.double())
        plain = (plain, mix(mixer, x)[0])
        result, _ = mix(mixer, x, mixer.initial_state(2, LENGTH))
        assert_close(result, plain, exact, "from the initial state")


@of_mixers
def rows_are_independent(subject: Subject) -> None:
    with torch.no_grad():
        mixer, x = subject.mixer(), subject.inputs(3, LENGTH)
        with by_definition():
            plain, _ = mix(mixer, x)
            exact, _ = mix(subject.mixer(torch.float64), x.double())
        plain = (plain, mix(mixer, x)[0])
        alone = torch.cat([mix(mixer, row)[0] for row in x.split(1)])
        assert_close(alone, plain, exact, "rows one by one")


@of_mixers
def packed_documents_are_separate(subject: Subject) -> None:
    """Outputs, states and gradients of documents in one row are those of each document alone."""
    lengths = [1, 5, 2, 70]
    packing = Packing.from_lengths(lengths)
    causal = subject.entry.mixer.traits.causal
    results = []
    for dtype, packed, defined in (
        (torch.float64, False, True),
        (torch.float32, False, True),
        (torch.float32, False, False),
        (torch.float32, True, False),
    ):
        mixer, x = subject.mixer(dtype), subject.inputs(1, sum(lengths), dtype).requires_grad_()
        with by_definition() if defined else nullcontext():
            if packed:
                y, state = mix(mixer, x, None, packing)
            else:
                outs, states = zip(*(mix(mixer, piece) for piece in x.split(lengths, dim=1)), strict=True)
                y, state = torch.cat(outs, dim=1), join_states(states) if causal else {}
        (gradient,) = torch.autograd.grad((y * subject.inputs(1, sum(lengths), dtype, seed=5)).sum(), x)
        results.append((y.detach(), gradient, state))
    exact, plain, apart, (result, grad, state) = results
    assert_close(result, (plain[0], apart[0]), exact[0], "packed outputs")
    assert_close(grad, (plain[1], apart[1]), exact[1], "packed gradients", gradient=True)
    for name in exact[2]:
        assert_close(state[name], (plain[2][name], apart[2][name]), exact[2][name], f"state {name} of packed documents")


def join_states(states: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    """Stack states along the batch; those that grow are padded with zeros to the longest."""
    joined = {}
    for name in states[0]:
        parts = [s[name] for s in states]
        longest = [max(p.shape[d] for p in parts) for d in range(parts[0].ndim)]
        padded = []
        for p in parts:
            out = p.new_zeros(1, *longest[1:])
            out[tuple(slice(0, n) for n in p.shape)] = p
            padded.append(out)
        joined[name] = torch.cat(padded)
    return joined


@of_mixers
def packed_documents_continue(subject: Subject) -> None:
    """A packed row continues states of its own documents: the shape of a padded batch fed in pieces."""
    if not subject.entry.mixer.traits.causal:
        return
    with torch.no_grad():
        first, second = [3, 1, 6], [4, 7, 1]
        rows = [subject.inputs(1, a + b, seed=i) for i, (a, b) in enumerate(zip(first, second, strict=True))]
        mixer, wide = subject.mixer(), subject.mixer(torch.float64)
        head = torch.cat([row[:, :a] for row, a in zip(rows, first, strict=True)], dim=1)
        tail = torch.cat([row[:, a:] for row, a in zip(rows, first, strict=True)], dim=1)
        _, state = mix(mixer, head, None, Packing.from_lengths(first))
        result, state = mix(mixer, tail, state, Packing.from_lengths(second))
        step, _ = mix(mixer, torch.cat([subject.inputs(1, 1, seed=8)] * 3), state)
        expected = []
        for row, a, _ in zip(rows, first, second, strict=True):
            whole = torch.cat([row, subject.inputs(1, 1, seed=8)], dim=1)
            with by_definition():
                defined, exact = mix(mixer, whole)[0], mix(wide, whole.double())[0]
            expected.append([y[:, a:] for y in (defined, mix(mixer, whole)[0], exact)])
        *plain, exact = (torch.cat([y[:, :-1] for y in same], dim=1) for same in zip(*expected, strict=True))
        assert_close(result, tuple(plain), exact, "continued packed row")
        *plain, exact = (torch.cat([y[:, -1:] for y in same]) for same in zip(*expected, strict=True))
        assert_close(step, tuple(plain), exact, "a step after packed rows of unequal length")


@of_mixers
def every_parameter_learns(subject: Subject) -> None:
    mixer, x = subject.mixer(), subject.inputs(2, LENGTH).requires_grad_()
    y, _ = mix(mixer, x)
    (y * subject.inputs(2, LENGTH, seed=5)).sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


@of_mixers
def survives_extreme_inputs(subject: Subject) -> None:
    """Silence, and activations a hundred times too large: finite outputs and gradients."""
    for scale in (0.0, 100.0):
        mixer, x = subject.mixer(), (subject.inputs(1, LENGTH) * scale).requires_grad_()
        y, _ = mix(mixer, x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(y).all(), f"inputs times {scale}: the output is not finite"
        assert torch.isfinite(gradient).all(), f"inputs times {scale}: the gradient is not finite"


@of_mixers
def counts_its_flops(subject: Subject) -> None:
    """The projections' share is what torch counts; the operator's share is positive."""
    from torch.utils.flop_counter import FlopCounterMode

    mixer = subject.mixer()
    counted = 0
    with torch.no_grad():
        for module in (m for m in mixer.modules() if isinstance(m, nn.Linear)):
            with FlopCounterMode(display=False) as counter:
                module(torch.zeros(1, LENGTH, module.in_features))
            counted += counter.get_total_flops()
    operator = mixer.operator_flops(LENGTH)
    assert operator > 0, "operator_flops(length) says nothing"
    assert mixer.flops(LENGTH) == counted + operator, f"flops says {mixer.flops(LENGTH)}, counted {counted} + {operator}"


@of_mixers
def names_its_lora_targets(subject: Subject) -> None:
    mixer = subject.mixer()
    linears = {name.rsplit(".", 1)[-1] for name, module in mixer.named_modules() if isinstance(module, nn.Linear)}
    assert mixer.lora_targets or not linears, "lora_targets is empty"
    unknown = set(mixer.lora_targets) - linears
    assert not unknown, f"lora_targets {sorted(unknown)} are no linear layers; there are {sorted(linears)}"


@of_mixers
def compiles_whole(subject: Subject) -> None:
    """`torch.compile(fullgraph=True)` forward and backward equal eager, and further lengths do not recompile."""
    torch._dynamo.reset()
    mixer = subject.mixer()
    frames = []

    def count(graph, example_inputs):
        frames.append(graph)
        return graph.forward

    def function(x):
        return mix(mixer, x)[0]

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for length in (20, 33, 47):
        x, exact_x = subject.inputs(1, length).requires_grad_(), subject.inputs(1, length, torch.float64)
        y, plain = compiled(x), function(x)
        assert_close(y, plain, mix(subject.mixer(torch.float64), exact_x)[0], f"compiled, length {length}")
        grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, plain)]
        assert_close(grads[0], grads[1], grads[1], f"compiled gradient, length {length}", gradient=True)
    torch._dynamo.reset()
    assert len(frames) == 1, f"compiled {len(frames)} times for three lengths"

"""What only a CUDA device can show; run with `pytest -m gpu`."""

import pytest
import torch
from test_ops import cast, inputs, run

import zoo
from zoo import decode
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject
from zoo.evaluate.tape import Recorder
from zoo.ops import OPS

pytestmark = pytest.mark.gpu
MODELS = zoo.list_models(encoder_decoder=False)
GENERATORS = [name for name in MODELS if Subject(name).traits().causal]


@pytest.mark.parametrize("op, case", [pytest.param(op, case, id=f"{op.name}-{case}") for op in OPS.values() for case in op.cases])
def test_operators_agree_with_the_cpu(op, case):
    given = cast(inputs(op.cases[case], 2, 70), torch.float32)
    moved = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    exact = run(op, cast(given, torch.float64), backend="reference")
    for x, p, r in zip(run(op, moved, backend="chunked"), run(op, given, backend="reference"), exact, strict=True):
        assert_close(x.cpu(), p, r, f"{op.name} on CUDA")


@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_the_cpu(name):
    subject = Subject(name)
    ids = subject.tokens(2, 70)
    exact, plain = (subject.model("base", dtype=dtype)(ids, use_cache=False).last_hidden_state for dtype in (torch.float64, torch.float32))
    model = subject.model("base").cuda().train()
    result = model(ids.cuda(), use_cache=False).last_hidden_state
    assert_close(result.detach().cpu(), plain.detach(), exact.detach(), f"{name} on CUDA")
    result.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_decode_step_never_waits_for_the_host(name):
    """Unless a channel mixer declares that it does; and in every case no state moves."""
    model = Subject(name).model().cuda()
    ids, mask = torch.ones(2, 9, dtype=torch.long, device="cuda"), torch.ones(2, 10, dtype=torch.long, device="cuda")
    mask[0, :3] = 0
    declared = any(block.channel_mixer.waits_for_device for block in model.model.layers if block.channel_mixer is not None)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask[:, :-1], use_cache=True).past_key_values
        model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        before = {(i, n): t.data_ptr() for i, layer in enumerate(cache.layers) for n, t in layer.state.items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
            waited = False
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            waited = True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert waited == declared, f"waits_for_device is declared {declared}, but the step {'waited' if waited else 'did not wait'}"
        if waited:
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
        assert before == {(i, n): t.data_ptr() for i, layer in enumerate(cache.layers) for n, t in layer.state.items()}


@pytest.mark.parametrize("name", GENERATORS)
def test_generates(name):
    model = Subject(name).model().cuda()
    ids = torch.ones(2, 9, dtype=torch.long, device="cuda")
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), expected)


@pytest.mark.parametrize("name", GENERATORS)
def test_recorded_steps_equal_plain_ones(name, monkeypatch):
    """As CUDA graphs, with room that is used up on the way; a model whose steps wait is not recorded."""
    recorder = Recorder(decode.record_graph)
    monkeypatch.setattr(decode, "record_graph", recorder)
    monkeypatch.setattr(decode, "ROOM", -10)
    monkeypatch.setattr(decode, "GRAIN", 1)
    model = Subject(name).model().cuda()
    ids, mask = torch.arange(1, 19, device="cuda").view(2, 9), torch.ones(2, 9, dtype=torch.long, device="cuda")
    mask[0, :4] = 0
    for way in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}):
        written = []
        for device in ("none", "cuda"):
            recorder.count = 0
            decode.forget(model)  # so that nothing is left from the way before
            monkeypatch.setattr(decode, "DEVICE", device)
            torch.manual_seed(0)
            arguments = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask} | way
            written.append(model.generate(ids, **arguments))
        waits = any(getattr(module, "waits_for_device", False) for module in model.modules())
        assert recorder.count == 0 if waits else recorder.count > 0
        assert torch.equal(*written)


def test_a_step_that_waits_unannounced_is_run_as_it_is(monkeypatch):
    model = Subject("gla").model().cuda()
    ids = torch.ones(2, 9, dtype=torch.long, device="cuda")
    arguments = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, do_sample=False, **arguments)
    norm = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda x: norm(x) * float(x.isfinite().all().item()))
    assert torch.equal(model.generate(ids, do_sample=False, **arguments), expected)
    assert model.generate(ids, do_sample=True, **arguments).shape == expected.shape  # random numbers still come

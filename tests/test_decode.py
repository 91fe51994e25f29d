"""Recorded decode steps: when they are used again, when not, and prompts read in pieces."""

from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.generation.streamers import BaseStreamer

import zoo
from zoo import decode, sampling
from zoo.evaluate import tape
from zoo.few_rows import FewRows
from zoo.layers import rotary_table, token_positions

NAMES = ("gla-tiny", "transformer-tiny", "hybrid-tiny")


@pytest.fixture
def recorder(monkeypatch):
    """Counts recordings, on tape where there is no GPU, and keeps all of them for the next call."""
    made = tape.Recorder()
    for name, value in (("DEVICE", "cpu"), ("SMALL", 0), ("record_graph", made)):
        monkeypatch.setattr(decode, name, value)
    return made


def make(name: str):
    torch.manual_seed(0)
    model = zoo.from_config(name, vocab_size=40)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model.eval()


def write(model, batch: int = 2, length: int = 5, tokens: int = 8, recorded: bool = True, **options):
    ids = torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(length))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with mock.patch.object(decode, "DEVICE", "cpu" if recorded else "none"):
        return model.generate(ids, max_new_tokens=tokens, **given | options)


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_serves_the_next_call(name, recorder):
    model = make(name)
    for length, tokens in ((5, 8), (9, 12), (2, 30)):
        assert torch.equal(write(model, length=length, tokens=tokens), write(model, length=length, tokens=tokens, recorded=False))
    assert recorder.count == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_changes_is_recorded_again(name, recorder):
    model = make(name)
    mixer = model.model.layers[0]

    def scale_weights():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * -1)

    changes = (scale_weights, model.train, model.eval, lambda: setattr(model.config, "logit_softcap", 1e-3), lambda: setattr(mixer, "x", 1))
    write(model)
    for count, change in enumerate(changes, start=2):
        change()
        assert torch.equal(write(model), write(model, recorded=False)) and recorder.count == count
    write(model, batch=3)
    assert recorder.count == len(changes) + 2
    write(model, batch=3)
    assert recorder.count == len(changes) + 2
    decode.forget(model)
    write(model, batch=3)
    assert recorder.count == len(changes) + 3


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_is_returned_stays_its_owners(name, recorder):
    model = make(name)
    first = write(model, return_dict_in_generate=True)
    kept = {n: t.clone() for n, t in first.past_key_values.layers[0].state.items()}
    write(model, length=7), write(model, length=4)
    assert all(torch.equal(t, kept[n]) for n, t in first.past_key_values.layers[0].state.items())
    longer = torch.cat([first.sequences, first.sequences[:, :2]], dim=1)
    given = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with mock.patch.object(decode, "DEVICE", "none"):
        expected = model.generate(longer, **given)
    given["past_key_values"] = first.past_key_values
    assert torch.equal(model.generate(longer, **given), expected)


def test_states_that_are_large_beside_the_model_are_given_back(recorder, monkeypatch):
    monkeypatch.setattr(decode, "SMALL", 8)
    model = make("gla-tiny")
    for batch in (1, 2, 1, 2):
        write(model, batch=batch)
    assert recorder.count == 2
    for batch in (64, 64, 1):
        write(model, batch=batch)
    assert recorder.count == 4
    monkeypatch.setattr(decode, "SMALL", 0.99 * sum(p.nbytes for p in model.parameters()) / decode._kept[model][2].nbytes)
    for batch in (2, 1, 1, 2):  # room for two rows, so that each puts the other out
        write(model, batch=batch)
    assert recorder.count == 6


@pytest.mark.parametrize("name", NAMES)
def test_hooks_are_called_in_every_step(name, recorder):
    model, calls = make(name), []
    expected = write(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(write(model), expected) and len(calls) == 8
    handle.remove()
    assert torch.equal(write(model), expected) and recorder.count == 1


def test_compiled_models_are_left_to_their_compiler(recorder):
    model = make("gla-tiny")
    expected = write(model)
    model.compile(backend="eager")
    assert torch.equal(write(model), expected) and recorder.count == 1


def test_what_cannot_be_recorded_runs_as_it_is(recorder, caplog):
    model = make("gla-tiny")
    expected = write(model, recorded=False)
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: norm(x) * float(x.isfinite().all())  # waits for the device
    assert torch.equal(write(model), expected) and recorder.count == 1
    assert "launched one by one" in caplog.text and "waits for the device" in caplog.text


def test_adapters_that_are_switched_off_and_on_are_recorded_apart(recorder):
    tuned = get_peft_model(make("gla-tiny"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    model, told = tuned.get_base_model(), []
    for recorded in (False, True):
        told.append([write(model, recorded=recorded).tolist()])
        with tuned.disable_adapter():
            told[-1].append(write(model, recorded=recorded).tolist())
        told[-1].append(write(model, recorded=recorded).tolist())
        tuned.set_adapter("default")
        told[-1].append(write(model, recorded=recorded).tolist())
    assert told[0] == told[1] and told[0][0] != told[0][1] and recorder.count == 3


def sixth(ids, scores, **kwargs):
    """Ends all rows with their sixth token."""
    return torch.full(ids.shape[:1], ids.shape[1] >= 11)


class Listener(BaseStreamer):
    """What a streamer is told."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("stop", ["end", "length", "sixth"])
def test_a_host_that_is_a_step_ahead_writes_the_same(stop, sampled, recorder, monkeypatch):
    """Also where it ends, what it streams, and which random numbers are next."""
    model, told, used = make("gla-tiny"), [], []
    monkeypatch.setattr("zoo.model.sample", lambda *args: used.append(1) or sampling.sample(*args))
    free = write(model, batch=3, tokens=12)[:, 5:]
    ends = {"end": {"eos_token_id": free[:, 4].tolist()}, "length": {}, "sixth": {"stopping_criteria": [sixth]}}[stop]
    for recorded in (False, True):
        torch.manual_seed(1)
        listener = Listener()
        out = write(model, batch=3, tokens=12, recorded=recorded, streamer=listener, do_sample=sampled, top_k=3, **ends)
        told.append((out.tolist(), listener.heard, torch.rand(1).item()))
    assert told[0] == told[1] and len(used) == 2
    if not sampled:
        last = max(next(i for i, token in enumerate(row) if token in free[:, 4]) for row in free)
        assert len(told[0][0][0]) == 5 + {"end": last + 1, "length": 12, "sixth": 6}[stop]


def test_layers_share_tables_of_a_step_and_of_no_other():
    x, seen = torch.zeros(2, 1, 8), torch.tensor([3, 5])
    with FewRows():
        first, second = (token_positions(x, own) for own in (seen, seen.clone()))
        tables = [rotary_table(positions, 8, theta) for positions in (first, second, first.clone()) for theta in (10.0, 20.0)]
    assert first is second and first.tolist() == [[3], [5]]
    assert tables[0] is tables[2] and tables[1] is tables[3] and len(set(map(id, tables))) == 4
    with FewRows():
        assert token_positions(x, seen + 1).tolist() == [[4], [6]]
    assert rotary_table(first, 8) is not rotary_table(first, 8)


def test_a_table_of_positions_still_ends_somewhere(recorder):
    model = zoo.from_config("gpt2-tiny")
    table = model.config.max_position_embeddings
    with pytest.raises(ValueError, match="max_position_embeddings"):
        write(model, length=table - 3, tokens=20)
    assert recorder.count == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pads", [0, 3, 14])
def test_long_prompts_are_read_in_pieces(name, pads, monkeypatch):
    model, ids = make(name), torch.randint(3, 40, (2, 23))
    mask = torch.ones_like(ids)
    mask[0, :pads], mask[1, : pads // 2] = 0, 0
    lengths, cache = [], zoo.ZooCache(len(model.model.layers))
    model.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    given = {"attention_mask": mask, "logits_to_keep": 2}
    with torch.no_grad():
        whole = model(ids, use_cache=False, **given).logits
        monkeypatch.setattr(decode, "PIECE", 10)
        assert torch.equal(model(ids, use_cache=False, **given).logits, whole) and lengths == [23, 23]
        cut = model(ids, past_key_values=cache, **given).logits
        assert lengths[2] == min(5 + pads // 2, 18) and max(lengths[3:]) <= 5 and sum(lengths[2:]) == 23 == cache.get_seq_length()
        torch.testing.assert_close(cut, whole)
        assert cache.lengths.tolist() == mask.sum(1).tolist()
        created = model(ids, use_cache=True, **given)
        torch.testing.assert_close(created.logits, whole)
        assert max(lengths[-2:]) <= 5 and created.past_key_values.lengths.tolist() == mask.sum(1).tolist()

"""The battery, third part: properties of caches and generation. Importing this file enters them among the model properties."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch

from zoo import decode
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.conformance import LENGTH, refused
from zoo.evaluate.model_properties import PAD, left_padded, of_models, twice
from zoo.evaluate.subject import Subject
from zoo.evaluate.tape import Recorder


def of_generators(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """A property of causal language models; of any other architecture, that its ForCausalLM refuses."""

    def check(subject: Subject) -> None:
        if subject.traits().causal:
            function(subject)
        else:
            refused(lambda: subject.model("causal_lm"), "causal")

    check.__name__ = function.__name__
    return of_models(check)


@of_generators
def cache_continues_anywhere(subject: Subject) -> None:
    """Prefill in pieces, then steps, with rows of unequal length: the logits of the whole."""
    rows = [subject.tokens(1, length, seed=length) for length in (LENGTH, 14)]
    ids, mask = left_padded(rows)
    model, exact_model = subject.model(), subject.model(dtype=torch.float64)
    with torch.no_grad():
        for cuts in ([6, 12], [10, 11, 12, 13], [1, 20]):
            cache, outs, start = None, [], 0
            for stop in [*cuts, LENGTH]:
                out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
                cache, start = out.past_key_values, stop
                outs.append(out.logits)
            assert cache.get_seq_length() == LENGTH
            assert cache.lengths.tolist() == [row.shape[1] for row in rows]
            for i, row in enumerate(rows):
                result = torch.cat(outs, dim=1)[i][mask[i] == 1]
                plain = twice(lambda row=row: model(row).logits[0])
                assert_close(result, plain, exact_model(row).logits[0], f"row {i} cut at {cuts}")


@of_generators
def cache_can_be_rearranged(subject: Subject) -> None:
    """Reorder, repeat, select and reset act on every state."""
    model, exact, ids = subject.model(), subject.model(dtype=torch.float64), subject.tokens(2, 9)
    order = torch.tensor([1, 0, 1])
    with torch.no_grad():
        plain, wide = twice(lambda: model(ids[order]).logits[:, -1]), exact(ids[order]).logits[:, -1]
        for change in ("batch_select_indices", "reorder_cache"):
            cache = model(ids[:, :-1]).past_key_values
            getattr(cache, change)(order)
            assert_close(model(ids[order, -1:], past_key_values=cache).logits[:, -1], plain, wide, change)
        cache = model(ids[:, :-1]).past_key_values
        cache.batch_repeat_interleave(2)
        again = model(ids[:, -1:].repeat_interleave(2, 0), past_key_values=cache).logits[:, -1]
        assert_close(again[[2, 0, 3]], plain, wide, "batch_repeat_interleave")
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes() == 0
        assert_close(model(ids[order], past_key_values=cache).logits[:, -1], plain, wide, "after reset")


@of_generators
def declared_bytes_are_held(subject: Subject) -> None:
    """The cache holds what the layers declare, and a decode step keeps every address within its room."""
    model, ids = subject.model(), subject.tokens(1, 70)
    with torch.no_grad():
        cache = model(ids).past_key_values
        declared = [block.initial_state(1, 70, torch.float32, "meta") for block in model.model.layers]
        expected = sum(t.numel() * t.element_size() for state in declared for t in state.values())
        assert cache.nbytes() == expected, f"holds {cache.nbytes()} bytes, declares {expected}"
        addresses = []
        for _ in range(2):
            model(ids[:, :1], past_key_values=cache)
            addresses.append({(i, n): t.data_ptr() for i, layer in enumerate(cache.layers) for n, t in layer.state.items()})
        moved = [key for key in addresses[0] if addresses[0][key] != addresses[1][key]]
        assert not moved, f"states move during decoding: {moved}"


@of_generators
def begins_from_learned_states(subject: Subject) -> None:
    """Learned states are at first those of nothing seen; packed, padded, cached and loaded again they begin every sequence."""
    plain_model, ids = subject.model(), subject.tokens(2, 9)
    fresh = subject.model(learned_state=True, push=False)
    starts = {name for name in fresh.state_dict() if ".start." in name}
    fresh.load_state_dict(plain_model.state_dict(), strict=False)
    with torch.no_grad():
        plain, wide = twice(lambda: plain_model(ids).logits), subject.model(dtype=torch.float64)(ids).logits
        assert_close(fresh(ids).logits, plain, wide, "from states that have learned nothing")
    if not starts:
        return
    model, exact = (subject.model(learned_state=True, dtype=dtype) for dtype in (torch.float32, torch.float64))
    with torch.no_grad():
        plain, wide = twice(lambda: model(ids, use_cache=False).logits), exact(ids, use_cache=False).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values)
        assert_close(torch.cat([first.logits, rest.logits], dim=1), plain, wide, "with a cache")
        packed = model(ids.reshape(1, -1), cu_seq_lens_q=torch.tensor([0, 9, 18]), use_cache=False)
        assert_close(packed.logits.view_as(wide), plain, wide, "packed")
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, cache_implementation="static"))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            assert_close(type(model).from_pretrained(folder)(ids, use_cache=False).logits, plain, wide, "loaded again")
    model(ids, labels=ids).loss.backward()
    for block in model.model.layers:
        gradients = [] if block.start is None else [value.grad for value in block.start.parameters()]
        assert not gradients or any(g is not None and g.any() for g in gradients), "a learned state has no gradient"


@of_generators
def generates_alike_in_every_way(subject: Subject) -> None:
    """Greedy, beams and sampling: with a cache as without, static as dynamic, in chunks, streamed; padded rows as alone."""
    from transformers import TextStreamer

    model = subject.model()
    rows = [subject.tokens(1, length, seed=length) for length in (9, 5)]
    ids, mask = left_padded(rows)
    common = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False}

    def new(**kwargs) -> list:
        torch.manual_seed(0)
        return model.generate(ids, **common | kwargs)[:, ids.shape[1] :].tolist()

    greedy = new(use_cache=False)
    assert new() == greedy, "the cache changes greedy decoding"
    for i, row in enumerate(rows):
        alone = model.generate(row, **common | {"attention_mask": torch.ones_like(row)})[:, row.shape[1] :].tolist()
        assert alone[0] == greedy[i], f"row {i} padded on the left continues otherwise than alone"
    assert new(cache_implementation="static") == greedy, "the static cache changes greedy decoding"
    assert new(prefill_chunk_size=4) == greedy, "prefill in chunks changes greedy decoding"
    with mock.patch.object(decode, "PIECE", 6):
        assert new() == greedy, "a prompt read in pieces changes greedy decoding"
    assert new(num_beams=3) == new(num_beams=3, use_cache=False), "the cache changes beam search"
    assert new(do_sample=True) == new(do_sample=True, use_cache=False), "the cache changes sampling"

    class Recorder(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    recorder = Recorder()
    model.generate(rows[0], streamer=recorder, **common | {"attention_mask": torch.ones_like(rows[0])})
    assert recorder.tokens == [*rows[0][0].tolist(), *greedy[0], "end"], "streaming differs from generating"


@of_generators
def recorded_steps_equal_plain_ones(subject: Subject) -> None:
    """Greedy, beams and sampling, with padded rows: the same tokens where steps are recorded and replayed, unless a step waits."""
    model = subject.model()
    ids, mask = left_padded([subject.tokens(1, length, seed=length) for length in (9, 5)])
    common = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": None}
    waits = any(getattr(module, "waits_for_device", False) for module in model.modules())
    grows = any(block.mixer is not None and not block.mixer.traits.constant_state for block in model.model.layers)
    for way in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}):
        written, recorder = [], Recorder()
        settings = {"DEVICE": "cpu", "ROOM": -10, "GRAIN": 1, "SMALL": 0, "record_graph": recorder}  # room that is used up soon
        for recorded in (False, True, True):
            torch.manual_seed(0)
            recorder.count = 0
            with mock.patch.multiple(decode, **settings) if recorded else nullcontext():
                written.append(model.generate(ids, **common | way).tolist())
            if len(written) == 2:
                right = (recorder.count == 0) if waits else (recorder.count > grows)
                assert right, f"{recorder.count} recordings with {way}"
        assert written[0] == written[1], f"recorded steps change what is written with {way}"
        assert written[0] == written[2], f"steps recorded by an earlier call change what is written with {way}"
        assert grows or not recorder.count, f"an earlier call's recording is not used with {way}"
        decode.forget(model)

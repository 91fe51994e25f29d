"""The battery for encoder-decoders: properties of a pair of stacks, its cache, generation and checkpoints."""

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSeq2SeqLM

from zoo.auto import model_class
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.conformance import refused
from zoo.evaluate.model_properties import learn_by_heart, left_padded, twice
from zoo.registry import build_config, get

SEQ2SEQ_PROPERTIES: dict[str, Callable[["Pair"], None]] = {}
READ, WRITTEN = 21, 9  # tokens


class Pair:
    """An encoder-decoder under test, in its preset "tiny", with parameters that hide nothing."""

    def __init__(self, name: str):
        self.name = name

    def model(self, *, dtype=torch.float32, push: bool = True, **fields) -> nn.Module:
        """In evaluation mode; the same parameters in every dtype."""
        torch.manual_seed(0)
        config = build_config(f"{self.name}-tiny", **fields)
        model = model_class(config)(config).eval()
        if push:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.to(dtype)

    def tokens(self, batch: int, length: int, seed: int = 1) -> Tensor:
        """Random token ids, none of them a special one."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, build_config(f"{self.name}-tiny").vocab_size, (batch, length), generator=generator)


def of_pairs(function: Callable[[Pair], None]) -> Callable[[Pair], None]:
    """Enter a property of encoder-decoders under its name."""
    SEQ2SEQ_PROPERTIES[function.__name__] = function
    return function


@of_pairs
@torch.no_grad()
def writes_without_looking_ahead(pair: Pair) -> None:
    """A token changes what is written behind it alone; any token of the source changes all that is written."""
    model, ids, written = pair.model(), pair.tokens(1, READ), pair.tokens(1, WRITTEN, seed=2)
    before = model(ids, decoder_input_ids=written).logits
    other = written.clone()
    other[0, 5] = (other[0, 5] + 1) % 100 + 3
    change = (model(ids, decoder_input_ids=other).logits - before).abs().amax((0, 2))
    assert not change[:5].any() and change[5:].all(), "a token changes what stands before it, or nothing behind it"
    for place in (0, READ // 2, READ - 1):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 100 + 3
        assert (model(other, decoder_input_ids=written).logits - before).abs().amax((0, 2)).all(), f"token {place} is not read"


@of_pairs
@torch.no_grad()
def padding_changes_nothing(pair: Pair) -> None:
    """Every row of a batch padded on either side, in both stacks, is the row alone."""
    model, exact = pair.model(), pair.model(dtype=torch.float64)
    rows = [pair.tokens(1, length, seed=length) for length in (3, READ, 12)]
    others = [pair.tokens(1, length, seed=length) for length in (7, 2, 10)]
    for side in ("left", "right"):
        (ids, mask), (written, written_mask) = left_padded(rows, side), left_padded(others, side)
        given = {"attention_mask": mask, "decoder_input_ids": written, "decoder_attention_mask": written_mask}
        result = model(ids, **given).logits
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            plain = twice(lambda row=row, other=other: model(row, decoder_input_ids=other).logits[0])
            assert_close(result[i][written_mask[i] == 1], plain, exact(row, decoder_input_ids=other).logits[0], f"row {i}, padded {side}")


@of_pairs
@torch.no_grad()
def cache_continues_anywhere(pair: Pair) -> None:
    """Written in pieces, from a source read once; the states can be rearranged."""
    model, exact = pair.model(), pair.model(dtype=torch.float64)
    ids, written = pair.tokens(2, READ), pair.tokens(2, WRITTEN, seed=2)
    plain, wide = twice(lambda: model(ids, decoder_input_ids=written).logits), exact(ids, decoder_input_ids=written).logits
    read = model.get_encoder()(ids)
    for cuts in ([1, 2, 3], [4], [2, 7]):
        cache, outs, start = None, [], 0
        for stop in [*cuts, WRITTEN]:
            out = model(encoder_outputs=read, decoder_input_ids=written[:, start:stop], past_key_values=cache, use_cache=True)
            outs.append(out.logits)
            cache, start = out.past_key_values, stop
        assert_close(torch.cat(outs, dim=1), plain, wide, f"cut at {cuts}")
    cache = model(ids, decoder_input_ids=written[:, :-1], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    again = model(encoder_outputs=read, decoder_input_ids=written[[1, 0], -1:], past_key_values=cache).logits
    assert_close(again[[1, 0], -1], tuple(p[:, -1] for p in plain), wide[:, -1], "rows exchanged")


@of_pairs
def generates_alike_in_every_way(pair: Pair) -> None:
    """Greedy, beams and sampling: with a cache as without, static as dynamic; padded rows as alone."""
    model = pair.model(eos_token_id=None, tie_word_embeddings=False)  # tied, the tiny model repeats itself
    rows = [pair.tokens(1, length, seed=length) for length in (READ, 5)]
    ids, mask = left_padded(rows)
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}

    def new(**kwargs) -> list:
        torch.manual_seed(0)
        return model.generate(ids, **common | kwargs).tolist()

    greedy = new(use_cache=False)
    assert new() == greedy, "the cache changes greedy decoding"
    assert len({tuple(row) for row in greedy}) == 2, "different sources lead to the same text"
    for i, row in enumerate(rows):
        alone = model.generate(row, **common | {"attention_mask": torch.ones_like(row)}).tolist()
        assert alone[0] == greedy[i], f"row {i} is continued otherwise than alone"
    assert new(cache_implementation="static") == greedy, "the static cache changes greedy decoding"
    assert new(num_beams=3) == new(num_beams=3, use_cache=False), "the cache changes beam search"
    assert new(do_sample=True) == new(do_sample=True, use_cache=False), "the cache changes sampling"


@of_pairs
def saves_and_loads_the_same_bits(pair: Pair) -> None:
    ids = pair.tokens(2, READ)
    for tied in (False, True):
        model = pair.model(tie_word_embeddings=tied)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            loaded = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
            assert type(loaded) is type(model)
            before, after = model.state_dict(), loaded.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before), "weights differ after loading"
            assert torch.equal(copy.deepcopy(loaded)(ids, decoder_input_ids=ids).logits, model(ids, decoder_input_ids=ids).logits)
            body = AutoModel.from_pretrained(folder)
            assert type(body) is get(pair.name).models["Model"]
        shared = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        assert shared == tied, f"tie_word_embeddings={tied}, but the loaded weights are {'' if shared else 'not '}shared"


@of_pairs
def loss_is_cross_entropy(pair: Pair) -> None:
    """Of the labels themselves, which the decoder gets moved one place; -100 is ignored, and micro-batches add up."""
    model, ids, labels = pair.model(), pair.tokens(3, READ), pair.tokens(3, WRITTEN, seed=2)
    labels[0, 4:] = -100
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, model.config.pad_token_id)], dim=1)
    with torch.no_grad():
        out, logits = model(ids, labels=labels), model(ids, decoder_input_ids=shifted).logits
        assert torch.equal(out.logits, logits), "labels are not moved one place"
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        assert_close(out.loss, expected, expected.double(), "loss")
        count = (labels != -100).sum()
        parts = sum(model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3))
        assert_close(parts, out.loss, expected.double(), "micro-batches")
    refused(lambda: model(ids), "decoder_input_ids")


@of_pairs
def checkpointing_changes_nothing(pair: Pair) -> None:
    """Gradients reach both stacks, and are the same where activations are computed again."""
    ids, labels = pair.tokens(2, READ), pair.tokens(2, WRITTEN, seed=2)
    grads = []
    for dtype, reentrant in ((torch.float64, None), (torch.float32, None), (torch.float32, False), (torch.float32, True)):
        model = pair.model(dtype=dtype).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=labels).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    exact, plain, *others = grads
    reached = [name for name, grad in plain.items() if "encoder" in name and grad is not None and grad.any()]
    assert reached, "no gradient reaches the encoder"
    for grad in others:  # gradients of the source add up in another order
        for name, expected in plain.items():
            assert (grad[name] is None) == (expected is None), f"{name} loses its gradient"
            if expected is not None:
                assert_close(grad[name], expected, exact[name], f"gradient of {name}", gradient=True)


@of_pairs
def learns_a_batch_by_heart(pair: Pair) -> None:
    model, ids, labels = pair.model(push=False).train(), pair.tokens(2, 12), pair.tokens(2, WRITTEN, seed=2)
    learn_by_heart(model, ids, labels)


@of_pairs
def runs_in_half_precision(pair: Pair) -> None:
    out = pair.model(dtype=torch.bfloat16, push=False)(pair.tokens(2, READ), labels=pair.tokens(2, WRITTEN))
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()


@of_pairs
def adapts_with_lora(pair: Pair) -> None:
    """Adapters on the targets of all mixers learn in both stacks, and change the output."""
    from peft import LoraConfig, get_peft_model

    model, ids, labels = pair.model(), pair.tokens(2, READ), pair.tokens(2, WRITTEN, seed=2)
    targets = {name for stack in (model.model.encoder, model.model.decoder) for layer in stack.layers for name in layer.mixer.lora_targets}
    before = model(ids, labels=labels).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=sorted(targets), init_lora_weights=False)).eval()
    out = adapted(input_ids=ids, labels=labels)
    assert (out.logits - before).abs().max() > 1e-4, "adapters change nothing"
    out.loss.backward()
    idle = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    assert not idle, f"adapters without a gradient: {idle}"


@of_pairs
def trains_compiled(pair: Pair) -> None:
    """Both stacks in one graph, forward and backward."""
    torch._dynamo.reset()
    model, ids, written = pair.model().train(), pair.tokens(2, READ), pair.tokens(2, WRITTEN, seed=2)
    compiled = torch.compile(lambda x, y: model(x, decoder_input_ids=y).logits, fullgraph=True, backend="aot_eager")
    out = compiled(ids, written)
    with torch.no_grad():
        plain = twice(lambda: model(ids, decoder_input_ids=written).logits)
        exact = pair.model(dtype=torch.float64)(ids, decoder_input_ids=written).logits
    assert_close(out.detach(), plain, exact, "compiled logits")
    out.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch._dynamo.reset()

"""The battery, second half: properties of whole models, heads, generation and checkpoints."""

import copy
import json
import pickle
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from zoo.evaluate.closeness import assert_close
from zoo.evaluate.conformance import LENGTH, refused
from zoo.evaluate.subject import Subject, by_definition
from zoo.kernels.packing import Packing

MODEL_PROPERTIES: dict[str, Callable[[Subject], None]] = {}
PAD = 0


def of_models(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """Enter a property of models under its name."""
    MODEL_PROPERTIES[function.__name__] = function
    return function


def hidden(model, ids: Tensor, **kwargs) -> Tensor:
    return model(ids, use_cache=False, **kwargs).last_hidden_state


def twice(function: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """A plain computation by the definition, and as it runs by itself: what the noise of its dtype is judged by."""
    with by_definition():
        defined = function()
    return defined, function()


def left_padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows `[1, T_i]` as one padded batch and its mask."""
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


@of_models
def saves_and_loads_the_same_bits(subject: Subject) -> None:
    for tied in (False, True):
        model = subject.model(tie_word_embeddings=tied)
        ids = subject.tokens(2, LENGTH)
        auto = AutoModelForCausalLM if subject.traits().causal else AutoModelForMaskedLM
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            model.save_pretrained(folder)
            files = {p.name for p in Path(folder).iterdir()}
            assert not any(name.endswith(".bin") for name in files), f"not safetensors only: {files}"
            loaded = auto.from_pretrained(folder).eval()
            assert type(loaded) is type(model), f"saved a {type(model).__name__}, loaded a {type(loaded).__name__}"
            before, after = model.state_dict(), loaded.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before), "weights differ after loading"
            # a copy, for memory mapped from a file is aligned otherwise, by which matrix products round differently
            assert torch.equal(copy.deepcopy(loaded)(ids).logits, model(ids).logits), "logits differ after loading"
            first, second = model.config.to_dict(), AutoConfig.from_pretrained(folder).to_dict()
            differ = {k for k in first if k not in ("architectures", "_name_or_path", "dtype") and first[k] != second.get(k)}
            assert not differ, f"config fields change on the way: {differ}"
        shared = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        assert shared == tied, f"tie_word_embeddings={tied}, but the loaded weights are {'' if shared else 'not '}shared"


@of_models
def is_known_to_auto_classes(subject: Subject) -> None:
    config = subject.config()
    assert config.model_type == f"zoo_{subject.name}"
    assert type(AutoConfig.for_model(config.model_type)) is type(config)
    assert type(AutoModel.from_config(config)) is subject.entry.models["Model"]


@of_models
def refuses_unknown_fields(subject: Subject) -> None:
    refused(lambda: subject.config(hidden_sise=3), "hidden_size")
    with tempfile.TemporaryDirectory() as folder:
        config = subject.config()
        config.save_pretrained(folder)
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_sise": 3}))
        refused(lambda: AutoConfig.from_pretrained(folder), "hidden_size")
    refused(lambda: subject.model("base")(subject.tokens(1, 4), flavour=1), "flavour")


@of_models
def initialises_what_a_checkpoint_lacks(subject: Subject) -> None:
    """A model built on the meta device and then initialised equals one built directly: values, names, shapes, buffers."""
    model_class, config = subject.entry.models["Model"], subject.config()
    direct = model_class(config)
    for part in [*direct.modules(), *direct.parameters(), *direct.buffers()]:
        part._is_hf_initialized = False
    torch.manual_seed(0)
    direct.initialize_weights()
    torch.manual_seed(0)
    # transformers' own loader: the zoo's would refuse the missing keys
    late = PreTrainedModel.from_pretrained.__func__(model_class, None, config=config, state_dict={})
    values, others = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (direct, late))
    assert values.keys() == others.keys(), values.keys() ^ others.keys()
    for name, value in values.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
        assert value.dtype == others[name].dtype, f"{name} differs in dtype"
        assert torch.equal(value, others[name]), f"{name} is initialised otherwise, or not at all"


@of_models
def padding_changes_nothing(subject: Subject) -> None:
    """Every row of a padded batch, on either side, is the row alone."""
    rows = [subject.tokens(1, length, seed=length) for length in (3, 11, 7)]
    with torch.no_grad():
        plain_model, exact_model = subject.model("base"), subject.model("base", dtype=torch.float64)
        for side in ("left", "right"):
            ids, mask = left_padded(rows, side)
            result = hidden(plain_model, ids, attention_mask=mask)
            for i, row in enumerate(rows):
                plain = twice(lambda row=row: hidden(plain_model, row)[0])
                assert_close(result[i][mask[i] == 1], plain, hidden(exact_model, row)[0], f"row {i}, padded on the {side}")


@of_models
def packed_row_equals_documents(subject: Subject) -> None:
    """Said in any of the three ways; loss gradients too."""
    lengths = [4, 9, 1, 6]
    rows = [subject.tokens(1, length, seed=length) for length in lengths]
    packed, packing = torch.cat(rows, dim=1), Packing.from_lengths(lengths)
    ways = [
        {"cu_seq_lens_q": packing.cu_seqlens.int()},
        {"seq_idx": packing.seq_idx[None].int()},
        {"position_ids": packing.positions[None]},
    ]
    gradients = []
    ways_apart = [(torch.float64, by_definition, 1), (torch.float32, by_definition, 1), (torch.float32, nullcontext, 1)]
    for dtype, context, copies in (*ways_apart, (torch.float32, nullcontext, 3)):  # copies round differently
        model = subject.model("base", dtype=dtype)
        with context():
            apart = torch.cat([hidden(model, row.expand(copies, -1)) for row in rows], dim=1)
        apart.square().sum().div(copies).backward()
        apart = apart[:1]
        gradients.append((apart.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (exact, exact_grads), *plain = gradients
    for way in ways:
        model = subject.model("base")
        result = hidden(model, packed, **way)
        assert_close(result, tuple(y for y, _ in plain), exact, f"packed by {next(iter(way))}")
        result.square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                noise = tuple(grads[name] for _, grads in plain)
                assert_close(parameter.grad, noise, exact_grads[name], f"gradient of {name}, packed", gradient=True)


@of_models
def checkpointing_changes_nothing(subject: Subject) -> None:
    ids = subject.tokens(2, LENGTH)
    grads = []
    for reentrant in (None, False, True):
        model = subject.model().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    for loss, grad in grads[1:]:
        assert torch.equal(loss, grads[0][0]), "the loss changes"
        for name, expected in grads[0][1].items():
            assert (grad[name] is None) == (expected is None), f"{name} loses its gradient"
            if expected is not None:
                assert_close(grad[name], expected, expected, f"gradient of {name}", gradient=True)


@of_models
def loss_is_cross_entropy(subject: Subject) -> None:
    """Of the next token (or the masked one), -100 ignored; micro-batches add up to the batch."""
    model, ids = subject.model(), subject.tokens(4, LENGTH)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
        logits, targets = (out.logits[:, :-1], labels[:, 1:]) if subject.traits().causal else (out.logits, labels)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        assert_close(out.loss, expected, expected.double(), "loss")
        if subject.traits().causal:
            alone = model(ids, labels=labels, skip_logits=True)
            assert alone.logits is None
            assert_close(alone.loss, out.loss, expected.double(), "loss without logits")
            count = (labels[:, 1:] != -100).sum()
            pairs = zip(ids.split(1), labels.split(1), strict=True)
            parts = sum(model(row, labels=targets, num_items_in_batch=count).loss for row, targets in pairs)
            assert_close(parts, out.loss, expected.double(), "micro-batches")


def learn_by_heart(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> None:
    """Sixty steps on one batch, after which little of its loss may be left."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], f"the loss went from {losses[0]:.2f} only to {losses[-1]:.2f} in 60 steps"


@of_models
def learns_a_batch_by_heart(subject: Subject) -> None:
    model, ids = subject.model(push=False).train(), subject.tokens(2, 12)
    learn_by_heart(model, ids, ids)


@of_models
def copies_and_pickles(subject: Subject) -> None:
    model, ids = subject.model(), subject.tokens(1, 5)
    with torch.no_grad():
        expected = model(ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids).logits, expected)


@of_models
def classifies(subject: Subject) -> None:
    """Sequences and tokens; a padded row is classified as it is alone."""
    rows = [subject.tokens(1, length, seed=length) for length in (3, 8)]
    ids, mask = left_padded(rows)
    count = 64  # enough numbers for the noise among them to be typical
    for task, labels in (("sequence_classification", torch.tensor([0, 2])), ("token_classification", mask * 2)):
        model = subject.model(task, num_labels=count)
        exact = subject.model(task, num_labels=count, dtype=torch.float64)
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        assert torch.isfinite(out.loss)
        for i, row in enumerate(rows):
            with torch.no_grad():
                alone, wide = twice(lambda row=row, model=model: model(row).logits[0]), exact(row).logits[0]
            result = out.logits[i] if task.startswith("sequence") else out.logits[i][mask[i] == 1]
            assert_close(result.detach(), alone, wide, f"{task}, row {i}")


@of_models
def marks_answers(subject: Subject) -> None:
    """Where answers begin and end; a padded row's are marked as they are alone, and positions behind the end are ignored."""
    rows = [subject.tokens(1, length, seed=length) for length in (40, 56)]
    ids, mask = left_padded(rows, "right")
    model, exact = (subject.model("question_answering", dtype=dtype) for dtype in (torch.float32, torch.float64))
    out = model(ids, attention_mask=mask, start_positions=torch.tensor([2, 56]), end_positions=torch.tensor([5, 90]))
    out.loss.backward()
    idle = [name for name, p in model.named_parameters() if name == "answer.weight" and (p.grad is None or not p.grad.any())]
    assert not idle, f"without a gradient: {idle}"
    first = [-logits[0].log_softmax(-1)[at] for logits, at in ((out.start_logits, 2), (out.end_logits, 5))]
    assert_close(out.loss.detach(), sum(first).detach() / 2, sum(first).detach().double() / 2, "loss")
    with torch.no_grad():
        for i, row in enumerate(rows):
            for name in ("start_logits", "end_logits"):
                plain, wide = twice(lambda row=row, name=name: getattr(model(row), name)[0]), getattr(exact(row), name)[0]
                assert_close(getattr(out, name)[i][mask[i] == 1].detach(), plain, wide, f"{name}, row {i}")
    refused(lambda: model(ids, start_positions=torch.tensor([2, 3])), "end_positions")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert type(AutoModel.from_pretrained(folder)) is subject.entry.models["Model"], "the body is not read without its head"


@of_models
def runs_in_half_precision(subject: Subject) -> None:
    model = subject.model(dtype=torch.bfloat16, push=False)
    out = model(subject.tokens(2, LENGTH))
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()


@of_models
def trains_in_mixed_precision(subject: Subject) -> None:
    """Under autocast to bfloat16 the weights and their gradients stay in float32, and little is lost."""
    model, ids = subject.model(push=False).train(), subject.tokens(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    with torch.no_grad():
        plain, exact = (subject.model(push=False, dtype=dtype)(ids).logits for dtype in (torch.bfloat16, torch.float64))
    assert_close(out.logits.detach(), plain, exact, "logits under autocast")
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is None or (gradient.dtype == torch.float32 and torch.isfinite(gradient).all()), f"gradient of {name}"


@of_models
def adapts_with_lora(subject: Subject) -> None:
    """Adapters on the declared targets, of the channel mixers where mixers have none, change the output, learn, and merge."""
    from peft import LoraConfig, get_peft_model

    layers = subject.model("base").layers
    mixers = [layer.mixer for layer in layers if layer.mixer is not None]
    targets = {t for mixer in mixers for t in mixer.lora_targets} or {t for layer in layers for t in layer.channel_mixer.lora_targets}
    model, ids = subject.model(), subject.tokens(2, 9)
    before = model(ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=sorted(targets), init_lora_weights=False)).eval()
    with torch.no_grad():
        during = adapted(ids).logits
    assert (during - before).abs().max() > 1e-4, "adapters change nothing: a projection's weight is read instead of called"
    adapted(ids, labels=ids).loss.backward()
    idle = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().max() == 0)]
    assert not idle, f"adapters without a gradient: {idle}"
    with torch.no_grad():
        wide = copy.deepcopy(adapted).double()
        exact = wide(ids).logits
        merged = wide.merge_and_unload()(ids).logits
    assert_close(merged, during, exact, "merged adapters")


@of_models
def masked_heads_know_their_direction(subject: Subject) -> None:
    """A masked language model exists exactly where the mixer sees both ways; a causal head refuses a bidirectional config."""
    if subject.traits().bidirectional:
        ids = subject.tokens(2, 8)
        out = subject.model("masked_lm", causal=False)(ids, labels=ids)
        out.loss.backward()
        assert out.logits.shape == (2, 8, subject.config().vocab_size)
        refused(lambda: subject.model("causal_lm", causal=False), "causal")
    else:
        refused(lambda: subject.model("masked_lm", causal=False), "causal")
    if subject.traits().causal:
        refused(lambda: subject.model("masked_lm", causal=True), "causal")


@of_models
def trains_compiled(subject: Subject) -> None:
    """The whole model in one graph, forward and backward."""
    torch._dynamo.reset()
    model, ids = subject.model().train(), subject.tokens(2, LENGTH)
    compiled = torch.compile(lambda x: model(x).logits, fullgraph=True, backend="aot_eager")
    out = compiled(ids)
    with torch.no_grad():
        plain, exact = twice(lambda: model(ids).logits), subject.model(dtype=torch.float64)(ids).logits
    assert_close(out.detach(), plain, exact, "compiled logits")
    out.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch._dynamo.reset()

"""Training: the data, the loss, what runs promise, and what they refuse."""

import copy
import json
import shlex
import signal
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import AutoPeftModelForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
import zoo.loss
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.subject import Subject
from zoo.evaluate.training import EQUIVALENCES, STEPS, StopAt, adapters, blocks, compare, model, rows
from zoo.loss import chunked_cross_entropy
from zoo.registry import get_channel_mixer
from zoo.train import (
    DataArguments,
    Display,
    FinetuneArguments,
    PretrainArguments,
    Rows,
    RunArguments,
    ZooTrainer,
    byte_tokenizer,
    choose_parameters,
    collate,
    documents,
    finetune,
    forward_flops,
    learn_states,
    lora_coverage,
    parse,
    pretrain,
    text_rows,
    token_rows,
)
from zoo.train.adapt import add_lora
from zoo.train.data import encode, packed
from zoo.train.display import clock
from zoo.train.meter import Meter

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "scripts" / "recipes"
TEMPLATE = (RECIPES / "chat.jinja").read_text(encoding="utf-8")
KINDS = (RunArguments, DataArguments, PretrainArguments)


@pytest.fixture
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(path: Path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def jsonl_rows(path: str, tokenizer, size: int = 64, **kwargs) -> Rows:
    return text_rows(documents(Path(path), tokenizer), tokenizer, size, **kwargs)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_chunked_loss_is_the_loss_of_whole_logits(monkeypatch):
    monkeypatch.setattr(zoo.loss, "LOGITS", 1)  # 64 tokens a chunk, the least
    subject = Subject("gemma2")  # caps its logits
    ids = subject.tokens(5, 70)
    labels = ids.masked_fill(subject.tokens(5, 70, seed=2) % 3 == 0, -100)
    found = []
    for dtype, skip in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        net = subject.model(dtype=dtype)
        loss = net(ids, labels=labels, skip_logits=skip).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters())])
    for exact, plain, chunked in zip(*found, strict=True):
        assert_close(chunked, plain, exact, "loss or gradient", gradient=True)


def test_chunked_loss_never_holds_whole_logits(monkeypatch):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    monkeypatch.setattr(zoo.loss, "LOGITS", 1)
    net, ids = Subject("gla").model(vocab_size=5000), Subject("gla").tokens(4, 256)
    for skip in (True, False):
        with Largest() as largest:
            net(ids, labels=ids, skip_logits=skip).loss.backward()
        assert (largest.numel < ids.numel() * 5000 / 2) == skip


def test_chunked_loss_without_labels_has_gradients_of_zero():
    head = torch.nn.Linear(4, 9)
    loss = chunked_cross_entropy(torch.randn(1, 6, 4), torch.full((1, 6), -100), head, 9, count=1)
    loss.backward()
    assert loss == 0 and not head.weight.grad.any()
    with pytest.raises(ValueError, match="pass labels"):
        Subject("gla").model()(torch.zeros(1, 3, dtype=torch.long), skip_logits=True)


def test_chunked_loss_takes_shifted_labels():
    states, head, labels = torch.randn(2, 6, 4), torch.nn.Linear(4, 9), torch.randint(9, (2, 6))
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = chunked_cross_entropy(states, labels, head, 9)
    assert torch.equal(chunked_cross_entropy(states, torch.zeros_like(labels), head, 9, shift_labels=shifted), expected)


# -- the data ----------------------------------------------------------------------------------------------------------


def test_rows_hold_every_document_once(tokenizer, tmp_path):
    texts = ["x" * length for length in (3, 60, 17, 100, 31, 1, 8)]
    made = jsonl_rows(write(tmp_path / "a.jsonl", *({"text": text} for text in texts)), tokenizer)
    lengths = sorted(length for row in made for length in row["lengths"])
    assert lengths == sorted([5, 62, 19, 64, 38, 33, 3, 10])  # with a beginning and an end, the longest in two pieces
    assert all(len(row["input_ids"]) <= 64 for row in made) and len(made) <= 5
    assert made.fingerprint() == jsonl_rows(str(tmp_path / "a.jsonl"), tokenizer).fingerprint()
    assert made.fingerprint() != jsonl_rows(str(tmp_path / "a.jsonl"), tokenizer, packing=False).fingerprint()


def test_packing_fills_rows_to_the_brim():
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    ends = np.cumsum([0, *lengths]).tolist()
    filled = packed(list(pairwise(ends)), 100)
    assert sorted(place for row in filled for place in row) == list(pairwise(ends))
    assert max(sum(stop - start for start, stop in row) for row in filled) <= 100
    assert len(filled) <= 1.02 * lengths.sum() / 100 + 1


def test_a_packed_batch_has_the_gradients_of_its_documents_alone():
    made, alone = rows(), rows(packing=False)
    net, exact = model(), model(torch.float64)
    batch = collate([made[i] for i in range(len(made))])
    assert len(batch["cu_seq_lens_q"]) == 24 and batch["input_ids"].shape[0] == 1
    count = int((batch["labels"] != -100).sum())
    results = []
    for trained, batches in ((exact, alone), (net, alone), (model(), [batch])):
        for one in batches if batches is not alone else ({k: row[k][None] for k in ("input_ids", "labels")} for row in alone):
            trained(**one, use_cache=False, num_items_in_batch=count).loss.backward()
        results.append([p.grad for p in trained.parameters()])
    for wide, plain, together in zip(*results, strict=True):
        assert_close(together, plain, wide, "gradient", gradient=True)


def test_only_completions_and_assistants_are_learned(tokenizer, tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "2+2=", "completion": "4"},
        {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yé"}, {"role": "user", "content": "so"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
    )
    made = list(jsonl_rows(path, tokenizer, 128, packing=False))
    assert [tokenizer.decode(row["labels"][row["labels"] >= 0]) for row in made] == ["4<|end|>", "yé\n<|end|>", "b\n<|end|>b\n<|end|>"]
    assert tokenizer.decode(made[0]["input_ids"]) == "<|end|>2+2=4<|end|>"


def test_tokenizers_in_python_read_the_same(tokenizer):
    class Slow:
        is_fast, bos_token_id, eos_token_id = False, None, 256

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    parts = [("ab", False), ("cdé", True)]
    assert encode(Slow(), "prompt", parts) == encode(tokenizer, "prompt", parts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"a.jsonl:2: not JSON \(.*\); expected one object a line"),
        ('["text"]', r"a.jsonl:2: expected .* found list"),
        ('{"txt": "a"}', r"a.jsonl:2: expected .*found an object with \['txt'\]"),
        ('{"text": 3}', "a.jsonl:2: expected .* with texts as values"),
        ('{"prompt": "a"}', "a.jsonl:2: expected"),
        ('{"messages": "hi"}', "a.jsonl:2: messages must be a list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "a.jsonl:2: messages .* one at least the assistant's"),
        ({"prompt": "a" * 64, "completion": "b"}, "a.jsonl:2: 67 tokens, but a row holds 64; raise --block_size, .*--drop_long"),
    ],
)
def test_malformed_records_are_named(tokenizer, tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        jsonl_rows(write(tmp_path / "a.jsonl", {"text": "fine"}, line), tokenizer)


def test_bytes_that_are_no_text_are_named(tokenizer, tmp_path):
    for name, message in (("a.txt", "a.txt is no text in UTF-8"), ("a.jsonl", "a.jsonl:1: not JSON")):
        (tmp_path / name).write_bytes(b'{"text": "\xff"}\n')
        with pytest.raises(ValueError, match=message):
            jsonl_rows(str(tmp_path / name), tokenizer)


def test_long_chats_can_be_left_out(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, {"prompt": "a" * 64, "completion": "b"})
    assert len(jsonl_rows(path, tokenizer, drop_long=True)) == 1


def test_chats_need_a_template_that_appends(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    plain = byte_tokenizer()
    with pytest.raises(ValueError, match=r"a.jsonl:1 is a chat, but the tokenizer has no chat template.*--chat_template"):
        jsonl_rows(path, plain)
    plain.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not just append turn 2"):
        jsonl_rows(path, plain)


def test_tokens_stay_on_the_disk(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 97, 1000).astype(np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", tokens.astype(np.int64))
    for name in ("a.bin", "a.npy"):
        made = token_rows(tmp_path / name, 64, 97, None)
        assert isinstance(made.tokens, np.memmap) and len(made) == 15 and made[1]["lengths"] == [64]
        assert made[14]["input_ids"].tolist() == tokens[14 * 64 : 15 * 64].tolist()
    split = token_rows(tmp_path / "a.bin", 64, 97, end=5)[0]
    starts = np.cumsum([0, *split["lengths"][:-1]])
    assert all(split["input_ids"][start - 1] == 5 for start in starts[1:]) and (split["labels"][starts] == -100).all()
    with pytest.raises(ValueError, match=r"a.npy: token id 96 is outside the vocabulary of 96"):
        token_rows(tmp_path / "a.npy", 64, 96, None)
    with pytest.raises(ValueError, match="expected one row of at least 2048 integers"):
        token_rows(tmp_path / "a.npy", 2048, 97, None)


# -- what runs promise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "FSDP2" in n or "compiled" in n else ()) for n in EQUIVALENCES])
def test_the_same_run_done_otherwise_learns_the_same(name):
    compare(name)


@pytest.mark.parametrize("name", zoo.list_models(encoder_decoder=False))
def test_adapters_reach_every_layer_and_merge(name):
    coverage, change, merged = adapters(name)
    assert coverage.modules and change > 1e-3 and merged < 1e-9 * max(1.0, change), (change, merged)
    idle = [kind for kind, count in coverage.layers.items() if coverage.reached[kind] < count]
    assert not idle or not any(getattr(m, "lora_targets", ()) for m in Subject(name).model().modules() if type(m).__name__ in str(idle))


def test_the_page_has_every_comparison():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in EQUIVALENCES), "run python scripts/write_training.py"


def test_evaluation_counts_every_token_once_and_bytes(tokenizer, tmp_path):
    made = jsonl_rows(write(tmp_path / "a.jsonl", *({"text": "abc" * n} for n in (1, 9, 4, 30, 2))), tokenizer, packing=False)
    torch.manual_seed(0)
    net = zoo.from_config("gla-tiny", vocab_size=257)
    trainer = ZooTrainer(net, RunArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=2), made, made, tokenizer)
    found = trainer.evaluate()
    total, exact = (
        sum(trained(row["input_ids"][None], labels=row["labels"][None], num_items_in_batch=1).loss.detach() for row in made)
        for trained in (net, copy.deepcopy(net).double())
    )
    count, size = (
        sum(int((row["labels"] >= 0).sum()) for row in made),
        sum(int(((row["labels"] >= 0) & (row["labels"] < 256)).sum()) for row in made),
    )
    for name, function in (
        ("loss", lambda x: x / count),
        ("perplexity", lambda x: (x / count).exp()),
        ("bits_per_byte", lambda x: x / np.log(2) / size),
    ):
        assert_close(torch.tensor(found[f"eval_{name}"]), function(total), function(exact), name)
    assert size == sum(len("abc" * n) for n in (1, 9, 4, 30, 2)) - 1  # the second piece of the longest begins with one unpredicted


def test_processes_share_evaluation(tmp_path):
    made, trainer = rows(), ZooTrainer(model(), RunArguments(str(tmp_path), use_cpu=True), rows())
    batches = []
    for rank in range(3):
        trainer.args = types.SimpleNamespace(world_size=3, process_index=rank, per_device_eval_batch_size=2)
        batches.append(list(trainer._shares(made)))
    assert len({tuple(map(len, share)) for share in batches}) == 1, "every process must have as much to do"
    seen = torch.cat([sample["labels"] for share in batches for batch in share for sample in batch])
    expected = torch.cat([row["labels"] for row in made])
    assert sorted(seen[seen >= 0].tolist()) == sorted(expected[expected >= 0].tolist())


@pytest.mark.parametrize("name", zoo.list_channel_mixers())
def test_channel_mixers_count_their_flops(name):
    mixer = get_channel_mixer(name)(zoo.build_config("transformer-tiny"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, 24, 32))
    products = (torch.ops.aten.mm, torch.ops.aten.addmm)
    assert mixer.flops(24) == sum(count for op, count in counter.get_flop_counts()["Global"].items() if op in products)


def test_frozen_weights_cost_less():
    net = zoo.from_config("gla-tiny")
    total, frozen = forward_flops(net, 64)
    operators = sum(block.mixer.operator_flops(64) for block in net.model.layers)
    linears = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear))
    assert (total, frozen) == (2 * 64 * linears + operators, 0)
    net.requires_grad_(False)
    assert forward_flops(net, 64) == (total, 2 * 64 * linears)
    adapted, _ = add_lora(zoo.from_config("gla-tiny"), ["mixers"], r=2)
    assert Meter(adapted).flops(64) < 3 * total


# -- whole runs --------------------------------------------------------------------------------------------------------


def run(folder: Path, *flags: str, lines: list | None = None):
    """The recipe for pretraining, at reduced size."""
    small = ["--model_args", '{"hidden_size": 32, "num_hidden_layers": 2}', "--block_size", "128", "--use_cpu", "True", "--max_steps", "3"]
    recipe = ["--config", str(RECIPES / "pretrain_bytes.yaml"), "--lr_scheduler_kwargs", '{"num_decay_steps": 1}', "--warmup_steps", "1"]
    return pretrain(
        *parse(KINDS, [*recipe, *small, "--eval_steps", "2", "--save_steps", "2", "--output_dir", str(folder), *flags]),
        say=(lines if lines is not None else []).append,
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    lines, folder = [], tmp_path_factory.mktemp("pretrained")
    run(folder, lines=lines)
    return folder, lines


def test_recipe_pretrains(pretrained):
    folder, lines = pretrained
    assert {"losses.json", "losses.png", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == 3 and all(part in steps[-1] for part in ("loss", "gnorm", "lr", "tok/s", "FLOP/s", "GiB", " < 0:00:00"))
    assert any(line.startswith("eval      2") and "bits/byte" in line for line in lines)
    assert "3 steps, " in lines[-1] and "best on held-out text" in lines[-1]
    history = json.loads((folder / "losses.json").read_text())
    assert next(entry["tokens"] for entry in history if "loss" in entry) > 500
    net = AutoModelForCausalLM.from_pretrained(folder)
    assert net.config.use_cache and net.config.eos_token_id == 256
    text = AutoTokenizer.from_pretrained(folder)
    assert text.decode(net.generate(**text("def", return_tensors="pt"), max_new_tokens=3, do_sample=False)[0]).startswith("def")


def tune(source: Path, folder: Path, *flags: str, lines: list | None = None):
    recipe = ["--config", str(RECIPES / "finetune_chat.yaml"), "--train_file", str(RECIPES / "chat.jsonl")]
    recipe += ["--chat_template", str(RECIPES / "chat.jinja"), "--use_cpu", "True", "--max_steps", "2"]
    kinds = (RunArguments, DataArguments, FinetuneArguments)
    arguments = [*recipe, "--model_name_or_path", str(source), "--output_dir", str(folder), *flags]
    return finetune(*parse(kinds, arguments), say=(lines if lines is not None else []).append)


def test_recipe_finetunes(pretrained, tmp_path):
    lines = []
    tune(pretrained[0], tmp_path / "merged", lines=lines)
    assert lines[0].startswith("LoRA: mixer GLAMixer 2/2 layers, 10 linear layers; channel_mixer GatedMLP 2/2")
    merged, before = (zoo.from_pretrained(folder) for folder in (tmp_path / "merged", pretrained[0]))
    ids = torch.arange(20)[None]
    assert type(merged) is type(before) and (merged(ids).logits - before(ids).logits).abs().max() > 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    trained = tune(pretrained[0], tmp_path / "adapter", "--merge", "False").model.eval()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(copy.deepcopy(loaded)(ids).logits, copy.deepcopy(trained)(ids).logits)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(pretrained, tmp_path, monkeypatch):
    step, lines = ZooTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 0:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ZooTrainer, "training_step", interrupted)
        assert run(tmp_path, lines=lines).interrupted
    assert lines[-1] == "interrupted after step 1; go on with --resume_from_checkpoint last"
    assert not (tmp_path / "model.safetensors").exists()
    assert not run(tmp_path, "--resume_from_checkpoint", "last").interrupted
    whole, parts = (zoo.from_pretrained(folder).state_dict() for folder in (pretrained[0], tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    tokens = [[e["tokens"] for e in json.loads((f / "losses.json").read_text()) if "tokens" in e] for f in (pretrained[0], tmp_path)]
    assert tokens[0] == tokens[1]


def test_mixed_precision_keeps_the_weights_wide(pretrained, tmp_path):
    losses = []
    for flags in ((), ("--bf16", "True")):
        trainer = tune(pretrained[0], tmp_path / str(len(flags)), "--merge", "False", *flags)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] != losses[1] and np.isfinite(losses).all()


def test_rows_of_one_document_compile_to_one_graph(tmp_path):
    torch._dynamo.reset()
    compiled = torch.compile(model().train(), fullgraph=True, backend="aot_eager")
    compiled(**collate([blocks()[0], blocks()[1]]), skip_logits=True, use_cache=False, num_items_in_batch=62).loss.backward()
    torch._dynamo.reset()


def test_adapters_with_dropout_resume_and_checkpoint_exactly(tmp_path):
    settings = dict(use_cpu=True, max_steps=STEPS, per_device_train_batch_size=4, save_steps=100, learning_rate=1e-2)
    found = []
    for folder, stop, extra in (
        ("whole", None, {}),
        ("parts", 2, {}),
        ("parts", None, {}),
        ("cheap", None, {"gradient_checkpointing": True}),
    ):
        torch.manual_seed(0)
        net, _ = add_lora(model(), (), r=4, dropout=0.1)
        trainer = ZooTrainer(net, RunArguments(str(tmp_path / folder), **settings, **extra), rows())
        if stop:
            trainer.add_callback(StopAt(stop, trainer))
        resumed = (tmp_path / "parts" / "checkpoint-2").is_dir() and folder == "parts"
        trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2") if resumed else None)
        found.append(torch.cat([p.detach().flatten() for p in net.parameters() if p.requires_grad]))
    whole, interrupted, resumed, cheap = found
    assert not torch.equal(whole, interrupted) and torch.equal(whole, resumed) and torch.equal(whole, cheap)


def test_parts_are_trained_alone(pretrained, tmp_path):
    trainer = tune(pretrained[0], tmp_path, "--lora_r", "0", "--merge", "False", "--train_only", "*.mixer.*", "--freeze", "*.gate_proj.*")
    before, after = zoo.from_pretrained(pretrained[0]).state_dict(), zoo.from_pretrained(tmp_path).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mixer." in name and ".gate_proj." not in name for name in changed)
    assert trainer.state.global_step == 2


def test_states_are_learned_alone(pretrained, tmp_path):
    tune(pretrained[0], tmp_path / "out", "--lora_r", "0", "--merge", "False", "--learn_state", "True")
    before, after = zoo.from_pretrained(pretrained[0]).state_dict(), zoo.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(after.keys() - before.keys()) == [f"model.layers.{i}.start.values.memory" for i in range(2)]
    assert all(after[name].any() for name in after.keys() - before.keys())
    with pytest.raises(ValueError, match="TransformerForCausalLM has no states to learn"):
        learn_states(zoo.from_config("transformer-tiny"))
    with pytest.raises(ValueError, match="either --lora_r, or"):
        tune(pretrained[0], tmp_path / "both", "--learn_state", "True")


def test_a_signal_saves_a_checkpoint_and_resuming_needs_the_same_run(tmp_path):
    class Signal(StopAt):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == self.stop:
                signal.raise_signal(signal.SIGTERM)

    handler, made = signal.getsignal(signal.SIGTERM), rows()
    settings = dict(max_steps=STEPS, use_cpu=True, save_steps=100, logging_steps=50)
    first = ZooTrainer(model(), RunArguments(str(tmp_path), **settings), made)
    first.add_callback(Signal(3, first))
    first.train()
    assert first.interrupted and first.state.global_step == 3 and signal.getsignal(signal.SIGTERM) is handler
    last = ZooTrainer(model(), RunArguments(str(tmp_path / "last"), **settings), made)
    last.add_callback(StopAt(STEPS, last))
    last.train()
    assert not last.interrupted, "nothing was left to interrupt"
    checkpoint = str(tmp_path / "checkpoint-3")
    for changes, data, message in (
        ({"seed": 7}, made, "seed was 42 and is 7"),
        ({"per_device_train_batch_size": 2}, made, "per_device_train_batch_size was 8 and is 2"),
        ({}, rows(packing=False), "of another run.*data was"),
    ):
        with pytest.raises(ValueError, match=message):
            ZooTrainer(model(), RunArguments(str(tmp_path), **settings | changes), data).train(resume_from_checkpoint=checkpoint)
    facts = json.loads((tmp_path / "checkpoint-3" / "run.json").read_text())
    (tmp_path / "checkpoint-3" / "run.json").write_text(json.dumps(facts | {"world_size": 2}))
    with pytest.raises(ValueError, match="world_size was 2 and is 1"):
        ZooTrainer(model(), RunArguments(str(tmp_path), **settings), made).train(resume_from_checkpoint=checkpoint)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    net = model()
    with torch.no_grad():
        net.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; lower --learning_rate"):
        ZooTrainer(net, RunArguments(str(tmp_path), use_cpu=True, max_steps=1), rows()).train()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_flags_win_over_files_and_unknown_ones_are_named(tmp_path):
    first = write(tmp_path / "a.yaml", "architecture: gla-tiny", "learning_rate: 0.5", "train_file: [x, y]", "seed: null")
    second = write(tmp_path / "b.yaml", "learning_rate: 0.25", "lr_scheduler_kwargs: {num_decay_steps: 3}")
    args, data, new = parse(KINDS, ["--max_steps", "4", "--config", first, "--config", second, "--architecture", "rwkv7-tiny"])
    assert (args.learning_rate, args.max_steps, args.lr_scheduler_kwargs) == (0.25, 4, {"num_decay_steps": 3})
    assert (data.train_file, new.architecture) == (["x", "y"], "rwkv7-tiny")
    for path, message in (
        (write(tmp_path / "c.yaml", "learning_rat: 1"), "no flag 'learning_rat' .did you mean 'learning_rate'"),
        (write(tmp_path / "d.yaml", "- a"), "must be a mapping"),
        (write(tmp_path / "e.yaml", "a: [1"), "is not YAML"),
        (str(tmp_path / "none.yaml"), "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(KINDS, ["--config", path])
    with pytest.raises(ValueError, match="needs a YAML file"):
        parse(KINDS, ["--config"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--architecture", "glaa-tiny"], "did you mean 'gla-tiny'"),
        (["--lr_scheduler_kwargs", "{}"], "warmup_stable_decay needs the steps of its decay"),
        (["--use_liger_kernel", "True"], "in chunks already"),
        (["--dataset_name", "squad"], "needs the package datasets; run: pip install datasets"),
        (["--train_file", "x.jsonl"], "either --train_file or --dataset_name"),
        (["--model_args", '{"vocab_size": 50}'], r"pydoc: token id \d+ is outside the vocabulary of 50"),
        (["--chat_template", "none.jinja"], "none.jinja: no such file"),
        (["--resume_from_checkpoint", "last"], "has no finished checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is no finished checkpoint"),
    ],
)
def test_runs_refuse_what_does_not_fit(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", *flags)


def test_output_folders_are_checked_first(pretrained, tmp_path):
    write(tmp_path / "file", "x")
    with pytest.raises(ValueError, match=r"output_dir .*cannot be written .*name another folder"):
        run(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="holds checkpoint-3 of another run; go on with --resume_from_checkpoint last"):
        run(pretrained[0])
    (pretrained[0] / "checkpoint-9").mkdir()  # killed while it was written: not the last finished one
    with pytest.raises(ValueError, match="checkpoint-3 is the end of its run; to train further, finetune"):
        run(pretrained[0], "--resume_from_checkpoint", "last")


def test_files_are_checked(tmp_path, tokenizer):
    plain = DataArguments(train_file=[write(tmp_path / "a.jsonl")], tokenizer_name="bytes")
    args = RunArguments(str(tmp_path / "out"), use_cpu=True, max_steps=1)
    new = PretrainArguments("gla-tiny")
    np.save(tmp_path / "a.npy", np.zeros(5000, dtype=np.int64))
    tokens = str(tmp_path / "a.npy")
    for data, message in (
        (plain, "a.jsonl: the data is empty: no document has a token to learn"),
        (DataArguments(train_file=[str(tmp_path / "b.txt")], tokenizer_name="bytes"), "b.txt is no file"),
        (DataArguments(train_file=[tokens, tokens]), "must stand alone"),
        (DataArguments(train_file=[write(tmp_path / "c.txt", "text")]), "text needs a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain(args, data, new, say=lambda line: None)
    with pytest.raises(ValueError, match="name what to learn"):
        DataArguments()
    with pytest.raises(ValueError, match="name what to train: --architecture"):
        pretrain(args, plain, PretrainArguments(), say=lambda line: None)
    evaluated = RunArguments(str(tmp_path / "out"), use_cpu=True, max_steps=1, eval_strategy="steps")
    with pytest.raises(ValueError, match="needs text to evaluate on; name --validation_file"):
        pretrain(evaluated, DataArguments(train_file=[tokens]), new, say=lambda line: None)
    assert pretrain(args, DataArguments(train_file=[tokens]), new, say=lambda line: None).state.global_step == 1


def test_datasets_are_read_like_lines(monkeypatch, tmp_path):
    splits = {"train": [{"text": "abc"}] * 5, "test": [{"text": "de"}]}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, config: splits, __spec__=object()))
    lines = []
    run(tmp_path / "out", "--dataset_name", "some", lines=lines)
    assert "5 documents" in lines[1] and "held out: 1 rows" in lines[1]
    splits["train"].append({"txt": "a"})
    with pytest.raises(ValueError, match="some/train:5: expected"):
        run(tmp_path / "out2", "--dataset_name", "some")
    del splits["train"]
    with pytest.raises(ValueError, match="some has no split train, only test"):
        run(tmp_path / "out3", "--dataset_name", "some")


def test_parts_that_do_not_exist_are_named():
    net = zoo.from_config("mamba-tiny")
    with pytest.raises(ValueError, match=r"target 'q_proj' matches no linear layer .*in_proj"):
        lora_coverage(net, ["mixers", "q_proj"])
    with pytest.raises(ValueError, match="'channel_mixers' matches no"):
        lora_coverage(net, ["channel_mixers"])
    assert len(lora_coverage(net, ["0.mixer.in_proj"]).modules) == 1
    with pytest.raises(ValueError, match=r"pattern 'model.embed.\*' matches no parameter"):
        choose_parameters(net, freeze=["model.embed.*"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        choose_parameters(net, freeze=["*"])


def test_finetuning_refuses_contradictions(pretrained, tmp_path, monkeypatch):
    for flags, message in (
        (["--train_only", "*"], "either --lora_r, or --train_only"),
        (["--lora_r", "0"], "--merge adds adapters .* give --lora_r"),
        (["--lora_target_modules", "q_prj"], "'q_prj' matches no linear layer .*did you mean 'q_proj'"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(pretrained[0], tmp_path, *flags)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="adapters need the package peft; run: pip install peft"):
        tune(pretrained[0], tmp_path)
    with pytest.raises(ValueError, match="name what to train further"):
        finetune(RunArguments(str(tmp_path), use_cpu=True), DataArguments(["x"]), FinetuneArguments(), say=lambda line: None)


def test_the_readme_shows_flags_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    kinds = {"pretrain": KINDS, "finetune": (RunArguments, DataArguments, FinetuneArguments)}
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    shown = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(("zoo pretrain", "zoo finetune"))]
    assert {command for command, *_ in shown} == kinds.keys()
    for command, *flags in shown:
        assert parse(kinds[command], flags)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate_*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    found = load_config_from_file(str(path))
    assert found.distributed_type.value in path.stem.upper() or found.distributed_type.value == "MULTI_GPU"


def test_times_are_written_as_clocks():
    assert [clock(s) for s in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
    assert Display(print).say is print

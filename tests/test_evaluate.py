"""Measuring language models, on ones whose answers are known."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_generate import byte_tokenizer, make
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import zoo
from zoo.__main__ import main
from zoo.evaluate.closeness import assert_close
from zoo.evaluate.perplexity import by_position, nats_by_position, text_score
from zoo.evaluate.retrieval import copying, retrieval
from zoo.evaluate.suite import TASKS, Settings, evaluate, table, write

TEXT = "The quick brown fox jumps over the lazy dog, and naïve 世界 looks on. " * 10


class Echo(nn.Module):
    """Expects the token that came where the last `order` tokens stood before, at most `window` tokens ago; else none in particular."""

    def __init__(self, order: int, window: int = 10**6):
        super().__init__()
        self.order, self.window, self.embedding = order, window, nn.Embedding(257, 1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        ends = input_ids[0].unfold(0, self.order, 1)  # the i-th ends at position i + order - 1
        index = torch.arange(len(ends))
        ago = index[:, None] - index
        same = (ends[:, None] == ends).all(-1) & (ago > 0) & (ago <= self.window)
        last = torch.where(same, index, -1).amax(-1)
        logits = torch.zeros(1, input_ids.shape[1], 257)
        for i in (last >= 0).nonzero().flatten().tolist():
            logits[0, i + self.order - 1, input_ids[0, last[i] + self.order]] = 1.0
        return SimpleNamespace(logits=logits)


# -- perplexity ------------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model, length = make(), len(TEXT.encode())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    score = text_score(model, byte_tokenizer(), [TEXT, TEXT], length=64)
    assert (score.tokens, score.bytes, score.words) == (2 * length, 2 * length, 2 * len(TEXT.split()))
    assert score.nats / score.tokens == pytest.approx(math.log(260)) and score.bits_per_byte == pytest.approx(math.log2(260))
    assert score.perplexity == math.exp(score.nats / score.tokens)
    assert score.word_perplexity == math.exp(score.nats / score.words)
    score = text_score(model, byte_tokenizer(bos_token=None, eos_token=None), [TEXT], length=64)  # whose first byte is only context
    assert (score.tokens, score.bytes) == (length - 1, length - 1) and score.bits_per_byte == pytest.approx(math.log2(260))


@pytest.mark.parametrize(("length", "stride"), [(200, 100), (64, 63), (64, 32), (50, 7)])
def test_windows_give_every_token_its_context_once(length, stride):
    model, tokenizer = make("transformer-tiny").double(), byte_tokenizer()
    ids = torch.tensor([256, *tokenizer(TEXT[:120])["input_ids"]])
    expected = 0.0
    for place in range(1, len(ids)):
        start = max(0, -(-(place - length + 1) // stride)) * stride  # of the first window that holds it
        logits = model(input_ids=ids[None, start:place]).logits[0, -1]
        expected += F.cross_entropy(logits, ids[place]).item()
    score = text_score(model, tokenizer, [TEXT[:120]], length=length, stride=stride)
    assert score.tokens == len(ids) - 1 and score.nats == pytest.approx(expected)


def test_positions_are_averaged_over_rows_and_grouped():
    model, rows = make(), torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
    nats = nats_by_position(model, rows)
    exact = F.cross_entropy(model.double()(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(3, 39).mean(0)
    assert_close(nats.float(), nats.float(), exact.detach(), "nats by position")
    found = by_position(torch.arange(1.0, 40).log().double(), 32)
    assert list(found) == [(0, 4), (4, 8), (8, 16), (16, 32), (32, 40)]
    assert found[4, 8] == pytest.approx(math.prod(range(4, 8)) ** (1 / 4)) and found[0, 4] == pytest.approx(6 ** (1 / 3))
    assert list(by_position(torch.zeros(7), 4)) == [(0, 2), (2, 4), (4, 8)]


# -- retrieval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "order"), [("passkey", 8), ("needle", 4)])
def test_an_echo_finds_what_lies_within_its_window(kind, order):
    grid = retrieval(Echo(order), byte_tokenizer(), kind, [512, 700], [0.0, 0.5, 1.0], trials=2)
    assert grid == [[1.0] * 3] * 2
    near = retrieval(Echo(order, window=300), byte_tokenizer(), kind, [700], [0.0, 1.0], trials=2)
    assert near == [[0.0, 1.0]]
    assert retrieval(make(), byte_tokenizer(), kind, [512], [1.0], trials=2) == [[0.0]]


def test_an_echo_copies_within_its_window():
    words = list(range(256))
    assert copying(Echo(3), words, [32, 200], first=[256]) == [1.0, 1.0]
    near = copying(Echo(3, window=100), words, [32, 100, 101])
    assert near[:2] == [1.0, 1.0] and near[2] < 0.1
    assert copying(Echo(1), words, [40], cue=1, span=40, trials=1)[0] < 1.0  # one token alone is ambiguous


# -- all together ----------------------------------------------------------------------------------------------------


def test_the_suite_measures_prints_and_writes(tmp_path):
    settings = Settings(length=320, lengths=(400, 640), depths=2, trials=1, rows=1)
    results = evaluate(make(), byte_tokenizer(), [TEXT], list(TASKS), settings)
    assert list(results) == list(TASKS) and all(results.values())
    assert [(row["from"], row["to"]) for row in results["positions"]][-2:] == [(160, 320), (320, 640)]
    assert [(row["length"], row["depth"]) for row in results["needle"]] == [(400, 0.0), (400, 1.0), (640, 0.0), (640, 1.0)]
    assert [row["distance"] for row in results["copying"]] == [32, 128, 367, 607]
    text = table(results)
    assert all(task in text for task in TASKS) and "depth 100%" in text
    numbers, picture = write(results, {"model": "m"}, tmp_path)
    rows = json.loads(numbers.read_text())["rows"]
    assert len(rows) == sum(map(len, results.values())) and {row["task"] for row in rows} == set(TASKS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert write({"perplexity": results["perplexity"]}, {}, tmp_path) == [numbers]


def test_lengths_follow_the_table_of_positions():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    assert Settings(length=16).for_model(gpt2).lengths == (16, 32, 64)
    assert Settings(length=16).for_model(make()).lengths == (16, 32, 64, 128)
    with pytest.raises(ValueError, match=r"a row to evaluate has 65 tokens.* ends at 64"):
        Settings(length=16, lengths=(65, 32)).for_model(gpt2)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda m, t: evaluate(m, t, [TEXT], ["passky"]), r"no task 'passky' \(did you mean 'passkey'\?\)"),
        (lambda m, t: evaluate(m, t, ["", " "], ["perplexity"]), "the text is empty"),
        (lambda m, t: evaluate(m, t, ["short"], ["positions"]), "the text is too short: .* a row needs 8192"),
        (lambda m, t: evaluate(m, t, [TEXT], ["passkey"], Settings(length=64)), r"length 64 is too short for a passkey: .* takes \d+"),
        (lambda m, t: evaluate(m, t, [TEXT], ["copying"], Settings(lengths=(40,))), "copying 32 tokens needs at least 65"),
        (lambda m, t: evaluate(m, t, [TEXT], ["copying"], Settings(lengths=(1,))), "length is 1, at least 2"),
        (lambda m, t: text_score(m, t, [TEXT], length=8, stride=8), "stride is 8, it must lie between 1 and"),
        (lambda m, t: text_score(m, t, [""]), "the text is empty"),
        (lambda m, t: text_score(zoo.from_config("gla-tiny", vocab_size=50), t, [TEXT]), "vocabulary of 50; the tokenizer belongs to"),
        (lambda m, t: retrieval(m, t, "pass", [512], [0.0]), "no probe 'pass'"),
        (lambda m, t: retrieval(m, t, "needle", [512], [1.5]), r"depths are \[1\.5\]"),
        (lambda m, t: retrieval(m, t, "needle", [512], [1.0], haystack=""), "the haystack is empty"),
        (lambda m, t: retrieval(m, t, "needle", [512], [1.0], trials=0), "trials is 0"),
        (lambda m, t: copying(m, [1, 2], [16]), "each distance must be at least the span"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run(make(), byte_tokenizer())


# -- the command, and lm-eval ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_the_command_evaluates(folder, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    tasks = ["--tasks", "perplexity", "copying", "--length", "80", "--trials", "1"]
    assert main(["evaluate", folder, *tasks, "--text", f"{tmp_path}/text", "-o", f"{tmp_path}/out"]) == 0
    assert "GLAForCausalLM" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    score = text_score(make(), byte_tokenizer(), [TEXT], length=80)
    assert content["rows"][0]["nats"] == pytest.approx(score.nats) and content["command"].startswith("zoo evaluate ")
    assert (tmp_path / "out" / "evaluation.png").exists()


def test_the_command_names_what_is_wrong(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").write_text(" \n")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "zoo.evaluate.harness", raising=False)
    for arguments, message in (
        ([str(tmp_path)], "has no config.json"),
        ([f"{tmp_path}/none"], "does not exist"),
        ([folder, "--tasks", "perplexty"], "did you mean 'perplexity'?"),
        ([folder, "--text", f"{tmp_path}/empty"], "the text is empty"),
        ([folder, "--text", f"{tmp_path}/none"], "No such file"),
        ([folder, "--lm-eval", "arc_easy"], "pip install 'seqzoo[eval]'"),
    ):
        assert main(["evaluate", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("zoo evaluate: ") and message in said


def stub(monkeypatch, calls: list) -> ModuleType:
    """A stand-in for lm-eval that keeps what it is called with; returns `zoo.evaluate.harness` on top of it."""

    class HFLM:
        def __init__(self, **kwargs):
            calls.append(kwargs)

    class TaskManager:
        def __init__(self, include_path):
            calls.append(include_path)

        def match_tasks(self, names):
            return [name for name in names if name == "known"]

    def simple_evaluate(**kwargs):
        calls.append(kwargs)
        return {"results": {"known": {"alias": "known", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc,strict": 0.25}}}

    parts = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.models": {}, "lm_eval.models.huggingface": {"HFLM": HFLM}}
    for name, members in (parts | {"lm_eval.tasks": {"TaskManager": TaskManager}}).items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "zoo.evaluate.harness", raising=False)
    from zoo.evaluate import harness

    monkeypatch.delitem(sys.modules, "zoo.evaluate.harness")
    return harness


def test_the_adapter_hands_over_the_loaded_model(monkeypatch):
    calls, model, tokenizer = [], make(), byte_tokenizer()
    harness = stub(monkeypatch, calls)
    rows = harness.run(model, tokenizer, ["known"], limit=3, batch=2, include="folder")
    assert rows == [{"name": "known", "acc": 0.5, "acc,strict": 0.25}]
    path, built, ran = calls
    assert path == "folder"
    assert built == dict(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=harness.LENGTH, batch_size=2)
    assert isinstance(ran["model"], harness.ZooLM) and (ran["tasks"], ran["limit"]) == (["known"], 3)
    with pytest.raises(ValueError, match="lm-eval has no task 'unknown'"):
        harness.run(model, tokenizer, ["known", "unknown"])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    harness.ZooLM(gpt2, tokenizer)
    assert calls[-1]["max_length"] == 64


TASK = """
task: zoo_test
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.lm_eval
@pytest.mark.filterwarnings("default")  # those of lm-eval and of what it needs are its own affair
def test_a_task_of_lm_eval_is_scored_by_the_likelihood_of_its_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", f"{tmp_path}/cache")
    from zoo.evaluate import harness

    model, tokenizer = make(), byte_tokenizer()
    documents = [{"question": word, "choices": ["ab", "cd"]} for word in ("one", "two", "three", "four", "five")]
    for index, document in enumerate(documents):
        losses = []
        for choice in document["choices"]:
            prompt, answer = (tokenizer(text)["input_ids"] for text in (document["question"], f" {choice}"))
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item())
        best = int(losses[1] < losses[0])
        document["label"] = best if index < 3 else 1 - best  # two are wrong
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    (row,) = harness.run(model, tokenizer, ["zoo_test"], include=str(tmp_path), batch=2)
    assert row["name"] == "zoo_test" and row["acc"] == pytest.approx(0.6)

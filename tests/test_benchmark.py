"""Benchmarks: every case runs, what is wrong has no time, and tables say what was measured."""

import dataclasses
import importlib.machinery
import json
import math
import sys
import types

import pytest
import torch
from torch import nn

import zoo
from zoo.__main__ import main
from zoo.evaluate.bench import decoding, report, throughput
from zoo.evaluate.bench import measure as measuring
from zoo.evaluate.bench.case import ANYWHERE, SMALL, Case, Peer, all_cases, chosen
from zoo.evaluate.bench.families import attention
from zoo.evaluate.bench.measure import Clock, Row, contenders, measure
from zoo.evaluate.bench.warm import keep

TINY = {"B": 1, "T": 32, "H": 2, "G": 1, "D": 8, "N": 3, "K": 8, "V": 8}
CLOCK = Clock("cpu", seconds=0.0, rate=1e9)


def tiny_cases() -> list[Case]:
    """Every case of few heads and channels, and as long as its check needs to be; those that become alike count once."""
    resized = [case.resized(TINY | (case.small if case.small != SMALL else {})) for case in all_cases()]
    return list({case.label: case for case in resized}.values())


@pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in tiny_cases()])
def test_every_case_is_measured(case, monkeypatch):
    monkeypatch.setattr(measuring, "CALLS", 1)
    for row in measure(case, contenders(case, ["chunked"], ANYWHERE), CLOCK, torch.bfloat16):
        assert (row.note, row.wrong) == ("", "")
        assert min(row.forward, row.both, row.first, row.forward_floor) > 0 and row.both_floor > 2 * row.forward_floor
        assert 0 < row.forward_error < 0.01 and 0 < row.gradient_error < 0.02
        assert (row.host_forward is not None) == case.host


def test_every_case_has_a_label_of_its_own():
    labels = [case.label for case in all_cases()]
    assert len(set(labels)) == len(labels)


def test_flexattentions_blocks_are_those_that_it_finds_itself():
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    for length in (32, 640, 1000):
        ours = attention.window_blocks(length, torch.device("cpu"))
        found = flex.create_block_mask(attention.near, None, None, length, length, device="cpu")
        for kind in ("kv", "full_kv", "q", "full_q"):
            for name in (f"{kind}_num_blocks", f"{kind}_indices"):
                assert torch.equal(getattr(ours, name), getattr(found, name)), (length, name)


def test_transformers_windows_are_filled_up():
    (case,) = chosen(["on either side"], TINY | {"T": 600, "M": 5})
    for row in measure(case, contenders(case, ["chunked"], ["transformers."]), CLOCK, torch.float32):
        assert (row.note, row.wrong) == ("", "") and row.both


def test_flashkda_is_given_logits(monkeypatch):
    (case,) = chosen(["delta_rule, decay by channel, B1"], TINY)

    @torch.no_grad()
    def forward(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound):
        """What its documentation says."""
        decay = lower_bound * torch.sigmoid(A_log.exp()[:, None] * (g + dt_bias))
        out.copy_(case.call("reference", q=q, k=k, v=v, beta=beta.sigmoid(), log_decay=decay, scale=scale))

    library = types.ModuleType("flash_kda")
    library.fwd, library.__spec__ = forward, importlib.machinery.ModuleSpec("flash_kda", None)
    monkeypatch.setitem(sys.modules, "flash_kda", library)
    _, row = measure(case, contenders(case, ["chunked"], ["flash_kda."]), CLOCK, torch.bfloat16)
    assert row.contender == "flash_kda.fwd" and row.reads and row.forward
    assert row.wrong.startswith("gradients: ") and row.both is None


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (row,) = measure(*raced([], "fused"))
    assert "Triton" in row.note and row.forward is row.both is None


@pytest.mark.parametrize(
    ("patterns", "sizes", "message"), [(["sort"], {}, "no case is called 'sort'"), ([], {"Z": 1}, "no case has a size 'Z'")]
)
def test_what_does_not_exist_is_named(patterns, sizes, message):
    with pytest.raises(ValueError, match=message):
        chosen(patterns, sizes)


class Misled(torch.autograd.Function):
    """The identity, with a gradient twice too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Refused(Misled):
    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("not on this device")


def raced(peers: list, backend: str = "chunked"):
    """Arguments of `measure`: a matrix memory against functions of its output."""
    (found,) = [case for case in chosen(["no decay, B1"], TINY) if case.op == "linear_attention"]

    def peer(name: str, change) -> Peer:
        return Peer(name, lambda: lambda q, k, v: change(found.call("chunked", q=q, k=k, v=v)), lambda **inputs: tuple(inputs.values()))

    given = tuple(peer(f"torch.{name}", change) for name, change in peers)
    case = Case(found.op, found.name, found.sizes, found.draw, given)
    return case, contenders(case, [backend]), CLOCK, torch.float32


WRONG = [("right", lambda o: 1 * o), ("larger", lambda o: 1.1 * o), ("misled", Misled.apply), ("refused", Refused.apply)]


def test_what_is_wrong_has_no_time():
    ours, right, larger, misled, refused = measure(*raced(WRONG))
    for row in (ours, right):
        assert row.forward and row.both and not row.wrong
    assert larger.forward is larger.both is larger.extra is None and "output: off by" in larger.wrong
    assert misled.forward and misled.both is None and "gradient of q: off by" in misled.wrong
    assert refused.forward and refused.both is None and "not on this device" in refused.wrong
    text = report.table([ours, right, larger, misled, refused])
    (line,) = (line for line in text.splitlines() if line.startswith("| torch.larger"))
    assert [cell.strip() for cell in line.split("|")[2:6]] == ["", "", "", ""]
    assert "- torch.larger: WRONG, output: off by" in text and "x / " in text


def test_a_gradient_that_is_missing_is_wrong():
    case, _, clock, dtype = raced([])
    deaf = Peer("torch.deaf", lambda: lambda q, k, v: case.call("chunked", q=q.detach(), k=k, v=v), lambda **inputs: tuple(inputs.values()))
    case = dataclasses.replace(case, peers=(deaf,))
    _, row = measure(case, contenders(case, ["chunked"]), clock, dtype)
    assert row.wrong.startswith("gradients: ") and row.forward and row.both is None


def test_what_is_not_finite_at_full_size_has_no_time():
    overflowing = ("overflowing", lambda o: o if o.shape[1] == 8 else o / 0)
    case, _, clock, dtype = raced([overflowing])
    case = dataclasses.replace(case, small={"T": 8})
    _, row = measure(case, contenders(case, ["chunked"]), clock, dtype)
    assert row.wrong == "output not finite at full size" and row.forward is row.both is None


def test_wrong_peers_are_timed_on_request_in_parentheses():
    rows = list(measure(*raced(WRONG), keep_wrong=True))
    larger, misled, refused = rows[2:]
    assert larger.forward and larger.both and misled.both and refused.both is None
    assert [cell[:1] for cell in report.cells(larger, rows)[1:3]] == ["(", "("]
    assert [cell[:1] == "(" for cell in report.cells(misled, rows)[1:3]] == [False, True]


def test_ours_is_never_timed_wrong():
    case, _, clock, dtype = raced([])
    wrong = Case(
        case.op,
        case.name,
        case.sizes,
        case.draw,
        apply=lambda backend, **inputs: case.call(backend, **inputs) * (1 + 0.1 * (backend == "chunked")),
    )
    (row,) = measure(wrong, contenders(wrong, ["chunked"]), clock, dtype, keep_wrong=True)
    assert "output: off by" in row.wrong and row.forward is row.both is None


def test_tables():
    rows = [
        Row("scan, B1", "zoo fused", True, forward=1.0, both=2.0, forward_floor=0.5, both_floor=1.5, first=1.5, extra=2**21,
            forward_error=1e-3, gradient_error=2e-3, host_forward=40.0, host_both=90.0),
        Row("scan, B1", "zoo chunked", True, note="OutOfMemoryError: too large"),
        Row("scan, B1", "one", False, forward=3.0, both=5.0),
        Row("scan, B1", "two", False, forward=2.0, both=8.0),
        Row("scan, B1", "other", False, anchor=True, forward=0.1, both=0.1),
    ]  # fmt: skip
    assert report.ratios(rows[0], rows) == (2.0, 2.5) and report.ratios(rows[2], rows) == (None, None)
    assert report.cells(rows[0], rows) == ["zoo fused", "1.000", "2.000", "2.00x / 2.50x", "50% / 75%", "1.50", "2", "1.0e-03", "2.0e-03"]
    lines = report.table(rows).splitlines()
    assert lines[0] == "### scan, B1" and len({len(line) for line in lines[2:9]}) == 1
    assert lines[-2:] == ["- zoo fused: the host spends 40 us on a call, 90 us with backward", "- zoo chunked: OutOfMemoryError: too large"]


def test_operators_are_benchmarked_by_command(tmp_path, capsys):
    sizes = [f"{letter}={size}" for letter, size in TINY.items()]
    line = [
        "bench",
        "gpu",
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--cases",
        "linear_attention, decay by token",
        "--warm",
        "--workers",
        "1",
        "--sizes",
        *sizes,
    ]
    assert main([*line, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    results, text = json.loads((tmp_path / "operators.json").read_text()), (tmp_path / "operators.md").read_text()
    assert "first call" in shown.err and shown.out.count("###") == text.count("###") == len({row["case"] for row in results["rows"]})
    assert all(row["both"] and row["first"] for row in results["rows"]) and results["host"]["torch"] == torch.__version__
    (ran,) = results["runs"]
    assert "--cases 'linear_attention, decay by token'" in ran["command"] and ran["command"] in text and ran["bandwidth"] > 0
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_kernels_are_found_where_they_are_kept(tmp_path):
    made, kept = tmp_path / "made" / "key", tmp_path / "kept" / "key"
    made.mkdir(parents=True)
    (made / "kernel.cubin").write_bytes(b"code")
    (made / "__grp__kernel.json").write_text(json.dumps({"child_paths": {"kernel.cubin": str(made / "kernel.cubin")}}))
    keep(made.parent, kept.parent)
    (found,) = json.loads((kept / "__grp__kernel.json").read_text())["child_paths"].values()
    assert found == str(kept / "kernel.cubin") and (kept / "kernel.cubin").read_bytes() == b"code"


def test_runs_are_merged(tmp_path):
    def run(name: str, **both: float) -> dict:
        rows = [dataclasses.asdict(Row(case, "zoo chunked", True, forward=1.0, both=time)) for case, time in both.items()]
        return {"host": {"device": "X"}, "dtype": "bfloat16", "runs": [{"command": name, "bandwidth": 1e9}], "rows": rows}

    folders = [tmp_path / name for name in "abc"]
    for folder, results in zip(folders, (run("a", scan=1.0, sort=2.0), run("b", sort=3.0), run("c", sum=4.0)), strict=True):
        report.operators(folder, results)
    assert main(["bench", "merge", *map(str, folders), "-o", str(tmp_path / "all")]) == 0
    merged = json.loads((tmp_path / "all" / "operators.json").read_text())
    assert [ran["command"] for ran in merged["runs"]] == ["a", "b", "c"]
    assert [(row["case"], row["both"]) for row in merged["rows"]] == [("scan", 1.0), ("sort", 3.0), ("sum", 4.0)]
    assert (tmp_path / "all" / "operators.png").exists()

    assert main(["bench", "merge", str(tmp_path / "none"), "-o", str(tmp_path / "other")]) == 2
    report.operators(folders[2], run("c", sum=4.0) | {"dtype": "float32"})
    assert main(["bench", "merge", *map(str, folders), "-o", str(tmp_path / "other")]) == 2


def test_training_is_benchmarked_by_command(tmp_path, capsys):
    line = ["bench", "train", "--device", "cpu", "--models", "gla-tiny", "mamba2-tiny", "--batch", "1", "--length", "16", "--steps", "1"]
    assert main([*line, "--checkpointing", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["library"] for row in rows] == ["zoo", "zoo", "transformers"] and capsys.readouterr().out.count("gla-tiny") >= 2
    assert all(row["tokens_per_second"] > 0 and abs(row["loss"] - math.log(256)) < 0.5 and not row["note"] for row in rows)
    assert 0.5 < rows[0]["parameters"] / rows[2]["parameters"] < 2
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


SERVED = ["--device", "cpu", "--dtype", "float32", "--models", "gla-tiny", "mamba2-tiny", "--contexts", "8", "16"]


def test_decoding_is_benchmarked_by_command(tmp_path, capsys):
    assert main(["bench", "decode", *SERVED, "--batches", "2", "--tokens", "6", "--launched", "-o", str(tmp_path)]) == 0
    results, text = json.loads((tmp_path / "decoding.json").read_text()), (tmp_path / "decoding.md").read_text()
    rows = [decoding.Row(**row) for row in results["rows"]]
    assert [(row.library, row.batch, row.context) for row in rows[:4]] == [
        (library, 2, context) for library in ("zoo", decoding.LAUNCHED) for context in (8, 16)
    ]
    assert all(row.first and row.ready and row.step and row.floor and not row.note and row.parameters for row in rows)
    assert capsys.readouterr().out.count("tokens/s") > len(rows) and "of the floor" in text and "2 x 16" in text
    assert (tmp_path / "decoding.png").read_bytes().startswith(b"\x89PNG")


def test_reading_is_benchmarked_by_command_and_merged(tmp_path):
    for name in ("a", "b"):
        assert main(["bench", "prefill", *SERVED, "-o", str(tmp_path / name)]) == 0
    assert main(["bench", "merge", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "all")]) == 0
    results = json.loads((tmp_path / "all" / "reading.json").read_text())
    rows = [decoding.Row(**row) for row in results["rows"]]
    assert len(rows) == 4 and len(results["runs"]) == 2 and all(row.read and row.step is None for row in rows)
    assert (tmp_path / "all" / "reading.png").exists()


def test_others_are_served_as_ours_are():
    names = ["mamba-tiny", "gated_deltanet-tiny"]
    *ours, _, compiled = decoding.contenders(names, peers=None, launched=True)
    assert [(who.name, who.library) for who in ours if who.library in ("zoo", "transformers")] == [
        ("mamba-tiny", "zoo"), ("mamba-tiny", "transformers"), ("gated_deltanet-tiny", "zoo"), (compiled.name, "transformers")
    ]  # fmt: skip
    assert [who.library for who in ours if who.name == "gated_deltanet-tiny"][:2] == ["zoo", decoding.LAUNCHED]
    for who in (ours[0], ours[2], compiled):
        for row in decoding.serve(who, CLOCK, [4, 9], [2], torch.float32, 4):
            assert not row.note and row.written and row.read
    model = zoo.from_config("gla-tiny")
    weights = sum(p.nbytes for p in model.parameters())
    assert decoding.step_bytes(model) == weights - model.lm_head.weight.nbytes
    model.lm_head.weight = model.model.embed_tokens.weight
    assert decoding.step_bytes(model) == weights - model.lm_head.weight.nbytes


def test_what_fails_to_be_served_is_noted_and_what_takes_too_long_is_left_out(monkeypatch):
    def refuse() -> nn.Module:
        raise RuntimeError("no room")

    given = CLOCK, [4, 8, 16], [1], torch.float32, 2
    (row,) = decoding.serve(throughput.Contender("broken", "zoo", refuse, {}), *given)
    assert row.note == "RuntimeError: no room" and row.written is row.read is None and row.note in decoding.table([row])
    monkeypatch.setattr(decoding, "PATIENCE", 0.0)
    (row,) = decoding.serve(throughput.Contender("slow", "zoo", lambda: zoo.from_config("gla-tiny"), {}), *given)
    assert row.context == 4 and row.written


def test_a_model_that_diverges_has_no_speed():
    def broken() -> nn.Module:
        model = zoo.from_config("gla-tiny")
        nn.init.constant_(model.model.embed_tokens.weight, math.nan)
        return model

    row = throughput.throughput(throughput.Contender("broken", "zoo", broken, {}), CLOCK, 1, 8, torch.float32, steps=1)
    assert row.tokens_per_second is None and row.note == "WRONG, the loss is nan"


def test_chunked_is_compared_with_the_definition(capsys):
    assert main(["bench", "kernels", "--length", "8", "--seconds", "0", "--threads", "1"]) == 0
    assert capsys.readouterr().out.count(" ms ") >= 15

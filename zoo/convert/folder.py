"""A conversion in its folder: begun, advanced, interrupted and resumed, finished.

The student lies in the folder like any model: as converted until the last stage has ended, then as trained.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.auto import from_pretrained
from zoo.convert.control import CONTROLS
from zoo.convert.data import fingerprint, rows_of, spread
from zoo.convert.fit import Fit
from zoo.convert.headers import blank_teacher
from zoo.convert.job import JOB, PROGRESS, REPORT, STREAMED, Job, Say, check_same, clear, finished, has_ended, read_job, write_job
from zoo.convert.plan import blank_student, check_memory, lacks, layout_config, must_stream
from zoo.convert.recipe import Method, Stage
from zoo.convert.report import LENGTHS, Row, write_report
from zoo.convert.select import ALIGNED, hybrid, layer_scores, select_layers
from zoo.convert.stream import Shelf, align, fitting, write, write_student
from zoo.convert.student import convert, converted_layers, positions_kept
from zoo.convert.teacher import load_teacher, open_teacher, open_tokenizer
from zoo.evaluate.perplexity import perplexity
from zoo.evaluate.speed import generation_speed, state_bytes
from zoo.train.trainer import Interruption

PROBED = 4  # rows on which starts are measured


def start(folder: str | os.PathLike, job: Job, say: Say, *, device: str = "cpu", force: bool = False) -> None:
    """Make the student and write the folder; what is there of the same job already stays.

    Raises:
        ValueError: the folder holds another job (with `force` it is begun anew), the recipe needs what the engine lacks, or more
            memory than there is.
    """
    folder = Path(folder)
    if (folder / JOB).is_file() and not force:
        before = read_job(folder)
        if before.digest == job.digest:
            return
        differing = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in before.unlike(job).items())
        raise ValueError(f"{folder} holds another conversion ({differing}); name another folder, or begin anew with --force")
    if lacking := job.method.missing():
        raise ValueError(f"the recipe {job.method.name!r} cannot be run yet, for want of: {'; '.join(lacking)}")
    blank, available = blank_teacher(job.teacher)[0], memory(device)
    job = dataclasses.replace(job, stream=job.stream or must_stream(blank, job.method, available))
    check_memory(blank, job.method, available, job.stream)
    if job.stream:
        check_apart(job)
    tokenizer = open_tokenizer(job.teacher)
    train, _ = job.read(tokenizer, blank.config.vocab_size)
    done = start_streamed(folder, job, device) if job.stream else start_whole(folder, job, train, say, device)
    write_job(folder, job, tokenizer)
    say(done)


def start_whole(folder: Path, job: Job, train: Tensor, say: Say, device: str) -> str:
    """Write the student as converted; what there is to say of it."""
    teacher, aligned = load_teacher(job.teacher, dtype=torch.float32).to(device), open_aligned(job, device)
    kept = choose_layers(teacher, job.method, train, say, aligned)
    student = begin(job, teacher, kept, aligned)
    check_learns(job.method, student)
    clear(folder)
    student.save_pretrained(folder)
    return f"layers {list(kept)} of {len(student.config.plan)} keep attention; the converted student is in {folder}"


def check_learns(method: Method, student: nn.Module) -> None:
    """Raise ValueError for stages that a student learns nothing in."""
    if lacking := lacks(method, student):
        raise ValueError(f"the recipe {method.name!r} would teach this student nothing: {'; '.join(lacking)}")


def begin(job: Job, teacher: nn.Module, kept: Iterable[int], aligned: nn.Module | None = None) -> nn.Module:
    """The student as it is before any training, with attention in the layers `kept`."""
    method = job.method
    torch.manual_seed(job.seed)
    if aligned is not None:
        student = hybrid(teacher, aligned, kept, **positions_kept(method.rope))
    else:
        student = convert(teacher, mixer=method.mixer, keep=kept, window=method.window, sinks=method.sinks, mixer_args=method.mixer_args,
                          inherit=method.inherit, rope=method.rope, starts=method.init, rows=probe(job, teacher))  # fmt: skip
    if job.control is not None:
        CONTROLS[job.control](teacher, student)
    return student


def probe(job: Job, teacher: nn.Module) -> Tensor | None:
    """Rows on which a start is measured; None where none is."""
    if "measured" not in job.method.init.values():
        return None
    tokens, _ = job.read(open_tokenizer(job.teacher), teacher.config.vocab_size)
    return spread(rows_of(tokens, job.method.stages[0].length, "text"), PROBED)


def advance(
    folder: str | os.PathLike, say: Say, *, device: str = "cpu", save_every: int = 200, progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> bool:  # fmt: skip
    """Take what is left of the stages; False if a signal came first or `stop`, asked after every step, said so: what was done is saved.

    Raises:
        ValueError: there is no such folder, it is finished, or its data are no longer the same.
    """
    folder, job = Path(folder), read_job(Path(folder))
    if has_ended(folder):
        raise ValueError(f"{folder} is finished; its {REPORT} has the results")
    begun = None
    if job.stream:
        begun = advance_streamed(folder, job, say, device, progress, stop)
        if begun is None or begun["stage"] == len(job.method.stages):
            return begun is not None
    teacher, tokenizer = open_teacher(job.teacher, device)
    train, held_out = job.read(tokenizer, teacher.config.vocab_size)
    student = open_student(folder, device)
    fresh = blank_student(teacher, student.config)[1].fresh
    done = load(folder, job, train, device)
    if done is None and begun is not None:
        done = {"fit": None} | {name: begun[name] for name in ("stage", "losses", "perplexity")}
    elif done is None:
        measured = {"teacher": perplexity(teacher, held_out), "converted": perplexity(student, held_out)}
        done = {"stage": 0, "fit": None, "losses": {}, "perplexity": measured}
    weights = done.pop("weights", None)
    if weights is not None and done["fit"] is None:
        student.load_state_dict(weights)

    with Interruption() as interruption:

        def after(fit: Fit) -> bool:
            ends = interruption.raised or stop()
            if ends or len(fit.history) % save_every == 0:
                save(folder, job, train, student, done | {"fit": fit.state()})
            return ends

        while done["stage"] < len(job.method.stages):
            stage = job.method.stages[done["stage"]]
            fit = Fit(teacher, student, rows_of(train, stage.length, "text"), stage, fresh=fresh, seed=job.seed + done["stage"])
            if done["fit"] is not None:  # its weights are of a student with all that the stage adds to it
                student.load_state_dict(weights)
                fit.load(done["fit"])
            if not fit.done:
                fit.run(stage.name if progress else None, after)
            if not fit.done:
                say(f"interrupted after step {len(fit.history)} of {fit.steps} of {stage.name}; go on with: resume {folder}")
                return False
            fit.close()
            done["perplexity"][stage.name] = perplexity(student, held_out)
            done["losses"][stage.name] = fit.history
            done["stage"], done["fit"] = done["stage"] + 1, None
            save(folder, job, train, student, done)
            say(f"{stage.name}: perplexity {done['perplexity'][stage.name]:.2f} on held-out text")
    finish(folder, job, teacher, student, held_out, done | {"data": fingerprint(train)})
    return True


def finish(folder: Path, job: Job, teacher: nn.Module, student: nn.Module, held_out: Tensor, done: dict) -> list[Row]:
    """Save the trained student, its numbers and their picture; progress is no longer needed."""
    student.save_pretrained(folder)
    prompt = held_out.flatten()[None, :1024]
    speeds = {True: generation_speed(teacher, prompt, 8), False: generation_speed(student, prompt, 8)}
    rows = [
        Row(name, value, {n: state_bytes(teacher if name == "teacher" else student, n) for n in LENGTHS}, *speeds[name == "teacher"])
        for name, value in done["perplexity"].items()
    ]
    kept = sorted(set(range(len(student.config.plan))) - set(converted_layers(student)))
    facts = {"digest": job.digest, "data_hash": done["data"], "kept": kept, "tokens_held_out": held_out.numel()}
    write_report(rows, done["losses"], job.to_dict() | facts, folder)
    (folder / PROGRESS).unlink()
    (folder / STREAMED).unlink(missing_ok=True)
    return rows


def status(folder: str | os.PathLike) -> list[str]:
    """Lines that tell how far a conversion is."""
    folder, job = Path(folder), read_job(Path(folder))
    finished = has_ended(folder)
    lines = [f"{job.method.name} of {job.teacher} to {job.method.mixer}, seed {job.seed}, digest {job.digest}"]
    known = (folder / PROGRESS).is_file()
    done = torch.load(folder / PROGRESS, weights_only=True, mmap=True, map_location="cpu") if known else {"stage": 0, "fit": None}
    for index, stage in enumerate(job.method.stages):
        fit = done["fit"] if index == done["stage"] else None
        steps = stage.steps if finished or index < done["stage"] else len(fit["history"]) if fit else 0
        loss = f", loss {sum(fit['history'][-1]) / len(fit['history'][-1]):.4g}" if fit and fit["history"] else ""
        lines.append(f"{stage.name}: {steps:,} of {stage.steps:,} steps{loss}")
    if (folder / STREAMED).is_file() and not known:
        streamed = json.loads((folder / STREAMED).read_text(encoding="utf-8"))
        lines.append(f"layer by layer: {streamed['stage']} stages, and {len(streamed['layers'])} layers of the next")
        done = done | {"perplexity": streamed["perplexity"]}
    measured = json.loads((folder / REPORT).read_text(encoding="utf-8"))["rows"] if finished else []
    found = {row["name"]: row["perplexity"] for row in measured} or done.get("perplexity", {})
    return lines + [f"perplexity of {name}: {value:.2f}" for name, value in found.items()] + ["finished"] * finished


# -- layer by layer ------------------------------------------------------------------------------------------------------


def check_apart(job: Job) -> None:
    """Raise ValueError for what cannot be done layer by layer."""
    method, (first, *_) = job.method, job.method.stages
    if not first.apart:
        raise ValueError(f"stage {first.name!r} has no layers that learn apart from one another; leave --stream out")
    if job.aligned is not None or job.control is not None or not (isinstance(method.keep, tuple) or method.select in ("none", "uniform")):
        raise ValueError(
            "layer by layer a student begins from its teacher alone, and keeps layers that are named or uniform; leave --stream out"
        )


def start_streamed(folder: Path, job: Job, device: str) -> str:
    """`start_whole` with one layer at a time."""
    method, teacher = job.method, Shelf(job.teacher)
    config = layout_config(teacher.model, method)
    check_learns(method, blank_student(teacher.model, config)[0])
    write_student(folder, teacher, config, inits=method.init, seed=job.seed, rows=probe(job, teacher.model), device=device)
    clear(folder)
    return f"the converted student is in {folder}, written layer by layer"


def advance_streamed(folder: Path, job: Job, say: Say, device: str, progress: bool, stop: Callable[[], bool]) -> dict | None:
    """`advance` through the first stages, those whose layers learn apart; None if it was stopped.

    Returns: the number of stages that are done, their losses, and perplexities. After the last stage the folder is finished.
    """
    teacher, student = Shelf(job.teacher), Shelf(folder)
    train, held_out = job.read(open_tokenizer(job.teacher), teacher.model.config.vocab_size)
    path, stages = folder / STREAMED, job.method.stages
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        check_same(folder, known, job, train)
    else:
        measured = {"teacher": teacher.perplexity(held_out, device), "converted": student.perplexity(held_out, device)}
        known = {"stage": 0, "layers": {}, "rows": {}, "losses": {}, "perplexity": measured}
        known |= {"digest": job.digest, "data": fingerprint(train)}

    def keep() -> None:
        write(path, lambda place: place.write_text(json.dumps(known), encoding="utf-8"))

    fresh = blank_student(teacher.model, student.model.config)[1].fresh
    with Interruption() as interruption:
        while known["stage"] < len(stages) and stages[known["stage"]].apart:
            stage, seed = stages[known["stage"]], job.seed + known["stage"]
            rows = streamed_rows(folder, train, stage, teacher, known["rows"], say)
            whole = align(
                folder, teacher, stage, rows, fresh=fresh, seed=seed, device=device, done=known["layers"], finished=keep,
                stop=lambda: interruption.raised or stop(), label=stage.name if progress else None,
            )  # fmt: skip
            if whole:
                known["perplexity"][stage.name] = student.perplexity(held_out, device)
                known["losses"][stage.name] = [[loss for (loss,) in step] for step in zip(*known["layers"].values(), strict=True)]
                known["stage"], known["layers"] = known["stage"] + 1, {}
                say(f"{stage.name}: perplexity {known['perplexity'][stage.name]:.2f} on held-out text")
            keep()
            if not whole:
                say(f"interrupted after {len(known['layers'])} layers of {stage.name}; go on with: resume {folder}")
                return None
    if known["stage"] == len(stages):
        rows = [{"name": name, "perplexity": value} for name, value in known["perplexity"].items()]
        report = job.to_dict() | {"rows": rows, "losses": known["losses"], "digest": job.digest, "data_hash": known["data"]}
        write(folder / REPORT, lambda place: place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
        path.unlink()
    return known


def streamed_rows(folder: Path, train: Tensor, stage: Stage, teacher: Shelf, counts: dict[str, int], say: Say) -> Tensor:
    """The rows of a stage, as many as the disk had room for when it began."""
    rows = rows_of(train, stage.length, "text")
    if stage.name not in counts:
        counts[stage.name] = len(fitting(folder, rows, teacher.model.config.hidden_size, teacher.dtype))
    if counts[stage.name] < len(rows):
        say(f"the disk has room for the activations of {counts[stage.name]} of {len(rows)} rows; {stage.name} learns from these")
    return rows[: counts[stage.name]]


# -- its files -----------------------------------------------------------------------------------------------------------


def open_student(folder: Path, device: str) -> nn.Module:
    """The student of a folder in float32, as far as it is."""
    return from_pretrained(folder, task="causal_lm", dtype=torch.float32).to(device).eval()


def save(folder: Path, job: Job, train: Tensor, student: nn.Module, done: dict) -> None:
    content = done | {"weights": student.state_dict(), "digest": job.digest, "data": fingerprint(train)}
    write(folder / PROGRESS, lambda path: torch.save(content, path))


def load(folder: Path, job: Job, train: Tensor, device: str) -> dict | None:
    """The progress there is; ValueError if it is of other data or another recipe."""
    if not (folder / PROGRESS).is_file():
        return None
    done = torch.load(folder / PROGRESS, weights_only=True, map_location=device)
    check_same(folder, done, job, train)
    return done


# -- what it begins from -------------------------------------------------------------------------------------------------


def memory(device: str) -> int:
    """Bytes a device has: what is free of a GPU, all of a machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def open_aligned(job: Job, device: str) -> nn.Module | None:
    """The student to begin from, if there is one; ValueError where it is not finished, or of another teacher or other mixers."""
    if job.aligned is None:
        return None
    folder = finished(job.aligned)
    fields = ("teacher", "mixer", "mixer_args", "inherit", "window", "sinks", "rope")  # that make the mixers what they are
    for name, (was, now) in read_job(folder).unlike(job).items():
        if name in fields:
            raise ValueError(f"{folder} was aligned with {name}={was!r}, this conversion asks for {now!r}")
    return open_student(folder, device)


def choose_layers(teacher: nn.Module, method: Method, train: Tensor, say: Say, aligned: nn.Module | None = None) -> tuple[int, ...]:
    """Which layers stay, as the recipe says."""
    count = len(teacher.config.layer_configs())
    kept, signal, window = method.kept(count), method.select.replace("none", "uniform"), method.window or 64
    if isinstance(kept, tuple):
        return kept
    signal = signal if 0 < kept < count else "uniform"
    if signal in ALIGNED and aligned is None:
        raise ValueError(f"select={signal} reads an aligned student; align every layer first, and name its folder: --aligned FOLDER")
    rows = spread(rows_of(train, max(4 * window, method.stages[0].length), "text"), 2)
    if signal != "uniform":
        say(f"looking for {kept} layers to keep, by {signal}")
    scores = layer_scores(signal, teacher, rows, aligned=aligned, window=window, sinks=method.sinks)
    return tuple(select_layers(signal, scores, kept, must_keep=method.must_keep, min_gap=method.min_gap))

"""What is asked of a conversion, and the files in its folder that say so and how far it is. All are replaced whole."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from zoo.convert.data import fingerprint, read_tokens, rows_of, spread
from zoo.convert.recipe import Method, read_method
from zoo.convert.stream import write

JOB = "conversion.json"  # what was asked
PROGRESS = "progress.pt"  # weights, optimizer and losses of the stage at hand
STREAMED = "streamed.json"  # layers and losses of a stage that goes layer by layer
REPORT = "report.json"  # what came of it, once it has ended
HELD_ROWS, HELD_LENGTH = 16, 1024  # of held-out text, to measure perplexity on, where there is as much
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What was asked: the teacher's folder or Hub id, a settled recipe, files of text (none: Python's help topics), a seed.

    Args:
        aligned: the finished folder of a conversion that aligned every layer, from whose mixers the student begins; None: none.
        control: how the student is made to begin worse, of `zoo.convert.control`; None: not.
        stream: hold one layer at a time in the first stages, where they are compared layer by layer.
    """

    teacher: str
    method: Method
    data: tuple[str, ...] = ()
    seed: int = 0
    aligned: str | None = None
    control: str | None = None
    stream: bool = False

    def to_dict(self) -> dict:
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        named["recipe"] = named.pop("method").to_dict()
        return named | {"data": list(self.data)}

    @property
    def digest(self) -> str:
        named = {name: what for name, what in self.to_dict().items() if name != "stream"}  # which may follow from the machine
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, tokenizer, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Token ids to train on `[N]`, and held-out rows `[M, T]`, int64, to measure perplexity on; shorter where there is little text.

        Raises:
            ValueError: too little text for a row of any stage, or what `read_tokens` refuses.
        """
        train, held_out = read_tokens(self.data, tokenizer, vocab_size)
        for stage in self.method.stages:
            rows_of(train, stage.length, "text")
        length = HELD_LENGTH if len(held_out) >= HELD_LENGTH else self.method.stages[0].length
        return train, spread(rows_of(held_out, length, "held-out text"), HELD_ROWS)

    def unlike(self, other: "Job") -> dict[str, tuple]:
        """Field, of the job or of its recipe -> what it is here and there, where that differs."""
        own, others = ({k: v for k, v in (job.to_dict() | job.to_dict()["recipe"]).items() if k != "recipe"} for job in (self, other))
        return {name: (own.get(name), value) for name, value in others.items() if own.get(name) != value}


def read_job(folder: Path) -> Job:
    """What was asked of this folder."""
    if not (folder / JOB).is_file():
        raise ValueError(f"{folder} has no {JOB}, so it is no conversion; begin one with `run` or `init`")
    content = json.loads((folder / JOB).read_text(encoding="utf-8"))
    method, data = read_method(content.pop("recipe"), {}), tuple(content.pop("data"))
    return Job(method=method, data=data, **content)


def write_job(folder: Path, job: Job, tokenizer) -> None:
    """Say beside the student what was asked."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write(folder / JOB, lambda path: path.write_text(json.dumps(job.to_dict(), indent=1) + "\n", encoding="utf-8"))


def clear(folder: Path) -> None:
    """Take away what was there of another job."""
    for name in (JOB, PROGRESS, STREAMED, REPORT):
        (folder / name).unlink(missing_ok=True)


def has_ended(folder: Path) -> bool:
    return (folder / REPORT).is_file() and not (folder / PROGRESS).is_file()


def finished(folder: str | os.PathLike) -> Path:
    """A folder whose conversion has ended; ValueError where it has not, or is none."""
    folder = Path(folder)
    read_job(folder)
    if not has_ended(folder):
        raise ValueError(f"{folder} is not finished; go on with: resume {folder}")
    return folder


def check_same(folder: Path, done: dict, job: Job, train: Tensor) -> None:
    """Raise ValueError if progress is of another recipe or other data."""
    for name, what, now in (("digest", "recipe", job.digest), ("data", "data", fingerprint(train))):
        if done[name] != now:
            raise ValueError(f"{folder}: the {what} changed since its progress was written; put it back, or begin anew with run --force")

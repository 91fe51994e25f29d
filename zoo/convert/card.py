"""The result card of a conversion: teacher and student side by side, before and after training, and whether the student may be
called done. Numbers as JSON, the same as Markdown, and a picture."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from zoo.convert.data import spread
from zoo.convert.draw import card_markdown, draw_card
from zoo.convert.folder import advance, begin, open_aligned, open_student, start
from zoo.convert.gates import LEAST, run_gates
from zoo.convert.job import REPORT, Job, Say, finished, read_job
from zoo.convert.recipe import Stage
from zoo.convert.report import LENGTHS
from zoo.convert.student import converted_layers
from zoo.convert.teacher import licence, open_teacher
from zoo.evaluate.compare import agreement, compare_writing, greedy, read_rows
from zoo.evaluate.retrieval import copying, retrieval, shortest
from zoo.evaluate.speed import generation_speed, state_bytes
from zoo.generate import begin as first_tokens

TWIN = "twin"  # folder of the student that was never taught, below the conversion's


@dataclass(frozen=True)
class Measures:
    """How to measure.

    Args:
        distances: in tokens, of what is copied from and of passkeys.
        span, trials: tokens copied, and prompts for each distance.
        prompts, written: continuations to compare, and their tokens.
        seed: of what is drawn.
    """

    distances: tuple[int, ...] = (64, 128, 256, 512, 1024)
    span: int = 32
    trials: int = 8
    prompts: int = 8
    written: int = 64
    seed: int = 0

    def __post_init__(self):
        if not self.distances or min(self.distances) < self.span or min(self.trials, self.prompts, self.written) < 1 or self.span < 9:
            raise ValueError(
                f"distances {list(self.distances)}, span {self.span}, trials {self.trials}, prompts {self.prompts}, written "
                f"{self.written}: a distance is at least the span, a span at least 9, and the others at least 1"
            )


class Bench:
    """A teacher, what it is asked, and how: every student is measured beside the same.

    Args:
        teacher, tokenizer: of `zoo.convert.teacher.open_teacher`; without a tokenizer there are no passkeys.
        rows: `[N, T]` int64 of held-out text.
    """

    def __init__(self, teacher: nn.Module, tokenizer, rows: Tensor, measures: Measures):
        self.teacher, self.tokenizer, self.rows, self.measures = teacher, tokenizer, rows, measures
        self.prompts = spread(rows, measures.prompts)[:, : max(1, rows.shape[1] // 2)].to(teacher.device)
        self.answers = greedy(teacher, self.prompts, measures.written)

    def measure(self, student: nn.Module) -> dict:
        """All numbers of a student, or of the teacher itself."""
        found = read_rows(student, self.rows)._asdict() | self._beside(student)
        found |= {"copying": self._copying(student), "passkey": self._passkeys(student)}
        prompt = self.rows.flatten()[None, :1024]
        speed = generation_speed(student, prompt, 16)
        weight = {str(length): state_bytes(student, length) for length in LENGTHS}
        return found | speed._asdict() | {"state_bytes": weight, "parameters": sum(p.numel() for p in student.parameters())}

    def _beside(self, student: nn.Module) -> dict:
        """How its predictions and continuations differ from the teacher's."""
        same = student is self.teacher
        written = self.answers if same else greedy(student, self.prompts, self.measures.written)
        writing = compare_writing(written, self.answers)._asdict()
        return writing if same else agreement(self.teacher, student, self.rows)._asdict() | writing

    def _copying(self, model: nn.Module) -> dict[str, float]:
        special = set(self.tokenizer.all_special_ids) if self.tokenizer else set()
        count = min(len(self.tokenizer), model.config.vocab_size) if self.tokenizer else model.config.vocab_size
        words, asked = sorted(set(range(count)) - special), self.measures
        first = first_tokens(self.tokenizer) if self.tokenizer else None
        shares = copying(model, words, list(asked.distances), span=asked.span, trials=asked.trials, seed=asked.seed, first=first)
        return {str(distance): share for distance, share in zip(asked.distances, shares, strict=True)}

    def _passkeys(self, model: nn.Module) -> dict[str, float]:
        """Of keys at the very beginning, by the length of the prompt; of lengths that have no room for the question, none."""
        if self.tokenizer is None:
            return {}
        asked, least = self.measures, shortest(self.tokenizer, "passkey")
        lengths = [distance for distance in asked.distances if distance >= least]
        if not lengths:
            return {}
        grid = retrieval(model, self.tokenizer, "passkey", lengths, [0.0], trials=asked.trials, seed=asked.seed)
        return {str(length): row[0] for length, row in zip(lengths, grid, strict=True)}


def make_card(
    folder: str | os.PathLike, say: Say, *, device: str = "cpu", twin: bool = False, measures: Measures | None = None, command: str = ""
) -> dict:
    """Measure a finished conversion, try its gates, and write `card.json`, `card.md` and `card.png` into its folder.

    Args:
        twin: train, or go on training, a student of the same sizes and random weights on as many tokens of the same text.
        command: that does this again, for the card.

    Returns:
        the card; its "done" tells whether every gate holds.

    Raises:
        ValueError: the folder is no conversion or not finished, or the held-out text is too short.
    """
    folder = finished(folder)
    job = read_job(folder)
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    teacher, tokenizer = open_teacher(job.teacher, device)
    _, rows = job.read(tokenizer, teacher.config.vocab_size)
    final = open_student(folder, device)
    say("trying the gates")
    gates = run_gates(teacher, final, gate_row(rows, final))
    bench = Bench(teacher, tokenizer, rows, measures or Measures())
    say("measuring the teacher and its student")
    models = {"teacher": bench.measure(teacher)}
    models["converted"] = bench.measure(begin(job, teacher, report["kept"]))
    if job.aligned:
        models["aligned"] = bench.measure(begin(job, teacher, report["kept"], open_aligned(job, device)))
    stages = [row for row in report["rows"] if row["name"] not in ("teacher", "converted")]
    models |= {f"after {row['name']}": {"perplexity": row["perplexity"]} for row in stages[:-1]}
    models["final"] = bench.measure(final)
    if twin:
        models[TWIN] = bench.measure(train_twin(folder / TWIN, job, report["kept"], say, device))
        models["final"]["gap_closed"] = gap_closed(models)
    card = {
        "done": not any(gates.values()), "gates": gates, "models": models, "job": job.to_dict(), "digest": job.digest,
        "data_hash": report["data_hash"], "tokens": sum(stage.steps * stage.batch * stage.length for stage in job.method.stages),
        "held_out": {"rows": len(rows), "length": rows.shape[1]}, "layers": len(final.config.plan), "replaced": converted_layers(final),
        "licence": licence(job.teacher), "measures": asdict(bench.measures), "command": command, "device": device_name(device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(card_markdown(card), encoding="utf-8")
    draw_card(card, folder / "card.png")
    return card


def gate_row(rows: Tensor, student: nn.Module) -> Tensor:
    """`[1, T]` of the text, longer than twice any window where it can be."""
    windows = [getattr(part, "window", None) or 0 for part in student.modules()]
    length = min(max(LEAST, 2 * max((w for w in windows if isinstance(w, int)), default=0) + 16), 512)
    return rows.flatten()[None, :length]


def train_twin(folder: Path, job: Job, kept: list[int], say: Say, device: str) -> nn.Module:
    """The student's twin from random weights, trained on the text itself over as many tokens as all stages had together."""
    stages = job.method.stages
    tokens, last = sum(stage.steps * stage.batch * stage.length for stage in stages), stages[-1]
    stage = Stage(
        "scratch", "tokens", "ce", "all", tokens=tokens, length=last.length, batch=last.batch, accumulate=last.accumulate,
        learning_rate=1e-3, warmup=0.05,
    )  # fmt: skip
    own = Job(job.teacher, replace(job.method, stages=(stage,), keep=tuple(kept)), job.data, job.seed, control="scratch")
    start(folder, own, say, device=device)
    if not (folder / REPORT).is_file() and not advance(folder, say, device=device):
        raise ValueError(f"the twin in {folder} was interrupted; go on by asking for the card again")
    return open_student(folder, device)


def gap_closed(models: dict[str, dict]) -> float:
    """Of the way from the twin's cross-entropy to the teacher's, the share that the student has come."""
    logs = {name: torch.tensor(models[name]["perplexity"], dtype=torch.float64).log().item() for name in ("teacher", "final", TWIN)}
    return (logs[TWIN] - logs["final"]) / (logs[TWIN] - logs["teacher"])


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"

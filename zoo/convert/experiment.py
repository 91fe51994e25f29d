"""Many conversions of one teacher at equal tokens, measured alike: students, what is left out of one, which layers stay.

Each is a `Trial`: a recipe with changes, perhaps begun from the mixers that another trial aligned. A trial that is finished leaves
a file of numbers, by which it is known also where its folder is gone; one that is not goes on where it was left.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from zoo.config import nearest
from zoo.convert.card import Bench, Measures, gate_row
from zoo.convert.folder import advance, open_student, start
from zoo.convert.gates import run_gates
from zoo.convert.job import REPORT, Job, Say, finished
from zoo.convert.recipe import load_recipe, read_method
from zoo.convert.teacher import open_teacher
from zoo.evaluate.perplexity import text_score

PURE = {"window": None, "sinks": 0, "keep": 0, "select": "none"}
TEACHERS = {"inherit": ["num_kv_heads", "rope_theta", "qkv_bias"]}  # what a mixer made for conversion takes from the teacher's attention
MIXERS = {  # student -> what its every layer is
    "gla": {"mixer": "gla"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "kda": {"mixer": "kda"},
    "rwkv7": {"mixer": "qrwkv7"} | TEACHERS,
    "mamba2": {"mixer": "mamba2"},
    "retnet": {"mixer": "retnet"},
    "hedgehog_window": {"mixer": "lolcats", "mixer_args.window": 64} | TEACHERS,
    "gated_deltanet_window": {"mixer": "gated_deltanet", "window": 64, "sinks": 4},
}
COUNTS, SIGNALS = (2, 4, 8), ("uniform", "window", "swap", "restore", "recall")


@dataclass(frozen=True)
class Trial:
    """One conversion.

    Args:
        name, group, what: of its row; groups are "align" (measured for others only), "student", "ablation" and "hybrid".
        changes: of the recipe `zoo`.
        stages: which of its stages are taken.
        aligned: the trial whose mixers it begins from.
        control: of `zoo.convert.control`.
    """

    name: str
    group: str
    what: str
    changes: dict = field(default_factory=dict)
    stages: tuple[str, ...] = ("align", "distil")
    aligned: str | None = None
    control: str | None = None


def list_trials(align: int, distil: int, *, best: str = "gated_deltanet", counts: Iterable[int] = COUNTS) -> dict[str, Trial]:
    """All trials by name, each of `align + distil` tokens in sum; those of one mixer share its alignment.

    Args: best: the student from which things are left out, and whose hybrids are made; counts: layers that these keep.

    Raises:
        ValueError: no such student, or no tokens.
    """
    if best not in MIXERS:
        raise ValueError(f"no student {best!r}{nearest(best, MIXERS)}; choose one of {', '.join(MIXERS)}")
    if min(align, distil) < 1:
        raise ValueError(f"{align} tokens of alignment and {distil} of distillation; there must be some of both")
    tokens, found = {"align.tokens": align, "distil.tokens": distil}, []
    for name, mixer in MIXERS.items():
        found.append(Trial(f"align_{name}", "align", f"{name}, aligned", PURE | mixer | tokens, ("align",)))
        found.append(Trial(name, "student", "every layer replaced", PURE | mixer | tokens, ("distil",), f"align_{name}"))
    own, whole = PURE | MIXERS[best] | tokens, {"distil.tokens": align + distil}

    def left_out(name: str, what: str, changes: dict | None = None, **kwargs) -> None:
        found.append(Trial(name, "ablation", f"{best}: {what}", own | (changes or {}), **kwargs))

    late = {"stages": ("distil",), "aligned": f"align_{best}"}
    left_out("no_alignment", "not aligned, all tokens in the second stage", whole, stages=("distil",))
    left_out("no_copying", "mixers begin at random", control="uncopied")
    left_out("mispaired", "keys and values of head h from group h % G", control="mispaired")
    left_out("likelihood", "cross-entropy instead of the divergence", {"distil.target": "tokens", "distil.loss": "ce"}, **late)
    left_out("mlp_frozen", "channel mixers are not trained", {"distil.train": "mixer+norms+embeddings"}, **late)
    for begins in ("zero", "random"):
        left_out(f"gate_{begins}", f"an output gate that begins at {begins}", {"mixer_args.use_gate": True, "init.gate": begins})
    left_out("decay_measured", "decays from the teacher's mean attention distance", {"init.decay": "measured"})
    left_out("scratch", "the same sizes from random weights, on the text itself", whole | {
        "distil.target": "tokens", "distil.loss": "ce", "distil.learning_rate": 1e-3, "distil.final_rate": 1e-4, "distil.warmup": 0.05,
    }, stages=("distil",), control="scratch")  # fmt: skip
    for count in counts:
        for signal in SIGNALS:
            kept = {"keep": count, "select": signal}
            found.append(Trial(f"keep{count}_{signal}", "hybrid", f"{best}, {count} layers kept by {signal}", own | kept, **late))
    return {trial.name: trial for trial in found}


class Experiment:
    """Takes trials one after the other, each in a folder of its own below `root`, and leaves `results/<name>.json`.

    Args:
        teacher: a folder or Hub id, with its tokenizer.
        trials: of `list_trials`.
        changes: of every trial's recipe, such as another batch.
        also: further texts on which perplexity is measured.
        lean: take a folder away once it is measured and no other trial begins from it.
    """

    def __init__(
        self, root: Path, teacher: str, data: tuple[str, ...], trials: dict[str, Trial], say: Say, *, changes: dict | None = None,
        also: tuple[str, ...] = (), seed: int = 0, device: str = "cpu", measures: Measures | None = None, lean: bool = False,
    ):  # fmt: skip
        self.root, self.path, self.data, self.trials, self.say, self.seed = Path(root), teacher, data, trials, say, seed
        self.changes, self.also, self.device, self.measures, self.lean = changes or {}, also, device, measures or Measures(), lean
        self.bench: Bench | None = None

    def take(self, names: Iterable[str], stop: Callable[[], bool] = lambda: False) -> bool:
        """Take those of the trials that have no result yet; False if `stop` said so before all had one.

        What a recipe refuses, and a loss that is not finite, is a result too, but another call tries again.

        Raises:
            ValueError: no trial of a name.
        """
        if wrong := [name for name in names if name not in self.trials]:
            raise ValueError(f"no trial {wrong[0]!r}{nearest(wrong[0], self.trials)}; there are {', '.join(self.trials)}")
        begun = False  # however little time there is, something is done
        for name in names:
            if self.result(name).is_file() and "refused" not in json.loads(self.result(name).read_text(encoding="utf-8")):
                continue
            if begun and stop():
                return False
            begun = True
            try:
                done = self.train(name, stop)
            except (ValueError, FloatingPointError) as error:
                self.write(name, {"refused": str(error)})
                self.say(f"{name}: {error}")
                continue
            if not done:
                return False
            with exact_products():
                self.measure(name)
        return True

    def train(self, name: str, stop: Callable[[], bool]) -> bool:
        """Train a trial, after the one it begins from; whether it is finished."""
        trial, folder = self.trials[name], self.folder(name)
        if trial.aligned is not None and not self.train(trial.aligned, stop):
            return False
        if (folder / REPORT).is_file():
            return True
        begun = time.monotonic()
        self.say(f"{name}: {trial.what}")
        start(folder, self.job(trial), self.say, device=self.device)
        done = advance(folder, self.say, device=self.device, progress=False, stop=stop)
        clock = folder / "seconds.json"
        before = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else 0.0
        clock.write_text(json.dumps(before + time.monotonic() - begun), encoding="utf-8")
        return done

    def job(self, trial: Trial) -> Job:
        changes = trial.changes | {name: value for name, value in self.changes.items() if name not in trial.changes}
        method = load_recipe("zoo", changes, "the experiment").only(trial.stages)
        aligned = None if trial.aligned is None else str(self.folder(trial.aligned))
        return Job(self.path, read_method(method.to_dict(), {}), self.data, self.seed, aligned, trial.control)

    def measure(self, name: str) -> None:
        """Numbers of a finished trial, and of the teacher if these are not there yet."""
        bench, trial, folder = self.open_bench(), self.trials[name], finished(self.folder(name))
        if not self.result("teacher").is_file():
            self.write("teacher", bench.measure(bench.teacher) | {"also": self.elsewhere(bench.teacher), "group": "teacher"})
        student, report = open_student(folder, self.device), json.loads((folder / REPORT).read_text(encoding="utf-8"))
        found = bench.measure(student) | {"also": self.elsewhere(student), "group": trial.group, "what": trial.what}
        if trial.group in ("student", "hybrid"):
            found["gates"] = run_gates(bench.teacher, student, gate_row(bench.rows, student))
        found |= {"kept": report["kept"], "digest": report["digest"], "data_hash": report["data_hash"], "seed": self.seed}
        found["tokens"] = sum(stage["tokens"] for stage in report["recipe"]["stages"])
        found["seconds"] = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        found["stages"] = {row["name"]: row["perplexity"] for row in report["rows"]}
        self.write(name, found)
        self.say(f"{name}: perplexity {found['perplexity']:.2f}")
        if self.lean and all(name != other.aligned for other in self.trials.values()):
            for path in folder.glob("model*.safetensors"):
                path.unlink()

    def elsewhere(self, model: torch.nn.Module) -> dict[str, float]:
        """Perplexity on each of the further texts."""
        texts, tokenizer = {Path(path).stem: Path(path).read_text(encoding="utf-8") for path in self.also}, self.open_bench().tokenizer
        if texts and tokenizer is None:
            raise ValueError(f"the teacher has no tokenizer to read {', '.join(texts)} with")
        return {name: text_score(model, tokenizer, [text], length=1024).perplexity for name, text in texts.items()}

    def open_bench(self) -> Bench:
        if self.bench is None:
            teacher, tokenizer = open_teacher(self.path, self.device)
            _, rows = self.job(next(iter(self.trials.values()))).read(tokenizer, teacher.config.vocab_size)
            self.bench = Bench(teacher, tokenizer, rows, self.measures)
        return self.bench

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def result(self, name: str) -> Path:
        return self.root / "results" / f"{name}.json"

    def write(self, name: str, content: dict) -> None:
        self.result(name).parent.mkdir(parents=True, exist_ok=True)
        self.result(name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def exact_products() -> Iterator[None]:
    """Within the context matrix products are as exact as their dtype, whatever is allowed in training."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def read_results(root: Path, trials: dict[str, Trial]) -> dict[str, dict]:
    """The numbers there are, of the teacher first and of the trials in their order.

    Raises:
        ValueError: none are there.
    """
    paths = {name: Path(root) / "results" / f"{name}.json" for name in ("teacher", *trials)}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}
    if "teacher" not in found:
        raise ValueError(f"{root} has no results yet; run some trials first")
    return found

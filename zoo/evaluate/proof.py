"""Layouts proven: all properties on all trials, and what was found as a table."""

import tempfile
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from zoo.evaluate.parity import properties
from zoo.evaluate.trial import has_oracle, make_trial, trial_names
from zoo.layout import Layout, layouts

COLUMNS = {  # heading -> properties
    "loads": ("loads", "options_are_read", "accounts_for_every_key"),
    "padding": ("padded_rows_are_as_alone",),
    "greedy equal": ("greedy_continuations_are_equal",),
    "gradients": ("gradients_are_equal",),
    "bfloat16": ("half_precision_stays_half",),
    "saves back bit-equal": ("written_back_it_is_what_it_was", "bodies_alone_keep_their_bits", "what_is_made_here_is_read_there"),
}


@dataclass
class Proof:
    """What was found out about a layout.

    Args:
        layout, architecture: names.
        oracle: whether it was compared with transformers.
        trials: how many configs were tried.
        errors: property -> the largest error over all trials.
        failures: (trial, property) -> what went wrong.
    """

    layout: str
    architecture: str
    oracle: bool
    trials: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def holds(self, label: str) -> bool:
        return label in self.errors and not any(failed == label for _, failed in self.failures)


def prove(layout: Layout, trials: Iterable[str] | None = None) -> Proof:
    """All properties of a layout on some of its trials (default: all)."""
    proof = Proof(layout.name, layouts()[layout.name], has_oracle(layout))
    for name in trial_names(layout) if trials is None else trials:
        with tempfile.TemporaryDirectory(prefix="parity-") as place:
            trial = make_trial(layout, name, Path(place))
            proof.trials += 1
            for label, check in properties(layout).items():
                try:
                    proof.errors[label] = max(check(trial), proof.errors.get(label, 0.0))
                except Exception:  # it may fail in any way; the caller reports it
                    proof.failures[name, label] = traceback.format_exc(limit=-2)
                    if "ours" not in vars(trial):  # there is nothing to prove
                        break
    return proof


def table(proofs: list[Proof], before: str = "") -> list[str]:
    """A Markdown table with a row for each, and the rows of other layouts that a table has from `before`."""
    titles = ["layout", "architecture", "max error", *COLUMNS, "configs tried"]
    old = [[cell.strip() for cell in line.strip("|").split("|")] for line in before.splitlines() if line.startswith("| `")]
    rows = [row for row in old if row[0].strip("`") in layouts().keys() - {proof.layout for proof in proofs}]
    for proof in proofs:
        error = f"{proof.errors['logits_are_equal']:.1e}" if proof.holds("logits_are_equal") else "fails" if proof.oracle else ""
        held = ["yes" if all(map(proof.holds, labels)) else "fails" for labels in COLUMNS.values()]
        if not proof.oracle:
            kept = "yes" if proof.holds("saved_and_loaded_it_is_what_it_was") else "fails"
            held = [kept if title in ("loads", "bfloat16", "saves back bit-equal") else "" for title in COLUMNS]
        rows.append([f"`{proof.layout}`", f"`{proof.architecture}`", error, *held, str(proof.trials)])
    rows = [titles, ["-" * len(title) for title in titles], *sorted(rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]

"""What a run measures, kept as far as it has come, and several runs on one page."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from zoo.evaluate.bench import decoding, report, throughput

PAGES = {  # file -> what its rows are merged by, and what writes it
    "operators": ("case", report.operators),
    "training": ("model", throughput.save),
    "decoding": ("case", decoding.save),
    "reading": ("case", decoding.save_reading),
}


class Run:
    """The `rows` of one command, written into a folder if one is named.

    Args:
        page: of `PAGES`.
        command: that does it again.
        facts: of this run: `bandwidth`, where the page tells shares of it.
    """

    def __init__(self, page: str, folder: Path | None, command: str, device: str, dtype: str, **facts: float):
        self.folder, self.write, self.rows = folder, PAGES[page][1], []
        self.head = {"host": report.host(device), "dtype": dtype, "runs": [{"command": command, **facts}]}

    def add(self, *rows) -> None:
        """Keep rows, and write what there is without a picture, should the time run out."""
        self.rows += rows
        self.save(picture=False)

    def save(self, picture: bool = True) -> None:
        if self.folder is not None:
            self.write(self.folder, self.head | {"rows": [dataclasses.asdict(row) for row in self.rows]}, picture)


def merge(folders: Sequence[Path], output: Path) -> list[Path]:
    """Write the pages of several runs, the oldest first, and return their files.

    Raises:
        ValueError: there are none, or they are not of the same machine, versions and dtype.
    """
    written = []
    for name, (key, write) in PAGES.items():
        if files := [path for folder in folders if (path := folder / f"{name}.json").exists()]:
            written += write(output, joined(files, key))
    if not written:
        raise ValueError(f"no {' or '.join(f'{name}.json' for name in PAGES)} in {', '.join(map(str, folders))}")
    return written


def joined(files: Sequence[Path], key: str) -> dict:
    """Several runs' results as one. Where two have the same row[key] (a case, say), all rows of the later run stand."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for file, more in zip(files[1:], others, strict=True):
        if differing := [name for name in ("host", "dtype") if more[name] != first[name]]:
            raise ValueError(f"{file} has another {differing[0]} than {files[0]}: {more[differing[0]]}, not {first[differing[0]]}")
        again = {row[key] for row in more["rows"]}
        first["rows"] = [row for row in first["rows"] if row[key] not in again] + more["rows"]
        first["runs"] += more["runs"]
    return first

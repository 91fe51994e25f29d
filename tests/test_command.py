"""The command `zoo`: what it offers is there, and what it refuses it names."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.__main__ import COMMANDS, main, usage

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_script(command, capsys):
    script = importlib.import_module(f"zoo.scripts.{COMMANDS[command][0]}")
    assert Path(script.__file__).resolve().parent == ROOT / "scripts"
    before = sys.argv
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: zoo {command}")
    assert sys.argv is before


def test_examples_are_commands():
    named = [line.split()[1] for line in usage().splitlines() if line.startswith("  zoo ")]
    assert named and set(named) <= COMMANDS.keys()


def test_documents_name_commands():
    pages = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
    named = {name: set(re.findall(r"^zoo (\S+)|`zoo (?!--)(\S+?)[ `]", text, flags=re.MULTILINE)) for name, text in pages.items()}
    assert {"list", "convert", "generate", "evaluate"} <= {"".join(pair) for pair in named["README.md"]}
    for name, pairs in named.items():
        assert {"".join(pair) for pair in pairs} <= COMMANDS.keys(), name


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(arguments, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS) and max(map(len, text.splitlines())) <= 140


def test_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "zoo", "card", "transfromer"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("zoo card: no architecture 'transfromer' (did you mean 'transformer'?)")


def test_lists_and_cards(capsys):
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == zoo.list_models()
    assert main(["list", "--presets", "TINY"]) == 0
    assert capsys.readouterr().out.split() == [name for name in zoo.list_presets() if "tiny" in name]
    assert main(["card", "gla"]) == 0
    assert capsys.readouterr().out.strip() == (ROOT / "model_cards" / "gla.md").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lsit"], "zoo: no command 'lsit' (did you mean 'list'?); zoo --help names all\n"),
        (["list", "no such thing"], "zoo list: nothing in the list contains 'no such thing'"),
    ],
)
def test_what_is_refused_is_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)

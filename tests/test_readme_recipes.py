"""The recipes of the README, at reduced size: every command as it stands there, with flags behind it that make it small."""

import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hub_trials import connected
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from zoo.__main__ import main
from zoo.train import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ["--max_steps", "2", "--block_size", "256", "--use_cpu", "True"]
SMALL = {  # zoo's command, or a file -> what makes it small
    "pretrain": [
        "--model_args", '{"hidden_size": 32, "num_hidden_layers": 2}', "--warmup_steps", "1", "--lr_scheduler_kwargs",
        '{"num_decay_steps": 1}', "--eval_steps", "2", *TRAINED,
    ],
    "scripts/demo.py": ["--teacher", "teacher", "--steps", "2", "--keep", "1"],
    "finetune": TRAINED,
    "evaluate": ["--length", "128", "--lengths", "256", "--depths", "1", "--trials", "1"],
    "generate": ["--max-new-tokens", "4"],
    "push": [],
    "pull": [],
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls httpx


def recipes() -> list[str]:
    """The lines of the README's block that are no comments."""
    block = re.search(r"^## Four recipes\n.*?^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    return [line for line in block.splitlines() if line and not line.startswith("#")]


def small(line: str) -> list[str]:
    """The words of a line, with what makes it small if it computes."""
    words = shlex.split(line)
    return words + SMALL.get(words[1], [])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder that looks like a clone, with a little teacher in it."""
    for name in ("scripts", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (ROOT / "scripts" / "recipes" / "chat.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=2048)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, bos_token_id=256, eos_token_id=256, **sizes)).save_pretrained(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    verbosity = logging.get_verbosity()
    yield tmp_path
    logging.set_verbosity(verbosity)  # which the demo lowers


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def check(folder: Path) -> None:
    """Every recipe left what it promises, and the pulled copy is what was pushed."""
    left = {
        "gla-bytes": {"model.safetensors", "losses.json", "losses.png"},
        "demo/student": {"model.safetensors", "report.json", "report.png"},
        "student-chat": {"model.safetensors", "losses.png", "evaluation.json", "evaluation.png"},
        "copy": {"model.safetensors", "evaluation.json", "tokenizer.json", "README.md"},
    }
    for name, files in left.items():
        assert files <= {path.name for path in (folder / name).iterdir()}
    student, tuned, copy = (load_file(folder / name / "model.safetensors") for name in ("demo/student", "student-chat", "copy"))
    assert student.keys() == tuned.keys() == copy.keys()
    assert any(not torch.equal(student[name].float(), tuned[name].float()) for name in student)
    assert all(torch.equal(tuned[name], copy[name]) for name in tuned)
    card = (folder / "copy" / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "HuggingFaceTB/SmolLM2-135M-Instruct" in card and "Numbers in evaluation.json" in card


def run(words: list[str]) -> int | None:
    """A command of zoo's or a script, in this process."""
    if words[0] == "zoo":
        return main(words[1:])
    with patch.object(sys, "argv", words[1:]):
        return runpy.run_path(words[1], run_name="recipe")["main"]()


def test_recipes(workplace, port, capsys):
    """In this process, but for the Hub, which must not share huggingface_hub with its client."""
    (served,) = [shlex.split(line) for line in recipes() if "hub_server" in line]
    assert served[0] == "python" and served[-3:] == ["--port", "8642", "&"]
    wrote = []
    with subprocess.Popen([sys.executable, *served[1:-2], port], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline().strip().replace(port, "8642") in recipes()  # which says that it is there
            with connected(SimpleNamespace(url=f"http://127.0.0.1:{port}"), workplace / "cache"):
                for words in map(small, recipes()):
                    if words[1] in SMALL:
                        capsys.readouterr()
                        assert not run(words), words
                        wrote.append((words[1], capsys.readouterr().out))
        finally:
            server.terminate()
    assert {command for command, _ in wrote} == SMALL.keys()
    check(workplace)
    *_, before, after = [text for command, text in wrote if command == "generate"]
    assert before == after and before.strip()


@pytest.mark.slow
def test_recipes_as_a_script(workplace, port):
    """In a shell, as a reader runs them."""
    lines = [shlex.join(words) if (words := small(line))[1] in SMALL else line for line in recipes() if not line.startswith("pip ")]
    for name, command in (("zoo", "-m zoo "), ("python", "")):
        shim = workplace / "bin" / name
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {command}"$@"\n', encoding="utf-8")
        shim.chmod(0o755)
    script = "\n".join(["set -e", "trap 'kill $! 2>/dev/null || true' EXIT", *lines]).replace("8642", port)
    path = f"{workplace / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"HF_HOME": str(workplace / "cache"), "PYTHONPATH": str(ROOT), "PATH": path}
    ran = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    check(workplace)

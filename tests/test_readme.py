"""What the documents tell a reader to do works as written."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import zoo
from zoo.evaluate.conformance import MIXER_PROPERTIES
from zoo.evaluate.subject import Subject
from zoo.registry import unregister

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), flags=re.MULTILINE | re.DOTALL)


def sections(name: str) -> dict[str, str]:
    """Heading -> its python block, for the headings that have one."""
    found = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", read(name), flags=re.MULTILINE | re.DOTALL)
    pattern = re.compile(r"^```python\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return {heading: match.group(1) for heading, text in found if (match := pattern.search(text))}


@pytest.mark.parametrize("heading", sections("README.md"))
def test_snippet(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(sections("README.md")[heading], heading, "exec"), {"__name__": "snippet"})


def test_every_snippet_is_run():
    assert len(sections("README.md")) == len(blocks("README.md", "python")) >= 3


@pytest.fixture
def leaky(tmp_path, monkeypatch):
    """The architecture that CONTRIBUTING.md shows, entered as if its file were in `models/`."""
    (code,) = blocks("CONTRIBUTING.md", "python")
    path = tmp_path / "leaky.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("leaky", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "leaky", module)
    spec.loader.exec_module(module)
    yield "leaky"
    unregister("leaky")


def test_the_example_is_an_architecture(leaky):
    properties = ("sees_no_future", "prefill_then_steps_equal_the_whole", "declares_its_state", "packed_documents_are_separate")
    for name in properties:
        MIXER_PROPERTIES[name](Subject(leaky))
    config = zoo.HybridConfig(hidden_size=32, num_hidden_layers=2, vocab_size=256, plan=[leaky, "gla"])
    assert zoo.from_config(config).num_parameters() > 0


def test_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE))
    named = {target for name in DOCUMENTS for target in re.findall(r"(?:^|`)make ([a-z]+)", read(name), flags=re.MULTILINE)}
    assert {"test", "demo"} <= named <= targets


def test_continuous_integration_runs_the_command_of_the_readme():
    assert "make test " in blocks("README.md", "sh")[0]
    assert read(".ci/run").splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#]+)\)", read(name))
    missing = [target for target in targets if not target.startswith("https://") and not (ROOT / target).exists()]
    assert not missing


def test_changelog_speaks_of_this_version():
    assert f"## [{zoo.__version__}]" in read("CHANGELOG.md")

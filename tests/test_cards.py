"""What the cards and the README say about the registry is what the registry says."""

import importlib.util
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("write_cards", ROOT / "scripts" / "write_cards.py")
write_cards = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_cards)


@pytest.mark.parametrize("name", zoo.list_models())
def test_card_explains_and_is_up_to_date(name):
    card = ROOT / "model_cards" / f"{name}.md"
    assert card.exists(), f"write model_cards/{name}.md: what the architecture is, its state's formula, what to know; then `make cards`"
    text = card.read_text(encoding="utf-8")
    assert text == write_cards.render(card), f"run `make cards`, or python scripts/write_cards.py {name}"
    assert text.startswith("# ")
    own = text.partition(write_cards.BEGIN)[0] + text.partition(write_cards.END)[2]
    assert len(own.split()) >= 40, f"model_cards/{name}.md says little beside the generated part: explain the state and what sets it apart"


def test_catalogue_is_up_to_date():
    readme = ROOT / "README.md"
    assert readme.read_text(encoding="utf-8") == write_cards.render(readme), "run `make cards`"


def test_insert_replaces_only_what_lies_between_the_markers():
    markers = (write_cards.BEGIN, write_cards.END)
    first = write_cards.insert("# title\nprose\n", "old", *markers)
    assert first == f"# title\n\n{write_cards.BEGIN}\nold\n{write_cards.END}\n\nprose\n"
    assert write_cards.insert(first, "new", *markers) == first.replace("old", "new")


def test_check_changes_nothing_and_tells(tmp_path, monkeypatch, capsys):
    (tmp_path / "model_cards").mkdir()
    monkeypatch.setattr(write_cards, "ROOT", tmp_path)
    assert write_cards.main(["--check", "gla"]) == 1
    assert not (tmp_path / "model_cards" / "gla.md").exists()
    assert write_cards.main(["gla"]) == 0
    assert write_cards.main(["--check", "gla"]) == 0
    assert capsys.readouterr().out.splitlines() == ["out of date: model_cards/gla.md", "wrote: model_cards/gla.md"]

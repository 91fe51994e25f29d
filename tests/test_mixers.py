"""The battery's mixer properties on every registered mixer; ids read `[gla-sees_no_future]`."""

import pytest

import zoo
from zoo.evaluate.battery import MIXER_PROPERTIES
from zoo.evaluate.subject import Subject


@pytest.mark.parametrize("check", [pytest.param(check, id=label) for label, check in MIXER_PROPERTIES.items()])
@pytest.mark.parametrize("name", zoo.list_mixers())
def test_mixer(name, check):
    check(Subject(name))

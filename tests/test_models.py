"""The battery's model properties on every registered architecture; ids read `[gla-padding_changes_nothing]`."""

import pytest

import zoo
from zoo.evaluate.battery import MODEL_PROPERTIES
from zoo.evaluate.subject import Subject


@pytest.mark.parametrize("check", [pytest.param(check, id=label) for label, check in MODEL_PROPERTIES.items()])
@pytest.mark.parametrize("name", zoo.list_models(encoder_decoder=False))
def test_model(name, check):
    check(Subject(name))

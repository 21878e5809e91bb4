from pathlib import Path

import pytest

from gateway.core.errors import MESSAGES
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.datamodel import ApiClass
from gateway.xenapi.reference import reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "rpc.md"


def test_the_reference_is_in_step_with_the_classes() -> None:
    written = DOCUMENT.read_text()
    assert written == reference(CLASSES), "run .venv/bin/python -m gateway.xenapi.reference >docs/rpc.md"


@pytest.mark.parametrize("model", CLASSES, ids=lambda model: model.name)
def test_every_field_and_every_method_written_by_hand_is_in_the_reference(model: ApiClass) -> None:
    section = reference([model])
    assert f"\n## {model.name}\n" in section
    for field in model.fields:
        assert f"`{field.name}`" in section
    for message in model.messages:
        assert f"- **{message.name}** `(" in section


@pytest.mark.parametrize("model", CLASSES, ids=lambda model: model.name)
def test_every_error_that_a_method_names_is_known(model: ApiClass) -> None:
    named = {code for message in model.all_messages.values() for code in message.errors}
    assert named <= set(MESSAGES)

"""The page of events is what its command prints, and every field of every event says what it means."""

import dataclasses

import pytest

from esper.leyline.events import EVENTS, reference
from esper.leyline.fields import class_doc, field_docs
from esper.leyline.files import package_folder


def test_the_committed_page_is_what_the_command_prints() -> None:
    committed = (package_folder().parent / "docs" / "events.md").read_text()
    assert committed == reference.page(), "python -m esper.leyline.events.reference > docs/events.md"


@pytest.mark.parametrize("cls", [*EVENTS.values(), *reference.nested_types()[0]], ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls: type) -> None:
    assert class_doc(cls)
    docs = field_docs(cls)
    assert [field.name for field in dataclasses.fields(cls) if not docs.get(field.name)] == []


def test_every_event_stands_on_the_page_with_its_level() -> None:
    page = reference.page()
    for kind in EVENTS:
        assert f"\n## {kind}\n" in page
    assert "`TickDone`; level full.\n" in page
    assert "`Fault`; level lifecycle; priority.\n" in page


def test_a_field_without_a_docstring_of_its_own_has_its_parents() -> None:
    @dataclasses.dataclass
    class Parent:
        """A parent."""

        a: int = 0
        """First
        line and second."""
        b: int = 0

    @dataclasses.dataclass
    class Child(Parent):
        """A child."""

        a: int = 1
        c: int = 2
        """Its own."""

    assert field_docs(Child) == {"a": "First line and second.", "c": "Its own."}

"""The page of events is what its command prints, and every field of every event says what it means."""

import dataclasses
import typing

import pytest

from esper.leyline.events import EVENTS, Event, reference
from esper.leyline.events.words import UNITS, WHEN
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
    assert "`TickDone`; level full; said at each tick.\n" in page
    assert "`Fault`; level lifecycle; critical; said at once.\n" in page
    assert "| `save_ms` | float | ms | " in page


def test_every_number_has_a_unit_and_every_event_its_time() -> None:
    numbers = set()
    for cls in [Event, *EVENTS.values(), *reference.nested_types()[0]]:
        hints = typing.get_type_hints(cls)
        numbers |= {field.name for field in dataclasses.fields(cls) if reference.has_unit(hints[field.name])}
    assert numbers == set(UNITS), "esper/leyline/events/words.py"
    assert set(EVENTS) == set(WHEN)


def test_what_is_critical_has_priority_too() -> None:
    assert {kind for kind, cls in EVENTS.items() if cls.critical} == {"fault", "panic", "rollback", "degraded"}
    assert all(cls.priority for cls in EVENTS.values() if cls.critical)


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

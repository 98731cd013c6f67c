"""Slot ids: one canonical form, one order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import ConfigError
from esper.leyline.slots import SlotPlace, parse_slot, sort_slots

PLACES = st.tuples(st.integers(0, 9999), st.integers(0, 9999)).map(lambda pair: SlotPlace(*pair))


@given(PLACES)
def test_a_place_and_its_text_are_one(place):
    assert parse_slot(str(place)) == place


@given(st.text(alphabet="rc0123456789RC -+.", max_size=8))
def test_whatever_parses_is_canonical(text):
    try:
        place = parse_slot(text)
    except ConfigError:
        return
    assert str(place) == text


@pytest.mark.parametrize(
    "text",
    ["R0C0", "r00c1", "r0c01", "early", "", "r0", "r-1c0", " r0c0", "r0c0\n", "r0c0 ", "r10000c0", "r٣c0", None, 7],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigError, match="not a slot id; write r<row>c<col>"):
        parse_slot(text)


def test_an_error_lists_the_slots_of_the_host():
    for text, why in (("early", "not a slot id"), ("r9c9", "no such slot")):
        with pytest.raises(ConfigError, match=f"{why}; this host has r0c0, r0c1"):
            parse_slot(text, ("r0c0", "r0c1"))
    assert parse_slot("r0c1", ["r0c0", "r0c1"]) == (0, 1)


@given(st.lists(PLACES, unique=True, max_size=12))
def test_order_is_row_major_by_number(places):
    assert sort_slots(map(str, places)) == tuple(map(str, sorted(places)))


def test_tens_come_after_units():
    assert sort_slots(["r10c0", "r2c0", "r0c10", "r0c9"]) == ("r0c9", "r0c10", "r2c0", "r10c0")


def test_a_slot_named_twice_is_refused():
    with pytest.raises(ConfigError, match="slot r0c1: named twice"):
        sort_slots(["r0c1", "r0c0", "r0c1"])

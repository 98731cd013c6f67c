"""Plain data: a strict round trip, and digests that see every change."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.alpha import Curve
from esper.leyline.commands import Command
from esper.leyline.evidence import measured
from esper.leyline.observation import Observation
from esper.leyline.plain import digest62, from_plain, to_plain
from esper.leyline.stages import Gate, Op, Stage
from tests.support.observations import World, observe, slot_view, verdict

COMMANDS = st.builds(
    Command,
    slot=st.sampled_from(["r0c0", "r3c1"]),
    op=st.sampled_from(Op),
    blueprint=st.none() | st.text(max_size=5),
    curve=st.sampled_from(Curve),
    steepness=st.floats(0.1, 50),
    ticks=st.integers(0, 10_000),
    target=st.floats(0, 1),
    reason=st.text(max_size=20),
    proposal=st.integers(0, 2**40),
)


@dataclasses.dataclass(frozen=True)
class Bag:
    """One of each kind of field."""

    stage: Stage
    many: dict[str, list[int]]
    pair: tuple[float, ...]
    maybe: Command | None
    flag: bool
    free: Any


BAG = Bag(Stage.TRAINING, {"a": [1, 2]}, (0.5, 2.0), None, True, {"deep": [None, "x"]})


@given(COMMANDS)
def test_a_command_survives_json(command):
    assert from_plain(Command, json.loads(json.dumps(to_plain(command)))) == command


def test_a_whole_observation_survives_json():
    live = slot_view(stage=Stage.TRAINING, blueprint="light", verdict=verdict(Gate.G2, False), curve=Curve.SIGMOID)
    seen = observe(live, slot_view("r0c1"), train_loss=measured(1.5, tick=5, n=3, se=0.1))
    assert from_plain(Observation, json.loads(json.dumps(to_plain(seen)))) == seen
    busy = World(("r0c0", "r1c0"), worth=lambda slot, name: 0.0).advance()
    assert from_plain(Observation, json.loads(json.dumps(to_plain(busy)))) == busy


def test_every_kind_of_field_comes_back_as_its_type():
    assert from_plain(Bag, json.loads(json.dumps(to_plain(BAG)))) == BAG


def test_enums_travel_by_name():
    assert to_plain(Op.PRUNE) == "PRUNE"
    assert to_plain(Curve.COSINE) == "COSINE"


def test_a_whole_number_is_a_float_where_one_is_asked():
    loaded = from_plain(Bag, to_plain(BAG) | {"pair": [1, 2]})
    assert loaded.pair == (1.0, 2.0)
    assert all(type(item) is float for item in loaded.pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "SPROUT"}, r"Bag\.stage: 'SPROUT' is none of EMPTY"),
        ({"stage": 2}, r"Bag\.stage: 2 is none of EMPTY"),
        ({"many": {"a": [1, "2"]}}, r"Bag\.many\.a\[1\]: expected int, got '2'"),
        ({"many": [1]}, r"Bag\.many: expected a mapping, got list"),
        ({"many": {"a": [True]}}, r"Bag\.many\.a\[0\]: expected int, got True"),
        ({"pair": 0.5}, r"Bag\.pair: expected a list, got float"),
        ({"pair": [True]}, r"Bag\.pair\[0\]: expected float, got True"),
        ({"pair": [None]}, r"Bag\.pair\[0\]: expected float, got None"),
        ({"maybe": {"slot": "r0c0"}}, r"Bag\.maybe: missing blueprint, curve"),
        ({"maybe": 3}, r"Bag\.maybe: expected a mapping, got int"),
        ({"flag": 1}, r"Bag\.flag: expected bool, got 1"),
        ({"more": 1, "most": 2}, r"Bag: unknown more, most"),
    ],
)
def test_whatever_does_not_fit_is_an_error_with_its_path(change, message):
    with pytest.raises(ValueError, match=message):
        from_plain(Bag, to_plain(BAG) | change)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Bag)])
def test_a_missing_field_has_no_default(name):
    data = to_plain(BAG)
    del data[name]
    with pytest.raises(ValueError, match=f"Bag: missing {name}"):
        from_plain(Bag, data)


def test_only_plain_values_have_a_plain_form():
    for value in (object(), {1, 2}, b"bytes"):
        with pytest.raises(TypeError, match="no plain form"):
            to_plain(value)
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        from_plain(Command, [])


@given(COMMANDS, COMMANDS)
def test_digests_agree_exactly_when_values_do(one, other):
    assert (digest62(one) == digest62(other)) == (to_plain(one) == to_plain(other))
    assert 0 <= digest62(one) < 2**62


def test_digests_ignore_key_order_and_see_the_last_bit():
    assert digest62({"a": 1, "b": 2}) == digest62({"b": 2, "a": 1})
    assert digest62(0.1) != digest62(0.1 + 2**-56)
    assert digest62([1, 2]) != digest62([2, 1])
    assert digest62(0.0) != digest62(-0.0)


def test_a_digest_does_not_change_between_machines_and_releases():
    assert digest62({"slot": "r0c0", "alpha": 0.25}) == 3290578794916553605  # b2sum -l 64, by 4


def test_a_digest_of_no_number_is_an_error():
    with pytest.raises(ValueError, match="Out of range float"):
        digest62(float("nan"))

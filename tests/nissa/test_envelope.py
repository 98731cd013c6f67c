"""Every event goes to disk and comes back the same; a record that is not ours is refused by name."""

import json

import pytest

from esper.leyline.commands import Command
from esper.leyline.events import EVENTS, CommandJudged
from esper.leyline.plain import to_plain
from esper.leyline.stages import Op
from esper.nissa.envelope import AXES, Envelope, from_record, whole
from esper.nissa.jsonl import encode
from tests.nissa.samples import SAMPLES, axes, fault, tick_done


def test_the_samples_hold_every_class():
    assert {type(event) for event in SAMPLES} == set(EVENTS.values())


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.kind)
def test_round_trip_through_a_line(event):
    record = Envelope("run-1", 3, 1).to_record(event)
    back = from_record(json.loads(encode(record)))
    assert type(back) is type(event)
    assert back == event


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.kind)
def test_a_short_line_is_read_whole(event):
    record = json.loads(encode(Envelope("run-1", 3, 1).to_record(event)))
    long = json.loads(encode({name: value for name, value in to_plain(event).items() if name not in AXES}))
    assert whole(record)["payload"] == long
    assert whole(whole(record)) == whole(record)
    assert set(record["payload"]) == set(long), "an event's own fields are always there"


def test_what_goes_without_saying_is_left_out():
    told = CommandJudged(**axes(4), command=Command(slot="r0c0", op=Op.ADVANCE, proposal=7), applied=True, reason="")
    assert Envelope("run-1", 1, 0).to_record(told)["payload"]["command"] == {
        "slot": "r0c0",
        "op": "ADVANCE",
        "proposal": 7,
    }
    payload = Envelope("run-1", 1, 0).to_record(tick_done(4))["payload"]
    assert payload["train_loss"].keys() & {"status", "tick"} == set()
    assert {"status": "ABSENT"} in payload.values()


def test_a_nested_field_that_no_type_leaves_out_is_missed():
    told = CommandJudged(**axes(4), command=Command(slot="r0c0", op=Op.ADVANCE), applied=True, reason="")
    record = Envelope("run-1", 1, 0).to_record(told)
    for change, text in ((("op", None), "missing op"), (("o", 1), "unknown o")):
        broken = json.loads(encode(record))
        command = broken["payload"]["command"]
        command.pop(change[0]) if change[1] is None else command.update([change])
        with pytest.raises(ValueError, match=text):
            from_record(broken)
    with pytest.raises(ValueError, match="missing"):
        from_record({**json.loads(encode(record)), "schema": 3})


def test_the_envelope_numbers_and_names():
    envelope = Envelope("run-1", 3, 1)
    first, second = envelope.to_record(fault(1)), envelope.to_record(tick_done(2))
    assert (first["seq"], second["seq"]) == (0, 1)
    assert (first["run_id"], first["attempt"], first["rank"], first["schema"]) == ("run-1", 3, 1, 4)
    assert (second["kind"], second["step"], second["tick"]) == ("tick", 20, 2)
    assert "step" not in second["payload"]
    assert second["time"] >= first["time"] > 1.6e9


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.pop("seq"), r"missing \['seq'\]"),
        (lambda r: r.update(extra=1), r"unknown \['extra'\]"),
        (lambda r: r.update(schema=1), "schema 1"),
        (lambda r: r.update(kind="party"), "kind 'party'; kinds are born, breaker, checkpoint,"),
        (lambda r: r.update(payload=[]), "payload must be a mapping, got list"),
        (lambda r: r["payload"].pop("what"), "Fault: missing what"),
        (lambda r: r["payload"].update(step=4), "Fault: unknown step"),
        (lambda r: r["payload"].update(what=4), "Fault.what: expected str, got 4"),
        (lambda r: r.update(step="4"), "Fault.step: expected int"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(change, text):
    record = Envelope("run-1", 1, 0).to_record(fault(1))
    change(record)
    with pytest.raises(ValueError, match=text):
        from_record(record)


@pytest.mark.parametrize(("attempt", "rank"), [(0, 0), (1, -1)])
def test_attempts_count_from_one_and_ranks_from_zero(attempt, rank):
    with pytest.raises(ValueError, match="attempts count from 1"):
        Envelope("run-1", attempt, rank)


def test_numbers_that_json_lacks_are_written_as_words():
    assert json.loads(encode({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}})) == {
        "a": ["nan", 1.5],
        "b": {"c": "-inf"},
    }

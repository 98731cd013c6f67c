"""Every event goes to disk and comes back the same; a record that is not ours is refused by name."""

import dataclasses
import json
from dataclasses import replace

import pytest

from esper.leyline.commands import Command
from esper.leyline.events import EVENTS, CommandJudged, ContributionMeasured
from esper.leyline.evidence import measured
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
    defaults = {field.name: field.default for field in dataclasses.fields(event)}
    left_out = set(long) - set(record["payload"])
    assert all(getattr(event, name) == defaults[name] for name in left_out), "what has no default is always there"


def test_what_goes_without_saying_is_left_out():
    told = CommandJudged(**axes(4), command=Command(slot="r0c0", op=Op.ADVANCE, proposal=7), applied=True, reason="")
    assert Envelope("run-1", 1, 0).to_record(told)["payload"]["command"] == {
        "slot": "r0c0",
        "op": "ADVANCE",
        "proposal": 7,
    }
    payload = Envelope("run-1", 1, 0).to_record(tick_done(4))["payload"]
    assert payload["train_loss"].keys() & {"status", "tick"} == set()
    assert payload["slots"][0]["effective_alpha"] == {"status": "ABSENT"}
    look = next(event for event in SAMPLES if type(event) is ContributionMeasured)
    payload = Envelope("run-1", 1, 0).to_record(replace(look, counts=True, refill=False))["payload"]
    assert payload.keys() & {"counts", "refill"} == set()
    assert whole_payload(replace(look, counts=False, refill=True)) == {"counts": False, "refill": True}


def whole_payload(event):
    """Whether a look was counted, as a reader gets it."""
    payload = whole(json.loads(encode(Envelope("run-1", 1, 0).to_record(event))))["payload"]
    return {name: payload[name] for name in ("counts", "refill")}


def test_a_look_is_written_to_the_digits_of_a_float32_and_a_tick_to_all():
    look = next(event for event in SAMPLES if type(event) is ContributionMeasured)
    reading = measured(0.09280502893357064, tick=5, n=256, se=1.4e-300)
    told = replace(look, contribution=reading, log_evidence=None, chance=0.0029860499661148675)
    payload = Envelope("run-1", 1, 0).to_record(told)["payload"]
    assert payload["contribution"] == {"value": 0.09280503, "n": 256, "se": 1.4e-300}
    assert (payload["chance"], payload["log_evidence"], payload["look"]) == (0.00298605, None, 2)
    assert told.contribution is reading, "the event itself is as it was"
    tick = replace(tick_done(4), train_loss=measured(1 / 3, tick=4, n=3))
    assert Envelope("run-1", 1, 0).to_record(tick)["payload"]["train_loss"]["value"] == 1 / 3


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
    assert (first["run_id"], first["attempt"], first["rank"], first["schema"]) == ("run-1", 3, 1, 5)
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

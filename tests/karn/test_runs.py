"""Curves read at equal FLOPs, FLOPs read at equal loss; a run directory of a real run read back."""

import json

import pytest

from esper.karn.runs import read_run
from esper.leyline.errors import RunDirError
from tests.karn.records import record

RUN = record([(10, 2.0), (20, 1.0), (30, 1.5), (40, 0.5)])


@pytest.mark.parametrize(
    ("flops", "loss"), [(10, 2.0), (15, 1.5), (20, 1.0), (25, 1.0), (30, 1.0), (35, 1.0), (38, 0.7), (40, 0.5)]
)
def test_loss_at_equal_flops_is_the_best_so_far(flops, loss):
    assert RUN.loss_at(flops) == pytest.approx(loss)


def test_beyond_its_ends_a_run_says_nothing():
    assert RUN.loss_at(9) is None
    assert RUN.loss_at(41) is None


@pytest.mark.parametrize(("loss", "flops"), [(2.5, 10), (2.0, 10), (1.5, 15), (1.0, 20), (0.75, 37.5), (0.5, 40)])
def test_flops_to_a_loss_is_the_first_crossing(loss, flops):
    assert RUN.flops_to(loss) == pytest.approx(flops)


def test_a_loss_never_reached_costs_nothing_that_can_be_named():
    assert RUN.flops_to(0.4) is None


def test_an_unfinished_run_is_refused_by_name(tmp_path):
    with pytest.raises(RunDirError, match=r"result\.json"):
        read_run(tmp_path)


def write_run(folder, *, ticks=(1, 2, 3), result=None, tail=()) -> None:
    """A finished run of three ticks, all validated, as far as it is read."""
    measured = {"value": 0.5, "tick": 3}
    readings = dict.fromkeys(("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"), measured)
    whole = {"flops": 30, "samples": 3, "step": 3, "tick": 3, "parameters": 7, **readings}
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(whole if result is None else result(whole)))
    records = [("run_started", 0, {"resumed_from": None})]
    for tick in ticks:
        read = {"value": 1 / tick, "tick": tick}
        payload = {"validation_loss": read, "validation_accuracy": read, "flops": 10 * tick, "parameters": 7}
        records.append(("tick", tick, payload))
    lines = [
        {
            "schema": 2,
            "run_id": "x",
            "attempt": 1,
            "rank": 0,
            "seq": i,
            "time": 1.0 + i,
            "kind": kind,
            "step": tick,
            "tick": tick,
            "epoch": 0,
            "payload": payload,
        }
        for i, (kind, tick, payload) in enumerate([*records, *tail])
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_whole_run_is_read(tmp_path):
    stage = ("stage", 3, {"slot": "r0c0", "target": "PRUNED", "blueprint": None})
    write_run(tmp_path, tail=[stage])
    run = read_run(tmp_path)
    assert [(p.flops, p.loss) for p in run.curve] == [(10, 1.0), (20, 0.5), (30, 1 / 3)]
    assert (run.flops, run.parameters, run.test_accuracy, run.wall_s) == (30, 7, 0.5, 4.0)
    assert run.stages[0].target == "PRUNED"


def refused(folder) -> str:
    with pytest.raises(RunDirError) as caught:
        read_run(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: [],
        lambda whole: None,
        lambda whole: {},
        lambda whole: {**whole, "samples": "3"},
        lambda whole: {**whole, "tick": None},
        lambda whole: {**whole, "test_loss": 0.5},
        lambda whole: {**whole, "validation_loss": {"value": 0.5}},
        lambda whole: {name: value for name, value in whole.items() if name != "parameters"},
        lambda whole: {**whole, "test_accuracy": {}},
    ],
)
def test_a_malformed_result_is_one_line_with_its_remedy(tmp_path, spoil):
    write_run(tmp_path, result=spoil)
    text = refused(tmp_path)
    assert "result.json" in text or "events.jsonl: damaged" in text
    assert f"remove {tmp_path}, and the same command runs it again" in text


def test_a_torn_result_is_one_line_with_its_remedy(tmp_path):
    write_run(tmp_path)
    for torn in (b'{"flops": 3', b"", b"\xff\xfe"):
        (tmp_path / "result.json").write_bytes(torn)
        text = refused(tmp_path)
        assert "result.json: not readable" in text
        assert f"remove {tmp_path}" in text


@pytest.mark.parametrize(
    "tail",
    [
        ("tick", 3, {}),
        ("tick", 3, []),
        ("tick", 3, {"validation_loss": None, "validation_accuracy": None, "flops": 1, "parameters": 1}),
        ("tick", 3, {"validation_loss": {"value": "nan", "tick": 3}, "validation_accuracy": {}, "flops": 1}),
        ("tick", 3, {"validation_loss": {"tick": 3}, "validation_accuracy": {}, "flops": 1}),
        ("tick", [], {}),
        ("stage", 3, {"slot": "r0c0"}),
        ("run_started", 3, {}),
    ],
)
def test_malformed_events_are_one_line_with_their_remedy(tmp_path, tail):
    write_run(tmp_path, tail=[tail])
    text = refused(tmp_path)
    assert text.startswith(f"{tmp_path / 'events.jsonl'}: damaged")
    assert f"remove {tmp_path}, and the same command runs it again" in text


def test_events_that_are_not_there_or_torn_name_the_file_and_the_remedy(tmp_path):
    write_run(tmp_path)
    whole = (tmp_path / "events.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_bytes(whole.replace(b'"tick": 2, "epoch"', b'"ti'))
    torn = refused(tmp_path)
    (tmp_path / "events.jsonl").unlink()
    for text in (torn, refused(tmp_path)):
        assert "events.jsonl" in text
        assert f"remove {tmp_path}, and the same command runs it again" in text


def test_a_curve_with_a_hole_is_refused_with_what_the_run_said_of_it(tmp_path):
    said = "1 events dropped by a full queue, 0 lost (no error)"
    fault = ("fault", 3, {"what": said, "where": "telemetry events.jsonl"})
    write_run(tmp_path, ticks=(1, 3), tail=[fault])
    assert f"1 of 3 ticks are missing, the first is 2; the run said: {said}; remove" in refused(tmp_path)
    write_run(tmp_path, ticks=(1, 2))
    assert "1 of 3 ticks are missing, the first is 3; remove" in refused(tmp_path)
    write_run(tmp_path, tail=[fault])  # what was lost was none of the curve's
    assert len(read_run(tmp_path).curve) == 3


def test_a_curve_that_ends_before_the_last_validation_is_refused(tmp_path):
    stale = {"value": 0.5, "tick": 2}
    late = {"validation_loss": stale, "validation_accuracy": stale, "flops": 30, "parameters": 7}
    write_run(tmp_path, ticks=(1, 2), tail=[("tick", 3, late)])
    assert "the last validated tick is 2, in result.json it is 3" in refused(tmp_path)

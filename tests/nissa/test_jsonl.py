"""The event file: levels, the priority lane, drops that are counted, torn lines, disks that fail."""

import os
import resource
import sys
import time

import pytest

from esper.leyline.errors import RunDirError
from esper.leyline.events import RolledBack, RunEnded
from esper.leyline.stages import Stage
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope, from_record
from esper.nissa.jsonl import JsonlSink
from esper.nissa.reading import keep_latest, read_events
from tests.nissa.samples import SAMPLES, axes, fault, refused, run_started, stage_changed, tick_done
from tests.support.dist import ROOT
from tests.support.patience import Patience, run_patiently, size_of, wait_until


def sink_at(path, level=Level.FULL, attempt=1, **options):
    return JsonlSink(path, Envelope("run-1", attempt, 0), level, **options)


def write(path, events, level=Level.FULL, attempt=1):
    sink = sink_at(path, level, attempt)
    for event in events:
        sink.emit(event)
    sink.close()
    return sink


def kinds(path):
    return [record["kind"] for record in read_events(path)]


def wait_for_file(path, lines):
    def written():
        return path.exists() and path.read_bytes().count(b"\n") >= lines

    wait_until(written, f"{lines} lines of {path}", Patience(size_of(path), still_s=10.0))


def test_everything_comes_back_in_order(tmp_path):
    path = tmp_path / "events" / "rank-0.jsonl"
    sink = write(path, SAMPLES)
    records = read_events(path)
    assert [from_record(record) for record in records] == list(SAMPLES)
    assert [record["seq"] for record in records] == list(range(len(SAMPLES)))
    assert (sink.dropped.total(), sink.lost, sink.error) == (0, 0, None)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (Level.FULL, [event.kind for event in SAMPLES]),
        (Level.LIFECYCLE, [event.kind for event in SAMPLES if event.level == "lifecycle"]),
        (
            Level.OFF,
            [
                "refusal",
                "veto",
                "degraded",
                "skipped",
                "fault",
                "settings_changed",
                "extended",
                "shift",
                "panic",
                "rollback",
                "policy_alarm",
                "health",
                "breaker",
                "order",
                "orders_refused",
            ],
        ),
    ],
)
def test_levels(tmp_path, level, expected):
    write(tmp_path / "e.jsonl", SAMPLES, level)
    assert kinds(tmp_path / "e.jsonl") == expected


def test_no_file_without_a_record(tmp_path):
    write(tmp_path / "e.jsonl", [tick_done(1), run_started()], Level.OFF)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunDirError, match="no such event file"):
        read_events(tmp_path / "e.jsonl")


def test_priority_does_not_wait_for_the_batch(tmp_path):
    path = tmp_path / "e.jsonl"
    sink = sink_at(path, linger_s=60.0)
    sink.emit(tick_done(1))
    time.sleep(0.1)
    assert not path.exists()
    sink.emit(refused(1))
    wait_for_file(path, 2)
    assert kinds(path) == ["tick", "refusal"]
    sink.close()


def test_flush_writes_ordinary_records(tmp_path):
    sink = sink_at(tmp_path / "e.jsonl", linger_s=60.0)
    sink.emit(tick_done(1))
    sink.flush()
    assert kinds(tmp_path / "e.jsonl") == ["tick"]
    sink.close()


def test_a_full_queue_drops_ordinary_events_and_says_how_many(tmp_path):
    sink = sink_at(tmp_path / "e.jsonl", capacity=0)
    for tick in range(1, 6):
        sink.emit(tick_done(tick))
    sink.emit(refused(5))
    sink.close()
    assert sink.dropped == {"tick": 5}
    records = read_events(tmp_path / "e.jsonl")
    assert [(record["kind"], record["seq"]) for record in records] == [("refusal", 5), ("fault", 6)]
    assert records[-1]["payload"]["what"].startswith("5 events dropped by a full queue (tick 5), 0 lost")
    assert records[-1]["step"] == 50


def test_close_twice_and_emit_after_close(tmp_path):
    sink = sink_at(tmp_path / "e.jsonl")
    sink.emit(tick_done(1))
    sink.close()
    sink.close()
    sink.emit(tick_done(2))
    sink.flush()
    assert kinds(tmp_path / "e.jsonl") == ["tick"]
    assert sink.dropped == {"tick": 1}


def test_a_priority_record_survives_a_kill(tmp_path):
    path = tmp_path / "e.jsonl"
    script = (
        "import os, pathlib, signal, time\n"
        "from tests.nissa.test_jsonl import *\n"
        "path = pathlib.Path(os.environ['E'])\n"
        "sink = sink_at(path, linger_s=60.0)\n"
        "sink.emit(tick_done(1)); sink.emit(fault(1))\n"
        "wait_for_file(path, 2); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_patiently([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "E": str(path)})
    assert done.returncode == -9
    assert kinds(path) == ["tick", "fault"]


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path, cut):
    path = tmp_path / "e.jsonl"
    write(path, [run_started(), tick_done(1), tick_done(2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    readable = 3 if cut == 1 else 2  # without its newline alone the record is still whole
    assert len(read_events(path)) == readable
    write(path, [run_started(step=10, resumed_from=10), tick_done(2)], attempt=2)
    assert [(r["attempt"], r["kind"]) for r in read_events(path)][readable:] == [(2, "run_started"), (2, "tick")]
    assert b"\n\n" not in path.read_bytes()


def test_a_torn_line_of_an_attempt_that_wrote_nothing_else(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [tick_done(1)])
    with path.open("ab") as file:
        file.write(b'{"schema":1,"run_id":"run-1","attempt":2,\n{"sch\n\xc3')
    write(path, [tick_done(2)], attempt=3)
    assert [record["attempt"] for record in read_events(path)] == [1, 3]


def test_damage_within_an_attempt_is_an_error(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [tick_done(1), tick_done(2), tick_done(3)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"tick":2', b'"tick":2,,') + lines[2])
    with pytest.raises(RunDirError, match=r"e\.jsonl:2: not an event record, in the midst of attempt 1"):
        read_events(path)


def test_a_folder_that_cannot_be_made_does_not_stop_training(tmp_path, capsys):
    blocker = tmp_path / "events"
    blocker.write_text("a file where the folder should be")
    sink = sink_at(blocker / "e.jsonl")
    sink.emit(tick_done(1))
    sink.flush()
    sink.emit(fault(1))
    sink.flush()
    assert sink.lost == 1
    assert isinstance(sink.error, OSError)
    blocker.unlink()  # the disk recovers: what must not be lost is written now
    sink.emit(tick_done(2))
    sink.close()
    records = read_events(blocker / "e.jsonl")
    assert [record["kind"] for record in records] == ["fault", "tick", "fault"]
    assert "0 events dropped by a full queue, 1 lost" in records[-1]["payload"]["what"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "training goes on" in err


def test_a_full_device_is_said_once(capsys):
    sink = sink_at("/dev/full")
    for tick in range(1, 4):
        sink.emit(tick_done(tick))
        sink.flush()
    sink.emit(fault(3))
    sink.close()
    assert sink.lost == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "No space left on device" in lines[0]
    assert "2 critical events could not be written" in lines[1]


def test_a_half_written_batch_is_cut_off_again(tmp_path):
    path = tmp_path / "e.jsonl"
    sink = sink_at(path, linger_s=60.0)
    sink.emit(tick_done(1))
    sink.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        for tick in range(2, 400):
            sink.emit(tick_done(tick))
        sink.emit(fault(400))
        sink.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sink.lost == 398
    assert kinds(path) == ["tick"]
    sink.emit(tick_done(401))
    sink.close()
    assert kinds(path) == ["tick", "fault", "tick", "fault"]


def test_a_summary_that_is_no_plain_data_is_counted(tmp_path, capsys):
    sink = write(tmp_path / "e.jsonl", [RunEnded(**axes(1), status="done", summary={"model": object()})])
    assert sink.lost == 1
    assert kinds(tmp_path / "e.jsonl") == ["fault"]
    assert "no plain form for object" in capsys.readouterr().err


def test_replays_count_once(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [run_started(), *(tick_done(tick) for tick in range(1, 8)), fault(7)])
    change = stage_changed(5, Stage.TRAINING, Stage.BLENDING)
    write(path, [run_started(40, 40), tick_done(5), change, tick_done(6)], attempt=2)
    write(path, [run_started(50, 50), tick_done(6), tick_done(7), tick_done(8)], attempt=3)
    kept = [(r["attempt"], r["kind"], r["tick"]) for r in keep_latest(read_events(path))]
    assert kept == [
        (1, "run_started", 0),
        *((1, "tick", tick) for tick in range(1, 5)),  # tick 4 ended where attempt 2 began
        (1, "fault", 7),
        (2, "run_started", 4),
        (2, "tick", 5),
        (2, "stage", 5),
        (3, "run_started", 5),
        *((3, "tick", tick) for tick in range(6, 9)),
    ]


def test_a_record_at_the_resume_step_is_replaced_when_written_again(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [run_started(), tick_done(4), stage_changed(4, Stage.TRAINING, Stage.BLENDING)])
    again = stage_changed(4, Stage.TRAINING, Stage.PRUNED)
    write(path, [run_started(40, 40), again], attempt=2)
    kept = [(r["attempt"], r["kind"]) for r in keep_latest(read_events(path))]
    assert kept == [(1, "run_started"), (1, "tick"), (2, "run_started"), (2, "stage")]


def test_a_start_from_nothing_replaces_all(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [run_started(), tick_done(1)])
    write(path, [run_started(), tick_done(2)], attempt=2)
    assert [(r["attempt"], r["kind"]) for r in keep_latest(read_events(path))] == [(2, "run_started"), (2, "tick")]


def test_an_attempt_without_its_start_begins_at_its_first_record(tmp_path):
    path = tmp_path / "e.jsonl"
    write(path, [refused(3), refused(5)], Level.OFF)
    write(path, [refused(4), refused(5)], Level.OFF, attempt=2)
    assert [(r["attempt"], r["tick"]) for r in keep_latest(read_events(path))] == [(1, 3), (2, 4), (2, 5)]


def test_what_came_before_a_rollback_beyond_its_generation_counts_no_more(tmp_path):
    """The stage that the rollback itself changes at the very step of the generation replaces nothing there."""
    path = tmp_path / "e.jsonl"
    back = next(event for event in SAMPLES if isinstance(event, RolledBack))  # at tick 7, to tick 4
    blended = stage_changed(4, Stage.TRAINING, Stage.BLENDING)
    sick = [tick_done(tick) for tick in (3, 4, 5, 6, 7)]
    well = [stage_changed(4, Stage.BLENDING, Stage.PRUNED), *[tick_done(tick) for tick in (5, 6, 7, 8)]]
    write(path, [run_started(), *sick[:2], blended, *sick[2:], fault(6), back, *well])
    write(path, [run_started(80, 80), tick_done(9)], attempt=2)
    kept = [(r["seq"], r["kind"], r["tick"]) for r in keep_latest(read_events(path)) if r["kind"] != "run_started"]
    assert kept == [
        (1, "tick", 3),
        (2, "tick", 4),
        (3, "stage", 4),
        (7, "fault", 6),
        (8, "rollback", 7),
        (9, "stage", 4),
        (10, "tick", 5),
        (11, "tick", 6),
        (12, "tick", 7),
        (13, "tick", 8),
        (1, "tick", 9),
    ]

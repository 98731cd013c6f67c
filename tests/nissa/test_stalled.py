"""A file system that hangs: nobody waits for it, nothing critical is lost, and memory stays bounded.

A write into the event file blocks here as one to a dead network disk does, until the disk works again.
"""

import os
import threading
import time
from itertools import pairwise

import pytest

from esper.leyline.events import Fault
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import JsonlSink, encode
from esper.nissa.lane import RESERVE
from esper.nissa.reading import read_events
from esper.nissa.spill import Spill
from tests.nissa.samples import axes, fault, refused, tick_done
from tests.support.patience import Patience, load, wait_until


def spill_at(folder, attempt=1, **options):
    return Spill(folder, "run-1", attempt, 0, **options)


class HangingDisk:
    """The module ``os``, whose ``write`` hangs while the disk does."""

    def __init__(self):
        self.works = threading.Event()

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        self.works.wait()
        return os.write(fd, data)


@pytest.fixture
def hung(tmp_path, monkeypatch):
    """A sink whose file hangs, its file, and the disk."""
    disk = HangingDisk()
    monkeypatch.setattr("esper.nissa.jsonl.os", disk)
    path = tmp_path / "run" / "events.jsonl"
    spill = spill_at(tmp_path, after_s=0.05)
    sink = JsonlSink(path, Envelope("run-1", 1, 0), Level.FULL, spill=spill, timeout_s=0.2, capacity=64)
    yield sink, path, disk
    disk.works.set()
    sink.close()


def lines_of(folder):
    return [line for path in folder.glob("*.spill") for line in path.read_bytes().splitlines()]


def fill(sink):
    """Emits until the writer hangs in the first batch."""
    sink.emit(tick_done(1))
    sink.flush()


def test_what_is_critical_is_on_another_disk_while_its_file_hangs_and_comes_home(hung, tmp_path):
    sink, path, disk = hung
    fill(sink)
    began = time.perf_counter()
    for tick in range(2, 12):
        sink.emit(fault(tick))
    assert time.perf_counter() - began < 0.5 * load(), "nobody waits"
    wait_until(lambda: len(lines_of(tmp_path)) == 10, "ten lines in the spill", Patience(lambda: 0, still_s=10.0))
    disk.works.set()
    wait_until(lambda: not lines_of(tmp_path), "the spill is gone", Patience(lambda: 0, still_s=10.0))
    sink.close()
    assert [record["kind"] for record in read_events(path)] == ["tick", *["fault"] * 10]


def test_a_flood_into_a_hanging_file_is_counted_and_bounded(hung):
    sink, path, disk = hung
    fill(sink)
    emitted = 64 + RESERVE + 500
    for tick in range(2, 2 + emitted):
        sink.emit(refused(tick))
    assert len(sink._lane._queue) <= 64 + RESERVE, "memory is bounded"
    assert sink.dropped == {"refusal": 500}
    sink.emit(fault(emitted))
    disk.works.set()
    sink._timeout_s = 30.0 * load()
    sink.close()
    records = read_events(path)
    assert sum(record["kind"] == "refusal" for record in records) == emitted - 500
    assert [record["payload"]["where"] for record in records[-2:]] == ["lockstep", "telemetry events.jsonl"]
    assert "500 events dropped by a full queue (refusal 500)" in records[-1]["payload"]["what"]


def test_the_next_attempt_brings_home_what_a_killed_one_has_spilled(tmp_path):
    path = tmp_path / "events.jsonl"
    lost = spill_at(tmp_path)
    envelope = Envelope("run-1", 1, 0)
    first = JsonlSink(path, envelope, Level.FULL)
    first.emit(fault(1, what="written and spilled"))
    first.flush()
    lost.expect(path.read_bytes())
    lost.expect(encode(envelope.to_record(fault(2, what="lost"))))
    assert lost.spill_all() == 2
    second = JsonlSink(path, Envelope("run-1", 2, 0), Level.FULL, spill=spill_at(tmp_path, attempt=2))
    second.emit(tick_done(3))
    second.close()
    told = [(r["attempt"], r["payload"].get("what")) for r in read_events(path)]
    assert told == [(1, "written and spilled"), (1, "lost"), (2, None)]
    assert lines_of(tmp_path) == []


def test_a_spill_is_nobodys_elses_file(tmp_path):
    """A file or a link that somebody has put there is not written."""
    spill = spill_at(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    spill.path.symlink_to(precious)
    spill.expect(b"line\n")
    assert spill.spill_all() == 0
    assert precious.read_text() == "mine"


def test_a_spill_that_cannot_be_written_is_tried_now_and_then_and_burns_no_processor(tmp_path, monkeypatch):
    monkeypatch.setattr("esper.nissa.spill.AGAIN_S", 0.2)
    tries = []

    class Counted(Spill):
        def _spill(self, lines):
            tries.append(time.monotonic())
            return super()._spill(lines)

    spill = Counted(tmp_path / "later", "run-1", 1, 0, after_s=0.05)
    spill.expect(b"one\n")
    patience = Patience(lambda: len(tries), still_s=10.0)
    wait_until(lambda: len(tries) > 2, "it tries again", patience)
    assert min(b - a for a, b in pairwise(tries)) >= 0.2
    (tmp_path / "later").mkdir()
    wait_until(lambda: lines_of(tmp_path / "later") == [b"one"], "what waited is there", patience)
    spill.written([b"one\n"])
    assert lines_of(tmp_path / "later") == []


def test_a_hundred_thousand_events_a_minute_lose_no_critical_one(tmp_path):
    """A minute's worth, as fast as it goes: ten thousand events with a fault at every hundredth."""
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path, Envelope("run-1", 1, 0), Level.FULL, timeout_s=60.0 * load())
    began = time.perf_counter()
    for number in range(10_000):
        if number % 100 == 0:
            sink.emit(Fault(**axes(number), what=f"{number}", where="disk"))
        else:
            sink.emit(refused(number))
    emitted_s = time.perf_counter() - began
    sink.close()
    records = read_events(path)
    faults = [int(r["payload"]["what"]) for r in records if r["kind"] == "fault" and r["payload"]["where"] == "disk"]
    assert faults == list(range(0, 10_000, 100))
    told = sum(r["kind"] == "refusal" for r in records)
    assert told + sink.dropped["refusal"] == 9_900
    assert 10_000 / emitted_s > 100_000 / 60 / load(), f"{10_000 / emitted_s * 60:,.0f} a minute"

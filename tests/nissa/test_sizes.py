"""A long run's record: how large it grows, and that reading it takes no more memory than a short one's."""

import tracemalloc
from dataclasses import replace
from itertools import pairwise

from esper.leyline.commands import Command
from esper.leyline.events import CommandJudged, ContributionMeasured, GateJudged, RampCommitted, SeedBorn
from esper.leyline.stages import Op, Stage
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import encode
from esper.nissa.reading import read_latest
from tests.nissa.samples import GATE, SAMPLES, axes, run_started, stage_changed, tick_done

SLOTS, TICKS, LIFE = 48, 20_000, 100  # a million steps with a tick at every fiftieth
PATH = (Stage.EMPTY, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


def sample(kind):
    return next(event for event in SAMPLES if type(event) is kind)


def a_life(slot, tick):
    """What one seed's whole life says, from its birth to its fossil, with a look in each stage."""
    yield replace(sample(SeedBorn), **axes(tick), slot=slot)
    yield replace(sample(RampCommitted), **axes(tick), slot=slot)
    for source, target in pairwise(PATH):
        yield stage_changed(tick, source, target, slot)
        command = Command(slot=slot, op=Op.ADVANCE, reason="G2 passed: contribution 0.1909 ± 0.02374 over all looks")
        yield CommandJudged(**axes(tick), command=command, applied=True, reason=command.reason)
        yield GateJudged(**axes(tick), slot=slot, enforced=True, result=GATE)
        yield replace(sample(ContributionMeasured), **axes(tick), slot=slot)


def test_a_million_steps_with_48_slots_stay_below_100_mb_at_level_lifecycle():
    """Every slot lives a whole life at every hundredth tick, which is more than any run has done yet."""
    envelope, level = Envelope("0badcafe", 1, 0), Level.LIFECYCLE
    size = 0
    for tick in range(1, LIFE + 1):
        size += sum(len(encode(envelope.to_record(e))) for e in [tick_done(tick)] if level.takes(e))
    for number in range(SLOTS):
        told = [event for event in a_life(f"r{number}c0", 1_000_000) if level.takes(event)]
        size += sum(len(encode(envelope.to_record(event))) for event in told)
    megabytes = size * TICKS / LIFE / 1e6
    assert 10 < megabytes < 100, f"{megabytes:.0f} MB"


def read(path):
    tracemalloc.start()
    last = sum(record["kind"] == "tick" for record in read_latest(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return last, peak


def test_reading_takes_the_memory_of_one_record(tmp_path):
    peaks = []
    for ticks in (50, 2_000):
        path, envelope = tmp_path / f"{ticks}.jsonl", Envelope("0badcafe", 1, 0)
        line = encode(envelope.to_record(tick_done(1)))
        with path.open("wb") as file:
            file.write(encode(envelope.to_record(run_started())))
            for number in range(ticks):
                file.write(line.replace(b'"step":10', b'"step":%d' % (10 * number), 1))
        found, peak = read(path)
        assert found == ticks
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0] + 20_000, f"{peaks} bytes"

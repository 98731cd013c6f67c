"""A long run's record: how large it grows, and that reading it takes no more memory than a short one's."""

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest

from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.evidence.plan import plan_probe
from esper.leyline.commands import Command
from esper.leyline.events import CommandJudged, ContributionMeasured, GateJudged, RampCommitted, SeedBorn
from esper.leyline.evidence import Check, GateResult, measured
from esper.leyline.stages import Gate, Op, Stage
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import encode
from esper.nissa.reading import read_latest
from tests.nissa.samples import SAMPLES, axes, run_started, stage_changed, tick_done

SLOTS, TICKS, LIFE = 48, 20_000, 100  # a million steps with a tick at every fiftieth
PATH = (Stage.EMPTY, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
JUDGED = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)  # by evidence


def sample(kind):
    return next(event for event in SAMPLES if type(event) is kind)


def a_look(slot, tick, number):
    """Numbers with as many digits as those of a run."""
    newest = measured(0.09280502893357064, tick=tick, n=128, se=0.0497704200114501, skew=-0.32272577980905426)
    running = measured(0.11245858739149159, tick=tick, n=1024, se=0.021450103651394402, skew=0.1119034278665662)
    evidence = {"log_evidence": 9.878333500174653, "chance": 0.0029860499661148675, "clusters": 1024}
    told = {"slot": slot, "look": number, "contribution": newest, "running": running, **evidence}
    return replace(sample(ContributionMeasured), **axes(tick), **told)


GRADIENT = (
    "norm 0.6063, vanishing 0, exploding 0, 0 non-finite steps; needs a measured norm > 0, shares up to 0.9 and 0.1"
)
ALL_LOOKS = (
    "contribution 0.1909 ± 0.02374 over all looks against 0.002; log evidence 18.4, needs 4.91 at level 0.00734; "
    "8 of 8 looks spent"
)
NEWEST = "0.2448 ± 0.05069 at alpha 1; needs a fresh one > 0; 8 of 8 looks spent"
DETAILS = {"gradient": GRADIENT, "contribution": ALL_LOOKS, "newest look": NEWEST}
PASSED = tuple(Check(name=name, passed=True, detail=text, integrity=False) for name, text in DETAILS.items())


def a_life(slot, tick, looks):
    """What one seed's whole life says, from its birth to its fossil, with all looks that the probe affords."""
    yield replace(sample(SeedBorn), **axes(tick), slot=slot)
    yield replace(sample(RampCommitted), **axes(tick), slot=slot)
    for source, target in pairwise(PATH):
        yield replace(stage_changed(tick, source, target, slot), proposal=48_000)
        why = "G5 passed: contribution 0.1909 ± 0.02374 over all looks"
        advance = Command(slot=slot, op=Op.ADVANCE, proposal=48_000)
        yield CommandJudged(**axes(tick), command=advance, applied=True, reason=why)
        result = GateResult(gate=Gate.G5, passed=True, score=1.0, checks=PASSED if source in JUDGED else ())
        yield GateJudged(**axes(tick), slot=slot, enforced=True, result=result)
    yield from (a_look(slot, tick, number) for number in range(1, looks + 1))


def count_mb(births, looks, fossil_looks):
    """Megabytes of a million steps, by births, looks of each life and looks at fossils."""
    envelope, level = Envelope("0badcafe", 1, 0), Level.LIFECYCLE

    def size(events):
        return sum(len(encode(envelope.to_record(event))) for event in events if level.takes(event))

    life, look = size(a_life("r47c0", TICKS, looks)), size([a_look("r47c0", TICKS, 1)])
    return (TICKS * size([tick_done(TICKS)]) + births * life + fossil_looks * look) / 1e6


def test_a_million_steps_with_48_slots_stay_below_100_mb_at_level_lifecycle():
    """By the default settings: two seeds live at a time, a life takes at least the ticks of its looks, and every slot
    that has no such seed holds a fossil, which is looked at now and then. Measured when written: 35 MB."""
    slots, gates = SlotsConfig(), GateConfig()
    looks = plan_probe(1024, 1024, per_look=gates.probe_samples, reserve=gates.reserve).shares
    assert (looks, slots.max_live, gates.fossil_every) == (8, 2, 50)
    births = slots.max_live * TICKS // (looks * gates.look_every)
    megabytes = count_mb(births, looks, (SLOTS - slots.max_live) * TICKS // gates.fossil_every)
    assert 20 < megabytes < 100, f"{megabytes:.0f} MB"


@pytest.mark.parametrize("looks", [5, 8])
def test_so_do_they_where_every_slot_lives_a_whole_life_at_each_hundredth_tick(looks):
    """Four times the births of the default, with a look in each stage, or all eight that the probe affords. Measured
    when written: 83 and 98 MB."""
    megabytes = count_mb(SLOTS * TICKS // LIFE, looks, 0)
    assert 50 < megabytes < 100, f"{megabytes:.0f} MB"


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

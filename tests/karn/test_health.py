"""Health: what is odd is told once, with what to look at; what is usual is not; and nobody waits for it."""

import os
import random
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from esper.karn.health import LOOK_AT, HealthJudge, Work
from esper.karn.health_sink import HealthSink
from esper.leyline.events import Ailment, HealthAlert, LossSettled, SeedBorn
from esper.leyline.evidence import measured
from esper.leyline.machine.room import used_share
from esper.leyline.stages import Stage
from esper.nissa.config import HealthConfig
from tests.nissa.samples import axes, stage_changed, tick_done
from tests.support.patience import Patience, load, wait_until

CONFIG = HealthConfig(settle_ticks=10)


def tick(number, *, loss=1.0, norm=1.0, samples=320, steps_ms=100.0, data_ms=1.0, own_ms=50.0):
    noise = random.Random(number).uniform(-0.01, 0.01)
    return replace(
        tick_done(number),
        train_loss=measured(loss + noise, tick=number, n=320),
        host_gradient_norm=measured(norm * (1 + noise), tick=number, n=1),
        samples=samples,
        steps_ms=steps_ms * (1 + noise),
        tick_ms=1.0,
        data_ms=data_ms,
        own_ms=own_ms,
    )


def told(events, works=None):
    judge, found = HealthJudge(CONFIG), []
    for event in events:
        found += judge.take(event, {} if works is None else works(event))
    return found


def run(odd, at=range(20, 30), **more):
    """Forty ticks, of which some are odd."""
    return [tick(number, **(odd if number in at else {}), **more) for number in range(1, 41)]


def test_a_quiet_run_says_nothing():
    assert told(run({})) == []


@pytest.mark.parametrize(
    ("odd", "ailment", "first"),
    [
        ({"steps_ms": 300.0}, Ailment.THROUGHPUT, 22),
        ({"data_ms": 60.0}, Ailment.DATA_WAIT, 22),
        ({"steps_ms": 3000.0}, Ailment.STALL, 20),
        ({"loss": 3.0}, Ailment.LOSS, 20),
        ({"norm": 50.0}, Ailment.GRADIENT, 20),
    ],
)
def test_what_is_odd_is_told_once_with_what_to_look_at(odd, ailment, first):
    alerts = [event for event in told(run(odd)) if event.ailment is ailment]
    assert [(alert.tick, alert.look_at) for alert in alerts] == [(first, LOOK_AT[ailment])]
    assert alerts[0].words
    assert set(LOOK_AT) == set(Ailment)


def test_what_was_over_is_told_again():
    alerts = told(run({"norm": 50.0}, at={20, 21, 30}))
    assert [alert.tick for alert in alerts] == [20, 30]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_rank_that_the_others_wait_for_is_named(ranks):
    def works(event):
        slow = ranks - 1
        own = {rank: 50.0 if rank != slow or event.tick < 10 else 120.0 for rank in range(ranks)}
        return {r: Work(tick=event.tick - 1, own_ms=ms, host_share=0.5, device_share=None) for r, ms in own.items()}

    (alert,) = told(run({}), works)
    assert (alert.ailment, alert.rank, alert.tick) == (Ailment.STRAGGLER, ranks - 1, 12)


def test_old_times_of_a_rank_name_nobody():
    def works(event):
        return {
            0: Work(tick=event.tick, own_ms=50.0, host_share=None, device_share=None),
            1: Work(tick=1, own_ms=500.0, host_share=None, device_share=None),
        }

    assert [alert.tick for alert in told(run({}), works) if alert.tick > 1 + CONFIG.ticks] == []


def test_memory_that_runs_out_is_told_by_rank():
    def works(event):
        return {3: Work(tick=event.tick, own_ms=1.0, host_share=0.5, device_share=0.5 if event.tick < 7 else 0.95)}

    (alert,) = told(run({}), works)
    assert (alert.ailment, alert.rank, alert.tick) == (Ailment.DEVICE_MEMORY, 3, 7)


@pytest.mark.parametrize("comes_back", [True, False])
def test_the_height_of_a_spike_and_the_steps_until_the_loss_is_back(comes_back):
    born = SeedBorn(**axes(10), slot="r0c0", blueprint="mlp", generation=1, proposal=1, parameters=8, flops=64)
    events = [tick(n) for n in range(1, 11)] + [born]
    events += [tick(n, loss=1.2) for n in range(11, 14)]
    events += [tick(n, loss=0.9 if comes_back else 1.1) for n in range(14, 30)]
    (settled,) = [event for event in told(events) if isinstance(event, LossSettled)]
    assert (settled.slot, settled.after) == ("r0c0", "birth")
    assert settled.height == pytest.approx(0.2, abs=0.03)
    assert settled.recovery == (40 if comes_back else None)
    assert settled.tick == (14 if comes_back else 20)


def test_a_blending_is_watched_too():
    moved = stage_changed(10, Stage.TRAINING, Stage.BLENDING)
    events = [*[tick(n) for n in range(1, 11)], moved, tick(11, loss=0.5)]
    (settled,) = [event for event in told(events) if isinstance(event, LossSettled)]
    assert (settled.after, settled.recovery) == ("blending", 10)
    assert settled.height < 0, "it fell at once"


def both_have(sink, number):
    works = sink._read(sink._folder)  # without a file that is being written
    return all(rank in works and works[rank].tick == number for rank in (0, 1))


def test_ranks_meet_in_files_and_rank_0_says_who_is_slow(tmp_path):
    said = []
    ranks = [HealthSink(CONFIG, tmp_path, r, 2, torch.device("cpu"), said.append if r == 0 else None) for r in (0, 1)]
    for number in range(1, 6):
        for rank, sink in enumerate(ranks):
            sink._read_at = -10.0  # it looks only now and then
            sink.emit(tick(number, own_ms=50.0 if rank == 0 else 200.0))
        written = partial(both_have, ranks[0], number)
        wait_until(written, f"both files of tick {number}", Patience(lambda: 0, still_s=10.0))
        ranks[0]._works = ranks[0]._read(tmp_path)
    for sink in ranks:
        sink.close()
    assert [(alert.ailment, alert.rank) for alert in said if isinstance(alert, HealthAlert)] == [(Ailment.STRAGGLER, 1)]
    share = used_share()
    assert share is None or 0.0 < share < 1.0


def test_a_folder_that_hangs_delays_nobody(tmp_path):
    os.mkfifo(tmp_path / "rank-00001")  # to read it waits for a writer for ever
    sink = HealthSink(CONFIG, tmp_path, 0, 2, torch.device("cpu"), lambda event: None)
    began = time.perf_counter()
    for number in range(1, 1001):
        sink.emit(tick(number))
    assert time.perf_counter() - began < 1.0 * load()
    sink._lane._closing = True
    with open(tmp_path / "rank-00001", "wb"):
        pass  # lets it go

"""The health of a session: alerts like the trainer's, and ranks that meet beside its file of events."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.leyline.events import Ailment, HealthAlert, TickDone
from esper.nissa.reading import read_events
from tests.support.dist import run_distributed
from tests.support.sessions import EVERY, batch, loss, make, of, shard

LIMITS = {"ticks": 2, "straggler_times": 3.0, "stall_times": 1e9, "min_throughput": 0.0, "max_memory": 1.0}
TICKS = 8


def train(rank: int, folder: Path) -> list[tuple[Ailment, int | None]]:
    """Rank 1's forward takes far longer than rank 0's."""

    def slow(model: Any, data: Any) -> Any:
        time.sleep(0.2 * rank)
        return loss(model, data)

    session = make(loss=slow, actions=[], sink=folder / "events.jsonl", health=LIMITS)
    health = session.parts.recorder.health
    assert health is not None
    for step in range(TICKS * EVERY):
        session.loss(shard(batch(step), rank, 2)).backward()
        session.step()
        health._lane.flush(5.0)
        health._read_at = -10.0  # it looks only now and then
    told = [(alert.ailment, alert.rank) for alert in of(session, HealthAlert)]
    session.close()
    return told


def test_a_slow_rank_of_a_session_is_named(tmp_path: Path) -> None:
    told, others = run_distributed(train, 2, tmp_path)
    assert (Ailment.STRAGGLER, 1) in told
    assert others == [], "rank 0 speaks for all"
    assert {path.name for path in (tmp_path / "health").iterdir()} == {"rank-00000", "rank-00001"}
    assert json.loads((tmp_path / "health" / "rank-00001").read_bytes())[1] > 200.0, "milliseconds of its own work"
    alerts = [record["payload"] for record in read_events(tmp_path / "events.jsonl") if record["kind"] == "health"]
    assert [(a["ailment"], a["rank"]) for a in alerts] == [(ailment.name, rank) for ailment, rank in told]


def test_one_without_a_file_is_judged_by_rank_0_alone(tmp_path: Path) -> None:
    session = make(actions=[], health={"max_memory": 1e-6})
    health = session.parts.recorder.health
    assert health is not None
    for step in range(3 * EVERY):
        session.loss(batch(step)).backward()
        session.step()
        health._lane.flush(5.0)
    told = [(alert.ailment, alert.rank) for alert in of(session, HealthAlert)]
    session.close()
    assert told == [(Ailment.HOST_MEMORY, 0)]


class Slow:
    """A loader that takes its time, with or without a length."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.steps):
            time.sleep(self.seconds)
            yield batch(step)


class SlowWithLength(Slow):
    def __len__(self) -> int:
        return self.steps


@pytest.mark.parametrize("kind", [Slow, SlowWithLength])
def test_a_slow_loader_is_said(kind: type[Slow]) -> None:
    limits = {"ticks": 1, "max_data_wait": 0.2, "max_memory": 1.0, "stall_times": 1e9, "min_throughput": 0.0}
    session = make(actions=[], health=limits)
    for data in session.epoch(kind(2 * EVERY, 0.3)):
        session.loss(data).backward()
        session.step()
    ticks, told = of(session, TickDone), [alert.ailment for alert in of(session, HealthAlert)]
    session.close()
    assert all(300.0 * EVERY <= tick.data_ms <= tick.own_ms for tick in ticks)
    assert all(tick.data_ms <= tick.steps_ms for tick in ticks)
    assert told == [Ailment.DATA_WAIT]


def test_batches_from_elsewhere_are_no_wait() -> None:
    session = make(actions=[], health=LIMITS)
    for step in range(EVERY):
        session.loss(batch(step)).backward()
        session.step()
    assert [tick.data_ms for tick in of(session, TickDone)] == [0.0]
    session.close()

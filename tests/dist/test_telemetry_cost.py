"""What telemetry costs, counted, since clocks differ: no collective, no byte on the wire, no host sync, no bit."""

import sys
from pathlib import Path
from typing import Any

import pytest

from esper.config.strict import as_plain
from esper.leyline.events import Event
from esper.leyline.protocols import EventSink, NullSink
from esper.run.attempt import Attempt
from esper.run.telling.sinks import build_sink
from esper.tolaria.ranks.world import World
from tests.support.collective_counter import CollectiveCounter
from tests.support.dist import run_distributed
from tests.support.tensor_reads import counted_reads
from tests.support.tiny import act, make_engine, replica, schedule, tiny_config

EVERY = 50  # steps of a tick in a run, as in the figure for its record

LIFE = schedule(
    act(1, "r0c0", "GERMINATE", blueprint="conv_light"),
    act(4, "r0c0", "ADVANCE"),
    act(7, "r0c0", "ADVANCE"),
)


class Counted:
    """Passes events on, and counts them."""

    def __init__(self, sink: EventSink) -> None:
        self.sink, self.count = sink, 0

    def emit(self, event: Event) -> None:
        self.count += 1
        self.sink.emit(event)

    def flush(self) -> None:
        self.sink.flush()

    def close(self) -> None:
        self.sink.close()


def train(rank: int, folder: Path, telling: bool) -> dict[str, Any]:
    config = tiny_config(controller=LIFE, trainer__steps=24, telemetry__level="full")
    run_dir = folder / ("on" if telling else "off")
    run_dir.mkdir(exist_ok=True)

    def sink_of(world: World) -> EventSink:
        if not telling:
            return Counted(NullSink())
        attempt = Attempt(1, "tiny", "", run_dir)
        return Counted(build_sink(config, as_plain(config), run_dir, attempt, world, lambda: None))

    engine = make_engine(config, run_dir, sink_of=sink_of)
    engine.begin(None)
    sink, in_steps, step = engine.sink, 0, engine.train_step
    assert isinstance(sink, Counted)

    calls = {"steps": 0, "ticks": 0}
    within = "ticks"

    def note(_frame: Any, event: str, _arg: Any) -> None:
        calls[within] += event in ("call", "c_call")

    def counted_step() -> None:
        nonlocal in_steps, within
        before, within = sink.count, "steps"
        step()
        within = "ticks"
        in_steps += sink.count - before

    engine.train_step = counted_step  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch, CollectiveCounter() as counter:
        reads, before = counted_reads(patch), sys.getprofile()
        sys.setprofile(note)
        try:
            engine.run()
        finally:
            sys.setprofile(before)
        syncs = len(reads)
    bits = replica(engine)
    sink.close()
    size = sum(path.stat().st_size for path in run_dir.glob("events*.jsonl"))
    counts = {"collectives": counter.kinds(), "bytes": counter.sizes, "syncs": syncs, "bits": bits}
    told = {"in_steps": in_steps, "ticks": engine.state.tick, "size": size, "events": sink.count}
    return {"counts": counts, "calls": calls, "steps": engine.step, **told}


@pytest.mark.parametrize("world", [1, 2])
def test_telemetry_adds_no_collective_no_byte_no_sync_and_changes_no_bit(world: int, tmp_path: Path) -> None:
    off = run_distributed(train, world, tmp_path, False)
    on = run_distributed(train, world, tmp_path, True)
    for rank in range(world):
        assert on[rank]["counts"] == off[rank]["counts"]
        assert on[rank]["in_steps"] == 0, "a step says nothing; a tick does"
    first, bare = on[0], off[0]
    added = (first["calls"]["ticks"] - bare["calls"]["ticks"]) / first["ticks"]
    step = bare["calls"]["steps"] / bare["steps"]
    assert abs(first["calls"]["steps"] - bare["calls"]["steps"]) < 0.01 * bare["calls"]["steps"]
    assert 0 < added < 0.01 * EVERY * step, f"{added:.0f} calls a tick, {step:.0f} a step"
    assert first["size"] > 0
    assert first["size"] / first["ticks"] < 12_000, "bytes written for a tick, with two slots"
    assert first["events"] / first["ticks"] < 12

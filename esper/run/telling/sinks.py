"""Where a rank's events go: file, screen and wandb on rank 0, a file for its own faults on any other."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from esper.config.tree import EsperConfig
from esper.karn.health_sink import HealthSink
from esper.leyline.events import Event, Fault, RunStarted, SlotDegraded
from esper.leyline.files import RunDir
from esper.leyline.protocols import EventSink, NullSink
from esper.nissa.console import ConsoleSink
from esper.nissa.envelope import Envelope, from_record
from esper.nissa.fanout import MultiSink
from esper.nissa.jsonl import JsonlSink
from esper.nissa.reading import read_latest
from esper.nissa.spill import Spill
from esper.nissa.wandb_sink import WandbSink
from esper.run.attempt import Attempt
from esper.tolaria.lockstep.narrate import ELSEWHERE
from esper.tolaria.ranks.world import World


def build_sink(
    config: EsperConfig,
    plain: Mapping[str, Any],
    run_dir: Path,
    attempt: Attempt,
    world: World,
    ask_stop: Callable[[], None],
) -> EventSink:
    """Builds a rank's sink: file, screen and wandb on rank 0, a file for its own faults on any other rank.

    Args:
        config: the run's settings.
        plain: the same as plain data.
        run_dir: RUN.
        attempt: this start's number.
        world: this rank's place.
        ask_stop: called, on another thread, when somebody stops the run in wandb's page.
    """
    telemetry, rank = config.telemetry, world.rank
    envelope = Envelope(attempt.run_id, attempt.number, rank)
    place = RunDir(run_dir).health, rank, world.size, world.device
    spill = Spill(Path(telemetry.spill or tempfile.gettempdir()), attempt.run_id, attempt.number, rank)
    if rank != 0:
        own = JsonlSink(RunDir(run_dir).rank_events(rank), envelope, telemetry.level, spill=spill)
        return MultiSink([_FaultsOnly(own), HealthSink(telemetry.health, *place)])
    jsonl = JsonlSink(RunDir(run_dir).events, envelope, telemetry.level, spill=spill)
    screen = ConsoleSink(telemetry.console)
    sinks: list[EventSink] = [jsonl, screen]
    every = MultiSink(sinks)
    wandb = WandbSink(
        telemetry.wandb,
        run_dir=run_dir,
        run_id=attempt.run_id,
        name=name_run(plain),
        group=config.run.group,
        job_type=str(plain["controller"]["kind"]) if config.run.group else "train",
        config_dict=plain,
        on_fault=every.emit,
        on_stop=ask_stop,
        peak_flops=None if telemetry.health.peak_flops is None else telemetry.health.peak_flops * world.size,
        past=partial(read_past, RunDir(run_dir).events, attempt.number),
    )
    watched: list[EventSink] = [*sinks, wandb]
    told = MultiSink(watched)
    return MultiSink([*watched, HealthSink(telemetry.health, *place, tell=told.emit)])


def name_run(plain: Mapping[str, Any]) -> str:
    """What a run is, in a few words for wandb's lists: experiment (or host and data), controller and seed."""
    what = plain["run"].get("name") or f"{plain['host']['kind']} {plain['data']['kind']}"
    return f"{what}, {plain['controller']['kind']}, seed {plain['seed']}"


def read_past(path: Path, attempt: int, start: RunStarted) -> Iterator[Event]:
    """Yields what an attempt goes on from: the events of earlier ones, up to the step of its checkpoint.

    Args:
        path: event file of rank 0.
        attempt: number of this attempt.
        start: its start.
    """
    if start.resumed_from is None or not path.is_file():
        return
    for record in read_latest(path):
        if record["attempt"] < attempt and record["step"] <= start.resumed_from:
            with contextlib.suppress(ValueError):  # of an older version
                yield from_record(record)


class _FaultsOnly(NullSink):
    """Passes on what this rank alone knows: its faults, and its own fallbacks. The rest would repeat rank 0's."""

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink

    def emit(self, event: Event) -> None:
        if isinstance(event, Fault) or (isinstance(event, SlotDegraded) and event.reason != ELSEWHERE):
            self._sink.emit(event)

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self._sink.close()

"""The recorder of a session's events: it keeps the newest, judges their health, passes all on to the user's sink."""

import os
import secrets
from collections import deque
from pathlib import Path
from typing import Any

from esper.karn.health_sink import HealthSink
from esper.leyline.events import Event
from esper.leyline.protocols import EventSink, NullSink
from esper.nissa.config import HealthConfig, Level
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import JsonlSink
from esper.tolaria.ranks.world import World

EVENTS_KEPT = 1000


class Recorder:
    """A sink that keeps the newest events and passes all on; what is odd becomes an event of its own.

    Args:
        sink: the user's.
        health: of this rank; None if nobody judges it.
    """

    def __init__(self, sink: EventSink, health: HealthSink | None = None) -> None:
        self.sink, self.health = sink, health
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        """Itself: what is copied with a model, as by an export, has no file and no thread of its own."""
        return self

    def emit(self, event: Event) -> None:
        """Takes one event."""
        self.tell(event)
        if self.health is not None:
            self.health.emit(event)

    def tell(self, event: Event) -> None:
        """Keeps one event and passes it on."""
        self.events.append(event)
        self.sink.emit(event)

    def flush(self) -> None:
        """Flushes the sink."""
        self.sink.flush()

    def close(self) -> None:
        """Closes the sink."""
        if self.health is not None:
            self.health.close()
        self.sink.close()


def open_recorder(sink: EventSink | str | os.PathLike[str] | None, world: World, config: HealthConfig) -> Recorder:
    """The recorder of a rank. Ranks meet in the folder ``health`` beside the file of events, where ``sink`` is a path.

    Args:
        sink: as given to the session.
        world: this rank's place.
        config: limits of health.
    """
    folder = Path(sink).parent / "health" if isinstance(sink, str | os.PathLike) else None
    recorder = Recorder(open_sink(sink, world.rank))
    if world.rank == 0 or folder is not None:
        tell = recorder.tell if world.rank == 0 else None
        recorder.health = HealthSink(config, folder, world.rank, world.size, world.device, tell=tell)
    return recorder


def open_sink(sink: EventSink | str | os.PathLike[str] | None, rank: int) -> EventSink:
    """The given sink, or a file of JSON lines for a path. Without one, or on another rank than 0, it does nothing."""
    if sink is None or rank != 0:
        return NullSink()
    if isinstance(sink, str | os.PathLike):
        return JsonlSink(sink, Envelope(secrets.token_hex(4), 1, 0), Level.FULL)
    return sink

"""The recorder of a session's events: it keeps the newest and passes all on to the user's sink."""

import os
import secrets
from collections import deque

from esper.leyline.events import Event
from esper.leyline.protocols import EventSink, NullSink
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import JsonlSink

EVENTS_KEPT = 1000


class Recorder:
    """A sink that keeps the newest events and passes all on."""

    def __init__(self, sink: EventSink) -> None:
        self.sink = sink
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)

    def emit(self, event: Event) -> None:
        """Takes one event."""
        self.events.append(event)
        self.sink.emit(event)

    def flush(self) -> None:
        """Flushes the sink."""
        self.sink.flush()

    def close(self) -> None:
        """Closes the sink."""
        self.sink.close()


def open_sink(sink: EventSink | str | os.PathLike[str] | None, rank: int) -> EventSink:
    """The given sink, or a file of JSON lines for a path. Without one, or on another rank than 0, it does nothing."""
    if sink is None or rank != 0:
        return NullSink()
    if isinstance(sink, str | os.PathLike):
        return JsonlSink(sink, Envelope(secrets.token_hex(4), 1, 0), Level.FULL)
    return sink

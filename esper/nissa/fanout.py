"""A sink that passes every event to several others; one that breaks is left out while the others go on."""

import threading
from collections.abc import Callable, Sequence

from esper.leyline.events import Event, Fault
from esper.leyline.protocols import EventSink
from esper.nissa.config import Level
from esper.nissa.jsonl import JsonlSink
from esper.nissa.lane import say


class MultiSink:
    """Fans events out in a fixed order.

    Args:
        sinks: sinks in the order in which they take an event. One that raises is closed and left out, and the others
            get a `Fault` that names it.
    """

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks = list(sinks)
        self._axes = (0, 0, 0)
        self._lock = threading.RLock()  # sinks may report faults from their own threads

    def emit(self, event: Event) -> None:
        """Gives the event to every sink."""
        with self._lock:
            self._axes = (event.step, event.tick, event.epoch)
            self._each(lambda sink: sink.emit(event))

    def set_level(self, level: Level) -> None:
        """Sets which ordinary events the files of this run take from now on."""
        for sink in self._sinks:
            if isinstance(sink, JsonlSink):
                sink.level = level

    def flush(self) -> None:
        """Flushes every sink."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Closes every sink, the last one first, so that the first one, the event file, can record their faults."""
        self._each(lambda sink: sink.close(), backwards=True)

    def _each(self, call: Callable[[EventSink], None], *, backwards: bool = False) -> None:
        for sink in self._sinks[::-1] if backwards else self._sinks[:]:
            try:
                call(sink)
            except Exception as error:  # an error of a sink's library must not reach training
                self._leave_out(sink, error)

    def _leave_out(self, sink: EventSink, error: Exception) -> None:
        name = type(sink).__name__
        with self._lock:
            self._sinks = [other for other in self._sinks if other is not sink]
        say(f"telemetry: {name} failed and is left out: {error!r}; training goes on")
        try:
            sink.close()
        except Exception as second:
            say(f"telemetry: {name} could not be closed either: {second!r}")
        step, tick, epoch = self._axes
        self.emit(Fault(step=step, tick=tick, epoch=epoch, what=f"sink left out: {error!r}", where=name))

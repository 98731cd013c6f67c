"""A collective lasts until the device has passed it, as far as whoever watches for lost ranks is concerned."""

import threading

import pytest

from esper.leyline.errors import LockstepError
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.queued import Queued
from esper.tolaria.ranks.world import World


class Event:
    """Stands for a device's event: it is passed when the test says so, or fails with the device."""

    def __init__(self) -> None:
        self.recorded, self.passed, self.failed = False, threading.Event(), False

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        if self.failed:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self.passed.is_set()


def test_a_collective_is_named_until_the_device_has_passed_it() -> None:
    events: list[Event] = []

    def make() -> Event:
        events.append(Event())
        return events[-1]

    queued = Queued(make)
    assert queued.wait()[0] == ""
    queued.note("forward")
    queued.note("backward")
    events[0].passed.set()
    assert queued.wait()[0] == "backward"
    seen: list[str] = []
    watch = threading.Thread(target=lambda: seen.append(queued.wait()[0]))
    watch.start()
    watch.join()
    assert seen == ["backward"]
    events[1].failed = True
    assert queued.wait()[0] == ""
    events[1].failed = False
    events[1].passed.set()
    assert queued.wait()[0] == ""


def test_a_world_is_busy_in_what_it_waits_for_and_then_in_what_its_device_waits_for() -> None:
    world = World(WorldConfig(), ControlConfig(), alone=True)
    event = Event()
    world._queued = Queued(lambda: event)
    world._queued.note("backward")
    with world.collective("step"):
        assert world.wait()[0] == "step"
    assert world.wait()[0] == "backward"
    event.passed.set()
    assert world.wait()[0] == ""
    world.close()


def test_two_waits_of_one_name_are_two() -> None:
    """Else a device that is always in some backward looks as if it had waited in one."""
    queued = Queued(Event)
    queued.note("backward")
    first = queued.wait()
    queued.note("backward")
    assert (queued.wait()[0], queued.wait() == first) == ("backward", False)
    world = World(WorldConfig(), ControlConfig(), alone=True)
    with world.collective("backward"):
        first = world.wait()
        assert world.wait() == first
    with world.collective("backward"):
        assert world.wait() != first
    world.close()


def test_nothing_goes_on_once_a_rank_is_lost() -> None:
    """A device leaves a collective of a group that was cut without an error, and with rubbish."""
    world = World(WorldConfig(), ControlConfig(), alone=True)
    world.heartbeat = marks = LastWord(None, 0, 1)
    with world.collective("backward"):
        pass
    marks.lost = "rank 1 has not beaten for 3 s"
    with pytest.raises(LockstepError) as caught, world.collective("step"):
        pytest.fail("it went on")
    assert str(caught.value) == "lost contact in step: rank 1 has not beaten for 3 s"
    world.close()

"""Errors: exit codes, problems reported together, the range checks of config classes, tables without gaps."""

from dataclasses import dataclass

import pytest

from esper.leyline import errors
from esper.leyline.errors import ConfigError, EsperError
from esper.leyline.events import EVENTS
from esper.leyline.fields import Checks
from esper.leyline.protocols import NullSink
from esper.leyline.topology import Topology


@dataclass
class Settings:
    """Two numbers."""

    lr: float = 0.1
    steps: int = 5

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("lr", self.lr > 0, "must be > 0")
            check("steps", self.steps >= 1, "must be >= 1")


def test_exit_codes_are_the_documented_ones():
    codes = {cls.__name__: cls.exit_code for cls in vars(errors).values() if hasattr(cls, "exit_code")}
    assert codes == {
        "EsperError": 70,
        "ConfigError": 78,
        "DataError": 74,
        "CheckpointError": 74,
        "RunDirError": 74,
        "LockstepError": 76,
        "DivergedError": 79,
        "Preempted": 75,
        "IllegalTransition": 70,
        "GateError": 70,
        "ExportError": 70,
        "OwnershipError": 70,
        "LoopError": 78,
        "LeaseError": 74,
        "InUseError": 74,
    }
    assert all(issubclass(getattr(errors, name), EsperError) for name in codes)


def test_a_config_error_keeps_each_problem():
    error = ConfigError(line for line in ("a = 1: no", "b = 2: no"))
    assert error.problems == ("a = 1: no", "b = 2: no")
    assert str(error) == "a = 1: no\nb = 2: no"
    assert ConfigError("one").problems == ("one",)
    assert isinstance(error, ValueError)


def test_every_failed_check_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        Settings(lr=-1.0, steps=0)
    assert caught.value.problems == ("lr = -1.0: must be > 0", "steps = 0: must be >= 1")
    assert Settings(lr=1.0) == Settings(lr=1.0, steps=5)


def test_an_error_inside_the_checks_is_not_hidden_by_them():
    check = Checks(Settings())
    check("lr", False, "never reported")
    broken = ZeroDivisionError()
    assert check.__exit__(type(broken), broken, None) is None  # goes on to whoever waits for it
    with pytest.raises(ConfigError, match=r"lr = 0\.1: never reported"):
        check.__exit__(None, None, None)


def test_refusals_vetoes_fallbacks_skips_panics_and_faults_are_priority_events():
    urgent = {"refusal", "veto", "degraded", "skipped", "fault", "panic", "shift", "rollback", "breaker"}
    urgent |= {"settings_changed", "extended", "policy_alarm", "order", "orders_refused", "health"}
    assert {kind for kind, cls in EVENTS.items() if cls.priority} == urgent
    assert all(cls.kind == kind and cls.level in ("lifecycle", "full") for kind, cls in EVENTS.items())


def test_the_silent_sink_takes_everything():
    sink = NullSink()
    assert (sink.emit(None), sink.flush(), sink.close(), sink.close()) == (None, None, None, None)


@pytest.mark.parametrize("topology", list(Topology))
def test_the_channel_axis_is_where_the_letters_say(topology):
    assert topology.value[topology.channel_axis] == "C"
    assert topology.ndim == len(topology.value)

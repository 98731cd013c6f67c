"""Observers of a tick: called at four points in one order, unable to change what is agreed, saved and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline.errors import CheckpointError
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.training.engine import Engine
from tests.support.averaging_observer import Averaging
from tests.support.small_runs import train_on
from tests.support.tiny import act, make_engine, replica, schedule, tiny_config

POINTS = ("after_observe", "before_commit", "after_commit", "after_follow")
LIFE = schedule(act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=2), act(3, "r0c0", "ADVANCE"))


class Noting(Observer):
    """Notes each call as (name, point, tick)."""

    def __init__(self, name: str, calls: list[tuple[str, str, int]]) -> None:
        self.name, self._calls = name, calls

    def _note(self, point: str, turn: Turn) -> None:
        self._calls.append((self.name, point, turn.state.tick))

    def after_observe(self, turn: Turn) -> None:
        assert turn.decision is None
        self._note("after_observe", turn)

    def before_commit(self, turn: Turn) -> None:
        assert turn.decision is None
        self._note("before_commit", turn)

    def after_commit(self, turn: Turn) -> None:
        assert turn.agreed.outcome.state.tick == turn.state.tick
        self._note("after_commit", turn)

    def after_follow(self, turn: Turn) -> None:
        assert turn.state is turn.agreed.outcome.state
        self._note("after_follow", turn)


class Meddling(Observer):
    """Puts another state in the place of the agreed one, at one point."""

    name = "meddling"

    def __init__(self, point: str, governs: bool) -> None:
        self.governs = governs
        setattr(self, point, self._meddle)

    def _meddle(self, turn: Turn) -> None:
        turn.state = replace(turn.state)


def begun(run_dir: Path, *observers: Observer, at: int | None = None, **settings: Any) -> Engine:
    """A run that grows and saves at every second tick, begun, or resumed from a step."""
    config = tiny_config("cnn", controller=LIFE, checkpoint__every_ticks=2, checkpoint__keep=9, **settings)
    engine = make_engine(config, run_dir, observers=observers, attempt=1 if at is None else 2)
    for observer in observers:
        if isinstance(observer, Averaging):
            observer.watch(engine.grown.model)
    engine.begin(at)
    return engine


def finish(engine: Engine) -> None:
    """Trains to the end and lets the last save land."""
    train_on(engine)
    engine.saves.finish(engine.state)


def test_every_observer_is_called_at_four_points_of_every_tick_in_one_order(tmp_path: Path) -> None:
    calls: list[tuple[str, str, int]] = []
    engine = begun(tmp_path, Noting("first", calls), Noting("second", calls), trainer__steps=6)
    train_on(engine)
    assert engine.state.tick == 3
    assert calls == [(name, point, tick) for tick in (1, 2, 3) for point in POINTS for name in ("first", "second")]


@pytest.mark.parametrize("governs", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_an_observer_that_changes_the_agreed_state_is_named(point: str, governs: bool, tmp_path: Path) -> None:
    engine = begun(tmp_path, Meddling(point, governs), trainer__steps=2)
    if governs and point == "after_observe":
        train_on(engine)  # as the governor may
        return
    with pytest.raises(RuntimeError, match=f"observer meddling changed the agreed state in {point}; only a governor"):
        train_on(engine)


@pytest.mark.parametrize("names", [("twin", "twin"), ("saves",), ("",)])
def test_observers_without_a_name_of_their_own_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="observers need names of their own; these are "):
        begun(tmp_path, *(Noting(name, []) for name in names))


def test_what_an_observer_remembers_is_saved_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    whole, half = Averaging(), Averaging()
    undisturbed = begun(tmp_path, whole, trainer__steps=16)
    finish(undisturbed)
    saved = undisturbed.saver.store.load(8, "state.pt")["observers"]
    assert list(saved) == ["averaging"]
    assert saved["averaging"]["ticks"] == 4
    assert not torch.equal(saved["averaging"]["mean"], whole.mean), "it went on, and the save stood for itself"

    resumed = begun(tmp_path, half, at=8, trainer__steps=16)
    assert torch.equal(half.mean, saved["averaging"]["mean"])
    finish(resumed)
    assert half.ticks == whole.ticks == 8
    assert torch.equal(half.mean, whole.mean)
    assert replica(resumed) == replica(undisturbed)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ([Averaging], [], r"observers: missing none, unknown \['averaging'\]"),
        ([], [Averaging], r"observers: missing \['averaging'\], unknown none"),
    ],
)
def test_a_checkpoint_of_other_observers_is_refused_by_name(
    before: list[type[Observer]], after: list[type[Observer]], text: str, tmp_path: Path
) -> None:
    finish(begun(tmp_path, *(kind() for kind in before), trainer__steps=4))
    with pytest.raises(CheckpointError, match=text):
        begun(tmp_path, *(kind() for kind in after), at=4, trainer__steps=4)


def test_a_checkpoint_of_observers_that_remember_nothing_says_nothing_of_them(tmp_path: Path) -> None:
    engine = begun(tmp_path, Noting("forgetful", []), trainer__steps=4)
    finish(engine)
    assert "observers" not in engine.saver.store.load(4, "state.pt")
    finish(begun(tmp_path, at=4, trainer__steps=4))  # nor does a run without them miss anything

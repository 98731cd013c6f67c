"""A crowd that falls ill: all ranks go back to one generation, whatever befalls one of them."""

from pathlib import Path

import pytest

from esper.drill.bus import RankEnd
from esper.drill.crowd import strip_ages
from esper.drill.guarded import Guarded, GuardedCrowd, GuardedLife, GuardFault, Moment, run_guarded
from esper.leyline.errors import LockstepError
from esper.leyline.events import Event, Fault, RolledBack
from esper.tolaria.checkpoint.store import CheckpointStore


def lives_of(ends: list[RankEnd[GuardedLife]]) -> list[GuardedLife]:
    """Every rank came to the end, with the same moments, through the same collectives."""
    assert [repr(rank.error) for rank in ends] == ["None"] * len(ends)
    lives = [rank.value for rank in ends if rank.value is not None]
    assert len(lives) == len(ends)
    assert all(life.moments == lives[0].moments for life in lives)
    assert len({tuple(rank.calls) for rank in ends}) == 1
    return lives


def check_weights(moments: tuple[Moment, ...], events: tuple[Event, ...]) -> None:
    """The host is what it was at the step that the run went back to, and nobody went back without being told so."""
    rollbacks = [event for event in events if isinstance(event, RolledBack)]
    assert len(rollbacks) == sum(moment.panicked for moment in moments)
    for index, moment in enumerate(moments):
        if moment.panicked:
            event = rollbacks.pop(0)
            assert moment.step == event.to_step < event.step
            earlier = next(m for m in reversed(moments[:index]) if m.step == event.to_step)
            host = {name: value for name, value in earlier.weights.items() if name.startswith("layers.")}
            assert host
            assert {name: moment.weights[name] for name in host} == host
            assert moments[index - 1].weights != moment.weights


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_all_ranks_go_back_to_one_generation_and_on_alike(tmp_path: Path, seed: int) -> None:
    setup = GuardedCrowd(ranks=4, ticks=60, sick=(20, 40), seed=seed)
    first, *_ = lives_of(run_guarded(setup, tmp_path))
    assert sum(moment.panicked for moment in first.moments) == 2
    check_weights(first.moments, first.events)
    store = CheckpointStore(tmp_path / "checkpoints", attempt=2, keep=3)
    for step in store.steps():
        store.verify(step)
    assert store.steps()[0] > 0
    assert not list(store.folder.glob("*.tmp")), "every save was settled"


def test_one_full_disk_costs_saves_and_nothing_else(tmp_path: Path) -> None:
    whole, *_ = lives_of(run_guarded(GuardedCrowd(), tmp_path / "whole"))
    first, *_ = lives_of(run_guarded(GuardedCrowd(fault=GuardFault.DISK), tmp_path / "full"))
    assert first.moments == whole.moments
    faults = [event.what for event in first.events if isinstance(event, Fault)]
    assert faults
    assert all("save of step" in what for what in faults)


def test_without_snapshots_all_go_back_to_one_checkpoint(tmp_path: Path) -> None:
    first, *_ = lives_of(run_guarded(GuardedCrowd(ranks=3, fault=GuardFault.MEMORY), tmp_path))
    (event,) = [event for event in first.events if isinstance(event, RolledBack)]
    assert event.source == "disk"
    check_weights(first.moments, first.events)
    assert list((tmp_path / "checkpoints").glob("aside-*")), "what was saved since is set aside"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (GuardFault.LOST, "lost contact in save: rank {} was last seen in apply at step 220"),
        (GuardFault.SNAPSHOT, "ranks parted before tick 19, step 190: parameters differs on rank {}"),
    ],
)
def test_a_fault_in_the_rollback_is_named_by_all(tmp_path: Path, fault: GuardFault, text: str) -> None:
    setup = GuardedCrowd(seed=1, fault=fault)
    texts = set()
    for number, rank in enumerate(run_guarded(setup, tmp_path)):
        if fault is GuardFault.LOST and number == setup.struck:
            assert rank.lost
            continue
        assert isinstance(rank.error, LockstepError)
        texts.add(strip_ages(str(rank.error)))
    (said,) = texts
    assert said.startswith(text.format(setup.struck))


def test_ranks_that_choose_different_generations_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: one rank goes back further than the others."""
    own = Guarded.go_back

    def further(self: Guarded, present, recovery, began):  # type: ignore[no-untyped-def]
        if self.world.rank == 1:
            assert self.governor is not None
            recovery = type(recovery)(self.governor.ring.newest(2), recovery.replay)
        return own(self, present, recovery, began)

    monkeypatch.setattr(Guarded, "go_back", further)
    for rank in run_guarded(GuardedCrowd(seed=1), tmp_path):
        assert isinstance(rank.error, LockstepError)
        assert "ranks parted before tick 19" in str(rank.error)
        assert "differs on rank 1" in str(rank.error)

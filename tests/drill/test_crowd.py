"""A crowd of ranks under delays, vetoes and one fault: one outcome everywhere, no more on the wire than designed."""

from pathlib import Path
from typing import Any

import pytest

from esper.drill.bus import Bus, Lost, ProtocolBroken, RankWorld
from esper.drill.crowd import Crowd, CrowdResult, Setting, live, run_crowd, strip_ages
from esper.drill.faults import FaultKind
from esper.leyline.errors import LockstepError
from esper.leyline.events import BirthVetoed, StageChanged
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed

RANKS, SLOTS, TICKS = 12, 4, 5


def told_by(kind: FaultKind, ranks: int, rank: int, told: CrowdResult) -> str:
    """What every surviving rank must say of a fault."""
    step = 10 * TICKS
    parted, alone = (
        f"ranks parted before tick {TICKS}, step {step}: ",
        f"tick {TICKS}, step {step}: rank {rank} failed in ",
    )
    seen = f"rank {rank} was last seen in "
    return {
        FaultKind.LOST_BEFORE_OBSERVE: f"lost contact in observe: {seen}rewrap at step {step - 10}, tick {TICKS - 1}",
        FaultKind.LOST_BEFORE_COMMIT: f"lost contact in commit: {seen}observe at step {step}, tick {TICKS}",
        FaultKind.LOST_AFTER_COMMIT: f"lost contact in observe: {seen}apply at step {step}, tick {TICKS}",
        FaultKind.MEASURE: f"{alone}MEASURE: RuntimeError: no data on rank {rank}",
        FaultKind.DECIDE: f"{alone}DECIDE: RuntimeError: out of ideas",
        FaultKind.STAGE: f"{parted}state differs on rank {rank}; slot r0c0 record differs on rank {rank}",
        FaultKind.TICK: f"{parted}tick differs on rank {rank}; state differs on rank {rank}",
        FaultKind.STEP: f"{parted}step differs on rank {rank}; state differs on rank {rank}",
        FaultKind.ALPHA: f"{parted}slot r0c0 alpha differs on rank {rank}",
        FaultKind.WEIGHT: f"{parted}slot ",
        FaultKind.HOST: f"ranks parted before tick {TICKS + 1}, step {step + 10}: parameters differs on rank {rank}",
    }[kind]


def check_bytes(told: CrowdResult, ranks: int, slots: int) -> None:
    """observe: float64 of 48 + 34 S entries; commit: int64 of commands, vetoes, digest pairs and a word a rank."""
    assert told.bytes_per_tick == 8 * (48 + 34 * slots) + 8 * (9 * slots + 2 * (7 + 4 * slots) + ranks + 4)
    assert told.bytes_per_tick < 16 * 1024
    assert told.collectives == 2


def check_alike(told: CrowdResult, ranks: int, ticks: int) -> None:
    """Every rank came to the end, in equal states after every tick, through the same collectives."""
    assert [rank.error for rank in told.ranks] == [None] * ranks
    lives = [rank.value for rank in told.ranks]
    assert len({life.digests for life in lives if life is not None}) == 1
    assert {tuple(rank.calls) for rank in told.ranks} == {("observe", "commit") * ticks}


def check_fault(told: CrowdResult, setup: Crowd) -> None:
    """The rank that was struck is named by all, in one text; whoever is lost says nothing."""
    struck = setup.build_fault()
    assert struck is not None
    texts, calls = set(), set()
    for number, rank in enumerate(told.ranks):
        if struck.kind.loses and number == struck.rank:
            assert rank.lost
            continue
        assert isinstance(rank.error, LockstepError), f"rank {number}: {rank.error!r}"
        texts.add(strip_ages(str(rank.error)))
        calls.add(tuple(rank.calls))
    assert len(texts) == 1
    assert len(calls) == 1
    (text,) = texts
    wanted = told_by(struck.kind, setup.ranks, struck.rank, told)
    assert text.startswith(wanted)
    assert f"rank {struck.rank}" in text


def test_lives_with_delays_and_vetoes_are_one_life() -> None:
    told = run_crowd(Crowd(ranks=RANKS, slots=SLOTS, ticks=7, seed=6))
    check_alike(told, RANKS, 7)
    check_bytes(told, RANKS, SLOTS)
    life = told.ranks[0].value
    assert life is not None
    moved = {event.target.name for event in life.events if isinstance(event, StageChanged)}
    assert {"GERMINATED", "TRAINING", "PRUNED", "EMPTY"} <= moved
    assert any(isinstance(event, BirthVetoed) for event in life.events)


def test_the_order_in_which_ranks_come_changes_nothing() -> None:
    setup = Crowd(ranks=5, slots=2, ticks=4, seed=7)
    setting = Setting(setup)
    ends = set()
    for seed in (1, 2):
        for rank in Bus(5, seed=seed).run(lambda world: live(world, setup, setting)):
            assert rank.value is not None
            ends.add(rank.value.digests)
    assert len(ends) == 1


@pytest.mark.parametrize("kind", list(FaultKind))
def test_a_fault_has_one_outcome_on_all_ranks(kind: FaultKind) -> None:
    setup = Crowd(ranks=8, slots=SLOTS, ticks=TICKS, seed=5, fault=kind)
    check_fault(run_crowd(setup), setup)


def test_a_fault_that_cannot_be_played_is_said() -> None:
    """In the second tick no seed lives yet, so none can be forged."""
    with pytest.raises(ProtocolBroken, match=r"ended .*no living seed whose weight could be forged.* while rank"):
        run_crowd(Crowd(ranks=2, slots=1, ticks=2, seed=5, fault=FaultKind.WEIGHT))


def test_a_crowd_whose_first_tick_fails_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Lockstep, "commit", fail)
    with pytest.raises(ProtocolBroken, match=r"^in their first tick ranks sent \[\] bytes in \[\] collectives$"):
        run_crowd(Crowd(ranks=2, slots=1, ticks=1, seed=5))


def over_gloo(rank: int, setup: Crowd, run_dir: Path) -> tuple[int, ...]:
    world = World(WorldConfig(), ControlConfig(timeout_s=30.0))
    world.heartbeat = Heartbeat(run_dir / "heartbeat", rank, world.size)
    try:
        return live(world, setup, Setting(setup)).digests
    finally:
        world.close()


def test_real_ranks_over_gloo_come_to_the_same_states(tmp_path: Path) -> None:
    setup = Crowd(ranks=3, slots=3, ticks=6, seed=4)
    simulated = run_crowd(setup)
    check_alike(simulated, 3, 6)
    life = simulated.ranks[0].value
    assert life is not None
    assert run_distributed(over_gloo, 3, setup, tmp_path) == [life.digests] * 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [64, 256, 1024])
def test_bytes_and_states_of_a_large_crowd(ranks: int) -> None:
    told = run_crowd(Crowd(ranks=ranks, slots=12, ticks=4, seed=1))
    check_alike(told, ranks, 4)
    check_bytes(told, ranks, 12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(64, kind) for kind in FaultKind]
    + [(1024, kind) for kind in (FaultKind.STAGE, FaultKind.MEASURE, FaultKind.LOST_BEFORE_COMMIT)],
)
def test_faults_in_a_large_crowd(ranks: int, kind: FaultKind) -> None:
    setup = Crowd(ranks=ranks, slots=SLOTS, ticks=TICKS, seed=5, fault=kind)
    check_fault(run_crowd(setup), setup)


# the bus itself -------------------------------------------------------------------------------------------------------


def test_ranks_in_different_collectives_are_told() -> None:
    def part(world: RankWorld) -> None:
        world.gather_text("", what="diagnosis" if world.rank == 1 else "start-up")

    with pytest.raises(ProtocolBroken, match=r"rank 0, 2 in all_gather of start-up .*; rank 1 in all_gather of dia"):
        Bus(3).run(part)


def test_a_rank_that_leaves_the_others_waiting_is_told() -> None:
    def leave(world: RankWorld) -> None:
        if world.rank != 2:
            world.meet("start-up")

    with pytest.raises(ProtocolBroken, match=r"rank 2 ended \(returned\) while rank 0, 1 waits in all_reduce SUM"):
        Bus(3).run(leave)


def test_a_lost_rank_fails_the_others_collective_as_a_transport_does() -> None:
    def lose(world: RankWorld) -> list[str]:
        if world.rank == 1:
            raise Lost
        return world.gather_text("here", what="start-up")

    first, lost, last = Bus(3).run(lose)
    assert lost.lost
    for rank in (first, last):
        assert isinstance(rank.error, LockstepError)
        assert "Connection closed by peer" in str(rank.error)


def test_collectives_are_what_their_names_say() -> None:
    def all_of_them(world: RankWorld) -> tuple[list[str], list[bytes]]:
        return world.gather_text(f"rank {world.rank}", what="a"), world.gather_bytes(b"x" * (1 + world.rank), what="b")

    for rank in Bus(3).run(all_of_them):
        assert rank.value == (["rank 0", "rank 1", "rank 2"], [b"x", b"xx", b"xxx"])

"""The small world explored: nothing breaks in the shipped code, and what is broken on purpose is found."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from esper.accord import reducer
from esper.accord.effects import Outcome
from esper.accord.state import RunState
from esper.drill import explore as rooms
from esper.drill.explore import Explorer, InvariantBroken, SmallWorld
from esper.leyline.stages import Op
from esper.tolaria.lockstep import collectives as lockstep
from esper.tolaria.lockstep import tick
from esper.tolaria.lockstep.wire import Failure


def test_every_state_within_two_ticks_keeps_the_invariants() -> None:
    found = Explorer(SmallWorld()).explore(2)
    assert found.levels == [1, 5, 20]
    assert found.states == 26
    assert found.faults > 60


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("small", "depth"), [(SmallWorld(), 4), (SmallWorld(max_live=1), 5), (SmallWorld(slots=1), 9)])
def test_every_state_within_more_ticks_keeps_the_invariants(small: SmallWorld, depth: int) -> None:
    found = Explorer(small).explore(depth)
    assert found.states > 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rank_lost_anywhere_ends_the_others_alike() -> None:
    found = Explorer(SmallWorld(slots=1)).explore(3, with_losses=True)
    assert found.faults > 60


# broken on purpose ----------------------------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def rank_local_reducer(patch: pytest.MonkeyPatch) -> None:
    """The reducer reads something that is not agreed: which thread it runs in."""
    own, first = tick.reduce_tick, []

    def local(*args: Any, **kwargs: Any) -> Outcome:
        out = own(*args, **kwargs)
        first.append(threading.get_ident())
        if threading.get_ident() == first[0]:
            return out
        return replace(out, state=replace(out.state, germinations=out.state.germinations + 1))

    patch.setattr(tick, "reduce_tick", local)


def deaf_budget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reducer, "find_refusal", lambda run, slot, command: None)


def patient_births(patch: pytest.MonkeyPatch) -> None:
    own = tick.reduce_tick

    def patient(*args: Any, stage_ticks: int, order: Any) -> Outcome:
        return own(*args, stage_ticks=stage_ticks + 1, order=order)

    patch.setattr(tick, "reduce_tick", patient)


def hasty_failure(patch: pytest.MonkeyPatch) -> None:
    """A rank that failed raises before the diagnosis that the others enter."""
    own = lockstep.Lockstep.commit

    def commit(self: Any, state: Any, commands: Any, digests: Any, vetoes: Any, word: Any, *rest: Any) -> Any:
        text, order = rest
        if word.failure is not Failure.NONE:
            raise rooms.LockstepError(text)
        return own(self, state, commands, digests, vetoes, word, text, order)

    patch.setattr(lockstep.Lockstep, "commit", commit)


def deaf_digest(patch: pytest.MonkeyPatch) -> None:
    """Ranks that have parted go on."""
    patch.setattr(lockstep.Lockstep, "digests_of", lambda self, *args, **kwargs: dict.fromkeys(self.digests, 0))


def nameless_parting(patch: pytest.MonkeyPatch) -> None:
    """Ranks that part do not say which rank it was."""
    patch.setattr(lockstep, "describe_parting", lambda *args: "ranks differ")


def rooted_seeds(patch: pytest.MonkeyPatch) -> None:
    """No seed is ever pruned."""
    own = reducer.find_refusal

    def refuse(run: Any, slot: Any, command: Any) -> Any:
        return "it stays" if command.op is Op.PRUNE else own(run, slot, command)

    patch.setattr(reducer, "find_refusal", refuse)


@pytest.mark.parametrize(
    ("break_it", "small", "depth", "told"),
    [
        (rank_local_reducer, SmallWorld(slots=1), 1, "rank 0 has "),
        (deaf_budget, SmallWorld(max_live=1), 1, "2 live seeds, the budget is 1"),
        (patient_births, SmallWorld(slots=1), 3, "staged for 2 ticks, stage_ticks is 2"),
        (hasty_failure, SmallWorld(slots=1), 1, "met in different collectives"),
        (deaf_digest, SmallWorld(slots=1), 1, "forged stage on rank 0"),
        (nameless_parting, SmallWorld(slots=1), 1, "not told as what it is: ranks differ"),
        (rooted_seeds, SmallWorld(slots=1), 1, "a slot cannot be emptied again"),
    ],
)
def test_what_is_broken_on_purpose_is_found(
    break_it: Patch, small: SmallWorld, depth: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(InvariantBroken) as caught:
        Explorer(small).explore(depth)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        ([("observe", "commit"), ("observe",)], r"rank 0 entered \('observe', 'commit'\), rank 1 \('observe',\)"),
        ([("observe",), ("observe",)], r"all ranks entered \('observe',\), and came to parted"),
    ],
)
def test_ranks_in_other_collectives_than_a_tick_has(calls: list[tuple[str, ...]], told: str) -> None:
    explorer, one = Explorer(SmallWorld(slots=1)), rooms.Situation()
    node = rooms._Node(RunState(slots=()), None, None)
    with pytest.raises(InvariantBroken, match=f"^{told}; after the beginning; then "):
        explorer._check_alike(node, one, [("parted", entered) for entered in calls])


def test_an_error_of_the_explored_code_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Outcome:
        raise ZeroDivisionError

    monkeypatch.setattr(tick, "reduce_tick", fail)
    with pytest.raises(ZeroDivisionError):
        Explorer(SmallWorld(slots=1)).explore(1)

"""Killed on so many ranks, resumed on another number: exact up to the order of sums; on as many, exact.

One run in float64 on one rank is the truth. The same run is killed in the middle of a ramp and of an embargo, while a
seed is staged, and inside an accumulation window, and goes on each time on another number of ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.nissa.reading import read_events
from esper.tolaria.checkpoint.store import CheckpointStore
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.tiny import act, schedule, tiny_plain

A, B, C = "r0c0", "r1c0", "r0c1"
EVERY, TICKS = 3, 16

# (ranks, how they end): the commit of the save of tick t is killed at tick t + 1, right when t has become the newest.
RAMP_AND_EMBARGO, STAGED = Kill("committed", 8), Kill("committed", 10)
IN_A_WINDOW, LATE = Kill("backward", 12), Kill("committed", 14)


def plain_of(**settings: Any) -> dict[str, Any]:
    """A is on its ramp from tick 5 to 11, B in embargo from 6 to 9, C is asked for at tick 9; saved at every tick."""
    life = schedule(
        act(1, A, "GERMINATE", blueprint="conv_light", ticks=6),
        act(2, B, "GERMINATE", blueprint="norm"),
        act(3, A, "ADVANCE"),
        act(4, B, "ADVANCE"),
        act(5, A, "ADVANCE"),
        act(5, B, "PRUNE", ticks=0),
        act(9, C, "GERMINATE", blueprint="norm", ticks=2),
        act(11, C, "ADVANCE"),
        act(12, C, "ADVANCE"),
    )
    common: dict[str, Any] = {
        "controller": life,
        "trainer__precision": "fp64",
        "trainer__steps": EVERY * TICKS,
        "trainer__batch": 20,
        "trainer__accumulate": 2,
        "control__every": EVERY,
        "slots__embargo_ticks": 4,
        "checkpoint__every_ticks": 1,
        "checkpoint__keep": 20,
        "telemetry__level": "full",
    }
    return tiny_plain("cnn", **{**common, **settings})


def stages(outcome: dict[str, Any]) -> list[tuple[int, str, str]]:
    changes = [event for event in outcome["plain"]["events"] if event[0] == "stage"]
    return [(event[2], event[4]["slot"], event[4]["target"]) for event in changes]


def at(run: Path, tick: int) -> dict[str, dict[str, Any]]:
    """Slots of the agreed state in the checkpoint of a tick."""
    store = CheckpointStore(run / "checkpoints", attempt=0, keep=1)
    return {entry["slot"]: entry for entry in store.load(EVERY * tick, "state.pt")["run_state"]["slots"]}


def began(run: Path) -> list[int | None]:
    """Tick that each attempt went on from."""
    starts = [event for event in read_events(run / "events.jsonl") if event["kind"] == "run_started"]
    steps = [event["payload"]["resumed_from"] for event in starts]
    return [None if step is None else step // EVERY for step in steps]


def test_two_one_two_three_and_five_ranks_train_what_one_trains(tmp_path: Path) -> None:
    alone = prepare_run(tmp_path / "alone", plain_of())
    assert live(alone, 1) == [0]
    run = prepare_run(tmp_path / "run", plain_of())
    for world, kill in ((2, RAMP_AND_EMBARGO), (1, STAGED), (2, IN_A_WINDOW), (3, LATE)):
        assert live(run, world, kill) is None
    assert live(run, 5) == [0] * 5

    first, *later = began(run)
    assert first is None
    assert later[:2] == [7, 9]
    assert later[2] in (9, 10, 11), "the newest save may still have been under way"
    assert later[3] == 13
    resting = at(run, 7)
    assert (resting[A]["stage"], resting[B]["stage"]) == ("BLENDING", "EMBARGOED")
    assert resting[A]["ramp"] is not None
    assert at(run, 9)[C]["staged"] is not None
    assert at(run, 10)[C]["stage"] == "GERMINATED"

    found, wanted = final(run), final(alone)
    assert stages(found) == stages(wanted)
    assert {target for _, _, target in stages(wanted)} >= {"BLENDING", "PRUNED", "EMBARGOED", "RESETTING"}
    common = [name for name in wanted["tensors"] if name.startswith("state.pt")]
    assert common == [name for name in found["tensors"] if name.startswith("state.pt")]
    for name in common:
        torch.testing.assert_close(
            found["tensors"][name], wanted["tensors"][name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: n + text
        )


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 5])
def test_on_as_many_ranks_it_is_the_same_run_bit_for_bit(world: int, tmp_path: Path) -> None:
    undisturbed = prepare_run(tmp_path / "undisturbed", plain_of(trainer__precision="fp32"))
    assert live(undisturbed, world) == [0] * world
    run = prepare_run(tmp_path / "run", plain_of(trainer__precision="fp32"))
    for kill in (RAMP_AND_EMBARGO, STAGED, Kill("backward", 12, rank=world - 1), LATE):
        assert live(run, world, kill) is None
    assert live(run, world) == [0] * world
    assert_same_run(final(run), final(undisturbed))

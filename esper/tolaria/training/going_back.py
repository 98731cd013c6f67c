"""Puts a loop back at a generation: on a resume, and after a panic another way on from there."""

from typing import Protocol

from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError
from esper.leyline.protocols import Controller
from esper.tolaria.checkpoint import snapshot
from esper.tolaria.checkpoint.ring import Generation
from esper.tolaria.growth.continuation import Copies
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.tick import Cycle, Marks
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.world import World
from esper.tolaria.training.governor import Governor, Recovery, rollback_events


class Loop(Protocol):
    """What goes back with a run: its parts, the agreed record, and the place in it."""

    world: World
    heartbeat: Marks
    grown: Grown
    owner: ParameterOwner
    growth: Growth
    controller: Controller | None
    cycle: Cycle
    window: Window
    narrator: Narrator
    governor: Governor | None
    state: RunState
    step: int
    seed: int


def restore(loop: Loop, generation: Generation) -> None:
    """Restores the run of a generation, except for the wrapper."""
    snapshot.put_back(generation, loop.grown, loop.owner, loop.growth, loop.world, loop.seed)
    if loop.controller is not None:
        loop.controller.load_state_dict(generation.common["controller"])
    loop.cycle.observers.load_state_dict(generation.common.get("observers", {}), generation.where)
    loop.state = generation.state
    loop.step = loop.heartbeat.step = loop.state.step
    loop.heartbeat.tick = loop.state.tick
    loop.window.reset(loop.state.skipped_in_row)


def resume(loop: Loop, copies: Copies, generation: Generation) -> None:
    """Restores the run of a checkpoint, and the continuation in copies that was under way.

    Raises:
        CheckpointError: the checkpoint does not fit this run, or its continuation has no network to go on from.
    """
    under_way, base = generation.state.continuing, generation.common.get("continuation")
    if base is not None:
        copies.rebuild(base, loop.growth, generation.where)
    elif under_way is not None and under_way.done:
        raise CheckpointError(f"{generation.where}: missing ['continuation'], though one is under way")
    restore(loop, generation)


def go_back(loop: Loop, present: RunState, recovery: Recovery, began: float) -> tuple[RunState, float | None]:
    """Takes all ranks back to one generation, from which they go on with the replay's changes; see `RunLoop`."""
    assert loop.governor is not None
    outcome = recovery.replay.outcome
    restore(loop, recovery.generation)
    loop.state = outcome.state
    loop.growth.perform(outcome.effects)
    wrap_ms = loop.growth.follow(loop.state, force=True)
    faults = loop.governor.discard_later(recovery)
    loop.narrator.emit_all([*rollback_events(present, recovery, began), *faults])
    loop.narrator.report_failures(loop.state, loop.growth.failures)
    return loop.state, wrap_ms

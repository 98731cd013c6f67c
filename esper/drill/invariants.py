"""The invariants of agreed states and of ticks, written anew: `find_violations` calls no code that is under test.

Two functions make an exploration finite. `settle` moves an agreed state in time to a fixed tick and drops what decides
nothing (history, generations, proposal ids, means of the losses); all ages beyond every threshold become equal. The
result is itself a state that the shipped functions take. `can_empty` checks that the slots can be emptied again.
"""

from dataclasses import replace

from esper.accord.absorb import absorb
from esper.accord.lifecycle import SlotState
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.leyline.commands import Command, wait
from esper.leyline.evidence import NO_HEALTH, Reading
from esper.leyline.plain import digest62
from esper.leyline.stages import EDGES, Op, Stage
from esper.tolaria.lockstep.wire import ObserveLayout

TICK = 100  # tick of settled states
OLD = 4  # ticks; every threshold of a small world is lower
TABLE = {(edge.source, edge.cause.name, edge.target) for edge in EDGES}


def _reading(reading: Reading, shift: int) -> Reading:
    return reading if reading.tick is None else replace(reading, tick=max(TICK - OLD, reading.tick + shift))


def _slot(entry: SlotState, ticks: int, steps: int, terms: Terms) -> SlotState:
    def tick(at: int | None) -> int | None:
        return None if at is None else max(TICK - OLD, at + ticks)

    oldest = (TICK - OLD) * terms.tick_steps
    ramp, frozen = entry.ramp, entry.frozen_step
    if ramp is not None:
        shift = max(steps, oldest - ramp.last_step)
        ramp = replace(ramp, first_step=ramp.first_step + shift, last_step=ramp.last_step + shift)
        frozen = None if frozen is None else frozen + shift
    since = tick(entry.since_tick if entry.stage is not Stage.EMPTY else 0)
    assert since is not None
    return replace(
        entry,
        since_tick=since,
        staged_tick=tick(entry.staged_tick if entry.staged is not None else 0) or 0,
        staged=None if entry.staged is None else replace(entry.staged, proposal=0),
        generation=0,
        birth=0,
        level=0.01 if entry.stage.has_seed else 1.0,  # what is shown here is shown at any level
        retold=0,
        evidence=entry.evidence and replace(entry.evidence, tick=tick(entry.evidence.tick)),
        looked_tick=tick(entry.looked_tick),
        proposal=0,
        history=(),
        ramp=ramp,
        frozen_step=frozen,
        degraded_tick=tick(entry.degraded_tick),
        health=NO_HEALTH,
        learn_step=None if entry.learn_step is None else 0,
        gradient_norm=_reading(entry.gradient_norm, ticks),
        contribution=_reading(entry.contribution, ticks),
        changed_tick=0,
    )


def settle(state: RunState, terms: Terms) -> RunState:
    """Moves a state to a fixed tick, and drops what decides nothing."""
    ticks = TICK - state.tick
    steps = TICK * terms.tick_steps - state.step
    return RunState(
        tick=TICK,
        step=TICK * terms.tick_steps,
        epoch=1,
        germinations=state.germinations,
        slots=tuple(_slot(entry, ticks, steps, terms) for entry in state.slots),
    )


def key_of(state: RunState) -> int:
    """A number that is equal for equal settled states."""
    return digest62(state)


def _budgets(state: RunState, terms: Terms) -> list[str]:
    config, violations = terms.slots_config, []
    live = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
    alive = [entry for entry in state.slots if entry.staged is not None or entry.stage in live]
    names = [entry.staged.blueprint if entry.staged is not None else entry.blueprint for entry in state.slots]
    sizes = [
        next(info.parameters for info in terms.catalogue[entry.slot] if info.name == name)
        for entry, name in zip(state.slots, names, strict=True)
        if name is not None
    ]
    for what, spent, limit in (
        ("live seeds", len(alive), config.max_live),
        ("germinations", state.germinations, config.max_germinations),
        ("parameters", sum(sizes), config.max_parameters),
    ):
        if limit is not None and spent > limit:
            violations.append(f"{spent} {what}, the budget is {limit}")
    return violations


def _slot_broken(before: SlotState, after: SlotState, state: RunState, terms: Terms, stage_ticks: int) -> list[str]:
    broken, at = [], before.stage
    for line in after.history[len(before.history) :]:
        if line.source is not at or (line.source, line.cause, line.target) not in TABLE:
            broken.append(f"{at.name}: {line.source.name} -{line.cause}-> {line.target.name} is no edge")
        at = line.target
    if at is not after.stage:
        broken.append(f"is {after.stage.name}, its moves lead to {at.name}")
    for step in range(state.step, state.step + terms.tick_steps + 1):
        if not 0.0 <= after.alpha(step) <= 1.0:
            broken.append(f"alpha {after.alpha(step)} at step {step}")
    if after.stage not in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED) and after.alpha(state.step) != 0.0:
        broken.append(f"alpha {after.alpha(state.step)} in {after.stage.name}")
    rests = after.ramp is not None and state.step >= after.ramp.last_step
    if after.stage is Stage.FOSSILIZED and rests and not after.ending and after.alpha(state.step) != 1.0:
        broken.append(f"a fossil rests at alpha {after.alpha(state.step)}")
    if before.stage is Stage.FOSSILIZED and after.stage not in (Stage.FOSSILIZED, Stage.PRUNED):
        broken.append(f"a fossil became {after.stage.name}")
    if before.stage is Stage.FOSSILIZED and after.stage is Stage.PRUNED and not before.ending:
        broken.append("a fossil went without a ramp")
    if after.drawn > terms.probe.shares:
        broken.append(f"{after.drawn} looks drawn of {terms.probe.shares}")
    seen, evidence = after.drawn + after.refilled, after.evidence
    if evidence is not None and evidence.looks + evidence.void + evidence.begun > seen:
        broken.append(f"evidence of more looks than the {seen} drawn")
    if after.staged is not None:
        if after.stage is not Stage.EMPTY:
            broken.append(f"a birth is staged in {after.stage.name}")
        if state.tick - after.staged_tick >= stage_ticks:
            broken.append(f"staged for {state.tick - after.staged_tick} ticks, stage_ticks is {stage_ticks}")
    return [f"{after.slot}: {text}" for text in broken]


def find_violations(before: RunState, after: RunState, terms: Terms, stage_ticks: int) -> list[str]:
    """The invariants that a tick has broken, as texts; empty if there are none."""
    violations = _budgets(after, terms)
    for old, new in zip(before.slots, after.slots, strict=True):
        violations += _slot_broken(old, new, after, terms, stage_ticks)
    return violations


def can_empty(state: RunState, terms: Terms, stage_ticks: int, known: set[int]) -> bool:
    """Whether pruning all seeds empties every slot without a fossil, within a birth and a cool-down.

    Args:
        state: a settled state.
        terms: of the run.
        stage_ticks: ticks that a birth may wait.
        known: keys of states for which this is known to hold; the states on the way are added.
    """
    names, passed = ObserveLayout([entry.slot for entry in state.slots]).names, []
    # A staged seed is taken back at once; a living one goes by PRUNED, the embargo and RESETTING to EMPTY.
    for _ in range(5 + terms.slots_config.embargo_ticks):
        passed.append(key_of(state))
        free = all(e.staged is None and e.stage in (Stage.EMPTY, Stage.FOSSILIZED) for e in state.slots)
        if free or passed[-1] in known:
            known.update(passed)
            return True
        commands = {}
        for entry in state.slots:
            stands = entry.staged is not None or entry.stage.is_live
            commands[entry.slot] = Command(slot=entry.slot, op=Op.PRUNE) if stands else wait(entry.slot)
        taken = absorb(state, dict.fromkeys(names, 0.0), terms, step=state.step + terms.tick_steps, epoch=1)
        state = settle(reduce_tick(taken, commands, {}, terms, stage_ticks=stage_ticks).state, terms)
    return False

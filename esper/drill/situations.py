"""The situations of one tick of a small world: commands of the controller, vetoes, measurements, faults.

A *situation* is one choice of all of these. `situations` lists them for an agreed state: every combination of one legal
command per slot, with one of the events below at a time; and a germination in every slot, legal or not:

    nothing, or evidence that could not be measured
    a non-finite gradient in a slot; a seed that runs by a fallback on one rank; a row of skipped steps
    a veto by each of the ranks, NOT_READY or BUILD_FAILED; two ranks with different ones

`troubles` lists the faults that end a run, for each rank that they can strike.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from esper.accord.effects import Veto
from esper.accord.lifecycle import SlotState
from esper.accord.observation import observation_of
from esper.accord.state import RunState, Terms
from esper.drill.answers import sums_of
from esper.drill.faults import FaultKind, InjectedFault
from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command, wait
from esper.leyline.legality import why_refused
from esper.leyline.observation import Observation
from esper.leyline.stages import Op, Stage

BLUEPRINT = "norm"
STATELESS = (FaultKind.MEASURE, FaultKind.STAGE, FaultKind.TICK, FaultKind.STEP, FaultKind.ALPHA)


@dataclass(frozen=True, slots=True)
class Situation:
    """What happens in one tick.

    Fields:
        commands: at most one per slot.
        vetoes: by rank, then slot.
        every: entries of the observe vector of all ranks.
        values: entries of the observe vector by rank.
        fault: the fault that strikes, or None.
    """

    commands: tuple[Command, ...] = ()
    vetoes: Mapping[int, Mapping[str, Veto]] = field(default_factory=dict)
    every: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    fault: InjectedFault | None = None

    def __str__(self) -> str:
        parts = [f"{c.op.name} {c.slot}" + (f" to {c.target:g} in {c.ticks}" if c.ticks else "") for c in self.commands]
        parts += [f"{v.name} {slot} by rank {rank}" for rank, own in self.vetoes.items() for slot, v in own.items()]
        parts += [f"{name}={value:g}" for name, value in self.every.items() if "probe" not in name]
        parts += [
            f"{name}={value:g} on rank {rank}" for rank, own in self.values.items() for name, value in own.items()
        ]
        if any(name.endswith("probe_nonfinite") for name in self.every):
            parts.append("no evidence")
        return ", ".join(parts + ([f"{self.fault.kind} on rank {self.fault.rank}"] if self.fault else [])) or "nothing"


def commands_for(observation: Observation, slot: str) -> list[Command]:
    """WAIT, and every legal command with ramps of several lengths to several targets."""
    commands = [wait(slot), Command(slot=slot, op=Op.GERMINATE, blueprint=BLUEPRINT, ticks=1)]
    for ticks, target in itertools.product((0, 2), (0.5, 1.0)):
        ramp = Command(slot=slot, op=Op.SET_ALPHA_TARGET, ticks=ticks, target=target, curve=Curve.LINEAR)
        commands.append(ramp)
    commands.append(Command(slot=slot, op=Op.SET_ALPHA_TARGET, ticks=1, operator=Operator.MULTIPLY))
    commands += [Command(slot=slot, op=Op.PRUNE, ticks=ticks) for ticks in (0, 1)]
    commands += [Command(slot=slot, op=op) for op in (Op.ADVANCE, Op.FOSSILIZE)]
    return [one for one in commands if why_refused(observation, one) is None]


def _evidence(state: RunState, *, good: bool) -> dict[str, float]:
    """Each rank's sums of every probe that was requested: forty samples that gain a nat each, or unusable ones."""
    sums: dict[str, float] = {}
    for entry in state.slots:
        if entry.request is not None:
            sums |= {f"{entry.slot}__probe_{name}": float(value) for name, value in sums_of([1] * 40).items()}
            sums[f"{entry.slot}__probe_nonfinite"] = 0.0 if good else 1.0
    return sums


def _harm(state: RunState) -> dict[str, float]:
    """The same where each sample loses a nat by the seed; empty if no fossil is looked at."""
    sums: dict[str, float] = {}
    for entry in state.slots:
        if entry.request is not None and entry.stage is Stage.FOSSILIZED:
            sums |= {f"{entry.slot}__probe_{name}": float(value) for name, value in sums_of([-1] * 40).items()}
    return sums


def _events(entry: SlotState, ranks: int) -> Iterator[Situation]:
    slot = entry.slot
    if entry.staged is not None:
        for rank in range(ranks):
            yield Situation(vetoes={rank: {slot: Veto.NOT_READY}})
            yield Situation(vetoes={rank: {slot: Veto.BUILD_FAILED}})
        yield Situation(vetoes={0: {slot: Veto.BUILD_FAILED}, ranks - 1: {slot: Veto.NOT_READY}})
    if entry.stage.is_live:
        yield Situation(every={f"{slot}__nonfinite": 1.0})
        yield Situation(values={ranks - 1: {f"{slot}__degraded": 1.0}})


def situations(state: RunState, terms: Terms) -> Iterator[Situation]:
    """Every situation of the next tick, except faults that end the run."""
    observation = observation_of(state, terms)
    good = _evidence(state, good=True)
    events = [Situation(every=good)]
    if good:
        events.append(Situation(every=_evidence(state, good=False)))
    if harm := _harm(state):
        events.append(Situation(every=good | harm))
    for entry in state.slots:
        events += [
            Situation(vetoes=one.vetoes, every={**good, **one.every}, values=one.values)
            for one in _events(entry, terms.world_size)
        ]
    if any(entry.stage in (Stage.BLENDING, Stage.HOLDING) for entry in state.slots):
        row = {"skipped": float(terms.max_skips), "skipped_in_row": float(terms.max_skips)}
        events.append(Situation(every={**good, **row}))
    everywhere = tuple(Command(slot=entry.slot, op=Op.GERMINATE, blueprint=BLUEPRINT) for entry in state.slots)
    yield Situation(commands=everywhere, every=good)
    for commands in itertools.product(*(commands_for(observation, entry.slot) for entry in state.slots)):
        asked = tuple(command for command in commands if command.op is not Op.WAIT)
        for one in events:
            yield Situation(commands=asked, vetoes=one.vetoes, every=one.every, values=one.values)


def troubles(state: RunState, terms: Terms) -> Iterator[Situation]:
    """Faults that end a run with the same error on every rank; for those that remove a rank see `losses`."""
    kinds = list(STATELESS)
    if any(entry.stage.is_live for entry in state.slots):
        kinds.append(FaultKind.WEIGHT)
    for kind, rank in itertools.product(kinds, range(terms.world_size)):
        yield Situation(fault=InjectedFault(kind, rank, state.tick + 1))
    yield Situation(fault=InjectedFault(FaultKind.DECIDE, 0, state.tick + 1))


def losses(state: RunState, terms: Terms) -> Iterator[Situation]:
    """The loss of each rank at each point."""
    for kind, rank in itertools.product([kind for kind in FaultKind if kind.loses], range(terms.world_size)):
        yield Situation(fault=InjectedFault(kind, rank, state.tick + 1))

"""Agreed states without a network: terms of a small run, and ticks of it as the engine makes them.

run = Run(terms(slots=2))
run.tick(germinate("r0c0", "light"))          # absorb, reduce; `run.state`, `run.out` are what came of it
run.tick(evidence={"r0c0": (64, 6.4, 1.0)})   # sums of a probe that was asked for
"""

from collections.abc import Mapping
from typing import Any

from esper.accord.absorb import absorb
from esper.accord.config import EvidencePolicy, GateConfig, SlotsConfig
from esper.accord.effects import Outcome, Veto
from esper.accord.evidence.plan import ProbePlan
from esper.accord.lifecycle import SlotState
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.leyline.alpha import Operator
from esper.leyline.commands import Command, wait
from esper.leyline.events import CommandRefused, Event, StageChanged
from esper.leyline.observation import BlueprintInfo, HostInfo
from esper.leyline.slots import parse_slot
from esper.leyline.stages import Incubation, Op, Stage
from esper.tolaria.lockstep.wire import ObserveLayout

CATALOGUE = (
    BlueprintInfo(name="heavy", parameters=900, flops=9000, reach=None),
    BlueprintInfo(name="light", parameters=10, flops=100, reach=None),
    BlueprintInfo(name="noop", parameters=0, flops=0, reach=None),
)
PROBE = ProbePlan(samples=1000, clusters=1000, looks=9, reserve=1)
PLACES = ("r0c0", "r0c1", *(f"r{row}c0" for row in range(1, 47)))


def make_terms(slots: int = 2, *, gates: Mapping[str, Any] | None = None, **changes: Any) -> Terms:
    """Terms of a run of ``slots`` slots.

    Args:
        slots: 1 to 48. gates: of `GateConfig`, evidence in observe mode unless said otherwise.
        changes: fields of `Terms`, or of `SlotsConfig`.
    """
    ids = PLACES[:slots]
    places = {slot: (parse_slot(slot).row / 2, float(parse_slot(slot).col)) for slot in ids}
    own = {key: changes.pop(key) for key in list(changes) if key in Terms.__dataclass_fields__}
    base: dict[str, Any] = {
        "slots_config": SlotsConfig(
            **{"incubation": Incubation.SHADOW, "max_live": None, "embargo_ticks": 2, **changes}
        ),
        "gates": GateConfig(**{"evidence": EvidencePolicy.OBSERVE, "first_look": 1, "look_every": 1, **(gates or {})}),
        "probe": PROBE,
        "host": HostInfo(parameters=1000, flops=10_000),
        "catalogue": dict.fromkeys(ids, CATALOGUE),
        "names": tuple(info.name for info in CATALOGUE),
        "operators": dict.fromkeys(ids, tuple(Operator)),
        "channels": {},
        "places": places,
        "total_steps": 1000,
        "tick_steps": 10,
        "max_skips": 3,
        "world_size": 2,
        "costs": None,
    }
    return Terms(**(base | own))


def ask(slot: str, op: str, **fields: Any) -> Command:
    """A command by the name of its op."""
    return Command(slot=slot, op=Op[op], **fields)


def germinate(slot: str, blueprint: str = "light", **fields: Any) -> Command:
    """A birth with a ramp of 2 ticks unless said otherwise."""
    return ask(slot, "GERMINATE", blueprint=blueprint, **{"ticks": 2, **fields})


def sums_of_singles(count: int, total: float, squares: float, cubes: float | None = None) -> dict[str, float]:
    """What a probe sends of samples that are a cluster each; cubes are those of a symmetric sample unless said."""
    if cubes is None:
        cubes = 3.0 * total * squares / count - 2.0 * total**3 / count**2 if count else 0.0
    sizes = dict.fromkeys(("clusters", "count", "size_sq", "size_cube"), float(count))
    cross = {"cross": float(total), "cross_size": float(total), "cross_sq": float(squares)}
    return {**sizes, **cross, "total": float(total), "total_sq": float(squares), "total_cube": float(cubes)}


class Run:
    """Ticks of an agreed run: ``state`` is the present one, ``absorbed`` that before the reducer, ``out`` its outcome.

    Args:
        terms: of the run. stage_ticks: ticks that a staged seed may stay not ready.
    """

    def __init__(self, terms: Terms, *, stage_ticks: int = 3) -> None:
        self.terms, self.stage_ticks = terms, stage_ticks
        self.state = RunState(slots=terms.first_slots())
        self.absorbed = self.state
        self.out = Outcome(self.state)

    def slot(self, slot: str = "r0c0") -> SlotState:
        """Present record of a slot."""
        return self.state.slot(slot)

    def sums(self, evidence: Mapping[str, tuple[int, float, float]], **values: float) -> dict[str, float]:
        """The agreed sums of a healthy tick; every open request is answered by ``evidence``, or by a clear gain."""
        names = ObserveLayout([entry.slot for entry in self.state.slots]).names
        found = dict.fromkeys(names, 0.0)
        for entry in self.state.slots:
            if entry.stage.has_seed:
                found[f"{entry.slot}.finite"] = found[f"{entry.slot}.owned"] = float(self.terms.world_size)
                found[f"{entry.slot}.norm"], found[f"{entry.slot}.norm_steps"] = 5.0, 10.0
                found[f"{entry.slot}.health_steps"] = 2.0
            if entry.request is not None:
                sums = sums_of_singles(*evidence.get(entry.slot, (100, 50.0, 26.0)))
                found |= {f"{entry.slot}.probe_{name}": value for name, value in sums.items()}
        unknown = {key.replace("__", ".") for key in values} - set(names)
        if unknown:
            raise KeyError(unknown)
        return found | {key.replace("__", "."): float(value) for key, value in values.items()}

    def tick(
        self,
        *commands: Command,
        vetoes: Mapping[str, tuple[Veto, int]] | None = None,
        evidence: Mapping[str, tuple[int, float, float]] | None = None,
        steps: int | None = None,
        **values: float,
    ) -> list[Event]:
        """One tick of ``steps`` optimizer steps (the nominal number unless said); returns its events.

        Args:
            commands: one a slot at most. vetoes: of staged slots. evidence: (count, sum, sum of squares) by slot.
            values: entries of the agreed sums, ``r0c0__nonfinite=1``.
        """
        step = self.state.step + (self.terms.tick_steps if steps is None else steps)
        self.absorbed = absorb(self.state, self.sums(evidence or {}, **values), self.terms, step=step, epoch=1)
        asked = {entry.slot: wait(entry.slot) for entry in self.state.slots} | {c.slot: c for c in commands}
        self.out = reduce_tick(self.absorbed, asked, vetoes or {}, self.terms, stage_ticks=self.stage_ticks)
        self.state = self.out.state
        return self.out.events

    def events(self, kind: type[Event]) -> list[Any]:
        """Events of one class in the latest tick."""
        return [event for event in self.out.events if type(event) is kind]


def run_of(slots: int = 2, *, stage_ticks: int = 3, **terms: Any) -> Run:
    """A run of that many slots; see `make_terms`."""
    return Run(make_terms(slots, **terms), stage_ticks=stage_ticks)


def at(stage: Stage, slot: str = "r0c0", run: Run | None = None, **birth: Any) -> Run:
    """A run in which a seed has just come to ``stage``, its ramps done."""
    run = run or run_of()
    run.tick(germinate(slot, **birth))
    run.tick()
    if stage is Stage.GERMINATED:
        return run
    run.tick(ask(slot, "ADVANCE"))
    if stage is Stage.TRAINING:
        return run
    run.tick(ask(slot, "ADVANCE"))
    while not run.slot(slot).ramp_done(run.state.step):
        run.tick()
    if stage is Stage.BLENDING:
        return run
    run.tick(ask(slot, "ADVANCE"))
    if stage is Stage.FOSSILIZED:
        run.tick()
        run.tick(ask(slot, "FOSSILIZE"))
    assert run.slot(slot).stage is stage
    return run


def refusals(run: Run) -> list[str]:
    """Reasons of the refusals of the latest tick."""
    return [event.reason for event in run.events(CommandRefused)]


def moves(run: Run) -> list[tuple[str, str, str]]:
    """Stage changes of the latest tick: source, cause, target."""
    return [(e.source.name, e.cause, e.target.name) for e in run.events(StageChanged)]

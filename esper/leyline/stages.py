"""The life of a seed: stages, what each one means, and the one table of edges between them.

     empty -GERMINATE/G0-> GERMINATED -ADVANCE/G1-> TRAINING -ADVANCE/G2-> BLENDING -ADVANCE/G3-> HOLDING
                               |  `---- ADVANCE/G1, incubation=immediate ----^ |  ^- SET_ALPHA_TARGET -'|
                               `------------- PRUNE (now, or by a ramp down) ---'-----------------------'
                                                        v                         HOLDING -FOSSILIZE/G5-> FOSSILIZED
                                  PRUNED -> EMBARGOED -> RESETTING -> empty            (mechanical, by ticks)

A partial target rests in BLENDING; HOLDING is full alpha. A prune by ramp runs in BLENDING and ends by RAMP_END.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from esper.leyline.errors import GateError, IllegalTransition


class Op(IntEnum):
    """What a controller may ask of one slot at one tick. The number is the wire code."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    SET_ALPHA_TARGET = 3
    PRUNE = 4
    FOSSILIZE = 5


class Mechanical(StrEnum):
    """Causes of a stage change that nobody commands.

    QUARANTINE: its gradient was not finite. DEGRADED: it ran by a fallback for too long. ROLLBACK: it was blamed for a
    panic that the run was rolled back from.
    """

    RAMP_END = "RAMP_END"
    COOLDOWN = "COOLDOWN"
    QUARANTINE = "QUARANTINE"
    DEGRADED = "DEGRADED"
    ROLLBACK = "ROLLBACK"


class Gate(IntEnum):
    """Gates of the lifecycle; the number is part of the name. G4 is retired and raises."""

    G0 = 0
    G1 = 1
    G2 = 2
    G3 = 3
    G4 = 4
    G5 = 5

    @classmethod
    def of(cls, value: "int | str | Gate") -> "Gate":
        """Returns the gate that a number or name means.

        Raises:
            GateError: unknown, or retired.
        """
        try:
            gate = cls[value] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            raise GateError(f"unknown gate {value!r}; gates are G0, G1, G2, G3, G5") from None
        if gate is cls.G4:
            raise GateError("gate G4 is retired; HOLDING seeds are judged by G5")
        return gate


class Stage(StrEnum):
    """Stages of a slot; each answers its own questions from the table below."""

    EMPTY = "EMPTY"
    GERMINATED = "GERMINATED"
    TRAINING = "TRAINING"
    BLENDING = "BLENDING"
    HOLDING = "HOLDING"
    FOSSILIZED = "FOSSILIZED"
    PRUNED = "PRUNED"
    EMBARGOED = "EMBARGOED"
    RESETTING = "RESETTING"

    @property
    def has_seed(self) -> bool:
        """A seed module is registered in the slot."""
        return _TRAITS[self].has_seed

    @property
    def is_live(self) -> bool:
        """A seed that is neither fossil nor gone; counts against the budget of live seeds."""
        return _TRAITS[self].is_live

    @property
    def is_incubating(self) -> bool:
        """The host computes as if the slot were empty."""
        return _TRAITS[self].is_incubating

    @property
    def is_blended(self) -> bool:
        """The seed's delta takes part in the host's forward, scaled by alpha."""
        return _TRAITS[self].is_blended

    @property
    def is_cooling(self) -> bool:
        """The slot is on its way back to empty."""
        return _TRAITS[self].is_cooling

    @property
    def code(self) -> int:
        """Position in the table; for digests and plots."""
        return list(Stage).index(self)


@dataclass(frozen=True, slots=True)
class _Traits:
    has_seed: bool = False
    is_live: bool = False
    is_incubating: bool = False
    is_blended: bool = False
    is_cooling: bool = False


_TRAITS = {
    Stage.EMPTY: _Traits(),
    Stage.GERMINATED: _Traits(has_seed=True, is_live=True, is_incubating=True),
    Stage.TRAINING: _Traits(has_seed=True, is_live=True, is_incubating=True),
    Stage.BLENDING: _Traits(has_seed=True, is_live=True, is_blended=True),
    Stage.HOLDING: _Traits(has_seed=True, is_live=True, is_blended=True),
    Stage.FOSSILIZED: _Traits(has_seed=True, is_blended=True),
    Stage.PRUNED: _Traits(is_cooling=True),
    Stage.EMBARGOED: _Traits(is_cooling=True),
    Stage.RESETTING: _Traits(is_cooling=True),
}


@dataclass(frozen=True, slots=True)
class Edge:
    """One legal stage change and the gate that judges it (None: no gate)."""

    source: Stage
    cause: Op | Mechanical
    target: Stage
    gate: Gate | None = None


EDGES: tuple[Edge, ...] = (
    Edge(Stage.EMPTY, Op.GERMINATE, Stage.GERMINATED, Gate.G0),
    Edge(Stage.GERMINATED, Op.ADVANCE, Stage.TRAINING, Gate.G1),
    Edge(Stage.GERMINATED, Op.ADVANCE, Stage.BLENDING, Gate.G1),
    Edge(Stage.TRAINING, Op.ADVANCE, Stage.BLENDING, Gate.G2),
    Edge(Stage.BLENDING, Op.ADVANCE, Stage.HOLDING, Gate.G3),
    Edge(Stage.HOLDING, Op.FOSSILIZE, Stage.FOSSILIZED, Gate.G5),
    Edge(Stage.BLENDING, Op.SET_ALPHA_TARGET, Stage.BLENDING),
    Edge(Stage.HOLDING, Op.SET_ALPHA_TARGET, Stage.BLENDING),
    Edge(Stage.HOLDING, Op.SET_ALPHA_TARGET, Stage.HOLDING),
    *(
        Edge(stage, cause, Stage.PRUNED)
        for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
        for cause in (Op.PRUNE, Mechanical.QUARANTINE, Mechanical.DEGRADED, Mechanical.ROLLBACK)
    ),
    Edge(Stage.BLENDING, Op.PRUNE, Stage.BLENDING),
    Edge(Stage.HOLDING, Op.PRUNE, Stage.BLENDING),
    Edge(Stage.BLENDING, Mechanical.RAMP_END, Stage.PRUNED),
    Edge(Stage.PRUNED, Mechanical.COOLDOWN, Stage.EMBARGOED),
    Edge(Stage.EMBARGOED, Mechanical.COOLDOWN, Stage.RESETTING),
    Edge(Stage.RESETTING, Mechanical.COOLDOWN, Stage.EMPTY),
)


def edges_from(source: Stage) -> tuple[Edge, ...]:
    """All edges that leave ``source``."""
    return tuple(edge for edge in EDGES if edge.source is source)


def find_edge(source: Stage, cause: Op | Mechanical, target: Stage) -> Edge:
    """Returns the edge of the table.

    Raises:
        IllegalTransition: there is none; the text names those that leave ``source``.
    """
    for edge in edges_from(source):
        if edge.cause is cause and edge.target is target:
            return edge
    legal = ", ".join(f"{edge.cause.name}->{edge.target.name}" for edge in edges_from(source)) or "none"
    raise IllegalTransition(f"{source.name} -{cause.name}-> {target.name} is no edge; from {source.name}: {legal}")


if set(_TRAITS) != set(Stage):
    raise AssertionError(f"stages without a row of traits: {set(Stage) - set(_TRAITS)}")
if Stage.FOSSILIZED not in {e.target for e in EDGES} or {e.source for e in EDGES} != set(Stage) - {Stage.FOSSILIZED}:
    raise AssertionError("every stage but FOSSILIZED needs an edge that leaves it")
if {edge.cause for edge in EDGES} != {*Op, *Mechanical} - {Op.WAIT}:
    raise AssertionError("every cause but WAIT needs an edge")


class Incubation(StrEnum):
    """How a TRAINING seed learns. SHADOW: it sees the loss at full alpha in a forward of its own, all else frozen.
    STE: straight-through, forward exactly the host's, gradient as if added. IMMEDIATE: no incubation, blended from
    birth."""

    SHADOW = "shadow"
    STE = "ste"
    IMMEDIATE = "immediate"

"""The life of a seed: the stages, what each one means, and the one table of edges between them.

     empty -GERMINATE/G0-> GERMINATED -ADVANCE/G1-> TRAINING -ADVANCE/G2-> BLENDING -ADVANCE/G3-> HOLDING
                               |  `---- ADVANCE/G1, incubation=immediate ----^ |  ^- SET_ALPHA_TARGET -'|
                               `------------- PRUNE (now, or by a ramp down) ---'-----------------------'
                                                        v                         HOLDING -FOSSILIZE/G5-> FOSSILIZED
                                  PRUNED -> EMBARGOED -> RESETTING -> empty            (mechanical, by ticks)

At a partial target a seed rests in BLENDING; HOLDING means full alpha. A prune by ramp runs in BLENDING and ends by
RAMP_END. A fossil goes by PRUNE/G6, always by a ramp; while it runs the stage is still FOSSILIZED, and SET_ALPHA_TARGET
takes the prune back.
"""

import functools
from dataclasses import dataclass, fields
from enum import IntEnum, StrEnum

from esper.leyline.errors import GateError, IllegalTransition


class Op(IntEnum):
    """Operations that a controller may request for one slot at one tick. The number is the wire code."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    SET_ALPHA_TARGET = 3
    PRUNE = 4
    FOSSILIZE = 5


class Mechanical(StrEnum):
    """Causes of a stage change without a command.

    RAMP_END: the ramp of a prune ended. COOLDOWN: the slot's cool-down went on. QUARANTINE: the seed's gradient was not
    finite. DEGRADED: the seed ran by a fallback for too long. ROLLBACK: the seed was blamed for a panic, and the run
    was rolled back.
    """

    RAMP_END = "RAMP_END"
    COOLDOWN = "COOLDOWN"
    QUARANTINE = "QUARANTINE"
    DEGRADED = "DEGRADED"
    ROLLBACK = "ROLLBACK"


class Gate(IntEnum):
    """Gates of the lifecycle; the number is part of the name. G4 is retired; asking for it raises an error."""

    G0 = 0
    G1 = 1
    G2 = 2
    G3 = 3
    G4 = 4
    G5 = 5
    G6 = 6

    @classmethod
    def of(cls, value: "int | str | Gate") -> "Gate":
        """Returns the gate with this number or name.

        Raises:
            GateError: the gate is unknown or retired.
        """
        try:
            gate = cls[value] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            raise GateError(f"unknown gate {value!r}; gates are G0, G1, G2, G3, G5, G6") from None
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

    # Plain attributes, set below: a tick asks thousands of times.
    has_seed: bool
    """True if a seed module is registered in the slot."""
    is_live: bool
    """True if the seed is neither fossilised nor gone; it counts against the budget of live seeds."""
    is_incubating: bool
    """True while the slot has a seed but the host computes as if it were empty."""
    is_blended: bool
    """True if the seed's delta takes part in the host's forward pass, scaled by alpha."""
    is_cooling: bool
    """True if the slot is on its way back to empty."""

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
    """One legal stage change and the gate that judges it, or None."""

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
    Edge(Stage.FOSSILIZED, Op.PRUNE, Stage.FOSSILIZED, Gate.G6),
    Edge(Stage.FOSSILIZED, Op.SET_ALPHA_TARGET, Stage.FOSSILIZED),
    Edge(Stage.FOSSILIZED, Mechanical.RAMP_END, Stage.PRUNED),
    Edge(Stage.PRUNED, Mechanical.COOLDOWN, Stage.EMBARGOED),
    Edge(Stage.EMBARGOED, Mechanical.COOLDOWN, Stage.RESETTING),
    Edge(Stage.RESETTING, Mechanical.COOLDOWN, Stage.EMPTY),
)


@functools.cache
def edges_from(source: Stage) -> tuple[Edge, ...]:
    """Returns all edges that leave ``source``."""
    return tuple(edge for edge in EDGES if edge.source is source)


def find_edge(source: Stage, cause: Op | Mechanical, target: Stage) -> Edge:
    """Returns the edge of the table.

    Raises:
        IllegalTransition: there is no such edge; the text names those that leave ``source``.
    """
    for edge in edges_from(source):
        if edge.cause is cause and edge.target is target:
            return edge
    legal = ", ".join(f"{edge.cause.name}->{edge.target.name}" for edge in edges_from(source)) or "none"
    raise IllegalTransition(f"{source.name} -{cause.name}-> {target.name} is no edge; from {source.name}: {legal}")


if set(_TRAITS) != set(Stage):
    raise AssertionError(f"stages without a row of traits: {set(Stage) - set(_TRAITS)}")
for _stage, _traits in _TRAITS.items():
    for _field in fields(_Traits):
        setattr(_stage, _field.name, getattr(_traits, _field.name))
if {e.source for e in EDGES if e.target is not e.source} != set(Stage):
    raise AssertionError("every stage needs an edge that leaves it")
if {edge.cause for edge in EDGES} != {*Op, *Mechanical} - {Op.WAIT}:
    raise AssertionError("every cause but WAIT needs an edge")


class Incubation(StrEnum):
    """The way a TRAINING seed learns.

    SHADOW: it sees the loss at full alpha in a forward pass of its own, with everything else frozen. STE
    (straight-through): the forward pass is exactly the host's, and the gradient is as if the delta were added.
    IMMEDIATE: no incubation; the seed is blended in from birth.
    """

    SHADOW = "shadow"
    STE = "ste"
    IMMEDIATE = "immediate"

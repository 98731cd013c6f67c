"""Commands: what controllers request, at most one per slot and tick."""

import functools
from dataclasses import dataclass

from esper.leyline.alpha import Curve, Operator
from esper.leyline.stages import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One request for one slot. Fields that an op does not use keep their defaults."""

    slot: str
    """Slot id, as r0c0."""

    op: Op
    """What to do."""

    blueprint: str | None = None
    """Name of the seed's blueprint (GERMINATE)."""

    operator: Operator = Operator.ADD
    """How the seed joins the host from the coming ramp on (GERMINATE, SET_ALPHA_TARGET; a PRUNE keeps the operator).
    One other than the one in force is faded in along the ramp.
    """

    curve: Curve = Curve.COSINE
    """Shape of the coming ramp (GERMINATE, SET_ALPHA_TARGET, PRUNE)."""

    steepness: float = 6.0
    """SIGMOID's k of the coming ramp, 0.01 to 50."""

    ticks: int = 0
    """Length of the coming ramp in ticks: the tempo (GERMINATE), the speed (SET_ALPHA_TARGET, PRUNE; PRUNE with 0 is at
    once).
    """

    target: float = 1.0
    """Alpha to blend to, 0 to 1 (GERMINATE, SET_ALPHA_TARGET)."""

    reason: str = ""
    """Why, for people; does not travel."""

    proposal: int = 0
    """Id that ties proposal, verdict, mutation and outcome together; given by the engine on rank 0."""


@functools.cache
def wait(slot: str) -> Command:
    """Returns the command that changes nothing."""
    return Command(slot=slot, op=Op.WAIT)

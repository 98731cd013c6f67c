"""What controllers ask for: one command per slot and tick."""

from dataclasses import dataclass

from esper.leyline.alpha import Curve, Operator
from esper.leyline.stages import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One request for one slot. Fields that an op does not use keep their defaults.

    Fields:
        slot: slot id.
        op: what to do.
        blueprint: name of the seed's blueprint (GERMINATE).
        operator, curve, steepness: of the coming ramp (GERMINATE, SET_ALPHA_TARGET; a PRUNE keeps the operator). An
            operator other than the one in force is faded in along the ramp.
        ticks: length of the coming ramp in ticks: the tempo (GERMINATE), the speed (SET_ALPHA_TARGET, PRUNE; PRUNE
            with 0 is at once).
        target: alpha to blend to (GERMINATE, SET_ALPHA_TARGET), in [0, 1].
        reason: why, for people; does not travel.
        proposal: id that ties proposal, verdict, mutation and outcome together; given by the engine on rank 0.
    """

    slot: str
    op: Op
    blueprint: str | None = None
    operator: Operator = Operator.ADD
    curve: Curve = Curve.COSINE
    steepness: float = 6.0
    ticks: int = 0
    target: float = 1.0
    reason: str = ""
    proposal: int = 0


def wait(slot: str) -> Command:
    """The command that changes nothing."""
    return Command(slot=slot, op=Op.WAIT)

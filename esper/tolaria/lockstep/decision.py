"""The decision of one commit."""

from collections.abc import Mapping
from dataclasses import dataclass

from esper.accord.effects import Outcome
from esper.leyline.commands import Command
from esper.tolaria.lockstep.wire import Agreed


@dataclass(frozen=True, slots=True)
class Decision:
    """One commit and its outcome."""

    agreed: Agreed
    """The reduced commit vector."""
    outcome: Outcome
    """New state, effects and events, from the reducer."""
    commands: Mapping[str, Command] | None
    """Rank 0's commands with their reasons, which do not travel; None on other ranks."""
    digest_ms: float
    """Milliseconds spent on the digests."""

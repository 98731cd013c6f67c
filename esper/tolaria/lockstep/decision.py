"""What one commit came to."""

from collections.abc import Mapping
from dataclasses import dataclass

from esper.accord.effects import Outcome
from esper.leyline.commands import Command
from esper.tolaria.lockstep.wire import Agreed


@dataclass(frozen=True, slots=True)
class Decision:
    """One commit."""

    agreed: Agreed
    """What all ranks agreed."""
    outcome: Outcome
    """What it leads to."""
    commands: Mapping[str, Command] | None
    """Rank 0's commands, with the reasons, which do not travel; None elsewhere."""
    digest_ms: float
    """Milliseconds of the digests."""

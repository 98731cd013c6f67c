"""What the reducer leaves to be done to the model: effects in canonical order, beside the new state and the events."""

from dataclasses import dataclass, field

from esper.leyline.commands import Command
from esper.leyline.events import Event
from esper.tolaria.state import RunState


@dataclass(frozen=True, slots=True)
class Prepare:
    """Build the seed beside the model; nothing is registered yet."""

    slot: str
    command: Command
    generation: int


@dataclass(frozen=True, slots=True)
class Register:
    """Plant the staged seed and give it an optimizer group."""

    slot: str


@dataclass(frozen=True, slots=True)
class Discard:
    """Let go of the staged seed."""

    slot: str


@dataclass(frozen=True, slots=True)
class Uproot:
    """Remove the seed from model, optimizer and reducer."""

    slot: str


Effect = Prepare | Register | Discard | Uproot


@dataclass(slots=True)
class Outcome:
    """What a tick did. ``state`` is the new agreed state."""

    state: RunState
    effects: list[Effect] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

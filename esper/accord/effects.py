"""What the reducer leaves to be done to the model: effects in canonical order, beside the new state and the events."""

from dataclasses import dataclass, field
from enum import IntEnum

from esper.accord.state import RunState
from esper.leyline.commands import Command
from esper.leyline.events import Event


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


class Veto(IntEnum):
    """Why a rank cannot hold a staged seed; 0 is no veto."""

    NONE = 0
    NOT_READY = 1
    BUILD_FAILED = 2
    OUT_OF_MEMORY = 3
    NONFINITE_AT_BIRTH = 4
    LIBRARY_MISSING = 5
    LIBRARY_DAMAGED = 6

"""Effects: what the owner of the model must do after a tick, in canonical order; and the outcome that holds them."""

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
    """Discard the staged seed."""

    slot: str


@dataclass(frozen=True, slots=True)
class Uproot:
    """Remove the seed from model, optimizer and reducer."""

    slot: str


Effect = Prepare | Register | Discard | Uproot


@dataclass(slots=True)
class Outcome:
    """The result of a tick: the new agreed state, the effects on the model, and the events."""

    state: RunState
    effects: list[Effect] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


class Veto(IntEnum):
    """Reasons why a rank cannot hold a staged seed; 0 is no veto."""

    NONE = 0
    NOT_READY = 1
    BUILD_FAILED = 2
    OUT_OF_MEMORY = 3
    NONFINITE_AT_BIRTH = 4
    LIBRARY_MISSING = 5
    LIBRARY_DAMAGED = 6
    MOVES_LOSS = 7

"""Events of people's orders."""

from dataclasses import dataclass
from typing import ClassVar

from esper.leyline.events.base import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderTaken(Event):
    """A tick took an order of a person; the command to a slot has its own verdict beside it."""

    kind: ClassVar[str] = "order"
    priority: ClassVar[bool] = True
    number: int
    """Line of the order in RUN/orders/journal.jsonl, from 1."""

    sender: str
    """Who gave it."""

    words: str
    """What was ordered, as it was typed."""

    slot: str | None
    """Slot id; null: it is to the whole run."""

    applied: bool
    """Whether it was done; false: legality, a gate or a budget refused it."""

    reason: str
    """What came of it, or why it was refused."""

    why: str
    """The sender's own reason."""

    again: bool
    """Whether it was taken from the journal, since the run went on from before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrdersRefused(Event):
    """Orders that did not come as far as a tick; one event for each reason and tick."""

    kind: ClassVar[str] = "orders_refused"
    priority: ClassVar[bool] = True
    refusal: str
    """Why: forged, stale, replayed, malformed, out of order, oversized, busy, unwritten or expired."""

    count: int
    """How many since the last such event."""

    total: int
    """How many in this attempt."""

    words: str
    """The latest of them, in words."""

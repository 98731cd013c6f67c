"""RUN/orders: how orders travel, and what is kept of them.

    key             the key of this run's orders, mode 0600
    open.json       there while a running attempt takes orders: its number, and how long an order may be under way
    inbox/NONCE     an order on its way: the order and its signature, written under another name and renamed
    answers/NONCE   what became of it, signed
    journal.jsonl   every order that a tick took, with the tick, synced before that tick's commit
    ledger.jsonl    nonces that have come, until they are too old to be taken

Files need no port, work over a shared file system, and reach a run on another machine.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class OrdersDir:
    """The paths in RUN/orders. Nothing is read or created."""

    path: Path
    """RUN/orders."""

    @property
    def key(self) -> Path:
        """The key, mode 0600."""
        return self.path / "key"

    @property
    def open(self) -> Path:
        """There while orders are taken."""
        return self.path / "open.json"

    @property
    def inbox(self) -> Path:
        """Orders on their way."""
        return self.path / "inbox"

    @property
    def answers(self) -> Path:
        """Answers that wait to be read."""
        return self.path / "answers"

    @property
    def journal(self) -> Path:
        """Orders that ticks took."""
        return self.path / "journal.jsonl"

    @property
    def ledger(self) -> Path:
        """Nonces that have come."""
        return self.path / "ledger.jsonl"

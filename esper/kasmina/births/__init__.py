"""The seed library: births saved as content-addressed files and built beside training; see `library` for the idea."""

from esper.kasmina.births.config import LibraryConfig
from esper.kasmina.births.key import Birth
from esper.kasmina.births.library import Figures, Library, Order, Ticket
from esper.kasmina.births.store import DamagedEntry, MissingEntry, SeedStore

__all__ = [
    "Birth",
    "DamagedEntry",
    "Figures",
    "Library",
    "LibraryConfig",
    "MissingEntry",
    "Order",
    "SeedStore",
    "Ticket",
]

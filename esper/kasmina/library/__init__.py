"""The seed library: births saved as content-addressed files and built beside training; see `library` for the idea."""

from esper.kasmina.library.birth import Birth
from esper.kasmina.library.config import LibraryConfig
from esper.kasmina.library.library import Figures, Library, Order, Ticket
from esper.kasmina.library.store import DamagedEntry, MissingEntry, SeedStore

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

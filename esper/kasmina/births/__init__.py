"""Births: how a seed is built, the same on every rank, and the library that keeps built seeds as files."""

from typing import TYPE_CHECKING

from esper.kasmina.births.config import LibraryConfig
from esper.leyline.imports import export_later

if TYPE_CHECKING:
    from esper.kasmina.births.figures import Figures
    from esper.kasmina.births.key import Birth
    from esper.kasmina.births.library import Library, Order, Ticket
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
__getattr__ = export_later(
    __name__,
    {"Birth": "key", "Figures": "figures"}
    | dict.fromkeys(("Library", "Order", "Ticket"), "library")
    | dict.fromkeys(("DamagedEntry", "MissingEntry", "SeedStore"), "store"),
)

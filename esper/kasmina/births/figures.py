"""What a seed library tells of its work."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Counts of a library's work in an interval, and its contents at the end of it.

    Fields:
        births: seeds ordered.
        memory_hits: seeds found in memory.
        memory_misses: lookups in memory that found none.
        disk_hits: seeds found on disk.
        built: seeds found nowhere, and built.
        failed: orders that failed.
        evicted: births removed from memory to make room.
        entries: births in memory now.
        bytes: their size.
        oldest_ticks: ticks since the birth that is evicted next was used.
    """

    births: int
    memory_hits: int
    memory_misses: int
    disk_hits: int
    built: int
    failed: int
    evicted: int
    entries: int
    bytes: int
    oldest_ticks: int

"""Topologies: the meaning of the axes of a slot's features."""

from enum import StrEnum


class Topology(StrEnum):
    """Meaning of the axes of a slot's features; ``dim`` is the size of the channel axis C in each."""

    FEATURE_MAP = "BCHW"
    SEQUENCE = "BTC"
    VECTOR = "BC"

    @property
    def channel_axis(self) -> int:
        """Axis of C."""
        return {Topology.FEATURE_MAP: 1, Topology.SEQUENCE: 2, Topology.VECTOR: 1}[self]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.value)

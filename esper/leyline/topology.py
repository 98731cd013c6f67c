"""Topologies: the meaning of the axes of a slot's features, and layouts: the order in which a host has them."""

from enum import StrEnum

from esper.leyline.errors import ConfigError


class Topology(StrEnum):
    """Meaning of the axes of a slot's features; ``dim`` is the size of the channel axis C in each."""

    FEATURE_MAP = "BCHW"
    SEQUENCE = "BTC"
    SIGNAL = "BCT"
    VECTOR = "BC"

    @property
    def channel_axis(self) -> int:
        """Axis of C."""
        return self.value.index("C")

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.value)

    @property
    def has_length(self) -> bool:
        """Whether there is one axis of positions in time, T."""
        return "T" in self.value


class Reach(StrEnum):
    """What one position of a seed's delta is made of, apart from the statistics of a norm.

    POINT: of the same position of the features. NEAR: of that and of its neighbours, as in a convolution. ALL: of every
    position that it may see, as in attention or pooling.
    """

    POINT = "point"
    NEAR = "near"
    ALL = "all"


LAYOUTS = "BCHW, BHWC, BTC, TBC, BCT or BC"


def topology_of(layout: str, what: str = "layout") -> Topology:
    """Returns the topology whose axes a layout has, in whatever order: C behind T is a sequence, C before T a signal.

    Args:
        layout: a letter for each axis of the host's feature, as in "TBC".
        what: what an error calls it.

    Raises:
        ConfigError: it is no such order.
    """
    letters = "".join(sorted(layout)) if isinstance(layout, str) else ""
    fitting = [topology for topology in Topology if "".join(sorted(topology.value)) == letters]
    if not fitting:
        raise ConfigError(f"{what} = {layout!r}: expected a letter for each axis of the feature, such as {LAYOUTS}")
    if len(fitting) == 1:
        return fitting[0]
    return Topology.SIGNAL if layout.index("C") < layout.index("T") else Topology.SEQUENCE


def order_of(layout: str) -> tuple[int, ...] | None:
    """Axes of a feature in the order of its topology, for ``permute``; None where they stand in it already."""
    order = tuple(layout.index(letter) for letter in topology_of(layout).value)
    return None if order == tuple(range(len(order))) else order

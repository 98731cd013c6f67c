"""A site: the place of a slot in its host, and what the axes of the feature there mean."""

import math
from dataclasses import dataclass

from torch import Tensor

from esper.kasmina.axes.feature import Place
from esper.leyline.topology import Topology, order_of


@dataclass(frozen=True, slots=True)
class Site:
    """The place of a slot in the host, and the feature there.

    Fields:
        slot: slot id.
        module: dotted name of the host's submodule whose output holds the feature.
        topology: what the axes of the feature mean.
        dim: channels C of the feature.
        shape: shape of one sample's feature in the example, in the order of the topology, without the batch axis.
        place: place of the feature in the submodule's output, None where it is the whole output.
        layout: the axes as they stand in the host's feature, such as "TBC"; a slot turns them to the topology's order.
        causal: whether a position of a sequence or a signal sees only what is before it, in this host.
        may_skip: whether a forward in train() may leave it out.
    """

    slot: str
    module: str
    topology: Topology
    dim: int
    shape: tuple[int, ...]
    place: Place = None
    layout: str = ""
    causal: bool = True
    may_skip: bool = False

    def __post_init__(self) -> None:
        if not self.layout:
            object.__setattr__(self, "layout", self.topology.value)

    @property
    def order(self) -> tuple[int, ...] | None:
        """Axes of the host's feature in the order of the topology; None where they stand in it."""
        return order_of(self.layout)

    def describe(self) -> str:
        """What a seed's computation goes by here, as text."""
        causal = "causal" if self.causal else "not causal"
        return f"{self.layout}, {causal}{', may be left out' if self.may_skip else ''}"

    def turned(self, feature: Tensor) -> Tensor:
        """A view of the host's feature with its axes in the order of the topology."""
        return feature if self.order is None else feature.permute(self.order)

    def turned_back(self, feature: Tensor) -> Tensor:
        """The opposite of `turned`."""
        order = self.order
        return feature if order is None else feature.permute([order.index(axis) for axis in range(len(order))])

    @property
    def positions(self) -> int:
        """Positions per sample at which a seed is evaluated (H*W, T, or 1)."""
        return math.prod(self.shape) // self.dim

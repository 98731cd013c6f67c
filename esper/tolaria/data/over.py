"""Parts over other parts: they show some of the samples, or show them in another way."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from esper.tolaria.data.own.ahead import Ahead, Request
from esper.tolaria.data.parts import Part


class PartOver(Part):
    """A part as something else shows it; a subclass overrides what differs.

    Args:
        part: what lies beneath.
    """

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def fetch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `Part.fetch`."""
        return self.part.fetch(indices)

    def fetch_train(self, indices: Tensor, *, seed: int, epoch: int) -> tuple[Any, Any]:
        """See `Part.fetch_train`."""
        return self.part.fetch_train(indices, seed=seed, epoch=epoch)

    def read_ahead(self, seed: int, workers: int, *, pinned: bool = False) -> Ahead | None:
        """See `Part.read_ahead`."""
        return self.part.read_ahead(seed, workers, pinned=pinned)

    def requests(self, indices: Tensor, epoch: int) -> Iterator[Request]:
        """See `Part.requests`."""
        return self.part.requests(indices, epoch)

    def content(self) -> tuple[Tensor, ...]:
        """That of the part beneath."""
        return self.part.content()


class LeadingPart(PartOver):
    """The first samples of a part.

    Args:
        part: the whole part.
        size: samples of it.
    """

    def __init__(self, part: Part, size: int) -> None:
        super().__init__(part)
        self._size = size

    def __len__(self) -> int:
        return self._size

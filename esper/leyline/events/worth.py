"""Events of what seeds turn out to be worth to the network that they are part of."""

from dataclasses import dataclass
from typing import ClassVar

from esper.leyline.events.base import Event
from esper.leyline.evidence import Reading, SeedWorth


@dataclass(frozen=True, slots=True, kw_only=True)
class FossilHurts(Event):
    """All looks at a fossil since it became one show that the network is better without it. It stays until a controller
    prunes it.
    """

    kind: ClassVar[str] = "fossil"
    slot: str
    """Slot id, as r0c0."""

    blueprint: str
    """Its blueprint."""

    running: Reading
    """Mean paired loss without minus with the fossil over these looks, in nats per sample; negative hurts."""

    chance: float
    """Chance that luck says so of a fossil that does not hurt, in its life."""

    clusters: int
    """Clusters of samples behind ``running``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthMeasured(Event):
    """What a blended seed is worth, measured on the validation part (``control.attribute_every``)."""

    kind: ClassVar[str] = "worth"
    slot: str
    """Slot id, as r0c0."""

    blueprint: str
    """Blueprint of the seed."""

    worth: SeedWorth
    """Loss that it saves, in nats per sample: alone, left out, and its Shapley share."""

    together: Reading
    """Loss that all blended seeds save together, against none."""

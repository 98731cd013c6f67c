"""What a host and a seed cost on one sample."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SeedCost:
    """One seed on one sample.

    Fields:
        forward: one forward.
        full: backward to input and weights (a blended seed that learns).
        weights: backward to the weights alone (a seed whose input is detached or frozen).
        passing: backward to the input alone (a frozen seed in blend).
    """

    forward: int
    full: int
    weights: int
    passing: int


@dataclass(frozen=True, slots=True)
class HostCost:
    """The bare host on one sample.

    Fields:
        forward, backward: a forward, and the backward to all that it trains.
        down_to: per slot, the backward of the activations alone, from the output down to it.
        shared: per slot, the forward up to it, which forwards that differ from there on share; None where the host
            cannot resume from a slot and shares nothing.
        order: slots in the order of execution.
    """

    forward: int
    backward: int
    down_to: dict[str, int]
    shared: dict[str, int] | None
    order: tuple[str, ...]

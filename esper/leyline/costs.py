"""FLOPs of a host and of a seed on one sample."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SeedCost:
    """FLOPs of one seed on one sample.

    Fields:
        forward: one forward pass.
        full: backward pass to input and weights (a blended seed that learns).
        weights: backward pass to the weights alone (a seed whose input is detached or frozen).
        passing: backward pass to the input alone (a frozen seed that is blended in).
        uncounted: operators of the seed that have no formula, and count for nothing here.
    """

    forward: int
    full: int
    weights: int
    passing: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HostCost:
    """FLOPs of the bare host on one sample.

    Fields:
        forward: one forward pass.
        backward: backward pass to everything that the host trains.
        down_to: for each slot, the backward pass of the activations alone, from the output down to the slot.
        shared: for each slot, the forward pass up to the slot, which is shared by forward passes that differ only from
            there on; None if the host cannot resume from a slot and shares nothing.
        order: slots in the order of execution.
        uncounted: operators of the host that have no formula, and count for nothing here.
    """

    forward: int
    backward: int
    down_to: dict[str, int]
    shared: dict[str, int] | None
    order: tuple[str, ...]
    uncounted: tuple[str, ...] = ()

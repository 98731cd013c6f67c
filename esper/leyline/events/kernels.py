"""Events of what stands between the network and its training: compiled kernels, and the wrapper of DDP."""

from dataclasses import dataclass
from typing import ClassVar

from esper.leyline.events.base import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsCompiled(Event):
    """A seed was compiled for its slot, or the host at the start (``trainer.compile``); training waited for it."""

    kind: ClassVar[str] = "kernels"
    where: str
    """Slot id, as r0c0, or ``host``."""

    compile_ms: float
    """Milliseconds that it took on this rank."""

    hits: int
    """Graphs whose kernels lay on disk, compiled ahead or by an earlier run."""

    misses: int
    """Graphs that had to be compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped(Event):
    """The set of parameters that get gradients changed (or a save asked for it) and DDP was wrapped anew."""

    kind: ClassVar[str] = "rewrap"
    level: ClassVar[str] = "full"
    cause: str
    """``gradient set changed`` or ``save``."""

    parameters: int
    """Tensors that get gradients."""

    wrap_ms: float
    """Milliseconds that it took."""

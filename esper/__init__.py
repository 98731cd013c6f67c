"""Esper trains neural networks that grow while they train, on many processes in lockstep.

``esper.attach`` and ``esper.Session`` are imported when they are first used, so that ``import esper.leyline`` loads no
torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.kasmina.attach import attach
    from esper.session.session import Session

__all__ = ["Session", "__version__", "attach"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "attach":
        from esper.kasmina.attach import attach

        return attach
    if name == "Session":
        from esper.session.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

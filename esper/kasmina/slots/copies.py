"""Deep copies of a grown model that are alive: none of them gets the seeds that the original is given later.

`torch.optim.swa_utils.AveragedModel` keeps such a copy, and so does many an average written by hand. Each registers
weakly with its original when it is made, by what all its slots share (`esper.kasmina.slots.beat`), so that a copy of a
part with sites in it counts too. What esper itself copies (an export) does not register. A copy that has grown by
itself since is a model of its own.
"""

import gc
import sys
import weakref
from collections import Counter
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass(frozen=True, slots=True)
class _Copy:
    made: weakref.ref[Any]
    where: str


_copies: weakref.WeakKeyDictionary[Any, list[_Copy]] = weakref.WeakKeyDictionary()
_originals: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = (
    weakref.WeakKeyDictionary()
)  # of a copy's copy: the first
_growing: weakref.WeakSet[Any] = weakref.WeakSet()


def note_copy(beat: Any, made: Any) -> None:
    """Notes that ``made`` is being copied off ``beat``; called by its ``__deepcopy__``."""
    where = _place_of(sys._getframe(2))
    if where is None:
        return
    known = _originals.get(beat)
    first = beat if known is None else known()
    if first is not None:
        _originals[made] = weakref.ref(first)
    for original in (beat,) if first in (beat, None) else (beat, first):
        living = [copy for copy in _copies.get(original, ()) if copy.made() is not None]
        _copies[original] = [*living, _Copy(weakref.ref(made), where)]


def _place_of(frame: FrameType | None) -> str | None:
    """FILE:LINE of whoever asked `copy` or torch for a copy; None if it was esper."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in ("copy", "torch"):
            return None if package == "esper" else f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def grows_by_itself(beat: Any) -> None:
    """Notes that the model of this beat gets seeds of its own from now on, be it a copy or not."""
    _growing.add(beat)


def copies_of(beat: Any) -> Counter[str]:
    """How many copies of a model are alive that do not grow, by the FILE:LINE where they were made."""
    if _living(beat):
        gc.collect()  # one that is gone may be in a circle
    return Counter(_living(beat))


def _living(beat: Any) -> list[str]:
    """Where each was made; no reference to a copy outlives the call."""
    made = [(copy.made(), copy.where) for copy in _copies.get(beat, ())]
    return [where for twin, where in made if twin is not None and twin not in _growing]

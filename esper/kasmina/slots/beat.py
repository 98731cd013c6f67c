"""State that the slots of one model share: which have fired in this forward, and what was handed in for it."""

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from esper.kasmina.slots.copies import note_copy


@dataclass(slots=True, eq=False, weakref_slot=True)
class Beat:
    """Shared by every slot of a model.

    Fields:
        inside: a root forward is under way.
        fired: by slot id, whether the slot has fired; False for all at the beginning of a forward.
        logits: class logits handed in for CONFIDENCE; None where there are none.
        weights: weight of each sample, [B], in a training forward that is tallied; None where nothing is tallied.
    """

    inside: bool = False
    fired: dict[str, bool] = field(default_factory=dict)
    logits: Tensor | None = None
    weights: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Beat":
        """A copy, which is noted: what is copied with it does not grow with the model."""
        made = memo[id(self)] = Beat()
        note_copy(self, made)
        for each in fields(self):
            setattr(made, each.name, copy.deepcopy(getattr(self, each.name), memo))
        return made

    def begin(self) -> None:
        """Marks the beginning of a root forward."""
        self.end()
        self.inside = True

    def end(self) -> None:
        """Marks the end of a root forward."""
        self.inside = False
        for slot in self.fired:
            self.fired[slot] = False

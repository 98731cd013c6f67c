"""State that the slots of one model share: which have fired in this forward, and what was handed in for it."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
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

    def begin(self) -> None:
        """Marks the beginning of a root forward."""
        self.end()
        self.inside = True

    def end(self) -> None:
        """Marks the end of a root forward."""
        self.inside = False
        for slot in self.fired:
            self.fired[slot] = False

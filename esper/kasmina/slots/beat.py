"""What the slots of one model share: which have fired in the forward under way, and what was handed in for it."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class Beat:
    """Shared by every slot of a model.

    Fields:
        inside: a root forward is under way. fired: by slot id; False for all at the beginning of a forward.
        logits: class logits handed in for CONFIDENCE, None: none.
        weights: per sample [B], while a forward of training is tallied; None: nothing is tallied.
    """

    inside: bool = False
    fired: dict[str, bool] = field(default_factory=dict)
    logits: Tensor | None = None
    weights: Tensor | None = None

    def begin(self) -> None:
        """A root forward begins."""
        self.end()
        self.inside = True

    def end(self) -> None:
        """It is over."""
        self.inside = False
        for slot in self.fired:
            self.fired[slot] = False

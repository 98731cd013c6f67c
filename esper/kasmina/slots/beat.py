"""State that the slots of one model share: which have fired in this forward, and what was handed in for it."""

import copy
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.kasmina.slots.copies import note_copy
from esper.kasmina.slots.rows import Rows
from esper.kasmina.slots.told import Told

# Private, but it is what torch.utils.checkpoint goes by itself; where it is missing, no forward counts as a second one.
_backward_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


class Circumstances(NamedTuple):
    """What the slots go by in one forward besides tensors, phases and alphas.

    Fields:
        overrides: alphas in force instead of the committed ones, by slot id.
        logits: class logits handed in for CONFIDENCE.
        told: masks of the calls around sites, by slot id.
    """

    overrides: dict[str, float | Rows]
    logits: Tensor | None
    told: dict[str, Told]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Beat:
    """Shared by every slot of a model.

    Fields:
        inside: a root forward is under way.
        fired: by slot id, whether the slot has fired; False for all at the beginning of a forward.
        logits: class logits handed in for CONFIDENCE; None where there are none.
        host_layers: layers of the host that keep keys and values in a cache, as far as their numbers say.
        weights: weight of each sample, [B], in a training forward that is tallied; None where nothing is tallied.
        overrides: alphas in force instead of the committed ones, by slot id; each slot writes its own.
        find_unused: the reduction of gradients copes with parameters that a forward does not use.
        graded: the root forward under way began with gradients enabled.
        recalled: circumstances of the forward whose backward is under way, or of the latest one.
        changes: how often a seed or a gate has come or gone, so that whoever keeps names of parameters knows when they
            are out of date.
    """

    inside: bool = False
    fired: dict[str, bool] = field(default_factory=dict)
    host_layers: int = 0
    logits: Tensor | None = None
    weights: Tensor | None = None
    overrides: dict[str, float | Rows] = field(default_factory=dict)
    find_unused: bool = False
    graded: bool = False
    recalled: Circumstances | None = None
    changes: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Beat":
        """A copy, which is noted: what is copied with it does not grow with the model."""
        made = memo[id(self)] = Beat()
        note_copy(self, made)
        for each in fields(self):
            if each.name == "recalled":
                continue  # a copy has not run
            setattr(made, each.name, copy.deepcopy(getattr(self, each.name), memo))
        return made

    def begin(self) -> None:
        """Marks the beginning of a root forward."""
        self.end()
        self.inside = True

    def remember(self, outputs: list[Tensor], told: dict[str, Told]) -> None:
        """Has the circumstances of this forward recalled when its backward begins, at the tensors that it returned.

        Activation checkpointing runs parts of it again then, when other forwards may have run under others.
        """
        if not torch.is_grad_enabled():
            return
        logits = None if self.logits is None else self.logits.detach()
        now = self.recalled = Circumstances(dict(self.overrides), logits, told)

        def recall(_grad: Tensor) -> None:
            self.recalled = now

        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(recall)

    @property
    def again(self) -> Circumstances | None:
        """The circumstances of the forward of which a part is run again, for backward; None in any other call."""
        return None if self.inside or self.recalled is None or _backward_task() == -1 else self.recalled

    def end(self) -> None:
        """Marks the end of a root forward."""
        self.inside = False
        for slot in self.fired:
            self.fired[slot] = False

"""Names copies of a session's model that have not followed its growth: an average that is kept in one is wrong."""

import sys

from esper.accord.effects import Register, Uproot
from esper.kasmina.slots.copies import copies_of
from esper.kasmina.slots.grown import Grown
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.observers import Observer, Turn


class CopyWatch(Observer):
    """Names the copies that are alive at a tick that plants or prunes a seed or a gate, once for each place of making.

    Args:
        grown: the model.
        narrator: emits the event.
        aloud: whether to print the line on stderr too.
    """

    name = "copies"

    def __init__(self, grown: Grown, narrator: Narrator, *, aloud: bool) -> None:
        self.grown, self.narrator, self.aloud = grown, narrator, aloud
        self._gated = self._slots_with_gate()

    def _slots_with_gate(self) -> set[str]:
        return {slot for slot, holder in self.grown.slots.items() if holder.gate is not None}

    def after_follow(self, turn: Turn) -> None:
        """The model has grown, or was pruned."""
        effects = turn.agreed.outcome.effects
        changes = [f"{effect.slot} was given a seed" for effect in effects if isinstance(effect, Register)]
        changes += [f"{effect.slot} lost its seed" for effect in effects if isinstance(effect, Uproot)]
        before, self._gated = self._gated, self._slots_with_gate()
        changes += [f"{slot} was given a gate" for slot in self.grown.slots if slot in self._gated - before]
        changes += [f"{slot} lost its gate" for slot in self.grown.slots if slot in before - self._gated]
        if not changes:
            return
        for where, count in copies_of(self.grown.beat).items():
            copies = "a copy of the model has" if count == 1 else f"{count} copies of the model have"
            what = (
                f"{copies} not followed it, made at {where}: {', '.join(changes)}; an average kept there is "
                "wrong from here on: use session.ema(decay) (trainer.ema in the trainer), or make the copy anew"
            )
            self.narrator.report_fault(turn.state, what, where)
            if self.aloud:
                print(f"esper: {what}", file=sys.stderr, flush=True)

"""The agreed record under change: each change makes its effects and its events, so that none happens untold."""

from dataclasses import replace

from esper.accord.config import EvidencePolicy
from esper.accord.effects import Discard, Outcome, Uproot
from esper.accord.lifecycle import SlotState, Transition, move
from esper.accord.state import RunState, Spent, Terms
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.breaker import BreakerView
from esper.leyline.events import GateJudged, RampCommitted, StageChanged
from esper.leyline.evidence import GateResult
from esper.leyline.observation import Budgets
from esper.leyline.stages import Mechanical, Op, Stage


class Changes:
    """Collects what happens to an agreed state. ``out`` is what has become of it; ``moved`` are slots that changed.

    Args:
        state: with this tick's evidence taken in. terms: of the run.
    """

    def __init__(self, state: RunState, terms: Terms) -> None:
        self.out = Outcome(state)
        self.terms = terms
        self.moved: set[str] = set()
        self.axes = {"step": state.step, "tick": state.tick, "epoch": state.epoch}
        self._spent: Spent | None = None  # by all slots, kept along once somebody has asked

    @property
    def state(self) -> RunState:
        """As it is now."""
        return self.out.state

    @property
    def budgets(self) -> Budgets:
        """What may still be spent, as it is now."""
        if self._spent is None:
            self._spent = sum((self.terms.spent_by(entry) for entry in self.state.slots), Spent(0, 0, 0))
        return self.terms.budgets(self.state, self._spent)

    @property
    def breaker(self) -> BreakerView:
        """Whether seeds may be born, as it is now."""
        return self.state.governor.breaker.view(self.state.tick)

    def put(self, slot: SlotState) -> None:
        """Replaces one slot's record."""
        if self._spent is not None:
            self._spent += self.terms.spent_by(slot) - self.terms.spent_by(self.state.slot(slot.slot))
        self.out.state = self.state.with_slots({slot.slot: slot})

    def move(self, slot: SlotState, cause: Op | Mechanical, target: Stage, proposal: int = 0) -> SlotState:
        """Takes a slot along an edge, tells it, and has a seed that is pruned uprooted."""
        after, happened = move(
            slot, cause, target, tick=self.state.tick, proposal=proposal, history=self.terms.slots_config.history
        )
        self.put(after)
        self.moved.add(slot.slot)
        self._tell(happened)
        if target is Stage.PRUNED:
            self.out.effects.append(Uproot(slot.slot))
        return after

    def _tell(self, happened: Transition) -> None:
        if happened.source is not happened.target:
            self.out.events.append(
                StageChanged(
                    **self.axes,
                    slot=happened.slot,
                    source=happened.source,
                    target=happened.target,
                    cause=happened.cause,
                    generation=happened.generation,
                    blueprint=happened.blueprint,
                    proposal=happened.proposal,
                )
            )

    def ramp(self, slot: SlotState, *, target: float, ticks: int, curve: Curve, steepness: float, op: Operator) -> None:
        """Commits a path from the present alpha; it begins with the coming optimizer step."""
        step = self.state.step
        start, (now, _) = slot.alpha(step), slot.operators(step)
        if op.is_gated and slot.stage is Stage.HOLDING:  # from full alpha to full alpha: what it would be there
            op = Operator.ADD
        ramp = Ramp(
            start=start,
            target=target,
            first_step=step,
            last_step=step + ticks * self.terms.tick_steps,
            curve=curve,
            steepness=steepness,
            operator=op,
            fades_from=now if start > 0.0 and now is not op else None,  # at alpha 0 there is nothing to fade
        )
        self.put(replace(slot, operator=op, ramp=ramp, request=None, changed_tick=self.state.tick))
        self.out.events.append(
            RampCommitted(
                **self.axes,
                slot=slot.slot,
                start=start,
                target=target,
                first_step=ramp.first_step,
                last_step=ramp.last_step,
                curve=curve.name,
                operator=op.name,
                fades_from=None if ramp.fades_from is None else ramp.fades_from.name,
            )
        )

    def blend(self, slot: SlotState) -> None:
        """Starts the ramp that the birth command chose."""
        assert slot.curve is not None
        assert slot.operator is not None
        self.ramp(
            slot, target=slot.target, ticks=slot.tempo, curve=slot.curve, steepness=slot.steepness, op=slot.operator
        )

    def discard(self, slot: SlotState) -> None:
        """A staged seed is let go: nothing has changed, so its germination is not spent either."""
        self.out.state = replace(self.state, germinations=self.state.germinations - 1)
        self.out.effects.append(Discard(slot.slot))

    def judged(self, slot: str, result: GateResult) -> None:
        """Tells a gate's verdict."""
        enforced = self.terms.gates.evidence == EvidencePolicy.ENFORCE
        self.out.events.append(GateJudged(**self.axes, slot=slot, enforced=enforced, result=result))

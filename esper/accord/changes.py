"""Changes of the agreed record; each one also appends its effects and events, so that no change goes unreported."""

from dataclasses import replace

from esper.accord.config import EvidencePolicy
from esper.accord.effects import Discard, Outcome, Uproot
from esper.accord.facts import harm_of, running_of
from esper.accord.lifecycle import SlotState, Transition, move
from esper.accord.state import RunState, Spent, Terms
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.breaker import BreakerView
from esper.leyline.events import FossilHurts, GateJudged, RampCommitted, StageChanged
from esper.leyline.evidence import GateResult
from esper.leyline.observation import Budgets
from esper.leyline.stages import Mechanical, Op, Stage


class Changes:
    """Applies changes to an agreed state and collects their effects and events.

    Args:
        state: the state with this tick's evidence absorbed.
        terms: terms of the run.

    Attributes:
        outcome: the state as changed so far, with effects and events.
        moved: slots that changed stage in this tick, or staged a seed or let one go.
        axes: step, tick and epoch of the events.
    """

    def __init__(self, state: RunState, terms: Terms) -> None:
        self.outcome = Outcome(state)
        self.terms = terms
        self.moved: set[str] = set()
        self.axes = {"step": state.step, "tick": state.tick, "epoch": state.epoch}
        self._spent: Spent | None = None  # by all slots; kept up to date from the first time it is needed

    @property
    def state(self) -> RunState:
        """The state as changed so far."""
        return self.outcome.state

    @property
    def budgets(self) -> Budgets:
        """What may still be spent after the changes so far."""
        if self._spent is None:
            self._spent = self.terms.spent(self.state)
        return self.terms.budgets(self.state, self._spent)

    @property
    def breaker(self) -> BreakerView:
        """The breaker after the changes so far."""
        return self.state.governor.breaker.view(self.state.tick)

    def put(self, slot: SlotState) -> None:
        """Replaces one slot's record."""
        if self._spent is not None:
            self._spent += self.terms.spent_by(slot) - self.terms.spent_by(self.state.slot(slot.slot))
        self.outcome.state = self.state.with_slots({slot.slot: slot})

    def move(self, slot: SlotState, cause: Op | Mechanical, target: Stage, proposal: int = 0) -> SlotState:
        """Moves a slot along an edge, reports it, and uproots a seed that is pruned."""
        after, transition = move(
            slot, cause, target, tick=self.state.tick, proposal=proposal, history=self.terms.slots_config.history
        )
        self.put(after)
        self.moved.add(slot.slot)
        self._report_transition(transition)
        if target is Stage.PRUNED:
            self.outcome.effects.append(Uproot(slot.slot))
        return after

    def _report_transition(self, transition: Transition) -> None:
        if transition.source is not transition.target:
            self.outcome.events.append(
                StageChanged(
                    **self.axes,
                    slot=transition.slot,
                    source=transition.source,
                    target=transition.target,
                    cause=transition.cause,
                    generation=transition.generation,
                    blueprint=transition.blueprint,
                    proposal=transition.proposal,
                )
            )

    def ramp(self, slot: SlotState, *, target: float, ticks: int, curve: Curve, steepness: float, op: Operator) -> None:
        """Commits a ramp from the present alpha; it starts with the next optimizer step, and running evidence ends."""
        step = self.state.step
        start, (now, _) = slot.alpha(step), slot.operators(step)
        if op.is_gated and slot.stage is Stage.HOLDING:  # a ramp from full to full alpha, where a gated operator is ADD
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
        self.put(
            replace(
                slot,
                operator=op,
                ramp=ramp,
                request=None,
                evidence=None,
                lasting=None,
                changed_tick=self.state.tick,
            )
        )
        self.outcome.events.append(
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
        """Starts the ramp that the birth command asked for."""
        assert slot.curve is not None
        assert slot.operator is not None
        self.ramp(
            slot, target=slot.target, ticks=slot.tempo, curve=slot.curve, steepness=slot.steepness, op=slot.operator
        )

    def discard(self, slot: SlotState) -> None:
        """Discards a staged seed and gives its germination back, since the seed never entered the model."""
        self.outcome.state = replace(self.state, germinations=self.state.germinations - 1)
        self.outcome.effects.append(Discard(slot.slot))

    def report_verdict(self, slot: str, result: GateResult) -> None:
        """Reports a gate's verdict."""
        enforced = self.terms.gates.evidence == EvidencePolicy.ENFORCE
        self.outcome.events.append(GateJudged(**self.axes, slot=slot, enforced=enforced, result=result))

    def report_fossils(self) -> None:
        """Reports each fossil of which this tick's look has shown, with those before, that the network is better
        without it."""
        for slot in self.state.slots:
            if slot.stage is not Stage.FOSSILIZED or slot.looked_tick != self.state.tick or slot.evidence is None:
                continue
            hurts = harm_of(slot, self.terms)
            if hurts is not None and hurts.passed:
                self.outcome.events.append(
                    FossilHurts(
                        **self.axes,
                        slot=slot.slot,
                        blueprint=str(slot.blueprint),
                        running=running_of(slot, self.terms),
                        chance=hurts.level,
                        clusters=hurts.clusters,
                    )
                )

"""Rules with reasons, for any topology and any number of slots.

    EMPTY       GERMINATE at once after the warm-up (eager), or at a plateau judged by the metric's own noise; at most
                one birth a tick, into the slot with the fewest recent failures, while enough of the run is left
    GERMINATED  ADVANCE as soon as G1 would pass
    TRAINING    ADVANCE on fresh evidence that passes G2; PRUNE once every look is spent without it
    BLENDING    at rest at full alpha: ADVANCE when G3 passes; PRUNE by a ramp after ``patience`` readings against it
    HOLDING     FOSSILIZE when G5 passes on fresh evidence; PRUNE by a ramp once all looks together show that the seed
                hurts, or all continuations in copies that the network does as well without it; once every look is
                spent, PRUNE unless all looks together speak for it: then it is *undecided*
    FOSSILIZED  with ``remove_fossils``: PRUNE by a ramp when G6 passes, that is once the network is shown to be better
                without it

An undecided seed has not earned its place, but the mean over all its looks is above zero by ``undecided_se`` standard
errors; pruning it would lose what it learned. It is looked at again now and then, from the reserve, and goes as soon as
the mean falls below that. It makes way if undecided seeds use up the whole budget of live seeds and another slot waits
for a birth.

Quarantine, ramps and cool-down are mechanical and not decided here. Absent or stale evidence is never read as a number:
without a fresh reading nothing advances. Births are remembered by what later observations show, not by what was
proposed: a seed that is gone counts as failed, whatever ended it, and so does a proposed birth that never happened.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from esper.leyline.alpha import AlphaMode
from esper.leyline.commands import Command
from esper.leyline.legality import why_illegal, why_refused
from esper.leyline.observation import Observation, SlotObservation
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.stages import Op, Stage
from esper.tamiyo.common import check_observation
from esper.tamiyo.heuristic_config import HeuristicConfig, PlateauMetric, Undecided
from esper.tamiyo.plateau import measure_trend
from esper.tamiyo.registry import register
from esper.tamiyo.rotation import (
    Rotation,
    SlotRecord,
    check_preference,
    choose_blueprint,
    count_failures,
    update_record,
)


@dataclass(slots=True, kw_only=True)
class HeuristicState:
    """Memory of the rules.

    Fields:
        losses: readings of the plateau metric since the last birth, oldest first; at most two windows.
        loss_tick: tick at which the newest of them was measured.
        slots: history of each slot.
    """

    losses: list[float]
    loss_tick: int | None
    slots: dict[str, SlotRecord]


@register("heuristic", HeuristicConfig)
class HeuristicController:
    """Applies the rules above."""

    name = "heuristic"

    def __init__(self, config: HeuristicConfig, *, slots: tuple[str, ...], seed: int) -> None:
        self._config = config
        self._slots = slots
        self._rotation = Rotation(
            preference=tuple(config.blueprints),
            half_life=config.penalty_half_life,
            growth=config.penalty_growth,
            max_penalty=config.max_penalty,
            spread=config.spread,
        )
        self._state = HeuristicState(losses=[], loss_tick=None, slots={slot: SlotRecord() for slot in slots})

    def state_dict(self) -> dict[str, Any]:
        """Returns `HeuristicState` as plain data."""
        return to_plain(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned.

        Raises:
            ValueError: a field is missing or unknown, or the slots are not this controller's.
        """
        loaded = from_plain(HeuristicState, state)
        if set(loaded.slots) != set(self._slots):
            raise ValueError(f"HeuristicState.slots: {', '.join(loaded.slots)}; expected {', '.join(self._slots)}")
        self._state = loaded

    def decide(self, observation: Observation) -> list[Command]:
        """Returns at most one legal command per slot, each with its reason, row-major."""
        check_observation(observation, self._slots)
        check_preference(self._rotation, observation)
        self._remember(observation)
        commands = {view.slot: self._tend(observation, view) for view in observation.slots}
        growth = self._propose_birth(observation) or self._make_way(observation)
        if growth is not None:
            commands[growth.slot] = growth
        return [command for command in commands.values() if command and why_refused(observation, command) is None]

    def _remember(self, observation: Observation) -> None:
        for view in observation.slots:
            update_record(self._state.slots[view.slot], view, observation.tick, self._rotation)
        validation = self._config.plateau_metric is PlateauMetric.VALIDATION
        reading = observation.validation_loss if validation else observation.train_loss
        if reading.is_measured and reading.value is not None and reading.tick != self._state.loss_tick:
            self._state.losses = [*self._state.losses, reading.value][-2 * self._config.plateau_window :]
            self._state.loss_tick = reading.tick

    def _tend(self, observation: Observation, view: SlotObservation) -> Command | None:
        """Applies the rule of a living seed's stage; None lets it wait."""
        if view.ending or view.alpha_mode is not AlphaMode.HOLD:
            return None
        record, evidence = self._state.slots[view.slot], f"contribution {view.running} over all looks"
        passed = view.verdict is not None and view.verdict.passed
        why = "no verdict" if view.verdict is None else view.verdict.reason
        spent = self._is_spent(observation, view)
        if view.stage is Stage.GERMINATED:
            if passed:
                return Command(slot=view.slot, op=Op.ADVANCE, reason="G1 passed")
            if record.stalled >= self._config.stall_ticks:
                return self._prune(view, 0, f"not ready for {record.stalled} ticks: {why}")
        if view.stage is Stage.TRAINING:
            if passed and view.contribution.is_measured:
                return Command(slot=view.slot, op=Op.ADVANCE, reason=f"G2 passed: {evidence}")
            if spent:
                return self._prune(view, 0, f"{view.looks} of {view.max_looks} looks spent: {evidence}; {why}")
        if view.stage is Stage.BLENDING:
            return self._tend_blending(view, record, passed, f"{evidence}; {why}")
        if view.stage is Stage.HOLDING:
            if passed and view.contribution.is_measured:
                return Command(slot=view.slot, op=Op.FOSSILIZE, reason=f"G5 passed: {evidence}")
            if view.hurts is not None and view.hurts >= 1.0:
                return self._prune(view, self._config.prune_ticks, f"shown to hurt: {evidence}")
            if self._is_refused_lasting(view):
                return self._prune(view, self._config.prune_ticks, f"its help does not last: {why}")
            if self._awaits_lasting(view):
                return None
            if spent and not self._is_undecided(observation, view):
                ticks = self._config.prune_ticks
                return self._prune(view, ticks, f"{view.looks} of {view.max_looks} looks spent: {evidence}; {why}")
        if view.stage is Stage.FOSSILIZED and self._config.remove_fossils and passed:
            ticks = max(1, self._config.prune_ticks)
            return self._prune(view, ticks, f"G6 passed: {evidence} since it became a fossil")
        return None

    def _is_spent(self, observation: Observation, view: SlotObservation) -> bool:
        """Returns whether no looks are left and the evidence of the last one has had a tick to arrive."""
        spent = self._state.slots[view.slot].spent_tick
        return spent is not None and observation.tick > spent

    def _is_refused_lasting(self, view: SlotObservation) -> bool:
        """Returns whether a seed has been continued in copies as often as a life may, each time without success, and is
        not to be held: copies that lost it had not made up for it by either mark, so that pruning would lose it too."""
        if view.verdict is None or view.continuations < view.max_continuations:
            return False
        missed = view.lasting.value is not None and view.lasting.value > 0.0
        if missed and self._config.undecided is Undecided.HOLD:
            return False
        return any(check.name == "lasting help" and not check.passed for check in view.verdict.checks)

    def _awaits_lasting(self, view: SlotObservation) -> bool:
        """Returns whether all that a seed lacks is a continuation in copies, and its life may have one more."""
        if view.verdict is None or view.continuations >= view.max_continuations:
            return False
        return [check.name for check in view.verdict.checks if not check.passed] == ["lasting help"]

    def _is_undecided(self, observation: Observation, view: SlotObservation) -> bool:
        """Returns whether a seed is undecided: in HOLDING, sound, without looks left, refused by G5, and all its looks
        together speak for it."""
        if self._config.undecided is Undecided.PRUNE or view.stage is not Stage.HOLDING:
            return False
        if view.verdict is None or view.verdict.passed:
            return False
        sound = all(check.passed for check in view.verdict.checks if check.integrity)
        return sound and self._is_spent(observation, view) and self._speaks_for(view)

    def _speaks_for(self, view: SlotObservation) -> bool:
        mean, se = view.running.value, view.running.se
        return mean is not None and se is not None and mean > self._config.undecided_se * se

    def _tend_blending(self, view: SlotObservation, record: SlotRecord, passed: bool, why: str) -> Command | None:
        if record.against >= self._config.patience:
            return self._prune(view, self._config.prune_ticks, f"{record.against} readings against it: {why}")
        if view.alpha_target < 1.0:
            return Command(
                slot=view.slot,
                op=Op.SET_ALPHA_TARGET,
                target=1.0,
                ticks=self._config.tempo_ticks,
                curve=self._config.curve,
                reason=f"rests at alpha {view.alpha_target:g}, is judged at 1",
            )
        if passed:
            return Command(slot=view.slot, op=Op.ADVANCE, reason=f"G3 passed: {why}")
        if record.stalled >= self._config.stall_ticks:
            return self._prune(view, self._config.prune_ticks, f"at rest for {record.stalled} ticks: {why}")
        return None

    def _prune(self, view: SlotObservation, ticks: int, reason: str) -> Command:
        return Command(slot=view.slot, op=Op.PRUNE, ticks=ticks, curve=self._config.curve, reason=reason)

    def _propose_birth(self, observation: Observation) -> Command | None:
        """Returns at most one GERMINATE: births come one by one, so that the evidence of each stands alone for
        longer."""
        why = self._why_grow(observation)
        if why is None:
            return None
        records = self._state.slots
        empty = [view for view in observation.slots if view.stage is Stage.EMPTY and not view.staged]
        order = sorted(empty, key=lambda view: count_failures(records[view.slot], observation.tick, self._rotation))
        for view in order:  # sorted() is stable: equals stay row-major
            choice = choose_blueprint(self._rotation, records, observation, view)
            if choice is None:
                continue
            name, why_this = choice
            command = Command(
                slot=view.slot,
                op=Op.GERMINATE,
                blueprint=name,
                ticks=self._config.tempo_ticks,
                curve=self._config.curve,
                reason=f"{why}; {why_this}",
            )
            if why_refused(observation, command) is None:
                records[view.slot].proposed = name
                self._state.losses = []  # a plateau justifies one birth only
                return command
        return None

    def _make_way(self, observation: Observation) -> Command | None:
        """Returns a PRUNE of the least of the undecided seeds if they use up the budget of live seeds and another slot
        waits for a birth."""
        live = observation.budgets.live
        why = None if live is None or live > 0 else self._why_grow(observation)
        if why is None:
            return None
        living = [view for view in observation.slots if view.stage.is_live or view.staged]
        if not living or not all(self._is_undecided(observation, view) for view in living):
            return None
        freed = dataclasses.replace(observation, budgets=dataclasses.replace(observation.budgets, live=1))
        records = self._state.slots
        if not any(
            why_illegal(freed, view, Op.GERMINATE) is None
            and choose_blueprint(self._rotation, records, freed, view) is not None
            for view in freed.slots
        ):
            return None
        least = min(living, key=lambda view: view.running.value or 0.0)
        reason = f"undecided at contribution {least.running} over all looks, makes way for a birth: {why}"
        return self._prune(least, self._config.prune_ticks, reason)

    def _why_grow(self, observation: Observation) -> str | None:
        """Returns the reason for a birth now, or None."""
        if observation.tick < self._config.warmup_ticks or observation.tick == 0:
            return None
        ticks_left = (observation.total_steps - observation.step) / (observation.step / observation.tick)
        if ticks_left < self._config.life_ticks:
            return None
        if self._config.eager:
            return f"the slot is free, and the warm-up of {self._config.warmup_ticks} ticks over"
        trend = measure_trend(self._state.losses, self._config.plateau_window)
        if trend is None or trend.improvement > self._config.plateau_k_se * trend.se:
            return None
        metric, window = self._config.plateau_metric.value, self._config.plateau_window
        return f"plateau: {metric} loss fell by {trend.improvement:.3g} ± {trend.se:.2g} in {window} readings"

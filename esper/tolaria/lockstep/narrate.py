"""Turns the agreed changes of a tick into events. Every rank builds them; only rank 0's sink writes them all."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from esper.accord.breaker import BreakerState
from esper.accord.facts import harm_of, help_of, running_of
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Symptom, Verdict
from esper.kasmina.births import Library
from esper.kasmina.kernels.rehearsing import Compiled
from esper.kasmina.slots.grown import Grown
from esper.leyline.commands import Command
from esper.leyline.events import (
    BreakerChanged,
    CommandJudged,
    ContributionMeasured,
    Event,
    Fault,
    GateJudged,
    KernelsCompiled,
    LibraryUsed,
    LossShifted,
    Panic,
    Rewrapped,
    RolledBack,
    RunStarted,
    SeedBorn,
    SeedContinued,
    SettingsChanged,
    SlotDegraded,
    StageChanged,
    StepSkipped,
    WorthMeasured,
)
from esper.leyline.events.task import OF_SESSION, TaskInfo
from esper.leyline.protocols import EventSink
from esper.leyline.stages import Mechanical, Stage
from esper.tolaria.growth.continuation import describe_copies
from esper.tolaria.lockstep.ticks import TickTeller
from esper.tolaria.lockstep.wire import Agreed

ELSEWHERE = "a fallback on another rank, whose own event file says why"


def axes_of(state: RunState) -> dict[str, int]:
    """The axes of an event about this state."""
    return {"step": state.step, "tick": state.tick, "epoch": state.epoch}


def trouble_events(before: RunState, after: RunState) -> list[Event]:
    """The events of a panic, a shift and a breaker that changed between two states; on the axes of the second state."""
    events: list[Event] = []
    sick = after.governor
    if sick.symptom is Symptom.SHIFT:
        events.append(LossShifted(**axes_of(after), words=sick.words))
    if sick.verdict is Verdict.PANIC:
        events.append(
            Panic(**axes_of(after), symptom=sick.symptom.name, words=sick.words, healthy_step=sick.healthy_step)
        )
    return [*events, *breaker_events(before.governor.breaker, after)]


def breaker_events(old: BreakerState, after: RunState) -> list[Event]:
    """The event of a breaker that changed; empty if it did not."""
    new = after.governor.breaker
    if old.turns == new.turns:
        return []
    return [
        BreakerChanged(
            **axes_of(after),
            source=old.phase,
            target=new.phase,
            ticks_left=new.view(after.tick).ticks_left,
            reason=new.why,
            manual=new.manual,
        )
    ]


class Narrator:
    """Emits the events of a run to a sink; counts the model's parameters, and says what the task is."""

    def __init__(self, sink: EventSink, grown: Grown, task: TaskInfo = OF_SESSION) -> None:
        self.sink, self.grown, self.task = sink, grown, task
        self._degraded: dict[str, SlotDegraded] = {}  # reported, and still going on
        self._counted = (-1, 0)  # changes of the model, and its parameters then
        self._ticks = TickTeller()

    def emit(self, event: Event | None) -> None:
        """Emits an event, if there is one."""
        if event is not None:
            self.sink.emit(event)

    def emit_all(self, events: Iterable[Event]) -> None:
        """Emits events in their order."""
        for event in events:
            if isinstance(event, RolledBack):
                self._ticks.forget()
            self.sink.emit(event)

    def _parameters(self) -> int:
        if self._counted[0] != self.grown.beat.changes:
            count = sum(parameter.numel() for parameter in self.grown.model.parameters())
            self._counted = self.grown.beat.changes, count
        return self._counted[1]

    def report_start(self, state: RunState, terms: Terms, resumed_from: int | None) -> None:
        """Reports that the group began or resumed the run."""
        self.emit(
            RunStarted(
                **axes_of(state),
                world_size=terms.world_size,
                resumed_from=resumed_from,
                parameters=self._parameters(),
                total_steps=terms.total_steps,
                slots=tuple(self.grown.slots),
                uncounted=terms.costs.uncounted if terms.costs is not None else (),
                probe=str(terms.probe) if terms.probe.shares else "none",
                copies=describe_copies(self.grown, terms.gates),
                task=self.task,
            )
        )

    def report_changes(self, state: RunState, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Reports the settings that differ from those of the checkpoint, as (before, after) by dotted path."""
        for key, (before, after) in changes.items():
            self.emit(SettingsChanged(**axes_of(state), key=key, before=before, after=after))

    def report_evidence(
        self, before: RunState, state: RunState, terms: Terms, agreed: Agreed, first_skipped: int
    ) -> None:
        """Reports paired evidence, degraded seeds, dropped gradients and skipped steps."""
        for old, new in zip(before.slots, state.slots, strict=True):
            if new.stage is Stage.EMPTY and new.slot not in self._degraded:
                continue
            if old.request is not None:
                weighed = harm_of(new, terms) if new.stage is Stage.FOSSILIZED else help_of(new, terms)
                self.emit(
                    ContributionMeasured(
                        **axes_of(state),
                        slot=new.slot,
                        stage=new.stage,
                        look=old.request.look,
                        alpha=new.contribution_alpha,
                        contribution=new.contribution,
                        running=running_of(new, terms),
                        log_evidence=None if weighed is None else weighed.log_e,
                        chance=new.level if weighed is None else weighed.level,
                        clusters=0 if new.evidence is None else new.evidence.sums.clusters,
                        counts=old.request.counts,
                        refill=old.request.refill,
                    )
                )
            if new.continued != old.continued and new.stage is old.stage:
                self._report_continued(state, new)
            self._report_degraded(state, new)
            if new.nonfinite_steps:
                text = (
                    f"{new.nonfinite_steps} steps had a non-finite gradient in {new.slot} ({new.stage.name}); dropped"
                )
                self.emit(Fault(**axes_of(state), what=text, where=new.slot))
        if state.skipped:
            ranks = agreed.nonfinite_ranks
            self.emit(StepSkipped(**axes_of(state), count=state.skipped, ranks=ranks, first_step=first_skipped))

    def report_worth(self, before: RunState, state: RunState, sums: Mapping[str, float]) -> None:
        """Reports what each blended seed is worth, if that was measured; absent where a loss was not finite."""
        if not sums.get("worth_count"):
            return
        for old, new in zip(before.slots, state.slots, strict=True):
            if old.stage.is_blended:
                name, all_seeds = str(new.blueprint), state.together
                self.emit(
                    WorthMeasured(**axes_of(state), slot=new.slot, blueprint=name, worth=new.worth, together=all_seeds)
                )

    def _report_continued(self, state: RunState, slot: SlotState) -> None:
        found, names = slot.lasting, ("first", "last", "expected", "lower", "ahead")
        values: dict[str, Any] = {name: None if found is None else getattr(found, name) for name in names}
        self.emit(SeedContinued(**axes_of(state), slot=slot.slot, number=slot.continued, **values))

    def report_left_out(self, before: RunState, state: RunState, sums: Mapping[str, float]) -> None:
        """Reports probe samples whose loss is not finite: once a life, and once more if they cost it its evidence."""
        for old, new in zip(before.slots, state.slots, strict=True):
            void = new.void_looks > old.void_looks == 0
            if not void and not new.left_out > old.left_out == 0:
                continue
            left_out = int(sums[f"{new.slot}.probe_left_out"])
            count = int(sums[f"{new.slot}.probe_count"]) + left_out
            text = (
                f"the loss of {left_out} of {count} probe samples is not finite, with the seed in {new.slot} or without"
                if left_out
                else f"the losses of probe samples are too large to be summed, with the seed in {new.slot} or without"
            )
            then = (
                "so this look gives no evidence (gates.max_left_out), and without evidence no seed passes its gates"
                if void
                else "they are left out"
            )
            advice = "look at these samples (labels that are all ignored?), or make the loss finite for them"
            self.emit(Fault(**axes_of(state), what=f"{text}; {then}; {advice}", where=new.slot))

    def report_trouble(self, before: RunState, after: RunState) -> None:
        """Reports a panic or a shift, and a breaker that changed."""
        self.emit_all(trouble_events(before, after))

    def report_decisions(self, events: list[Event], commands: Mapping[str, Command] | None, terms: Terms) -> None:
        """Reports the reducer's events; on rank 0 with the controller's reasons, which do not travel."""
        reasons = {command.proposal: command.reason for command in (commands or {}).values() if command.proposal}
        for event in events:
            if isinstance(event, CommandJudged) and event.command.proposal in reasons:
                why = reasons[event.command.proposal]
                told = {"reason": why} if event.applied else {"command": replace(event.command, reason=why)}
                event = replace(event, **told)
            if isinstance(event, GateJudged):
                checks = tuple(c for c in event.result.checks if not (c.integrity and c.passed))
                event = replace(event, result=replace(event.result, checks=checks))
            self.emit(event)
            if isinstance(event, StageChanged) and event.target is Stage.GERMINATED:
                self._report_birth(event, terms)
            if isinstance(event, StageChanged) and event.cause == Mechanical.DEGRADED.name:
                degraded = self._degraded.pop(event.slot)
                self.emit(replace(degraded, step=event.step, tick=event.tick, epoch=event.epoch, pruned=True))

    def _report_birth(self, change: StageChanged, terms: Terms) -> None:
        info = terms.info(change.slot, str(change.blueprint))
        self.emit(
            SeedBorn(
                step=change.step,
                tick=change.tick,
                epoch=change.epoch,
                slot=change.slot,
                blueprint=info.name,
                generation=change.generation,
                proposal=change.proposal,
                parameters=info.parameters,
                flops=info.flops,
            )
        )

    def _report_degraded(self, state: RunState, slot: SlotState) -> None:
        if slot.degraded_tick is None:
            self._degraded.pop(slot.slot, None)
        elif slot.slot not in self._degraded:
            event = SlotDegraded(
                **axes_of(state),
                slot=slot.slot,
                blueprint=str(slot.blueprint),
                ranks=slot.degraded,
                reason=self.grown.slots[slot.slot].degraded or ELSEWHERE,
                pruned=False,
            )
            self._degraded[slot.slot] = event
            self.emit(event)

    def report_fault(self, state: RunState, what: str, where: str) -> None:
        """Reports that something is broken; the run goes on."""
        self.emit(Fault(**axes_of(state), what=what, where=where))

    def report_local_buffers(self, state: RunState, names: list[str]) -> None:
        """Reports the host's buffers that were found to differ between ranks, and clears the list."""
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            what = f"buffers of the host differ between ranks, and stay as they are on each: {shown}"
            advice = "a checkpoint has rank 0's; to average them at each tick, name them in average_buffers"
            self.report_fault(state, f"{what}; {advice}", names[0])
        names.clear()

    def report_failures(self, state: RunState, failures: dict[str, str]) -> None:
        """Reports why staged seeds failed on this rank, and clears the record."""
        for slot, text in failures.items():
            self.report_fault(state, f"seed for {slot} cannot be held here: {text}", slot)
        failures.clear()

    def report_library(self, state: RunState, library: Library, *, waited_ms: float) -> None:
        """Reports what the seed library did since the last tick, and what it could not keep."""
        figures = library.figures(state.tick)
        if figures.births or figures.disk_hits or figures.built or figures.evicted or figures.failed or waited_ms:
            self.emit(LibraryUsed(**axes_of(state), **asdict(figures), waited_ms=waited_ms))
        while library.troubles:
            self.report_fault(state, library.troubles.pop(0), "seed library")

    def report_compiled(self, state: RunState, reports: list[Compiled]) -> None:
        """Reports what was compiled since the last tick, and empties the list."""
        for took in reports:
            self.emit(KernelsCompiled(**{**axes_of(state), **asdict(took)}))
        reports.clear()

    def report_wrap(self, state: RunState, wrap_ms: float | None, *, parameters: int, saved: bool) -> None:
        """Reports a new wrapper, if there is one."""
        if wrap_ms is not None:
            cause = "save" if saved else "gradient set changed"
            self.emit(Rewrapped(**axes_of(state), cause=cause, parameters=parameters, wrap_ms=wrap_ms))

    def report_tick(self, before: RunState, state: RunState, **figures: float) -> None:
        """Reports a tick; see `TickTeller.event_of`."""
        self.emit(self._ticks.event_of(before, state, parameters=self._parameters(), **figures))

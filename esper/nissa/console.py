"""Progress on the screen, from rank 0: a bar on a terminal, plain lines in a file or a pipe.

    ━━━━━━━━━━━━━━━╸━━━━━━━━━ 350/600  0:00:12 left 0:00:09  loss 0.412  acc 87.1%  val 0.390 88.2%
    r0c0 BLENDING 0.45 conv_light   r0c1 EMPTY   r1c0 FOSSILIZED 1.00 conv_heavy

Stage changes, refusals, vetoes, skipped steps, panics, rollbacks and faults get a line each, above the bar. Wall-clock
time only decides how often a plain line is shown.
"""

import contextlib
import sys
import threading
import time
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from esper.leyline.events import (
    BirthVetoed,
    BreakerChanged,
    CheckpointSaved,
    CommandRefused,
    EarlyStopped,
    Event,
    Fault,
    FossilHurts,
    HealthAlert,
    LossSettled,
    LossShifted,
    OrdersRefused,
    OrderTaken,
    Panic,
    PolicyAlarm,
    RateCut,
    RolledBack,
    RunEnded,
    RunExtended,
    RunStarted,
    SettingsChanged,
    SlotLine,
    StageChanged,
    StepSkipped,
    TickDone,
)
from esper.leyline.events.task import OF_SESSION, TaskInfo
from esper.leyline.evidence import Reading
from esper.leyline.stages import Stage
from esper.nissa.config import ConsoleMode
from esper.nissa.screen import safe

_STYLES = {
    Stage.EMPTY: "dim",
    Stage.GERMINATED: "yellow",
    Stage.TRAINING: "yellow",
    Stage.BLENDING: "cyan",
    Stage.HOLDING: "blue",
    Stage.FOSSILIZED: "green",
    Stage.PRUNED: "red",
    Stage.EMBARGOED: "dim red",
    Stage.RESETTING: "dim red",
}

MOST_METRICS = 3  # of a task, in a line


def _slot(line: SlotLine) -> Text:
    parts: list[str | tuple[str, str]] = [f"{line.slot} ", (line.stage.name, _STYLES[line.stage])]
    if line.stage.has_seed:
        gated = f" (effective {line.effective_alpha.value:.2f})" if line.effective_alpha.value is not None else ""
        parts.append(f" {line.alpha:.2f}{gated} {line.blueprint}")
    return Text.assemble(*parts)


def _number(reading: Reading, form: str) -> str:
    """Formats a reading for the screen; '-' if it is absent."""
    return "-" if reading.value is None else format(reading.value, form)


def _scores(event: TickDone, task: TaskInfo) -> str:
    """Loss, accuracy where there is one, and the task's own metrics of validation."""
    train, validation = _number(event.train_loss, ".3f"), _number(event.validation_loss, ".3f")
    if task.graded:
        train += f"  acc {_number(event.train_accuracy, '.1%')}"
        validation += f" {_number(event.validation_accuracy, '.1%')}"
    for metric in task.metrics[:MOST_METRICS]:
        reading = event.metrics.get(f"validation_{metric.name}")
        if reading is not None and reading.value is not None:
            validation += f" {metric.name} {metric.show(reading.value)}"
    return f"loss {train}  val {validation}"


def _rollback(event: RolledBack) -> str:
    blamed = zip(event.blamed, event.blamed_ticks, strict=True)
    measures = [f"{slot} blamed for its change at tick {tick}" for slot, tick in blamed]
    if event.skipped_steps:
        measures.append(f"samples of steps {event.skipped_from} to {event.skipped_from + event.skipped_steps} left out")
    slow = "" if event.recovery_ms <= event.budget_ms else f", more than the {event.budget_ms:.0f} it may take"
    place = {"ram": "memory", "disk": "disk"}[event.source]
    return (
        f"back to step {event.to_step} from {place} in {event.recovery_ms:.0f} ms{slow}, replay {event.replay}: "
        f"{'; '.join(measures)}"
    )


def describe_event(event: Event) -> tuple[str, str] | None:
    """Returns one line for an event that people want to see at once, and its style; None for all other events."""
    at = f"step {event.step}"
    if isinstance(event, StageChanged):
        seed = f" {event.blueprint}" if event.blueprint else ""
        text = f"{at}  {event.slot} {event.source.name} -> {event.target.name}{seed} ({event.cause})"
        return text, _STYLES[event.target]
    if isinstance(event, CommandRefused):
        return f"{at}  {event.command.slot} {event.command.op.name} refused: {event.reason}", "yellow"
    if isinstance(event, BirthVetoed):
        return f"{at}  {event.slot} {event.blueprint} vetoed by rank {event.rank}: {event.reason}", "red"
    if isinstance(event, StepSkipped):
        ranks = f", ranks {', '.join(map(str, event.ranks))}" if event.ranks else ""
        return f"{at}  {event.count} steps skipped from step {event.first_step}: gradient not finite{ranks}", "red"
    if isinstance(event, Fault):
        return f"{at}  fault in {event.where}: {event.what}", "bold red"
    if isinstance(event, Panic):
        return f"{at}  panic, {event.symptom}: {event.words}", "bold red"
    if isinstance(event, FossilHurts):
        return f"{at}  {event.slot} {event.blueprint}: better without this fossil: {event.running}", "yellow"
    if isinstance(event, HealthAlert | LossSettled):
        return f"{at}  {event.line}", "yellow" if isinstance(event, HealthAlert) else "dim"
    if isinstance(event, LossShifted):
        return f"{at}  shift: {event.words}", "yellow"
    if isinstance(event, SettingsChanged):
        return f"{at}  setting changed: {event.key} = {event.after}, it was {event.before}", "yellow"
    if isinstance(event, EarlyStopped):
        return f"{at}  {event.metric} has not improved for {event.ticks} ticks: the end", "yellow"
    if isinstance(event, RateCut):
        return f"{at}  {event.metric} does not improve: learning rate {event.lr:.3g} from here on", "yellow"
    if isinstance(event, RunExtended):
        text = f"{at}  the run is {event.after:,} steps long, it was {event.before:,}"
        if event.lr_after != event.lr_before:
            rates = f"{event.lr_after:.3g} instead of {event.lr_before:.3g}"
            text += f"; {event.schedule} schedule over all of them: the learning rate goes on at {rates}"
        return text, "yellow"
    if isinstance(event, RolledBack):
        return f"{at}  {_rollback(event)}", "bold yellow"
    if isinstance(event, PolicyAlarm):
        head = f" of head {event.head}" if event.head else ""
        beyond = f"{event.value:.4g}, limit {event.limit:.4g}"
        return f"update {event.epoch}  policy alarm: {event.symptom}{head} {beyond}, {event.updates} in a row", "red"
    if isinstance(event, BreakerChanged):
        left = f", {event.ticks_left} ticks" if event.ticks_left else ""
        by = " by hand" if event.manual else ""
        return f"{at}  breaker of growth {event.source.name} -> {event.target.name}{by}{left}: {event.reason}", "yellow"
    if isinstance(event, OrderTaken):
        became = "applied" if event.applied else "refused"
        again = ", again" if event.again else ""
        text = f"{at}  order {event.number} of {event.sender}: {event.words}: {became}{again}: {event.reason}"
        return text, "cyan" if event.applied else "yellow"
    if isinstance(event, OrdersRefused):
        text = f"{at}  {event.count} orders {event.refusal}, {event.total} in all; the latest: {event.words}"
        return text, "bold red"
    if isinstance(event, CheckpointSaved):
        return f"{at}  checkpoint {event.path}", "dim"
    if isinstance(event, RunStarted):
        resumed = "" if event.resumed_from is None else f", resumed from step {event.resumed_from}"
        ranks = "1 rank" if event.world_size == 1 else f"{event.world_size} ranks"
        slots = ", ".join(event.slots)
        missed = f"; FLOPs are too low, no formula for {', '.join(event.uncounted)}" if event.uncounted else ""
        size = f"{event.parameters:,} parameters on {ranks}, {event.total_steps:,} steps, slots {slots}"
        copies = f"\ncopies: {event.copies}" if event.copies else ""
        return f"{size}{resumed}{missed}\nprobe: {event.probe}{copies}", "bold"
    if isinstance(event, RunEnded):
        return f"{at}  run {event.status}", "bold green" if event.status == "done" else "bold red"
    return None


class ConsoleSink:
    """Shows the progress of a run.

    Args:
        mode: auto, bar, plain or off.
        stream: where to write; stdout by default.
        console: a rich console to write to instead of ``stream``, with its own width and colours.
        every_s: minimum seconds between plain lines of ticks; the last tick is always shown.
    """

    def __init__(
        self,
        mode: ConsoleMode,
        *,
        stream: TextIO | None = None,
        console: Console | None = None,
        every_s: float = 2.0,
    ) -> None:
        self._console = console or Console(file=safe(stream or sys.stdout), highlight=False)
        if mode is ConsoleMode.AUTO:
            mode = ConsoleMode.BAR if self._console.is_terminal else ConsoleMode.PLAIN
        self._mode, self._every_s, self._shown_at = mode, every_s, -float("inf")
        self._held: TickDone | None = None  # the newest tick not shown yet
        self._total, self._learns, self._task = 0, OF_SESSION, TaskID(0)
        self._slots: dict[str, SlotLine] = {}  # a tick has those alone that have changed
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[scores]}"),
            console=self._console,
            expand=True,
        )

    def emit(self, event: Event) -> None:
        """Shows one event; if the screen is gone (a closed pipe), nothing is shown any more."""
        with self._lock:
            try:
                self._show(event)
            except (OSError, ValueError):
                self._stop()
                self._mode = ConsoleMode.OFF

    def flush(self) -> None:
        """Shows a tick that was held back."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._plain_tick()

    def close(self) -> None:
        """Leaves the bar on the screen and restores the cursor; safe to call twice."""
        self.flush()
        with self._lock:
            self._stop()

    def _show(self, event: Event) -> None:
        if self._mode is ConsoleMode.OFF:
            return
        if isinstance(event, RunStarted):
            self._total, self._learns = event.total_steps, event.task
        if isinstance(event, TickDone):
            self._slots |= {line.slot: line for line in event.slots}
            if self._mode is ConsoleMode.BAR:
                self._bar_tick(event)
                return
            self._held = event
            if time.monotonic() - self._shown_at >= self._every_s:
                self._plain_tick()
            return
        line = describe_event(event)
        if line is not None:
            if isinstance(event, RunEnded):
                self._plain_tick()
            self._line(*line)
        if isinstance(event, RunStarted) and self._mode is ConsoleMode.BAR:
            self._start(event.step)

    def _line(self, text: str, style: str) -> None:
        if self._mode is ConsoleMode.BAR:
            self._console.print(Text(text, style), soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)

    def _plain_tick(self) -> None:
        event, self._held = self._held, None
        if event is None:
            return
        self._shown_at = time.monotonic()
        slots = "  ".join(_slot(line).plain for line in self._slots.values())
        place = f"{event.step}/{self._total}" if self._total else f"{event.step}"
        scores = _scores(event, self._learns)
        self._line(f"step {place}  tick {event.tick}  {scores}  lr {event.lr:.2g}  {slots}".rstrip(), "")

    def _start(self, step: int) -> None:
        self._stop()
        self._task = self._progress.add_task("", total=self._total or None, completed=step, scores="")
        self._live = Live(Group(self._progress), console=self._console, refresh_per_second=4)
        self._live.start()

    def _bar_tick(self, event: TickDone) -> None:
        if self._live is None:
            self._start(event.step)
        self._progress.update(self._task, completed=event.step, scores=_scores(event, self._learns))
        slots = Text("   ").join(_slot(line) for line in self._slots.values())
        if self._live is not None:
            self._live.update(Group(self._progress, slots))

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                live.stop()
            self._progress.remove_task(self._task)

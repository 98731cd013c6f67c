"""What wandb gets of a run beside its rows: three tables, counts over time, and a short summary.

    decisions   one row per proposal: what was asked, the gate's verdict, the reason, and what came of it
    births      one row per seed: its size and what it costs
    incidents   one row per refused birth, skipped step, fault, panic, rollback, turn of the breaker, order
    growth      one row per change of a stage

A proposal is known by its id, which its command, its stage changes and its veto carry. Tables are sent whole: at the
end, and each time they have doubled, so that a run that is killed has shown at least half of each, and the work stays
linear. A table keeps its newest ``ROWS`` rows and counts the older ones.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.events import (
    BirthVetoed,
    BreakerChanged,
    CommandJudged,
    CommandRefused,
    Event,
    Fault,
    FossilHurts,
    GateJudged,
    HealthAlert,
    LossSettled,
    LossShifted,
    OrdersRefused,
    OrderTaken,
    Panic,
    PolicyAlarm,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedBorn,
    SlotDegraded,
    StageChanged,
    StepSkipped,
    TickDone,
)
from esper.leyline.stages import Stage

ROWS = 10_000  # what wandb's page shows of a table
COLUMNS = {
    "growth": ("step", "tick", "slot", "from", "to", "cause", "blueprint"),
    "decisions": (
        "proposal",
        "step",
        "tick",
        "slot",
        "op",
        "blueprint",
        "verdict",
        "gate",
        "reason",
        "outcome",
        "outcome_step",
    ),
    "births": ("step", "tick", "slot", "generation", "blueprint", "proposal", "parameters", "forward_flops"),
    "incidents": ("step", "tick", "kind", "words"),
}
INCIDENTS = (
    BirthVetoed,
    StepSkipped,
    SlotDegraded,
    Fault,
    Panic,
    LossShifted,
    RolledBack,
    BreakerChanged,
    FossilHurts,
    HealthAlert,
    LossSettled,
    PolicyAlarm,
    OrderTaken,
    OrdersRefused,
)
LIFE = (CommandJudged, GateJudged, StageChanged, SeedBorn)
COUNTED: dict[str, type[Event]] = {
    "refusals": CommandRefused,
    "vetoes": BirthVetoed,
    "panics": Panic,
    "rollbacks": RolledBack,
    "faults": Fault,
    "births": SeedBorn,
}


@dataclass(slots=True)
class Rows:
    """The rows of one table.

    Fields:
        rows: the newest ones.
        taken: how many there have been.
        sent: how many there had been when the table was last sent.
    """

    rows: deque[list[Any]] = field(default_factory=lambda: deque(maxlen=ROWS))
    taken: int = 0
    sent: int = 0

    def add(self, row: list[Any]) -> list[Any]:
        """Adds a row and returns it; it may still be changed."""
        self.rows.append(row)
        self.taken += 1
        return row

    @property
    def doubled(self) -> bool:
        """Whether it has at least twice as many rows as were sent."""
        return self.taken > 0 and self.taken >= 2 * self.sent


class Story:
    """Collects tables, counts and summary from the events of a run.

    Args:
        describe: an event in words; None for one that has none.

    Attributes:
        tables: the rows, by name of the table.
        counts: how often each thing of `COUNTED` happened.
    """

    def __init__(self, describe: Callable[[Event], tuple[str, str] | None]) -> None:
        self._describe = describe
        self.tables = {name: Rows() for name in COLUMNS}
        self.counts = dict.fromkeys(COUNTED, 0)
        self._open: dict[int, list[Any]] = {}  # rows of decisions whose outcome may still come
        self._verdicts: dict[str, tuple[int, str]] = {}  # slot -> tick and words of its latest gate
        self._stages: dict[str, Stage] = {}
        self._host = 0  # parameters at the first start
        self._summary: dict[str, Any] = {"status": "running"}

    def take(self, event: Event) -> None:
        """Takes one event."""
        for name, kind in COUNTED.items():
            self.counts[name] += isinstance(event, kind)
        if isinstance(event, INCIDENTS):
            words = (self._describe(event) or (type(event).__name__, ""))[0]
            self.tables["incidents"].add([event.step, event.tick, event.kind, words])
        if isinstance(event, GateJudged):
            self._judge(event)
        elif isinstance(event, CommandJudged):
            self._decide(event)
        elif isinstance(event, StageChanged):
            self._move(event)
        elif isinstance(event, BirthVetoed):
            self._settle(event.proposal, f"vetoed: {event.reason}", event.step)
        elif isinstance(event, SeedBorn):
            size = [event.parameters, event.flops]
            seed = [event.slot, event.generation, event.blueprint, event.proposal]
            self.tables["births"].add([event.step, event.tick, *seed, *size])
        self._sum_up(event)

    def summary(self) -> dict[str, Any]:
        """The run in some fifteen numbers."""
        held = list(self._stages.values())
        stages = {
            "fossils": held.count(Stage.FOSSILIZED),
            "live_seeds": sum(stage.is_live for stage in held),
        }
        troubles = {name: self.counts[name] for name in ("refusals", "vetoes", "rollbacks", "faults")}
        return {**self._summary, **stages, "seeds_born": self.counts["births"], **troubles}

    def _judge(self, event: GateJudged) -> None:
        failed = "; ".join(f"{check.name}: {check.detail}" for check in event.result.checks if not check.passed)
        words = f"{event.result.gate.name} passed" if event.result.passed else f"{event.result.gate.name}: {failed}"
        self._verdicts[event.slot] = (event.tick, words)

    def _decide(self, event: CommandJudged) -> None:
        command = event.command
        tick, gate = self._verdicts.get(command.slot, (-1, ""))
        verdict = "applied" if event.applied else "refused"
        asked = [command.proposal, event.step, event.tick, command.slot, command.op.name, command.blueprint]
        row = [*asked, verdict, gate if tick == event.tick else "", event.reason, "", None]
        self.tables["decisions"].add(row)
        if event.applied and command.proposal:
            self._open[command.proposal] = row
            for old in list(self._open)[:-ROWS]:
                del self._open[old]

    def _move(self, event: StageChanged) -> None:
        names = event.source.name, event.target.name
        self.tables["growth"].add([event.step, event.tick, event.slot, *names, event.cause, event.blueprint])
        self._stages[event.slot] = event.target
        self._settle(event.proposal, event.target.name, event.step)

    def _settle(self, proposal: int, outcome: str, step: int) -> None:
        """Notes what came of a proposal; of several things the last."""
        row = self._open.get(proposal)
        if row is not None:
            row[-2:] = [outcome, step]

    def _sum_up(self, event: Event) -> None:
        found: dict[str, Any] = {"step": event.step, "tick": event.tick}
        if isinstance(event, RunStarted):
            self._host = self._host or event.parameters
            found |= {"ranks": event.world_size, "parameters": event.parameters, "status": "running"}
        elif isinstance(event, TickDone):
            for name in ("train_loss", "validation_loss", "validation_accuracy"):
                if (value := getattr(event, name).value) is not None:
                    found[name] = value
            found |= {"parameters": event.parameters, "parameters_added": event.parameters - self._host}
            if event.flops is not None:
                found["training_flops"] = event.flops
            self._stages |= {line.slot: line.stage for line in event.slots}
        elif isinstance(event, RunEnded):
            plain = event.summary
            found |= {"status": event.status, **{name: plain[name] for name in ("wall_s",) if name in plain}}
        self._summary |= found

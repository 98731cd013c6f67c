"""The closing summary of a run, read back from its own event file, so that the table shows what was recorded."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.leyline.events import LibraryUsed
from esper.leyline.events.task import OF_SESSION, TaskInfo
from esper.leyline.evidence import ABSENT, Reading
from esper.leyline.files import RunDir
from esper.leyline.plain import from_plain
from esper.leyline.stages import Stage
from esper.nissa.reading import Record, read_latest
from esper.nissa.summary import GrownSeed, LibraryTotals, NextCommand, PrunedSeeds, RunSummary, Score


def _score(record: dict[str, Any]) -> Score:
    payload = record["payload"]
    return Score(
        step=record["step"],
        parameters=payload["parameters"],
        loss=from_plain(Reading, payload["validation_loss"]),
        accuracy=from_plain(Reading, payload["validation_accuracy"]),
        metrics=_of_validation({name: from_plain(Reading, one) for name, one in payload["metrics"].items()}),
    )


def _of_validation(readings: dict[str, Reading]) -> dict[str, Reading]:
    prefix = "validation_"
    return {name.removeprefix(prefix): one for name, one in readings.items() if name.startswith(prefix)}


class _Told:
    """What the closing table takes from a run's records, one by one, so that a long run need not fit into memory.

    Attributes:
        before: the last tick that was not after the first blending, or None.
        reasons: by id of an applied command.
        pruned: the payload of each prune.
        library: figures of the seed library, summed; None without any.
    """

    def __init__(self) -> None:
        self.before: Record | None = None
        self.reasons: dict[int, str] = {}
        self.pruned: list[dict[str, Any]] = []
        self.library: LibraryTotals | None = None
        self._blended: int | None = None

    def take(self, record: Record) -> None:
        """Takes the next record."""
        kind, payload = record["kind"], record["payload"]
        if kind == "tick" and (self._blended is None or record["step"] <= self._blended):
            self.before = record
        elif kind == "command" and payload["applied"] and payload["command"]["proposal"]:
            self.reasons[payload["command"]["proposal"]] = payload["reason"]
        elif kind == "stage":
            if payload["target"] == Stage.BLENDING.name:
                self._blended = min(record["step"], record["step"] if self._blended is None else self._blended)
            if payload["target"] == Stage.PRUNED.name:
                self.pruned.append(payload)
        elif kind == LibraryUsed.kind:
            names = [field.name for field in fields(LibraryTotals)]
            had = {name: 0 if self.library is None else getattr(self.library, name) for name in names}
            self.library = LibraryTotals(**{name: had[name] + payload[name] for name in names})


def summarise(
    run_dir: Path,
    state: RunState,
    grown: Grown,
    *,
    status: str,
    world_size: int,
    wall_s: float,
    start: dict[str, float],
    task: TaskInfo = OF_SESSION,
) -> RunSummary:
    """Summarises a finished run.

    Args:
        run_dir: RUN; its events.jsonl holds the tick records. Without them "before" has no scores.
        state: at the end.
        grown: the network at the end.
        status: as in STATUS.json.
        world_size: number of ranks.
        wall_s: seconds of this attempt.
        task: what was learned.
        start: seconds of each phase of its start.
    """
    path = RunDir(run_dir).events
    told = _Told()
    for record in read_latest(path) if path.exists() else ():
        told.take(record)
    parameters = sum(p.numel() for p in grown.model.parameters())
    after = Score(
        step=state.step,
        parameters=parameters,
        loss=state.validation_loss,
        accuracy=state.validation_accuracy,
        metrics=_of_validation({entry.name: entry.reading for entry in state.metrics}),
    )
    host = parameters - sum(grown.seed_parameters(slot) for slot in grown.slots)
    before = Score(step=0, parameters=host, loss=ABSENT, accuracy=ABSENT)
    if told.before is not None:
        score = _score(told.before)
        before = replace(score, parameters=host)
    reasons = told.reasons
    living = tuple(
        GrownSeed(
            slot=entry.slot,
            blueprint=str(entry.blueprint),
            stage=entry.stage,
            alpha=entry.alpha(state.step),
            parameters=grown.seed_parameters(entry.slot),
            contribution=entry.contribution,
            reason=reasons.get(entry.proposal, ""),
            shapley=entry.worth.shapley,
        )
        for entry in state.slots
        if entry.stage.has_seed
    )
    pruned: dict[tuple[str, str, str], int] = {}  # by slot, blueprint and reason
    for payload in told.pruned:
        reason = reasons.get(payload["proposal"], "") or payload["cause"].lower().replace("_", " ")
        key = (payload["slot"], str(payload["blueprint"]), reason.split(":")[0])
        pruned[key] = pruned.get(key, 0) + 1
    name = str(run_dir)
    offline = (
        ["wandb/offline-run-*"] if any(run_dir.glob("wandb/offline-run-*")) else []
    )  # none if wandb is online or disabled
    return RunSummary(
        status=status,
        task=task,
        ticks=state.tick,
        world_size=world_size,
        wall_s=wall_s,
        start=start,
        before=before,
        after=after,
        grown=living,
        pruned=tuple(PrunedSeeds(slot=s, blueprint=b, reason=r, count=n) for (s, b, r), n in sorted(pruned.items())),
        library=told.library,
        run_dir=name,
        next_commands=(
            NextCommand(command=f"esper why {name}", what="why each seed was born, kept or pruned"),
            NextCommand(command=f"esper report {name}", what="a page of it, to look at or to send"),
            NextCommand(command=f"esper watch {name}", what="it in this terminal, tick by tick"),
            *(NextCommand(command=f"wandb sync {name}/{kept}", what="send it to wandb") for kept in offline),
            NextCommand(command="python launch/train.py --help", what="your own run"),
        ),
    )

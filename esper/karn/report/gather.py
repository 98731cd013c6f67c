"""Gathers what a report shows of one run: figures and series, each with its place in the record."""

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.karn.lives import Life, LivesReader, by_birth, by_place
from esper.karn.report.traced import Figure, Series, from_event, from_file, rate_of
from esper.karn.store.digest import Digest, Kept
from esper.karn.store.facts import RunFacts, collect_facts, read_json, read_settings
from esper.karn.store.finding import FoundRun
from esper.karn.why.endings import Diagnosis, diagnose, read_evidence
from esper.leyline.errors import RunDirError
from esper.leyline.events.task import MetricInfo, TaskInfo
from esper.leyline.files import RunDir
from esper.leyline.plain import from_plain
from esper.nissa.reading import Record

MOST_SEEDS = 100  # seeds that are gone, the newest, which are shown; those that are there are shown all
MOST_LOOKS = 100  # looks of a seed of which some are held at least
MOST_ROWS = 400  # records of a kind, the newest, which are shown
MOST_TOLD = 1200  # records of any kind, the newest, for a log
MOST_MOVES = 2000  # moves of a slot, the newest, for its lane

# Series of a tick: name -> (title of the line, path in its payload, path of its standard error).
OF_TICKS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...] | None]] = {
    "train_loss": ("training", ("train_loss", "value"), None),
    "validation_loss": ("validation", ("validation_loss", "value"), ("validation_loss", "se")),
    "train_accuracy": ("training", ("train_accuracy", "value"), None),
    "validation_accuracy": ("validation", ("validation_accuracy", "value"), ("validation_accuracy", "se")),
    "parameters": ("parameters", ("parameters",), None),
    "flops": ("FLOPs", ("flops",), None),
    "steps_ms": ("training since the last tick", ("steps_ms",), None),
    "tick_ms": ("the tick", ("tick_ms",), None),
    "digest_ms": ("digests, of the tick", ("digest_ms",), None),
    "gradient": ("host", ("host_gradient_norm", "value"), None),
}
SECONDS = ("steps_ms", "tick_ms")
# Rates of a tick: name -> (title of the line, path, paths of what it is divided by, factor).
RATES: dict[str, tuple[str, str, tuple[str, ...], float]] = {
    "throughput": ("all ranks", "samples", SECONDS, 1e3),
    "speed": ("all ranks", "interval_flops", SECONDS, 1e3),
    "data_wait": ("waiting for data", "data_ms", ("steps_ms",), 100.0),
    "own": ("own work: data and forward", "own_ms", ("steps_ms",), 100.0),
}
FRESH = ("validation_loss", "validation_accuracy")  # shown at the tick at which they were measured


@dataclass(slots=True, kw_only=True)
class RunReport:
    """Everything that is shown of one run.

    Fields:
        name: how the page calls it.
        path: RUN.
        facts: its row in `esper runs`.
        digest: of its events.
        records: the newest of its events of each kind but readings.
        newest: the newest events of any kind but readings, the newest last.
        moves: step and stage of the newest moves of each slot.
        refused: refusals of what belongs to no seed, such as a birth; the newest.
        begun: its first start; None if its record lacks that.
        result: result.json; empty before the end.
        diagnosis: how it ended.
        lives: its seeds, by their birth; of those that are gone the newest.
        fates: how many seeds were born, and how many of them came to which fate.
        series: by name, of `OF_TICKS`, `RATES` and, where the peak of the devices was set, ``mfu``.
        alpha: by seed, named by slot and blueprint, in the order of births.
        ratio: the seed's gradient norm over the host's, by seed.
        gradient_parity: root mean square of the seed's gradient over the host's, by seed.
        update_parity: the same of what an optimizer step changed.
        peak: FLOP/s of one device at its best, as set; None: not set.
        memory: the newest share of memory in use, of the machine and of the device, by rank; where it was measured.
    """

    name: str
    path: Path
    facts: RunFacts
    digest: Digest
    records: Kept
    newest: list[Record]
    moves: dict[str, deque[tuple[int, str]]]
    refused: Kept
    begun: Record | None
    result: dict[str, Any]
    diagnosis: Diagnosis
    lives: list[Life]
    fates: Counter[str]
    series: dict[str, Series] = field(default_factory=dict)
    alpha: list[Series] = field(default_factory=list)
    ratio: list[Series] = field(default_factory=list)
    gradient_parity: list[Series] = field(default_factory=list)
    update_parity: list[Series] = field(default_factory=list)
    peak: float | None = None
    memory: dict[str, tuple[Figure, Figure]] = field(default_factory=dict)

    @property
    def slots(self) -> list[str]:
        """Its slots, in their order."""
        begun = self.of("run_started")
        return [str(slot) for slot in begun[-1]["payload"]["slots"]] if begun else []

    @property
    def metrics(self) -> tuple[MetricInfo, ...]:
        """The metrics of its task's own."""
        begun = self.of("run_started")
        task = begun[-1]["payload"].get("task") if begun else None
        return from_plain(TaskInfo, task, "task").metrics if task else ()

    @property
    def last_step(self) -> int:
        """The last step of which anything is known."""
        return max([self.digest.last_step, *(self.series["train_loss"].steps[-1:])])

    @property
    def newest_step(self) -> Figure:
        """The step of the newest event, an axis that stands beside its payload."""
        known = (self.digest.newest_record, self.digest.last_tick)
        newest = max((record for record in known if record is not None), key=by_place)
        return Figure(value=float(newest["step"]), source=f"events.jsonl {newest['attempt']} {newest['seq']} @step")

    def of(self, *kinds: str) -> list[Record]:
        """Its records of these kinds, without replaced ones: the newest of each."""
        return self.records.of(*kinds)

    def from_result(self, *path: str) -> Figure:
        """A number of result.json."""
        return from_file("result.json", self.result, *path)


def gather(path: Path, name: str) -> RunReport:
    """Reads a run, finished or not.

    Raises:
        RunDirError: this is no run directory, a file of it is damaged, or it holds no events.
    """
    gone: deque[Life] = deque(maxlen=MOST_SEEDS)
    fates: Counter[str] = Counter()
    records, refused = Kept(most=MOST_ROWS), Kept("refusal", most=MOST_ROWS)
    newest: deque[Record] = deque(maxlen=MOST_TOLD)
    moves: dict[str, deque[tuple[int, str]]] = {}
    begun: list[Record] = []

    def end(life: Life) -> None:
        gone.append(life)
        fates[life.fate] += 1

    reader = LivesReader(end, MOST_LOOKS)

    def take(record: Record) -> None:
        records(record)
        newest.append(record)
        if not reader.take(record):
            refused(record)
        if record["kind"] == "stage":
            slot, target = record["payload"]["slot"], record["payload"]["target"]
            moves.setdefault(slot, deque(maxlen=MOST_MOVES)).append((record["step"], target))
        elif record["kind"] == "run_started" and not begun:
            begun.append(record)

    evidence = read_evidence(path, take)
    digest = evidence.digest
    if digest.newest_record is None and digest.last_tick is None:
        raise RunDirError(f"{path}: no events, so there is nothing to show; `esper why {path} --end` says how it ended")
    fates.update(life.fate for life in reader.present.values())
    run = FoundRun(name=name, path=path)
    report = RunReport(
        name=name,
        path=path,
        facts=collect_facts(run, digest),
        digest=digest,
        records=records,
        newest=list(newest),
        moves=moves,
        refused=refused,
        begun=begun[0] if begun else None,
        result=read_json(RunDir(path).result),
        diagnosis=diagnose(evidence),
        lives=sorted([*gone, *reader.present.values()], key=by_birth),
        fates=fates,
        series={
            **{key: Series(name=title) for key, (title, _, _) in OF_TICKS.items()},
            **{key: Series(name=title) for key, (title, _, _, _) in RATES.items()},
        },
        peak=_peak(path),
        memory=_memory(path),
    )
    report.series["mfu"] = Series(name="all ranks")
    for life in report.lives:
        for lines in (report.alpha, report.ratio, report.gradient_parity, report.update_parity):
            lines.append(Series(name=f"{life.slot} {life.blueprint}"))
    for record in digest.latest or ():
        if record["kind"] == "tick":
            _add_tick(report, record)
    return report


def _peak(path: Path) -> float | None:
    """`telemetry.health.peak_flops` of a run."""
    health = (read_settings(RunDir(path)).get("telemetry") or {}).get("health") or {}
    return None if health.get("peak_flops") is None else float(health["peak_flops"])


def _memory(path: Path) -> dict[str, tuple[Figure, Figure]]:
    """What each rank wrote last of the memory in use; a file that is being written at this moment is left out."""
    found = {}
    for file in sorted(RunDir(path).health.glob("rank-*")):
        try:
            told = json.loads(file.read_bytes())
            shares = [None if told[i] is None else float(told[i]) for i in (2, 3)]
        except (OSError, ValueError, TypeError, IndexError):
            continue
        host, device = (Figure(value=v, source=f"health/{file.name} {i}") for i, v in zip((2, 3), shares))
        found[f"rank {int(file.name.removeprefix('rank-'))}"] = (host, device)
    return found


def _add_tick(report: RunReport, record: Record) -> None:
    for key, (_, path, error) in OF_TICKS.items():
        reading = record["payload"].get(path[0])
        if key in FRESH and reading["tick"] != record["tick"]:
            continue
        report.series[key].add(record["step"], from_event(record, *path), from_event(record, *error) if error else None)
    for key, (_, whole, over, times) in RATES.items():
        report.series[key].add(record["step"], rate_of(record, whole, over, times))
    if report.peak is not None and report.facts.ranks:
        share = rate_of(record, "interval_flops", SECONDS, 1e5 / (report.peak * report.facts.ranks))
        report.series["mfu"].add(record["step"], share)
    for index, line in enumerate(record["payload"]["slots"]):
        if line["blueprint"] is None:
            continue
        born = [i for i, life in enumerate(report.lives) if life.slot == line["slot"] and life.lasts(record["tick"])]
        if not born:  # of a seed that is not shown
            continue
        source = f"events.jsonl {record['attempt']} {record['seq']} slots.{index}."
        report.alpha[born[-1]].add(record["step"], Figure(value=float(line["alpha"]), source=source + "alpha"))
        for name, lines in (
            ("gradient_ratio", report.ratio),
            ("gradient_parity", report.gradient_parity),
            ("update_parity", report.update_parity),
        ):
            value = line[name]["value"] if name in line else None
            figure = Figure(value=None if value is None else float(value), source=f"{source}{name}.value")
            lines[born[-1]].add(record["step"], figure)

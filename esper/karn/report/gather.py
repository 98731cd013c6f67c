"""Gathers what a report shows of one run: figures and series, each with its place in the record."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.karn.lives import Life, lives
from esper.karn.report.traced import Figure, Series, from_event, from_file, rate_of
from esper.karn.store.facts import Digest, RunFacts, collect_facts, read_digest, read_json, read_settings
from esper.karn.store.finding import FoundRun
from esper.karn.why.endings import Diagnosis, explain_end
from esper.leyline.errors import RunDirError
from esper.leyline.events.task import MetricInfo, TaskInfo
from esper.leyline.files import RunDir
from esper.leyline.plain import from_plain
from esper.nissa.reading import EventFile, Record, keep_latest

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
OF_SLOTS = ("slot", "blueprint", "alpha", "gradient_ratio", "gradient_parity", "update_parity")
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
        digest: its events but ticks.
        result: result.json; empty before the end.
        diagnosis: how it ended.
        lives: its seeds.
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
    result: dict[str, Any]
    diagnosis: Diagnosis
    lives: list[Life]
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
        return max([0, *(record["step"] for record in self.digest.records), *(self.series["train_loss"].steps[-1:])])

    @property
    def newest_step(self) -> Figure:
        """The step of the newest event, an axis that stands beside its payload."""
        ticks = [self.digest.last_tick] if self.digest.last_tick else []
        newest = max([*self.digest.records, *ticks], key=lambda record: (record["attempt"], record["seq"]))
        return Figure(value=float(newest["step"]), source=f"events.jsonl {newest['attempt']} {newest['seq']} @step")

    def of(self, *kinds: str) -> list[Record]:
        """Its records of these kinds, without replaced ones."""
        return [record for record in self.digest.records if record["kind"] in kinds]

    def from_result(self, *path: str) -> Figure:
        """A number of result.json."""
        return from_file("result.json", self.result, *path)


def gather(path: Path, name: str) -> RunReport:
    """Reads a run, finished or not.

    Raises:
        RunDirError: this is no run directory, a file of it is damaged, or it holds no events.
    """
    diagnosis = explain_end(path)
    run = FoundRun(name=name, path=path)
    digest = read_digest(run)
    if not digest.records and digest.last_tick is None:
        raise RunDirError(f"{path}: no events, so there is nothing to show; `esper why {path} --end` says how it ended")
    report = RunReport(
        name=name,
        path=path,
        facts=collect_facts(run, digest),
        digest=digest,
        result=read_json(RunDir(path).result),
        diagnosis=diagnosis,
        lives=lives(digest.records),
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
    for record in _current_ticks(run):
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


def _current_ticks(run: FoundRun) -> list[Record]:
    """The ticks of a run without replaced ones, each with what is plotted of it alone."""
    if not run.directory.events.is_file():
        return []
    told = []
    for record in EventFile(run.directory.events):
        payload = record["payload"]
        if record["kind"] == "tick":
            names = {path[0] for _, path, _ in OF_TICKS.values()} | {path for _, path, _, _ in RATES.values()}
            wanted = {name: payload[name] for name in names if name in payload}
            slots = [{name: line[name] for name in OF_SLOTS if name in line} for line in payload["slots"]]
            record = {**record, "payload": {**wanted, "slots": slots}}
        elif record["kind"] not in ("run_started", "rollback"):
            record = {**record, "payload": {}}
        told.append(record)
    return [record for record in keep_latest(told) if record["kind"] == "tick"]


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
        born = [i for i, life in enumerate(report.lives) if life.slot == line["slot"]]
        born = [i for i in born if report.lives[i].birth["tick"] <= record["tick"]]
        if line["blueprint"] is None or not born:
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

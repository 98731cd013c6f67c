"""Gathers what a report shows of one run: figures and series, each with its place in the record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.karn.lives import Life, lives
from esper.karn.report.traced import Figure, Series, from_event, from_file
from esper.karn.store.facts import Digest, RunFacts, collect_facts, read_digest, read_json
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
        series: by name, of `OF_TICKS`.
        alpha: by seed, named by slot and blueprint, in the order of births.
        ratio: the seed's gradient norm over the host's, by seed.
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
        series={key: Series(name=title) for key, (title, _, _) in OF_TICKS.items()},
    )
    for life in report.lives:
        report.alpha.append(Series(name=f"{life.slot} {life.blueprint}"))
        report.ratio.append(Series(name=f"{life.slot} {life.blueprint}"))
    for record in _current_ticks(run):
        _add_tick(report, record)
    return report


def _current_ticks(run: FoundRun) -> list[Record]:
    """The ticks of a run without replaced ones, each with what is plotted of it alone."""
    if not run.directory.events.is_file():
        return []
    told = []
    for record in EventFile(run.directory.events):
        payload = record["payload"]
        if record["kind"] == "tick":
            wanted = {path[0]: payload[path[0]] for _, path, _ in OF_TICKS.values() if path[0] in payload}
            slots = [
                {"slot": line["slot"], "alpha": line["alpha"], "gradient_ratio": line["gradient_ratio"]}
                | {"blueprint": line["blueprint"]}
                for line in payload["slots"]
            ]
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
    for index, line in enumerate(record["payload"]["slots"]):
        born = [i for i, life in enumerate(report.lives) if life.slot == line["slot"]]
        born = [i for i in born if report.lives[i].birth["tick"] <= record["tick"]]
        if line["blueprint"] is None or not born:
            continue
        source = f"events.jsonl {record['attempt']} {record['seq']} slots.{index}."
        alpha = Figure(value=float(line["alpha"]), source=source + "alpha")
        report.alpha[born[-1]].add(record["step"], alpha)
        value = line["gradient_ratio"]["value"]
        ratio = Figure(value=None if value is None else float(value), source=source + "gradient_ratio.value")
        report.ratio[born[-1]].add(record["step"], ratio)

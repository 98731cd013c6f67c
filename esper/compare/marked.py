"""``esper compare NAME`` of arms that begin with a trained host: search rates, run all, read them at FLOP marks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from esper.compare.arms import CompareConfig, derive
from esper.compare.devices import default_parallel
from esper.compare.report import failures_by_name, finish_runs, folders_by_name, make_notes
from esper.compare.runner import Comparer
from esper.compare.search import Found, search_rates, with_rates
from esper.karn.marks import MarkReport, report_marks
from esper.karn.rows import Runs
from esper.leyline.errors import EsperError
from esper.leyline.files import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedReport:
    """The result of the command.

    Fields:
        name: of the comparison.
        marks: everything that is said at marks.
        found: what the search found; None without one.
        seeds: how many seeds every arm has, and how many there are to be.
        notes: what a reader must know beside the numbers, one line each.
        failures: the error of each run that failed or cannot be read, by "arm/seed".
    """

    name: str
    marks: MarkReport
    found: Found | None
    seeds: tuple[int, int]
    notes: list[str]
    failures: dict[str, str]


def run_marked(
    name: str,
    config: CompareConfig,
    out: Path,
    *,
    parallel: int | None,
    report_only: bool,
    share: str | None = None,
    say: Callable[[str], None],
) -> MarkedReport:
    """Runs what is missing, trials first, and reads all arms at all marks; arguments as for `run_compare`.

    Raises:
        Preempted: the command was stopped; the same command goes on.
        EsperError: nothing has finished, or a search is not complete.
        DataError: the data are missing; no run was begun.
    """
    asked = config.marks
    assert asked is not None
    last: list[Comparer] = []

    def run(part: CompareConfig, folder: Path) -> Runs:
        comparer = Comparer(part, folder, say)
        last[:] = [comparer]
        first, _ = derive(part, part.in_order()[0], part.seeds[0], {}, comparer.data)
        comparer.data(first.data)  # raises before any run is made
        return finish_runs(comparer, parallel=None if report_only else parallel or default_parallel(first))

    found = None
    if config.search is not None:
        found = search_rates(config, out, run, say)
        config = with_rates(config, found.rates)
    runs = run(config, out)
    comparer = last[0]
    failures = failures_by_name(comparer)
    if not runs.get(asked.of) or not any(by_seed for arm, by_seed in runs.items() if arm != asked.of):
        raise EsperError(f"compare {name}: nothing to compare: {next(iter(failures.values()), 'no run has finished')}")
    marks = report_marks(
        runs,
        of=asked.of,
        at=asked.at,
        main=asked.main,
        subject=config.subject,
        sizes=[arm for arm, entry in config.arms.items() if entry.size],
        apart=asked.apart,
        claims=asked.claims,
    )
    if share is None:
        rates = {} if found is None else {"rates": found.rates, "search": _plain(found)}
        write_json(out / "compare.json", {"name": name, "runs": folders_by_name(runs), "failures": failures, **rates})
    whole = set.intersection(*(set(by_seed) for by_seed in runs.values()))
    return MarkedReport(
        name=name,
        marks=marks,
        found=found,
        seeds=(len(whole), len(config.seeds)),
        notes=make_notes(comparer, {arm: dict(by_seed) for arm, by_seed in runs.items()}),
        failures=failures,
    )


def _plain(found: Found) -> dict[str, dict[str, float | None]]:
    """The losses of all trials for a file; None for one that did not reach the mark."""
    return {
        arm: {f"{rate:g}": None if loss == float("inf") else loss for rate, loss in of.items()}
        for arm, of in found.losses.items()
    }

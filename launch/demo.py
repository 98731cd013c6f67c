"""The demo: how a network grows, on two CPU ranks; then a case in which growing pays, with its controls.

Called by ``bash launch/demo.sh [override ...]``. Its exit code is that of the first run that failed, else 0.

The first part shows lives of seeds, on real digits. The second is ``esper compare demo``, on two seeds: a network that
has learned Python meets C++ headers, and must not forget. Its runs lie beside that of the first part, and the same
command goes on where it was stopped.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from esper.compare.arms import load_compare
from esper.compare.report import run_compare
from esper.karn.report.write import write_report
from esper.karn.runs import RunRecord
from esper.launcher.compose import main as launch
from esper.leyline.errors import ConfigError, EsperError, one_line

TITLES = {
    "lora": "frozen, low-rank parts",
    "grown": "frozen, a block grown",
    "unfrozen": "all weights go on",
}
BEFORE = "before"


def _table(runs: Mapping[str, Mapping[int, RunRecord]], seeds: Sequence[int]) -> Table:
    """Losses of held-out samples of both data, seed by seed."""
    title = f"nats per byte, lower is better; seeds {', '.join(map(str, seeds))}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    table.add_column("")
    for head in ("parameters", "GFLOP", "C++, new", "Python, old"):
        table.add_column(head, justify="right")

    def losses(which: str, told: Sequence[Mapping[str, float]]) -> str:
        return "  ".join(f"{metrics[which]:.2f}" for metrics in told)

    first = [runs["grown"][seed].curve[0] for seed in seeds]  # nothing has grown yet, and the host is frozen
    rows = [(BEFORE, first[0].parameters, 0.0, [point.metrics for point in first])]
    for arm, title in TITLES.items():
        found = [runs[arm][seed] for seed in seeds]
        cost = sum(run.flops for run in found) / len(found) / 1e9
        rows.append((title, max(run.parameters for run in found), cost, [run.final_metrics for run in found]))
    for title, parameters, cost, told in rows:
        table.add_row(title, f"{parameters:,}", f"{cost:.0f}", losses("loss_new", told), losses("loss_old", told))
    return table


def main(overrides: list[str]) -> int:
    """Runs both parts and prints what they show; returns the exit code.

    Args:
        overrides: Hydra overrides of the first part; ``run.dir=`` names the folder that holds all runs.
    """
    base = Path("runs/demo") / time.strftime("%Y-%m-%d_%H-%M-%S")
    for override in [text for text in overrides if text.startswith("run.dir=")]:
        overrides.remove(override)
        base = Path(override.removeprefix("run.dir="))
    again = f"esper: to finish the demo: bash launch/demo.sh {' '.join([*overrides, f'run.dir={base}'])}"
    console = Console(highlight=False, soft_wrap=True)
    console.print("1 of 2: how a network grows, on real digits and two ranks")
    grown = base / "grown"
    code = launch(["experiment=demo", *overrides, f"run.dir={grown}"])
    if code:
        if code != ConfigError.exit_code:  # the same command would fail again
            print(again, file=sys.stderr)
        return code
    console.print("\n2 of 2: where growing pays. A trained network meets new data, and must not forget; two seeds")
    try:
        page = write_report([grown], base / "report.html")
        config = load_compare("demo", [])
        report = run_compare(
            "demo", config, base / "pays", parallel=None, report_only=False, say=lambda text: console.print(f"  {text}")
        )
        if report.failures:
            raise EsperError("; ".join(report.failures.values()))
    except EsperError as error:
        print(f"esper: {one_line(error)}\n{again}", file=sys.stderr)
        return error.exit_code
    console.print(_table(report.runs, config.seeds))
    console.print("Frozen, it is what it was, to the last bit, with its seeds off. Where growing loses: RESULTS.md.")
    console.print(f"The first part to look at, in any browser: {page}")
    console.print(f"And why it grew so: esper why {grown}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

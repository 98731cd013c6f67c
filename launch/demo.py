"""The demo: a network too small for its task grows on two CPU ranks; then the same run without growth, as a control.

Called by ``bash launch/demo.sh [override ...]``. Its exit code is that of the first run that failed, else 0.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from esper.karn.report.write import write_report
from esper.launcher.compose import main as launch
from esper.leyline.errors import EsperError, one_line


def _read(folder: Path) -> dict[str, Any]:
    """RUN/result.json."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _compare(grown: dict[str, Any], control: dict[str, Any]) -> Table:
    """Validation at the end, and test on the checkpoint that validation chose; ± one standard error."""
    table = Table(title="same host, seed, data order and steps", title_justify="left", box=None, padding=(0, 2))
    for head in ("", "without growth", "grown"):
        table.add_column(head, justify="left" if not head else "right")
    for name, key, scale, unit in (
        ("validation accuracy", "validation_accuracy", 100.0, " %"),
        ("validation loss", "validation_loss", 1.0, ""),
        ("test accuracy", "test_accuracy", 100.0, " %"),
    ):
        places = 1 if unit else 3
        cells = [
            f"{r[key]['value'] * scale:.{places}f} ± {r[key]['se'] * scale:.{places}f}{unit}" for r in (control, grown)
        ]
        table.add_row(name, *cells)
    return table


def main(overrides: list[str]) -> int:
    """Runs both and prints the comparison; returns the exit code.

    Args:
        overrides: Hydra overrides for both runs; ``run.dir=`` names the folder that holds the two.
    """
    base = Path("runs/demo") / time.strftime("%Y-%m-%d_%H-%M-%S")
    for override in [text for text in overrides if text.startswith("run.dir=")]:
        overrides.remove(override)
        base = Path(override.removeprefix("run.dir="))
    code = launch(["experiment=demo", *overrides, f"run.dir={base / 'grown'}"])
    if code:
        print(
            f"esper: to finish the demo: bash launch/demo.sh {' '.join([*overrides, f'run.dir={base}'])}",
            file=sys.stderr,
        )
        return code
    print("\nThe control: the same run with controller=none ...", flush=True)
    quiet = ["telemetry.console=off", "telemetry.wandb.mode=disabled"]
    code = launch(["experiment=demo", *overrides, "controller=none", *quiet, f"run.dir={base / 'no-growth'}"])
    if code:
        return code
    console = Console(highlight=False)
    console.print(_compare(_read(base / "grown"), _read(base / "no-growth")))
    console.print("One seed shows how it works, not how much it gains.")
    try:
        page = write_report([base / "grown", base / "no-growth"], base / "report.html")
    except EsperError as error:  # the runs are done, whatever becomes of the page
        print(f"esper: no page: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    console.print(f"Look at it, in any browser: {page}", soft_wrap=True)
    console.print(f"And why it grew so: esper why {base / 'grown'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

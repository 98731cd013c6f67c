"""The command ``esper doctor``: checks whether a run will work here, and says what to do where it will not.

    machine        Python and torch, devices, two processes that reduce a number with gloo, ports, shared memory
    services       wandb, Slurm
    run directory  written and renamed over, locked against another process, clock, free space (--run-dir RUN)

Each line is ``ok``, ``warning`` (a run can work) or ``failure`` (it will not); the exit code is 1 with a failure, else
0. Only the standard library is needed to start (``python -m esper.doctor``): a missing torch is one of the findings.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from esper.launcher.checks import (
    Finding,
    Severity,
    check_backend,
    check_devices,
    check_ports,
    check_python,
    check_shared_memory,
    check_slurm,
    check_torch,
    check_wandb,
)
from esper.launcher.folder_checks import check_run_dir
from esper.nissa.screen import safe_streams

CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_devices,
    check_backend,
    check_ports,
    check_shared_memory,
    check_wandb,
    check_slurm,
)


def findings(run_dir: Path) -> Iterator[Finding]:
    """Makes one check after the other and yields each finding as it comes."""
    for check in CHECKS:
        yield check()
    yield from check_run_dir(run_dir)


@safe_streams()
def main(argv: list[str] | None = None) -> int:
    """Prints a line for each finding; returns 1 if one is a failure, else 0."""
    parser = argparse.ArgumentParser("esper doctor", description="Check whether a run will work here.")
    parser.add_argument("--run-dir", metavar="RUN", type=Path, default=Path("runs"), help="where it will write; runs")
    code = 0
    for finding in findings(parser.parse_args(argv).run_dir.expanduser().absolute()):
        print(finding, flush=True)
        if finding.level is Severity.FAILURE:
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())

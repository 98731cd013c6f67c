"""Strikes real runs by the table of faults, every fault in every phase, in pieces that are kept.

    python launch/matrix.py --record FILE                     # every cell; typed again after a stop, it goes on
    python launch/matrix.py --record FILE --minutes 30        # no cell begins later
    python launch/matrix.py --record FILE --only "kill -9"    # faults of which the name holds this
    python launch/matrix.py --record FILE --again             # those that failed, once more

The table is tests/faults/table.py, and each cell is one test of tests/faults/test_matrix.py, 20 to 90 s on two cores: a
run is struck, ended or started again as the table says, and comes to the same bits as one that was left alone. FILE has
a line for each cell: its outcome, the figures for docs/faults.md, and its words if it failed. A file of another version
of the sources is refused.
"""

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from soaking.record import OtherCode, add_line, read_lines, sources_digest  # noqa: E402

LAST_WORDS = 4000  # characters kept of a failure


class Keeper:
    """A pytest plugin that leaves out the cells that need not be played, and records each other one as it ends.

    Args:
        path: of the record.
        code: digest of the sources.
        skip: cells (fault, phase) that are not played.
        only: part of the name of the faults that are played.
        minutes: after which no cell begins.
    """

    def __init__(self, path: Path, code: str, skip: set[tuple[str, str]], only: str, minutes: float) -> None:
        self._path, self._code, self._skip, self._only = path, code, skip, only
        self._until = time.monotonic() + 60 * minutes
        self._began = 0.0
        self.cells: list[tuple[str, str]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps the cells that are due."""
        cells = {item: cell_of(item) for item in items if item.name.startswith("test_cell[")}
        self.cells = list(cells.values())
        items[:] = [item for item, cell in cells.items() if cell not in self._skip and self._only in cell[0]]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Notes when a cell begins."""
        self._began = time.monotonic()

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Records a cell that has been played, or could not be set up."""
        if call.when == "teardown" or (call.when == "setup" and call.excinfo is None):
            return
        outcome, words = "passed", ""
        if call.excinfo is not None:
            outcome = "skipped" if call.excinfo.errisinstance(pytest.skip.Exception) else "failed"
            words = str(call.excinfo.getrepr(style="short"))[-LAST_WORDS:]
            if call.excinfo.errisinstance(KeyboardInterrupt):
                return
        (name, phase), seconds = cell_of(item), round(time.monotonic() - self._began, 1)
        entry = {"name": name, "phase": phase, "outcome": outcome, "seconds": seconds}
        add_line(self._path, self._code, **entry, figures=dict(item.user_properties), words=words)
        print(f"\n{outcome}, {seconds:.0f} s: {name} in {phase}", flush=True)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Lets no further cell begin when the time is up."""
        if time.monotonic() > self._until and self.session is not None:
            self.session.shouldstop = "the time is up"

    session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Takes the session, to be able to stop it."""
        self.session = session


def cell_of(item: pytest.Item) -> tuple[str, str]:
    """The fault and the phase of a cell's test."""
    parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    return parameters["name"], parameters["phase"]


def latest(lines: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """The last outcome of each cell."""
    return {(line["name"], line["phase"]): line["outcome"] for line in lines}


def main() -> int:
    """Plays the cells that are due; returns 0 if every cell of the table has passed or been skipped by now, else 1."""
    parser = argparse.ArgumentParser(description="Every fault in every phase, in pieces that are kept.")
    parser.add_argument("--record", type=Path, required=True, help="the file of the cells played")
    parser.add_argument("--only", default="", metavar="WORDS", help="part of the name of the faults that are played")
    parser.add_argument("--again", action="store_true", help="play cells that failed once more")
    parser.add_argument("--minutes", type=float, default=600.0, help="no cell begins later")
    args = parser.parse_args()
    code = sources_digest()
    try:
        known = latest(read_lines(args.record, code))
    except OtherCode as error:
        print(f"matrix: {error}", file=sys.stderr)
        return 78
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes of the cell are ended first
    skip = {cell for cell, outcome in known.items() if not (args.again and outcome == "failed")}
    keeper = Keeper(args.record.absolute(), code, skip, args.only, args.minutes)
    words = ["-q", "--no-header", "--no-summary", "--tb=no", "-m", "slow", str(ROOT / "tests/faults/test_matrix.py")]
    pytest.main(words, plugins=[keeper])
    known = latest(read_lines(args.record, code))
    counts = Counter(known.values())
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    print(f"{len(known)} of {len(keeper.cells)} cells: {told} (sources {code}, {args.record})")
    for (name, phase), outcome in known.items():
        if outcome == "failed":
            print(f"  FAILED: {name} in {phase}")
    return 0 if keeper.cells and set(known) >= set(keeper.cells) and not counts["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())

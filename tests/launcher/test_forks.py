"""Ranks that are forked begin as ranks that Python starts, the first and those that torchrun starts again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.launcher.processes import children_of, leads_session
from tests.support.commands import Command, alive, environment, wait_until
from tests.support.patience import Patience, cpu_of

RANKS, AGAIN = (0, 1), 1
TOGETHER = (  # variables of one meeting of ranks
    *("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"),
)
WITHOUT_SERVER = "import sys; from esper.launcher import agent; agent.tie_to_launcher(); sys.exit(agent.main(None))"
# An open file that the agent inherits, as it does RUN's lock, and signals that a shell's background job ignores.
LOCKED = 'exec 9<"$0"; trap "" INT QUIT; exec "$@"'


def begin(words: list[str], folder: Path, reports: str, ranks: int) -> Command:
    """torchrun in our agent, with ranks that report, fail if there are several, and report again."""
    (folder / reports).mkdir()
    program = ["sh", "-c", LOCKED, str(folder), sys.executable, *words]
    torchrun = [f"--nproc-per-node={ranks}", "--standalone", "--max-restarts=1", "-m", "tests.support.rank_report"]
    return Command(program, *torchrun, reports, folder=folder, ESPER_LAUNCHER_PID=str(os.getpid()))


def read(folder: Path, attempt: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}-{attempt}.json").read_text()) for rank in RANKS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def forked(place: Path) -> Iterator[tuple[Command, Path]]:
    """An agent whose two ranks were forked, have been started again, and wait."""
    command = begin(["-m", "esper.launcher.agent"], place, "forked", 2)
    try:
        last = [place / "forked" / f"{rank}-{AGAIN}.json" for rank in RANKS]
        command.until(lambda: all(path.exists() for path in last), "the ranks' second start")
        yield command, place / "forked"
    finally:
        command.clear()


@pytest.fixture(scope="module")
def executed(place: Path) -> dict[str, Any]:
    """What a rank reports that Python has started."""
    command = begin(["-c", WITHOUT_SERVER], place, "executed", 1)
    try:
        assert command.end() == 0, command.told()
    finally:
        command.clear()
    report: dict[str, Any] = json.loads((place / "executed" / "0-0.json").read_text())
    return report


def without(report: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in names}


def test_a_forked_rank_begins_as_one_that_python_starts(forked: tuple[Command, Path], executed: dict[str, Any]) -> None:
    report = read(forked[1], AGAIN)[0]
    variables, others = report.pop("variables"), executed.pop("variables")
    assert report.pop("words") == [executed["words"][0], "forked"]
    own = ("pid", "parent", "shown", "words")
    assert without(report, *own) == without(executed, *own)
    assert without(variables, "_", *TOGETHER) == without(others, "_", *TOGETHER)
    assert set(TOGETHER) <= variables.keys()
    assert report["threads"] == 1
    assert [report["cuda"], report["group"]] == [False, False]


def test_a_rank_that_is_started_again_begins_as_the_first(forked: tuple[Command, Path]) -> None:
    for first, again in zip(read(forked[1], 0), read(forked[1], AGAIN), strict=True):
        assert first["pid"] != again["pid"]
        assert {first.pop("parent"), again.pop("parent")} == {forked[0].process.pid}
        counts = [report["variables"]["TORCHELASTIC_RESTART_COUNT"] for report in (first, again)]
        assert counts == ["0", str(AGAIN)]
        varying = ("variables", "pid")
        assert without(first, *varying) == without(again, *varying)


def test_a_rank_shows_what_it_is(forked: tuple[Command, Path]) -> None:
    for rank, report in zip(RANKS, read(forked[1], AGAIN), strict=True):
        assert report["shown"] == [sys.executable, "-m", "tests.support.rank_report", "forked", f"RANK={rank}"]


def test_the_server_holds_nothing_and_all_die_with_the_agent(forked: tuple[Command, Path]) -> None:
    command, folder = forked
    ranks = [report["pid"] for report in read(folder, AGAIN)]
    (server,) = set(children_of(command.process.pid)) - set(ranks)
    assert not leads_session(server)
    assert len(os.listdir(f"/proc/{server}/task")) == 1
    held = [os.readlink(path) for path in Path(f"/proc/{server}/fd").iterdir() if int(path.name) > 2]
    assert [target.split(":")[0] for target in held] == ["socket"], "its line to the agent, and neither lock nor store"
    os.kill(command.process.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, [server, *ranks])), "their end", Patience(cpu_of(lambda: [server, *ranks])))


def test_threads_before_the_fork_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    script = (
        "from esper.launcher.ahead import forks; forks.PRELOADED = (); assert forks.start_server('threaded') is None"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "importing threaded has started 1 threads, so ranks are not forked" in done.stderr

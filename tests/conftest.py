"""Property-based tests draw the same examples in every run, wait for slow machines, and leave no files behind.

Processes that share the tests (`-n 3 --dist loadfile`) take whole files, long ones first, so that they end together.
Files that look at one finished run go to the same process, so that it is made once.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("esper", deadline=None, database=None, derandomize=True)
settings.load_profile("esper")

ONE_RUN = ("e2e/test_kill_resume.py", "e2e/test_by_hand.py", "e2e/test_run.py", "e2e/test_run_wandb.py")
LONG = (
    *ONE_RUN,
    "e2e/test_compare.py",
    "faults/test_bad_day.py",
    "slurm/test_slurm.py",
    "dist/test_two_hosts.py",
    "dist/test_lockstep_lost.py",
    "dist/test_resume.py",
    "nissa/test_wandb.py",
    "e2e/",
    "dist/",
    "kasmina/test_compile.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Lets each process that shares all tests begin elsewhere to collect: what one compiles, the others read."""
    worker, tests = getattr(config, "workerinput", None), Path(__file__).parent
    if worker is not None and [Path(word).resolve() for word in config.args] == [tests]:
        files = sorted(map(str, tests.rglob("test_*.py")))
        first = len(files) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
        config.args[:] = files[first:] + files[:first]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[int, str]:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((index for index, long in enumerate(LONG) if path.startswith(long)), len(LONG)), path

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leaves modules and tests out of garbage collections, which would go through a million objects each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out files, as `--dist loadfile` does; those of `ONE_RUN` go out as if they were one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByRun(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return f"tests/{ONE_RUN[0]}" if file.removeprefix("tests/") in ONE_RUN else file

    return ByRun(config, log)

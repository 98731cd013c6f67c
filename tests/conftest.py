"""Property-based tests draw the same examples in every run, wait for slow machines, and leave no files behind.

Files that take long come first, so that processes which share the tests (`-n 2 --dist loadfile`) end together.
"""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("esper", deadline=None, database=None, derandomize=True)
settings.load_profile("esper")

LONG = (
    "e2e/test_compare.py",
    "e2e/test_kill_resume.py",
    "slurm/test_slurm.py",
    "dist/test_resume.py",
    "e2e/",
    "dist/",
    "kasmina/test_compile.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((index for index, long in enumerate(LONG) if path.startswith(long)), len(LONG))

    items.sort(key=place)

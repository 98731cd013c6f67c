"""Whether a core is idle: by the kernel's counts of each core, and by what quotas of control groups leave."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.kasmina.births.idle import IdleCores
from tests.support.groups import BOTH, SECOND, lay

Look = Callable[..., bool]
APART = [
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
    "33 31 0:30 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct",
]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Asks so many seconds later, with so many idle seconds of each of three cores, of which 0 and 2 are ours."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    now, hertz = [10.0], os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    made: list[IdleCores] = []

    def ask(seconds: float, *idle: float) -> bool:
        now[0] += seconds
        rows = [f"cpu{core} 5 5 5 {int(count * hertz)} 0 0" for core, count in enumerate(idle)]
        (tmp_path / "proc/stat").write_text("\n".join(["cpu  1 1 1 99999 1 1", *rows]))
        if not made:
            made.append(IdleCores(tmp_path))
        return made[0]()

    return ask


def test_idle_cores_are_counted_by_the_kernel(tmp_path: Path, look: Look) -> None:
    lay(tmp_path, [], [], {})
    assert not look(0.0, 0.0, 0.0, 0.0)
    assert not look(0.01, 5, 5, 5), "too soon to say"
    assert look(1.0, 0.3, 0.0, 0.3)
    assert look(0.01, 0.3, 0.0, 0.3), "too soon to say otherwise"
    assert not look(1.0, 0.4, 9.0, 0.4), "core 1 is not ours"


@pytest.mark.parametrize(
    ("groups", "mounts", "tight", "used", "per_s"),
    [
        (["0::/a/b"], SECOND, {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, "a/cpu.stat", 1e6),
        (["0::/a/b"], SECOND, {"a/cpu.max": "max 100000", "a/b/cpu.max": "100000 100000"}, "a/b/cpu.stat", 1e6),
        (
            ["4:cpu,cpuacct:/docker/abc/job"],
            BOTH,
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            "cpu,cpuacct/cpuacct.usage",
            1e9,
        ),
        (
            ["4:cpu:/a", "5:cpuacct:/a"],
            APART,
            {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"},
            "cpuacct/a/cpuacct.usage",
            1e9,
        ),
    ],
)
def test_a_quota_that_is_used_up_leaves_no_core_idle(
    groups: list[str], mounts: list[str], tight: dict[str, str], used: str, per_s: float, tmp_path: Path, look: Look
) -> None:
    """A quota of one core, in this process's group or in one above it; two cores have nothing to do."""

    def write(seconds: float) -> None:
        count = str(int(seconds * per_s))
        lay(tmp_path, groups, mounts, tight | {used: f"usage_usec {count}" if used.endswith("stat") else count})

    write(0.0)
    assert not look(0.0, 0, 0, 0)
    write(0.8)
    assert not look(1.0, 1, 0, 1), "0.2 cores are left of the quota"
    write(1.2)
    assert look(1.0, 2, 0, 2)
    (tmp_path / "sys/fs/cgroup" / used).unlink()
    assert not look(1.0, 3, 0, 3), "nobody says what was used"


def test_the_tightest_of_two_quotas_counts(tmp_path: Path, look: Look) -> None:
    """The group with the larger quota may be the one that has less left, since it has more processes."""
    quotas = {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 100000", "a/b/cpu.stat": "usage_usec 0"}
    lay(tmp_path, ["0::/a/b"], SECOND, quotas | {"a/cpu.stat": "usage_usec 0"})
    assert not look(0.0, 0, 0, 0)
    lay(tmp_path, ["0::/a/b"], SECOND, quotas | {"a/cpu.stat": "usage_usec 3800000"})
    assert not look(1.0, 1, 0, 1)
    lay(tmp_path, ["0::/a/b"], SECOND, quotas | {"a/cpu.stat": "usage_usec 4800000"})
    assert look(1.0, 2, 0, 2)

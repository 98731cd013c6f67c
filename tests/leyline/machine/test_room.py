"""Limits of control groups: real groups around real processes where they can be made, and files as Linux has them.

What is set on a group counts for every group below it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.leyline.machine.groups import cpu_quota, groups_of, memory_limits
from esper.leyline.machine.room import describe_cores, free_memory, usable_cores, used_share
from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.groups import BOTH, SECOND, lay

MIB = 1 << 20
CORES = len(os.sched_getaffinity(0))
Make = Callable[[str, dict[str, str]], Path]


@pytest.fixture
def make_group() -> Iterator[Make]:
    """Makes a group of a controller at the top of its tree, and another below it; returns the lower one."""
    made: list[Path] = []

    def make(controller: str, limits: dict[str, str]) -> Path:
        found = list(groups_of(controller))
        if not found:
            pytest.skip(f"no control group of {controller} is seen here")
        version, _ = min(found)  # version 1 says which controllers a tree has
        top = [group for kind, group in found if kind == version][-1]
        outer = top / f"esper-test-{os.getpid()}"
        try:
            outer.mkdir()
            made.append(outer)
            for name, value in limits.items():
                if (outer / name).exists():
                    (outer / name).write_text(value)
            if version == 2:
                (outer / "cgroup.subtree_control").write_text(f"+{controller}")
            (outer / "inner").mkdir()
        except OSError as error:
            pytest.skip(f"no control group of {controller} can be made here: {error}")
        made.append(outer / "inner")
        if not any((outer / name).exists() for name in limits):
            pytest.skip(f"the groups here do not control {controller}")
        return outer / "inner"

    yield make
    for group in reversed(made):
        group.rmdir()


def inside(group: Path, line: str) -> str:
    """What a line of Python prints in a process of the group."""
    code = f"import os, pathlib; pathlib.Path({str(group / 'cgroup.procs')!r}).write_text(str(os.getpid())); {line}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(ROOT))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_quota_of_cpu_time_is_seen_by_the_doctor_and_by_a_comparison(make_group: Make) -> None:
    quota = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000", "cpu.max": "150000 100000"}
    group = make_group("cpu", quota)
    room = "from esper.leyline.machine import room; print(room.cpu_quota(), room.usable_cores(), room.describe_cores())"
    seen = f"1.5 1 1 of {CORES} cores (a quota of 1.5)" if CORES > 1 else "1.5 1 1 cores"
    assert inside(group, room) == seen
    assert usable_cores() == CORES or cpu_quota() is not None, "this process is in none of them"


def test_a_limit_of_memory_is_seen_and_files_that_were_read_do_not_count(make_group: Make, tmp_path: Path) -> None:
    limit = 512 * MIB
    group = make_group("memory", {"memory.limit_in_bytes": str(limit), "memory.max": str(limit)})
    big = tmp_path / "big"
    big.write_bytes(bytes(64 * MIB))
    read = f"open({str(big)!r}, 'rb').read(); big = bytearray(100 * {MIB}); "
    line = "from esper.leyline.machine import room; print(room.free_memory(), room.used_share())"
    free, share = inside(group, read + line).split()
    assert limit - 160 * MIB < int(free) < limit - 95 * MIB
    assert float(share) > 95 * MIB / limit


# as the kernel writes it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "wanted"),
    [
        (["0::/"], SECOND, {"cpu.max": "250000 100000"}, 2.5),
        (["0::/"], SECOND, {"cpu.max": "max 100000"}, None),
        (["0::/a/b"], SECOND, {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        (["0::/a/b"], SECOND, {"a/cpu.max": "300000 100000", "a/b/cpu.max": "200000 100000"}, 2.0),
        (["0::/../../elsewhere"], SECOND, {"cpu.max": "100000 100000"}, 1.0),
        (["0::/docker/abc"], SECOND, {"cpu.max": "100000 100000"}, 1.0),
        (
            ["4:cpu,cpuacct:/docker/abc", "0::/docker/abc"],
            BOTH,
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4.0,
        ),
        (
            ["4:cpu,cpuacct:/docker/abc/job"],
            BOTH,
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/job/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            4.0,
        ),
        (["4:cpu,cpuacct:/docker/abc"], BOTH, {"cpu,cpuacct/cpu.cfs_quota_us": "-1"}, None),
        (["9:name=systemd:/"], BOTH, {}, None),
        ([], [], {}, None),
    ],
)
def test_quotas_of_both_versions(
    groups: list[str], mounts: list[str], files: dict[str, str], wanted: float | None, tmp_path: Path
) -> None:
    root = lay(tmp_path, groups, mounts, files)
    assert cpu_quota(root) == wanted
    cores = CORES if wanted is None else max(1, min(CORES, int(wanted)))
    assert usable_cores(root) == cores
    assert describe_cores(root).startswith(f"{cores} ")


def test_memory_of_both_versions(tmp_path: Path) -> None:
    second = {"a/memory.max": "1000", "a/memory.current": "900", "a/memory.stat": "anon 5\ninactive_file 500"}
    root = lay(tmp_path / "2", ["0::/a"], SECOND, second | {"memory.max": "max", "memory.current": "950"})
    (root / "proc/meminfo").write_text("MemTotal: 10 kB\nMemAvailable: 9 kB\n")
    assert memory_limits(root) == [(1000, 400)]
    assert (free_memory(root), used_share(root)) == (600, 0.4)
    first = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": "7000",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000",
    }
    root = lay(tmp_path / "1", ["4:memory:/docker/abc"], BOTH, first)
    (root / "proc/meminfo").write_text("MemTotal: 10 kB\nMemAvailable: 5 kB\n")
    assert memory_limits(root) == [(9223372036854771712, 6000)]
    assert (free_memory(root), used_share(root)) == (5 * 1024, 0.5)
    assert free_memory(tmp_path / "none") is used_share(tmp_path / "none") is None


def test_this_machine_says_what_is_free() -> None:
    free, share = free_memory(), used_share()
    assert free is not None
    assert free > 0
    assert share is not None
    assert 0.0 < share < 1.0

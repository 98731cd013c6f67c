"""Control groups as the kernel writes them, in a folder: what a process is in, where that is mounted, its files."""

from pathlib import Path


def lay(root: Path, groups: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    for name, lines in (("cgroup", groups), ("mountinfo", mounts)):
        (root / "proc/self").mkdir(parents=True, exist_ok=True)
        (root / "proc/self" / name).write_text("".join(line + "\n" for line in lines))
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text + "\n")
    return root


SECOND = ["31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"]
BOTH = [
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755",
    "32 31 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
    "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
]

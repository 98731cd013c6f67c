"""``esper doctor``: will a run work here? Every check does the thing itself, in small, and says what to do.

    machine        Python and torch, devices, two processes that reduce a number with gloo, ports, shared memory
    run directory  written and renamed over, locked against another process, clock, free space (--run-dir RUN)
    services       wandb, Slurm

``ok``, ``warning`` (a run can work) or ``failure`` (it will not); exit code 0 without a failure, 1 with one. Only the
standard library is needed to start: where torch is missing that is one of the findings (``python -m esper.doctor``).
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PATIENCE_S = 120.0
PYTHONS = ((3, 11), (3, 13))
MIN_TORCH = (2, 9)
LITTLE_SHARED = 1 << 30  # bytes; containers begin with 64 MiB
LITTLE_SPACE = 1 << 30  # bytes in the run directory
SKEW_S = 2.0  # seconds that the clocks of host and file server may differ


class Severity(StrEnum):
    """OK; WARNING: a run can work; FAILURE: it will not."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Args:
        level: how bad. what: the subject. text: what was found, and after a semicolon what to do.
    """

    level: Severity
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.what}: {self.text}"


def ok(what: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(Severity.OK, what, text)


def warning(what: str, text: str) -> Finding:
    """Worth knowing."""
    return Finding(Severity.WARNING, what, text)


def failure(what: str, text: str) -> Finding:
    """A run will not work."""
    return Finding(Severity.FAILURE, what, text)


def _child(*words: str, **variables: str) -> tuple[int, str]:
    """Exit code and last line of a child process; -1 when it does not end."""
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    except subprocess.TimeoutExpired:
        return -1, f"no end after {PATIENCE_S:g} s"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


# ---------------------------------------------------------------- machine


def check_python() -> Finding:
    """The interpreter's version."""
    here, name = sys.version_info[:2], ".".join(map(str, sys.version_info[:3]))
    if not PYTHONS[0] <= here <= PYTHONS[1]:
        return failure("Python", f"{name}; 3.11 to 3.13 is expected")
    return ok("Python", name)


def check_torch() -> Finding:
    """torch's version, as its import says it."""
    code, said = _child(sys.executable, "-c", "import torch; print(torch.__version__)")
    if code:
        return failure("torch", f"{said}; install what requirements.lock names (bash launch/setup.sh)")
    if tuple(int(part) for part in said.split(".")[:2]) < MIN_TORCH:
        return failure("torch", f"{said}; 2.9 or newer is expected")
    return ok("torch", said)


def check_devices() -> Finding:
    """Cores that this process may use, and CUDA devices."""
    cores = len(os.sched_getaffinity(0))
    script = "import torch; print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])"
    code, said = _child(sys.executable, "-c", script)
    if code:
        return failure("devices", f"{cores} cores; torch cannot count GPUs ({said})")
    if said == "[]":
        gpus = [Path(path) for path in ("/dev/nvidia0", "/proc/driver/nvidia/version") if Path(path).exists()]
        if gpus:
            return warning(
                "devices", f"{cores} cores, and {gpus[0]} but no CUDA device in torch; install torch for CUDA"
            )
        return ok("devices", f"{cores} cores, no GPU: world=cpu")
    return ok("devices", f"{cores} cores, {said}: world=gpu")


_REDUCE = """
import sys, datetime, torch, torch.distributed as dist
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
x = torch.tensor([rank + 1.0]); dist.all_reduce(x); dist.destroy_process_group()
print(x.item())
"""


def check_backend() -> Finding:
    """Two processes add up 1 and 2 with gloo."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", _REDUCE, f"{folder}/store"]
        with subprocess.Popen(
            [*words, "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as other:  # its peer says what is wrong
            code, said = _child(*words, "1")
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(PATIENCE_S if code == 0 else 5)
            other.kill()
    if code:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        advice = f"GLOO_SOCKET_IFNAME={interface} must name an interface that is up" if interface else "see ports"
        return failure("backend", f"two gloo processes cannot reduce: {said}; {advice}")
    return ok("backend", "two gloo processes reduced") if said == "3.0" else failure("backend", f"1 + 2 gave {said}")


def check_ports() -> Finding:
    """A port of this host, reached by its loopback address and by its own name."""
    name = socket.gethostname()
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        except OSError as error:
            return failure(
                "ports", f"127.0.0.1 is not reachable ({error.strerror or error}); bring up the interface lo"
            )
        try:
            socket.create_connection((name, port), timeout=10).close()
        except OSError as error:
            return warning(
                "ports",
                f"this host's name {name!r} leads nowhere ({error}); runs on several hosts need it in DNS or "
                "/etc/hosts, or world.rdzv_endpoint by address",
            )
    return ok("ports", f"loopback and {name!r} reachable")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Size of shared memory, and that it can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"esper")
            file.flush()
        stat = os.statvfs(folder)
    except OSError as error:
        return failure("shared memory", f"{folder} cannot be used ({error.strerror}); mount a tmpfs there")
    size = stat.f_frsize * stat.f_blocks
    if size < LITTLE_SHARED:
        return warning(
            "shared memory",
            f"{folder} has {size / 2**20:.0f} MiB; NCCL and data loaders want 1 GiB: docker run "
            "--shm-size=8g, or a memory volume in Kubernetes",
        )
    return ok("shared memory", f"{size / 2**30:.1f} GiB")


# ---------------------------------------------------------------- run directory


def skew_of(file_time: float, before: float, after: float) -> float:
    """Seconds by which a file's time lies outside of the moment in which it was written."""
    return max(before - file_time, file_time - after, 0.0)


def check_run_dir(run_dir: Path) -> Iterator[Finding]:
    """Atomic rename, locks, clock and space where a run writes. Leaves nothing behind."""
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    what = f"run directory {run_dir}"
    try:
        place = Path(tempfile.mkdtemp(prefix=".esper-doctor-", dir=folder))
    except OSError as error:
        yield failure(what, f"cannot be written ({error.strerror}); set run.dir=<a writable folder>")
        return
    try:
        yield from _checks_in(place, what)
    except OSError as error:
        yield failure(what, f"cannot be written ({error.strerror}); set run.dir=<a folder with space>")
    finally:
        shutil.rmtree(place, ignore_errors=True)


_LOCK = """
import fcntl, sys
try: fcntl.flock(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: print("held")
else: print("free")
"""


def _checks_in(place: Path, what: str) -> Iterator[Finding]:
    target, fresh = place / "file", place / "fresh"
    target.write_bytes(b"old" * 1000)
    before = time.time()
    with fresh.open("wb") as file:
        file.write(b"new" * 1000)
        file.flush()
        os.fsync(file.fileno())
    written, after = fresh.stat().st_mtime, time.time()
    with target.open("rb") as reader:
        fresh.replace(target)
        whole = reader.read() == b"old" * 1000 and target.read_bytes() == b"new" * 1000 and not fresh.exists()
    if whole:
        yield ok(what, "written, and replaced in one step")
    else:
        yield failure(what, "a rename does not replace a file in one step; set run.dir=<a POSIX file system>")

    with target.open("r+b") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield failure("locks", f"none there ({error.strerror}); mount with flock, or set run.dir=<another folder>")
        else:
            code, said = _child(sys.executable, "-I", "-c", _LOCK, str(target))
            if (code, said) == (0, "held"):
                yield ok("locks", "held against another process of this host")
            else:
                yield failure("locks", f"another process found it {said}; mount with flock, or use another folder")

    skew = skew_of(written, before, after)
    if skew > SKEW_S:
        yield warning(
            "clock", f"the file server's differs by {skew:.1f} s; set both by NTP (times in logs will not fit)"
        )
    else:
        yield ok("clock", f"file times differ by {skew:.1f} s")
    stat = os.statvfs(place)
    space = stat.f_frsize * stat.f_bavail
    tell = warning if space < LITTLE_SPACE else ok
    yield tell("space", f"{space / 2**30:.1f} GiB free" + ("; make room, or lower checkpoint.keep" * (tell is warning)))


# ---------------------------------------------------------------- services

_WANDB = """
import sys, wandb
run = wandb.init(mode="offline", dir=sys.argv[1], project="esper", settings=wandb.Settings(console="off", silent=True))
run.log({"x": 1}); run.finish()
"""


def check_wandb() -> Finding:
    """Importable, able to write an offline run, and whether there are credentials."""
    try:
        version = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        return failure("wandb", "not installed; pip install wandb, or set telemetry.wandb.mode=disabled")
    with tempfile.TemporaryDirectory() as folder:
        code, said = _child(sys.executable, "-c", _WANDB, folder)
        written = list(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))
    if code or not written:
        advice = "set telemetry.wandb.mode=disabled"
        return failure("wandb", f"{version} cannot write an offline run ({said or 'no file'}); {advice}")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
    if not known:
        return warning("wandb", f"{version} writes offline runs; no credentials for telemetry=online: wandb login")
    return ok("wandb", f"{version} writes offline runs, and there are credentials")


def check_slurm() -> Finding:
    """Commands, controller, and the job around this process."""
    if shutil.which("sbatch") is None:
        if "SLURM_JOB_ID" in os.environ:
            return failure(
                "Slurm", f"job {os.environ['SLURM_JOB_ID']} without sbatch; put Slurm's commands on the PATH"
            )
        return ok("Slurm", "not on this host; nothing needs it")
    absent = [name for name in ("srun", "scontrol", "scancel") if shutil.which(name) is None]
    if absent:
        return failure("Slurm", f"sbatch without {', '.join(absent)}; put Slurm's commands on the PATH")
    code, said = _child("timeout", "20", "scontrol", "ping")
    if code or " UP" not in said:
        return warning("Slurm", f"the controller does not answer ({said or 'for 20 s'}); ask its administrators")
    _, version = _child("sbatch", "--version")
    number = os.environ.get("SLURM_JOB_ID")
    where = "" if number is None else f", job {number} on {os.environ.get('SLURM_JOB_NODELIST', 'no hosts')}"
    return ok("Slurm", f"{version}, controller up{where}")


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
    """One after the other, as they are found."""
    for check in CHECKS:
        yield check()
    yield from check_run_dir(run_dir)


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each check; 1 when there is a failure, else 0."""
    parser = argparse.ArgumentParser("esper doctor", description="Check whether a run will work here.")
    parser.add_argument("--run-dir", metavar="RUN", type=Path, default=Path("runs"), help="where it will write; runs")
    worst = 0
    for found in findings(parser.parse_args(argv).run_dir.expanduser().absolute()):
        print(found, flush=True)
        worst = max(worst, int(found.level is Severity.FAILURE))
    return worst


if __name__ == "__main__":
    sys.exit(main())

"""Checks of ``esper doctor`` on the machine and on services: each does the thing itself, in small.

Only the standard library is imported here. What needs torch or wandb runs in a child process, so that a missing package
is a finding like any other. The checks of the run directory are in `esper.launcher.folder_checks`.
"""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from esper.leyline.machine.room import describe_cores

PATIENCE_S = 120.0
PYTHONS = ((3, 11), (3, 13))
MIN_TORCH = (2, 9)
LITTLE_SHARED = 1 << 30  # bytes; containers begin with 64 MiB


class Severity(StrEnum):
    """OK: nothing to do. WARNING: a run can work. FAILURE: a run will not work."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Fields:
        level: how bad it is.
        what: the subject.
        text: the observation, and after a semicolon what to do about it.
    """

    level: Severity
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.what}: {self.text}"


def ok(what: str, text: str) -> Finding:
    """A finding with nothing to do."""
    return Finding(Severity.OK, what, text)


def warning(what: str, text: str) -> Finding:
    """A finding that is worth knowing; a run can work."""
    return Finding(Severity.WARNING, what, text)


def failure(what: str, text: str) -> Finding:
    """A finding with which a run will not work."""
    return Finding(Severity.FAILURE, what, text)


def run_child(*words: str, **variables: str) -> tuple[int, str]:
    """Runs a child process; returns its exit code (-1 when it does not end) and its last line."""
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
    """The version that an import of torch reports."""
    code, line = run_child(sys.executable, "-c", "import torch; print(torch.__version__)")
    if code:
        return failure("torch", f"{line}; install what requirements.lock names (bash launch/setup.sh)")
    if tuple(int(part) for part in line.split(".")[:2]) < MIN_TORCH:
        return failure("torch", f"{line}; 2.9 or newer is expected")
    return ok("torch", line)


def check_devices() -> Finding:
    """The cores that this process may use, within its quota of CPU time, and the CUDA devices."""
    cores = describe_cores()
    script = "import torch; print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])"
    code, line = run_child(sys.executable, "-c", script)
    if code:
        return failure("devices", f"{cores}; torch cannot count GPUs ({line})")
    if line == "[]":
        gpus = [Path(path) for path in ("/dev/nvidia0", "/proc/driver/nvidia/version") if Path(path).exists()]
        if gpus:
            return warning("devices", f"{cores}, and {gpus[0]} but no CUDA device in torch; install torch for CUDA")
        return ok("devices", f"{cores}, no GPU: world=cpu")
    return ok("devices", f"{cores}, {line}: world=gpu")


_REDUCE = """
import datetime, os, signal, sys, torch, torch.distributed as dist
peer = os.fork()  # torch is loaded once
if not peer:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)  # the errors of one process are enough: its peer reports what is wrong
try:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(peer > 0), world_size=2,
                            timeout=datetime.timedelta(seconds=60))
    x = torch.tensor([1.0 + (peer > 0)]); dist.all_reduce(x); dist.destroy_process_group()
    print(x.item())
finally:
    if peer:
        os.kill(peer, signal.SIGKILL)
        os.waitpid(peer, 0)
"""


def check_backend() -> Finding:
    """Adds 1 and 2 in two processes with gloo."""
    with tempfile.TemporaryDirectory() as folder:
        code, line = run_child(sys.executable, "-c", _REDUCE, f"{folder}/store")
    if code:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        advice = f"GLOO_SOCKET_IFNAME={interface} must name an interface that is up" if interface else "see ports"
        return failure("backend", f"two gloo processes cannot reduce: {line}; {advice}")
    return ok("backend", "two gloo processes reduced") if line == "3.0" else failure("backend", f"1 + 2 gave {line}")


def check_ports() -> Finding:
    """Whether a port of this machine can be reached by the loopback address and by the machine's own name."""
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
    """The size of shared memory, and whether it can be written."""
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


# ---------------------------------------------------------------- services

_WANDB = """
import sys, wandb
run = wandb.init(mode="offline", dir=sys.argv[1], project="esper", settings=wandb.Settings(console="off", silent=True))
run.log({"x": 1}); run.finish()
"""


def check_wandb() -> Finding:
    """Whether wandb can be imported, can write an offline run, and has credentials."""
    try:
        version = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        return failure("wandb", "not installed; pip install wandb, or set telemetry.wandb.mode=disabled")
    with tempfile.TemporaryDirectory() as folder:
        code, line = run_child(sys.executable, "-c", _WANDB, folder)
        written = list(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))
    if code or not written:
        advice = "set telemetry.wandb.mode=disabled"
        return failure("wandb", f"{version} cannot write an offline run ({line or 'no file'}); {advice}")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))
    if not known:
        return warning("wandb", f"{version} writes offline runs; no credentials for telemetry=online: wandb login")
    return ok("wandb", f"{version} writes offline runs, and there are credentials")


def check_slurm() -> Finding:
    """Slurm's commands, its controller, and the job around this process."""
    if shutil.which("sbatch") is None:
        if "SLURM_JOB_ID" in os.environ:
            return failure(
                "Slurm", f"job {os.environ['SLURM_JOB_ID']} without sbatch; put Slurm's commands on the PATH"
            )
        return ok("Slurm", "not on this host; nothing needs it")
    absent = [name for name in ("srun", "scontrol", "scancel") if shutil.which(name) is None]
    if absent:
        return failure("Slurm", f"sbatch without {', '.join(absent)}; put Slurm's commands on the PATH")
    code, line = run_child("timeout", "20", "scontrol", "ping")
    if code or " UP" not in line:
        return warning("Slurm", f"the controller does not answer ({line or 'for 20 s'}); ask its administrators")
    _, version = run_child("sbatch", "--version")
    number = os.environ.get("SLURM_JOB_ID")
    where = "" if number is None else f", job {number} on {os.environ.get('SLURM_JOB_NODELIST', 'no hosts')}"
    return ok("Slurm", f"{version}, controller up{where}")

"""A Slurm cluster of two nodes for the tests of this folder; they are skipped, with the reason, where none can be had.

Debian's packages are installed where that is allowed: by root, on a machine that has apt-get, unless
ESPER_NO_INSTALL is set.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.patience import Patience, load, marks_of, size_of

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
PACKAGES = ("slurm-wlm", "slurm-client", "munge", "iproute2")
STILL_S = 150.0  # a job may wait that long for Slurm to look at its queue


def missing() -> list[str]:
    return [name for name in NEEDED if shutil.which(name) is None]


def install() -> None:
    """Installs what is missing, or skips."""
    if missing() and os.geteuid() == 0 and shutil.which("apt-get") and not os.environ.get("ESPER_NO_INSTALL"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 240 * load()}
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["apt-get", "update"], **quiet)
            lean = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
            subprocess.run(lean, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, **quiet)
    if missing():
        pytest.skip(f"no {', '.join(missing())} here; as root: apt-get install {' '.join(PACKAGES)}")


class Cluster:
    """A cluster in processes of its own.

    Attributes:
        base: folder for its state and for the tests' runs.
    """

    def __init__(self, base: Path, nodes: int) -> None:
        self.base = base
        apart = ["unshare", "-nmpf", "--mount-proc", "--kill-child"]
        server = [sys.executable, "-m", "tests.slurm.cluster", str(base), str(nodes)]
        self.process = subprocess.Popen(
            [*apart, *server],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout

    def answer(self) -> dict[str, Any]:
        """The next answer; code 1 when the cluster has ended."""
        line = self._out.readline()
        if not line:
            assert self.process.stderr is not None
            return {"code": 1, "out": "", "err": self.process.stderr.read()}
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, *words: str, folder: Path | None = None, **variables: str) -> str:
        """Output of a command on the controller's host; it must succeed."""
        variables = {**environment(self.base, **variables), "SLURM_CONF": str(self.base / "slurm.conf")}
        asked = {"words": words, "folder": str(folder or self.base), "environment": variables}
        self._in.write(json.dumps(asked) + "\n")
        self._in.flush()
        answer = self.answer()
        assert answer["code"] == 0, f"{words}: {answer}"
        return str(answer["out"])

    def submit(self, *words: str, **variables: str) -> str:
        """Number of a submitted job."""
        told = self.ask("sbatch", "--parsable", *words, **variables)
        return told.strip().split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def until(self, due: Callable[[], bool], what: str, log: Path | None = None, job: str | None = None) -> None:
        """Returns once ``due``; fails when no job gets on any more, or that which should bring it about has ended."""

        def marks() -> object:  # of the runs that there are by now
            return marks_of(*self.base.glob("*"), *self.base.glob("*/*"))()

        patience = Patience(marks, size_of(*([] if log is None else [log])), still_s=STILL_S)
        while not due():
            said = log.read_text() if log is not None and log.exists() else ""
            assert patience.lasts(), f"{what} did not come: {patience}\n{self.ask('squeue')}\n{said}"
            gone = job is not None and self.job(job)["JobState"] not in ("PENDING", "RUNNING", "CONFIGURING")
            assert not gone or due(), f"job {job} ended before {what}\n{said}"
            time.sleep(0.3)

    def start_now(self, number: str) -> None:
        """A requeued job is held for two minutes; this one is not to wait."""
        self.until(lambda: self.job(number)["JobState"] == "PENDING", f"job {number} in the queue again")
        self.ask("scontrol", "update", f"jobid={number}", "StartTime=now")

    def close(self) -> None:
        """Ends every daemon, job and namespace of it."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        try:
            self.process.wait(20 * load())
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for stream in (self._in, self._out, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes. munge wants a folder that only root may write, all the way up."""
    install()
    if os.geteuid() != 0:
        pytest.skip("network and mount namespaces with munge need root here")
    home = Path("/srv") if Path("/srv").is_dir() else Path("/var/lib")
    try:
        base = Path(tempfile.mkdtemp(prefix="esper-slurm-", dir=home))
    except OSError as error:
        pytest.skip(f"{home}: {error.strerror}; munge's socket needs a folder that only root may write")
    base.chmod(0o755)
    made = Cluster(base, 2)
    try:
        up = made.answer()
        if up["code"]:
            pytest.skip(f"no cluster here: {up['err'].strip() or up['out']}")
        yield made
    finally:
        made.close()
        shutil.rmtree(base, ignore_errors=True)

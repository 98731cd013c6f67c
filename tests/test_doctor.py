"""Each check of ``esper doctor`` with its real trouble: a bare environment, a small tmpfs, no network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper import cli, doctor
from esper.doctor import Severity
from esper.launcher.folder_checks import skew_of
from tests.support.dist import ROOT
from tests.support.patience import run_patiently


def apart(flags: str, script: str, *words: str) -> str:
    """What a Python line prints after a shell script in namespaces of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", flags, "true"], capture_output=True).returncode:
        pytest.skip("private namespaces need root and the program unshare")
    line = ["unshare", flags, "sh", "-ec", f'{script}\nexec "$@"', "sh", sys.executable, "-c", *words]
    done = run_patiently(line, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_bare_environment_is_examined_to_the_end(tmp_path: Path) -> None:
    """A Python with no packages at all: two failures by name, and everything else is still looked at."""
    bare, run = tmp_path / "bare", tmp_path / "deep" / "run"
    assert run_patiently([sys.executable, "-m", "venv", "--without-pip", str(bare)]).returncode == 0
    command = [str(bare / "bin" / "python"), "-m", "esper.doctor", "--run-dir", str(run)]
    variables = {"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}
    done = run_patiently(command, env=variables)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert (
        "failure  torch: ModuleNotFoundError: No module named 'torch'; install what requirements.lock names" in lines[1]
    )
    assert any(line.startswith("failure  wandb: not installed; pip install wandb") for line in lines)
    subjects = [line[9:].split(":")[0] for line in lines]
    known = ["Python", "torch", "devices", "backend", "ports", "shared memory", "wandb", "Slurm"]
    assert subjects == [*known, f"run directory {run}", "syncing folders", "modes", "locks", "clock", "space"]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bare"], "it leaves nothing behind"


def test_this_machine_can_run_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, doctor.check_torch, doctor.check_shared_memory))
    assert cli.main(["doctor", "--run-dir", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert not [line for line in lines if line.startswith("failure")]
    assert not list(tmp_path.iterdir())


def test_gloo_reduces_and_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.check_backend()
    assert (found.level, found.text) == (Severity.OK, "two gloo processes reduced")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    found = doctor.check_backend()
    assert found.level is Severity.FAILURE
    assert "GLOO_SOCKET_IFNAME=none0 must name an interface that is up" in found.text


def test_a_loopback_that_is_down_and_a_name_that_leads_nowhere() -> None:
    line = "from esper.doctor import check_ports; print(check_ports())"
    assert apart("-n", ":", line).startswith("failure  ports: 127.0.0.1 is not reachable (Network is unreachable)")
    odd = apart("-u", "hostname no-such-host.invalid", line)
    assert odd.startswith("warning  ports: this host's name 'no-such-host.invalid' leads nowhere")


def test_little_or_no_shared_memory() -> None:
    line = "from esper.doctor import check_shared_memory; print(check_shared_memory())"
    little = apart("-m", "mount -t tmpfs -o size=16m tmpfs /dev/shm", line)
    assert little.startswith("warning  shared memory: /dev/shm has 16 MiB; NCCL and data loaders want 1 GiB")
    none = apart("-m", "mount -t tmpfs -o ro tmpfs /dev/shm", line)
    assert none.startswith("failure  shared memory: /dev/shm cannot be used (")


def test_a_run_directory_that_is_read_only_or_full(tmp_path: Path) -> None:
    line = "import pathlib, sys; from esper.doctor import check_run_dir\n"
    line += "print(*check_run_dir(pathlib.Path(sys.argv[1])), sep=chr(10))"
    disk = tmp_path / "disk"
    disk.mkdir()
    run = str(disk / "runs" / "one")
    frozen = apart("-m", f"mount -t tmpfs -o ro tmpfs {disk}", line, run)
    assert frozen == (
        f"failure  run directory {run}: cannot be written (Read-only file system); set run.dir=<a writable folder>"
    )
    full = f"mount -t tmpfs -o size=64k tmpfs {disk}; head -c 60000 /dev/zero > {disk}/fill; mkdir -p {disk}/runs"
    (said,) = apart("-m", full, line, run).splitlines()
    assert said.startswith(f"failure  run directory {run}: cannot be written (No space left on device)")
    small = apart("-m", f"mount -t tmpfs -o size=1m tmpfs {disk}", line, run).splitlines()
    assert [found.split()[0] for found in small] == [*["ok"] * 5, "warning"]
    assert small[-1].endswith("0.0 GiB free; make room, or lower checkpoint.keep")


@pytest.mark.parametrize(("file_time", "skew"), [(10.0, 0.0), (10.5, 0.0), (11.0, 0.0), (4.0, 6.0), (3611.0, 3600.0)])
def test_a_file_is_as_old_as_the_moment_in_which_it_was_written(file_time: float, skew: float) -> None:
    assert skew_of(file_time, 10.0, 11.0) == skew


def test_wandb_writes_offline_and_credentials_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = doctor.check_wandb()
    assert found.level is Severity.WARNING, found
    assert "writes offline runs; no credentials for telemetry=online: wandb login" in found.text


def test_slurm_that_is_absent_half_there_or_silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = shutil.which("sbatch")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_slurm().level is Severity.OK
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert doctor.check_slurm().text == "job 7 without sbatch; put Slurm's commands on the PATH"
    if where is None:
        pytest.skip("the rest needs Slurm's commands")
    (tmp_path / "sbatch").symlink_to(where)
    found = doctor.check_slurm()
    assert (found.level, found.text) == (
        Severity.FAILURE,
        "sbatch without srun, scontrol, scancel; put Slurm's commands on the PATH",
    )
    monkeypatch.setenv("PATH", os.defpath)
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\nAuthType=auth/none\nNodeName=a\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    found = doctor.check_slurm()
    assert found.level is Severity.WARNING
    assert found.text.startswith("the controller does not answer (")

"""Odd words, variables and file systems at the start: each is one line, or passed over with one."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper import cli
from esper.launcher.agent import drop_settings_of_torchrun
from esper.launcher.complaints import words_in_order
from esper.launcher.folder_checks import check_run_dir
from esper.launcher.slurm import check_single_task
from esper.launcher.supervise import catches, children_of
from esper.leyline import files
from esper.leyline.errors import ConfigError, InUseError
from esper.run.lock import LOCKED, lock_by_hand, name_launch, take_lock
from tests.support.commands import ESPER, NO_WANDB, TRAIN, Command, environment
from tests.support.dist import ROOT

PREPARE = ("train", "experiment=demo", NO_WANDB, "launch=prepare")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, int], None]:
    """Makes a call of the file system answer with an error, as odd ones do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "_said", set())
    real = os.fsync

    def refuse(what: str, number: int) -> None:
        def fail(*args: Any) -> None:
            raise OSError(number, os.strerror(number))

        def fsync(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                fail()
            real(descriptor)

        name, call = {"chmod": ("os.chmod", fail), "flock": ("fcntl.flock", fail), "fsync": ("os.fsync", fsync)}[what]
        monkeypatch.setattr(name, call)

    return refuse


@pytest.mark.parametrize(
    ("call", "number", "told", "doctor"),
    [
        ("fsync", errno.EINVAL, "folders cannot be synced there", "syncing folders"),
        ("flock", errno.ENOSYS, "this file system has no locks", "locks"),
        ("flock", errno.ENOLCK, "this file system has no locks", "locks"),
    ],
)
def test_what_a_file_system_lacks_is_passed_over_with_one_line_and_found_by_the_doctor(
    call: str, number: int, told: str, doctor: str, odd: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    odd(call, number)
    assert cli.main([*PREPARE, "run.dir=run"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if told in line]) == 1, said
    assert len(said) == 1, said
    found = [finding for finding in check_run_dir(Path("run").absolute()) if finding.level != "ok"]
    assert [(finding.level, finding.what) for finding in found if finding.what != "space"] == [("warning", doctor)]


def test_a_file_system_without_modes_takes_a_run_and_the_doctor_finds_it(
    odd: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    odd("chmod", errno.EPERM)
    assert cli.main([*PREPARE, "run.dir=run"]) == 0
    assert capsys.readouterr().err == ""
    found = [finding for finding in check_run_dir(Path("run").absolute()) if finding.level != "ok"]
    assert [(finding.level, finding.what) for finding in found if finding.what != "space"] == [("warning", "modes")]


@pytest.mark.parametrize(
    ("call", "number", "advice"),
    [
        ("fsync", errno.EIO, "see what esper doctor --run-dir "),
        ("fsync", errno.ENOSPC, "make room there, or set run.dir=<a folder with space>"),
    ],
)
def test_a_disk_in_trouble_is_refused_and_no_writable_folder_is_asked_for(
    call: str, number: int, advice: str, odd: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    odd(call, number)
    assert cli.main([*PREPARE, "run.dir=run"]) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert advice in line
    assert "writable" not in line
    assert not Path("run").exists()


def test_files_of_a_run_follow_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o002)
    try:
        assert cli.main([*PREPARE, "run.dir=run"]) == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in Path("run").iterdir()}
    assert modes == {"config.yaml": 0o444, "environment.json": 0o664, "lock": 0o664}


def test_flags_may_stand_between_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words_in_order(["a=1", "-m", "b=2"]) == ["-m", "a=1", "b=2"]
    assert words_in_order(["a=1", "--cfg", "job", "b=2", "-p", "host", "~c"]) == [
        "--cfg",
        "job",
        "-p",
        "host",
        "a=1",
        "b=2",
        "~c",
    ]
    assert words_in_order(["a=1", "--info", "b=2"]) == ["--info=all", "a=1", "b=2"]
    assert words_in_order(["--info", "config", "b=2"]) == ["--info=config", "b=2"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "experiment=demo", "-m", "seed=1,2", "launch=plan", "hydra.sweep.dir=s"]) == 0
    assert capsys.readouterr().out.count("run directory: ") == 2


def test_a_sweep_folder_with_a_long_name_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*PREPARE, "-m", "seed=1,2", "hydra.sweep.dir=s", f"hydra.sweep.subdir={'x' * 300}"]
    assert cli.main(words) == 78
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text]
    assert line == (
        f"esper: config: hydra: File name too long: the name {'x' * 40}... has 300 bytes, and 255 are allowed; "
        "set hydra.sweep.subdir=${hydra.job.num}"
    )


def test_a_number_with_an_exponent_is_advised_as_a_whole_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "experiment=demo", "trainer.steps=1e3", "launch=plan"]) == 78
    assert "trainer.steps = 1000.0: expected a whole number or null; set trainer.steps=1000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2"}, False),  # in a batch script
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "4294967291"}, False),  # the batch script's own step
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "3"}, True),
    ],
)
def test_a_launcher_that_srun_starts_once_per_rank_is_refused(variables: dict[str, str], refused: bool) -> None:
    if not refused:
        check_single_task(variables)
        return
    with pytest.raises(ConfigError, match="srun starts this launcher 2 times, and each would train the whole run"):
        check_single_task(variables)


@pytest.mark.parametrize("program", [TRAIN, [*ESPER, "train"], [*ESPER, "resume"]])
def test_process_1_stops_at_its_first_sigterm_however_early(program: list[str], tmp_path: Path) -> None:
    apart = ["unshare", "-pf", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("a process 1 of its own needs root and the program unshare")
    words = ["run"] if "resume" in program else ["experiment=demo", "trainer.epochs=4000", NO_WANDB, "run.dir=run"]
    command = Command([*apart, *program], *words, folder=tmp_path)
    try:
        command.until(lambda: bool(caught(command)), "a handler, which comes long before torch")
        (pid,) = caught(command)
        os.kill(pid, signal.SIGTERM)
        assert command.end() == 75, command.told()
    finally:
        command.clear()
    assert command.err.splitlines()[-1] in (
        "esper: SIGTERM before a run had started",
        "esper: interrupted before a run had started",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", ["import esper.cli", "import runpy; runpy.run_path(sys.argv[1])"])
def test_the_handler_stands_before_anything_slow_is_imported(first: str) -> None:
    slow = "[names.index(name) for name in ('hydra', 'omegaconf', 'esper.launcher.ahead.process') if name in names]"
    order = f"names = list(sys.modules); print(names.index('esper.launcher.early') < min({slow}), 'torch' in names)"
    line = f"import sys; {first}; {order}"
    done = subprocess.run([sys.executable, "-c", line, TRAIN[1]], capture_output=True, text=True, env=environment(ROOT))
    assert done.stdout == "True False\n", done.stderr


def caught(command: Command) -> list[int]:
    """The launcher, once it catches SIGTERM."""
    return [pid for pid in children_of(command.process.pid) if catches(pid, signal.SIGTERM)]


def test_torchruns_own_variables_do_not_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    variables = {"PET_STANDALONE": "1", "PET_NNODES": "3", "PATH": "/bin"}
    drop_settings_of_torchrun(variables)
    assert variables == {"PATH": "/bin"}
    assert capsys.readouterr().err.startswith("esper: PET_NNODES, PET_STANDALONE: not passed on to torchrun")
    drop_settings_of_torchrun(variables)
    assert capsys.readouterr().err == ""


def test_a_lock_is_taken_by_hand_unless_it_is_held_for_these_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (LOCKED, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    held = take_lock(tmp_path)
    with pytest.raises(InUseError, match=f"in use by process {os.getpid()} on host "):
        lock_by_hand(tmp_path)
    monkeypatch.setenv(LOCKED, str(tmp_path))
    assert lock_by_hand(tmp_path) is None, "a process above holds it"
    monkeypatch.delenv(LOCKED)
    name_launch(held, "abc")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abd")
    with pytest.raises(InUseError):
        lock_by_hand(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")  # typed on another host of the same launch
    ours = lock_by_hand(tmp_path)
    assert ours is not None
    os.close(ours)
    os.close(held)
    again = lock_by_hand(tmp_path)
    assert again is not None
    os.close(again)

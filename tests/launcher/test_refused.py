"""Guards of starts, of Slurm and of what a run goes on from that no other test makes fire."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

import esper
from esper.compare.arms import read_compare
from esper.compare.cells import _lines
from esper.config.folder import conf_folder
from esper.config.tree import write_config
from esper.karn.store.facts import read_json, read_settings
from esper.launcher import compose, ctl, policy, slurm, start
from esper.launcher.ahead.forks import ForkedRank, RankServer
from esper.launcher.resume import make_order
from esper.launcher.slurm import SlurmJob, srun_command
from esper.launcher.start import LaunchResult
from esper.launcher.supervise import Ended
from esper.leyline.breaker import BreakerPhase
from esper.leyline.errors import ConfigError, DataError, EsperError, LeaseError, Preempted, RunDirError
from esper.leyline.files import RunDir, write_json
from esper.leyline.orders.answer import read_answer
from esper.run.attempt import Attempt, begin_attempt
from esper.run.fitting.asking import ask_whether_parts_fit
from esper.run.fitting.trial import verdict_of
from esper.run.learning.config import build_policy_config
from esper.run.lock import take_lock
from esper.run.parent import _prctl
from esper.run.start.origin import _stable_step
from esper.run.using.evaluation import _with_settings
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support.refusals import fails
from tests.support.tiny import tiny_config, tiny_plain
from tests.support.toy_tasks import toy_plain


@pytest.mark.parametrize(
    ("does", "text"),
    [
        (None, r"^scontrol: not found; Slurm's commands must be on the PATH of the job$"),
        ("echo 'slurm_load: no contact' >&2; exit 1", r"^scontrol show job: slurm_load: no contact$"),
        ("exit 3", r"^scontrol show job: exit code 3$"),
        ("exec /bin/sleep 60", r"^scontrol show job: no answer in 0\.3 s; is slurmctld up\?$"),
    ],
)
def test_slurm_that_does_not_answer(
    does: str | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if does is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if "sleep" in (does or ""):
        monkeypatch.setattr(slurm, "_PATIENCE_S", 0.3)
    fails(lambda: slurm._ask("scontrol", "show", "job"), EsperError, text)
    job = SlurmJob("1", 0, ("a", "b"))
    fails(lambda: srun_command(job, tmp_path / "c.yaml"), EsperError, r"^srun: not found; Slurm's commands must be on")


def origin(folder: Path, **changed: Any) -> None:
    plain = tiny_plain(**changed)
    if "optim__lr" in changed:
        plain["optim"]["lr"] = changed["optim__lr"]
    write_config(folder / "config.yaml", plain)
    _stable_step(tiny_config(), folder, CheckpointStore.of_run(folder))


def damaged(folder: Path) -> None:
    (folder / "cells.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    list(_lines(folder / "cells.jsonl"))


def broken(folder: Path) -> None:
    (folder / "mine.yaml").write_text("arms: [\n")
    read_compare(str(folder / "mine.yaml"), [])


def read_array(folder: Path) -> None:
    (folder / "STATUS.json").write_text("[]")
    read_json(folder / "STATUS.json")


def read_list(folder: Path) -> None:
    (folder / "config.yaml").write_text("- 1\n")
    read_settings(RunDir(folder))


def check_damaged(folder: Path) -> None:
    (folder / "attempt.json").write_text('{"number": 1}')
    Attempt(1, "x", "y", folder).check()


def begin_damaged(folder: Path) -> None:
    (folder / "attempt.json").write_text('{"number": 1')
    begin_attempt(folder, World(WorldConfig(nproc_per_node=1), ControlConfig()))


class Here:
    """Tries a run's parts in this process."""

    def try_parts(self, plain: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
        return verdict_of(dict(plain))


class Torn(Dataset[Any]):
    """Samples of which none can be read."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> Any:
        raise OSError("torn")


def torn() -> esper.Data:
    return esper.Data(train=Torn(), classes=3)


def torn_data(folder: Path) -> None:
    plain = toy_plain("segmentation")
    plain["data"] |= {"path": "tests.launcher.test_refused:torn", "options": {}}
    ask_whether_parts_fit(plain, {}, folder / "run", Here())


def order_in(given: list[str]) -> None:
    ctl.make_order(ctl.build_parser().parse_args(["run", *given]), {"run_id": "run", "attempt": 1})


def installed_without_settings(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esper.config.folder.package_folder", lambda: folder / "esper")
        conf_folder()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda tmp: build_policy_config([]), ConfigError, r"^config = \[\]: expected a mapping of sections$"),
        (read_array, RunDirError, r"STATUS\.json: not a JSON object; restore it, or remove it$"),
        (read_list, RunDirError, r"config\.yaml: not a table of settings; is this a run directory\?$"),
        (check_damaged, OSError, r"attempt\.json: damaged \('token'\)$"),
        (
            installed_without_settings,
            EsperError,
            r"esper: no conf/config\.yaml in it or beside it; install the project",
        ),
        (
            lambda tmp: make_order(tmp, tiny_config(governor__enabled=False), BreakerPhase.ALLOWED),
            ConfigError,
            r"^--breaker: the run has governor\.enabled=false, so nothing stops its growth$",
        ),
        (
            lambda tmp: origin(tmp, trainer__steps=None, trainer__epochs=2),
            ConfigError,
            r"^trainer\.resume_from = .*: its length is trainer\.epochs; go on from a run of trainer\.steps$",
        ),
        (lambda tmp: origin(tmp, optim__lr="fast"), ConfigError, r"config\.yaml: optim\.lr = 'fast'"),
        (
            lambda tmp: _with_settings({}, ["data.root=${nothing}"]),
            ConfigError,
            r"^--data data\.root=\$\{nothing\}: .*'nothing' not found",
        ),
        (
            begin_damaged,
            RunDirError,
            r"attempt\.json: damaged \(Expecting ',' .*\); remove it and start",
        ),
        (torn_data, DataError, r"^data: .*torn"),
        (
            lambda tmp: order_in(["checkpoint", "--why", "a\nb"]),
            ConfigError,
            r"^esper ctl checkpoint: why: expected one line of at most \d+ printable characters$",
        ),
        (lambda tmp: read_answer(b"k", b"{}", "n"), ValueError, r"^no answer \('answer'\)$"),
        (lambda tmp: _prctl(-1, 0), OSError, r"prctl\(-1\): Invalid argument$"),
        (damaged, EsperError, r"cells\.jsonl: line 2 is damaged; remove it, and its cell is run again$"),
        (broken, ConfigError, r"mine\.yaml: while parsing a flow node"),
    ],
)
def test_what_a_command_goes_on_from(
    call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    fails(lambda: call(tmp_path), kind, text)


def test_an_evaluation_of_no_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert policy.main(["evaluate", str(tmp_path), "--episodes", "0"]) == ConfigError.exit_code
    assert "--episodes 0: at least 1" in "".join(capsys.readouterr())


def test_a_policy_without_its_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "esper.run.learning.config", None)
    assert policy.main(["evaluate", str(tmp_path)]) == EsperError.exit_code
    assert "no esper.run.learning.config here; " in "".join(capsys.readouterr())


def test_a_rank_that_runs_on_and_one_that_cannot_be_forked() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(subprocess.TimeoutExpired, match=f"rank process {child.pid}"):
            ForkedRank(child.pid).wait(0.0)
    finally:
        child.kill()
        child.wait()
    ours, theirs = Pipe()
    theirs.send_bytes(str(-errno.EAGAIN).encode())
    fails(
        lambda: RankServer(ours, os.getpid()).start("m", [], {}),
        OSError,
        r"a rank cannot be forked \(Resource temporarily unavailable\)$",
    )


def test_a_question_that_cannot_be_asked_leaves_no_process(tmp_path: Path) -> None:
    plain = {**toy_plain("segmentation"), "odd": object()}
    fails(lambda: ask_whether_parts_fit(plain, {}, tmp_path / "run"), TypeError, "not JSON serializable$")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_as_it_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    before = os.listdir("/proc/self/fd")
    fails(lambda: take_lock(tmp_path), OSError, "Input/output error$")
    assert os.listdir("/proc/self/fd") == before


def test_a_run_that_another_launcher_has_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def in_place_of_ranks(*args: Any, **settings: Any) -> Ended:
        write_json(tmp_path / "run" / "attempt.json", {"number": 2, "launch": "of another"})
        return Ended(1, None, False)

    monkeypatch.setattr(start, "supervise", in_place_of_ranks)
    assert compose.main(["experiment=demo", "run.dir=run"]) == LeaseError.exit_code
    assert "run: attempt 2 was begun by another launcher; this run is that one's now" in capsys.readouterr().err
    assert not (tmp_path / "run" / "STATUS.json").exists()


def test_a_sweep_ends_with_the_job_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begun: list[int] = []

    def begin(plain: dict[str, Any], launch: str, ahead: Any) -> LaunchResult:
        begun.append(plain["seed"])
        return LaunchResult(Preempted.exit_code, "stopped")

    words = ["-m", "hydra.sweep.dir=sweep", "seed=1,2"]
    assert compose.main(words, begin=begin) == Preempted.exit_code
    assert begun == [1]

"""From a command line to a finished run: what is refused, what is left behind (nothing), and who gets which signal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper import cli
from esper.config.tree import RunConfig, build_config, load_config
from esper.launcher import compose as launcher
from esper.launcher import resume, start, supervise
from esper.launcher.ahead.torchrun import MALLOC, torchrun_arguments, torchrun_environment
from esper.launcher.processes import catches
from esper.launcher.supervise import Ended
from esper.leyline.errors import CheckpointError, ConfigError, EsperError, RunDirError
from esper.leyline.files import RunDir, write_json
from esper.run.directory import hold_run, read_status
from esper.tamiyo.policy.controller import Mode
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.ranks.config import Device, WorldConfig
from esper.tolaria.training.config import TrainerConfig
from tests.support.commands import TRAIN, Command, alive
from tests.support.dist import ROOT
from tests.support.patience import Patience, cpu_of, run_patiently, wait_until
from tests.support.policy_files import save_untrained


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESPER_DATA", raising=False)
    return tmp_path


# ---------------------------------------------------------------- what a user can get wrong

BAD_INPUT = [
    (["foo=1"], 78, "config: foo: no such setting; see --cfg job for all of them"),
    (["distill=default"], 78, "distill.run = ???: missing; set distill.run=<value>"),
    (["trainer={epochs:4,batches:2}"], 78, "config: trainer: cannot take this value; see --cfg job"),
    (["trainer.epoch=4"], 78, "config: trainer.epoch: no such setting; did you mean trainer.epochs"),
    (["host=resnet"], 78, "config: host=resnet: no such option; there are cnn, custom, gpt, hf, resnet20"),
    (
        ["controller.blueprints=[conv_huge]"],
        78,
        "controller.blueprints = 'conv_huge': no blueprint for the slots in use",
    ),
    (["slots.ids=[early]"], 78, "slots.ids = ['early']: slot 'early': not a slot id; this host has r0c0, r0c1, r1c0"),
    (["trainer.batch=1"], 78, "trainer.batch = 1: fewer samples than the 2 ranks that share them"),
    (["controller=policy", "controller.checkpoint=gone.pt"], 78, "controller.checkpoint = 'gone.pt': no such file; "),
    (["data=cifar10", "data.root=nowhere"], 74, "nowhere (from data.root) is not a folder"),
    (["data=cifar10"], 74, "data.root is null and ESPER_DATA is not set"),
    (["data=images"], 78, "data.root = ???: missing; set data.root=<value>"),
    (["seed=${oc.env:NOT_SET_ANYWHERE}"], 78, "Environment variable 'NOT_SET_ANYWHERE' not found"),
    (["launch=fly"], 78, "launch = 'fly': expected one of run, prepare, plan"),
    (["run.resume=must"], 74, "no run to resume there; set run.resume=auto"),
    (["run.dir=taken"], 74, "run.dir = "),
    (["run.dir=taken/below"], 74, "is not a folder"),
]


@pytest.mark.parametrize(("overrides", "code", "text"), BAD_INPUT, ids=[" ".join(row[0]) for row in BAD_INPUT])
def test_bad_input_gives_one_clear_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, text: str
) -> None:
    (here / "taken").write_text("a file")
    where = [] if any(word.startswith("run.dir=") for word in overrides) else ["run.dir=deep/run"]
    assert launcher.main([*where, *overrides]) == code
    shown = capsys.readouterr()
    assert text in shown.err
    assert "Traceback" not in shown.err
    if shown.err.startswith("esper: "):
        assert shown.err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["taken"]


def test_a_model_in_the_folder_one_stands_in_is_found_as_by_the_workers(here: Path) -> None:
    (here / "standing_here.py").write_text(
        "from torch import nn\n\n\ndef build(input_shape, classes):\n    return nn\n"
    )
    words = ["host=custom", "host.path=standing_here:build", "host.sites={r0c0: '0'}", "launch=plan"]
    ended = run_patiently([*TRAIN, *words])
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_policy_is_found_from_any_folder_and_its_mode_is_read(here: Path) -> None:
    save_untrained(here / "policy.pt")
    words = ["controller=policy", "controller.checkpoint=policy.pt", "controller.mode=sampled", "run.dir=run"]
    assert launcher.main([*words, "launch=prepare"]) == 0
    config = load_config(here / "run" / "config.yaml")[0].controller
    assert (config.checkpoint, config.mode) == (str(here / "policy.pt"), Mode.SAMPLED)


def test_another_esper_in_the_folder_is_refused_since_workers_would_run_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "esper").mkdir()
    (here / "esper" / "__init__.py").touch()
    assert launcher.main(["launch=plan"]) == 78
    said = capsys.readouterr().err
    assert f"{here / 'esper'}: workers started here would run this esper instead of {ROOT / 'esper'}" in said


def test_several_problems_are_told_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["optim.lr=-1", "trainer.batch=1", "control.every=-5"]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(" = .*", "", line) for line in lines] == [
        "esper: config: optim.lr",
        "esper: config: control.every",
        "esper: config: trainer.batch",
    ]
    assert list(here.iterdir()) == []


def test_a_read_only_file_system_is_named_and_the_exit_code_says_input_output(here: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a private mount namespace needs root and the program unshare")
    disk = here / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o ro none "{disk}" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *TRAIN, f"run.dir={disk}/run"]
    done = run_patiently(command)
    assert done.returncode == 74, done.stderr
    assert done.stderr == (
        f"esper: rundir: run.dir = '{disk}/run': cannot be written (Read-only file system: {disk}/run); "
        "set run.dir=<a writable folder>\n"
    )
    assert sorted(path.name for path in here.rglob("*")) == ["disk"]


# ---------------------------------------------------------------- Hydra as its users expect it


def test_cfg_help_and_plan_write_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--cfg", "job", "optim=sgd"]) == 0
    assert "kind: sgd" in capsys.readouterr().out
    assert launcher.main(["--help"]) == 0
    assert re.search(r"host: cnn, .*gpt", capsys.readouterr().out)
    assert launcher.main(["launch=plan", "run.dir=here", "world.nproc_per_node=3", "world.threads=2"]) == 0
    shown = capsys.readouterr().out
    assert f"run directory: {here}/here (new)" in shown
    assert re.search(r"OMP_NUM_THREADS=2 .*torchrun .*--nproc-per-node=3 .*-m esper.worker \S+/here/config.yaml", shown)
    assert list(here.iterdir()) == []


def test_prepare_writes_what_a_torchrun_typed_by_hand_needs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["launch=prepare", "run.dir=run", "seed=7"]) == 0
    assert sorted(path.name for path in (here / "run").iterdir()) == ["config.yaml", "environment.json", "lock"]
    config, plain = load_config(here / "run" / "config.yaml")
    assert (config.seed, config.run.dir, "launch" in plain) == (7, str(here / "run"), False)
    first = json.loads((here / "run" / "environment.json").read_text())
    assert first["python"] == sys.version.split()[0]
    assert {"torch", "hydra-core"} <= set(first["packages"])
    assert first["earlier"] == []

    assert launcher.main(["launch=prepare", "run.dir=run", "seed=7", "telemetry.console=plain"]) == 0  # goes on
    assert load_config(here / "run" / "config.yaml")[0].telemetry.console == "plain"
    assert json.loads((here / "run" / "environment.json").read_text())["earlier"] == [
        {key: value for key, value in first.items() if key != "earlier"}
    ]
    before = {path.name: path.read_bytes() for path in (here / "run").iterdir()}
    capsys.readouterr()

    assert launcher.main(["run.dir=run", "seed=8", "optim.lr=0.5"]) == 78
    shown = capsys.readouterr().err
    assert "holds a run with other settings" in shown
    assert "seed = 8: the run has 7; set seed=7" in shown
    assert "optim.lr = 0.5: the run has 0.001; set optim.lr=0.001" in shown
    assert launcher.main(["run.dir=run", "seed=7", "run.resume=never"]) == 74
    assert "holds a run already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (here / "run").iterdir()} == before


def test_multirun_gives_each_job_its_folder_and_a_failed_job_does_not_end_the_sweep(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["-m", "launch=prepare", "hydra.sweep.dir=sweep", "trainer.batch=64,1,32"]
    assert launcher.main(sweep) == 78
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert [line for line in shown.err.splitlines() if line.startswith("esper: ")] == [
        "esper: config: trainer.batch = 1: fewer samples than the 2 ranks that share them; "
        "set trainer.batch=2 or more, or start fewer ranks (world.nproc_per_node)",
        "esper: 1 of 3 jobs did not finish; their lines stand above",
    ]
    assert sorted(path.name for path in (here / "sweep").iterdir()) == ["0", "2", "multirun.yaml"]
    batches = [load_config(here / "sweep" / job / "config.yaml")[0].trainer.batch for job in "02"]
    assert batches == [64, 32]
    assert launcher.main(["-m", "launch=prepare", "run.dir=x", "seed=1,2"]) == 78
    assert "set hydra.sweep.dir instead" in capsys.readouterr().err


def finished(here: Path, name: str, **status: object) -> None:
    """A run directory as a finished run leaves it."""
    assert launcher.main(["launch=prepare", f"run.dir={name}"]) == 0
    write_json(here / name / "STATUS.json", {"step": 5, "objective": 0.5, "message": "", **status})


def test_a_finished_run_is_not_run_again_and_returns_its_objective(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(here, "run", status="done", exit_code=0)
    config, plain = load_config(here / "run" / "config.yaml")
    outcome = start.start(config, plain)
    assert (outcome.code, outcome.objective) == (0, 0.5)
    capsys.readouterr()
    assert launcher.main(["run.dir=run"]) == 0
    assert cli.main(["resume", "run"]) == 0
    assert capsys.readouterr().out.count("esper: done at step 5") == 2


# ---------------------------------------------------------------- the run directory


def test_a_folder_that_is_no_run_is_left_alone(here: Path) -> None:
    (here / "notes.txt").write_text("mine")
    with (
        pytest.raises(RunDirError, match=r"holds notes.txt but no config.yaml"),
        hold_run(RunConfig(dir=str(here)), {"run": {}}),
    ):
        raise AssertionError
    assert [path.name for path in here.iterdir()] == ["notes.txt"]


def test_a_second_launcher_is_told_who_has_the_run(here: Path) -> None:
    run, plain = RunConfig(dir=str(here / "run")), {"run": {"dir": "", "resume": "auto"}}
    with hold_run(run, plain):
        with pytest.raises(RunDirError, match=rf"in use by process {os.getpid()} on host"), hold_run(run, plain):
            raise AssertionError
        assert (here / "run" / "config.yaml").exists()
    with hold_run(run, plain):
        pass  # free again


def test_what_a_refused_start_made_is_taken_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when config.yaml is written: /dev/full stands in for it."""
    monkeypatch.setattr(RunDir, "environment", Path("/dev/full/environment.json"))
    with (
        pytest.raises(RunDirError, match="cannot be written"),
        hold_run(RunConfig(dir=str(here / "a" / "b")), {"run": {}}),
    ):
        raise AssertionError
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_status_is_named(here: Path, text: str) -> None:
    (here / "STATUS.json").write_text(text)
    with pytest.raises(RunDirError, match="remove it and start the run again"):
        read_status(here)


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        ({"status": "preempted", "exit_code": 75, "step": 3, "message": "SIGTERM"}, 75, "preempted at step 3: SIGTERM"),
        (
            {"status": "failed", "exit_code": 76, "step": 3, "message": "rank 1 is missing"},
            76,
            "failed at step 3: rank 1",
        ),
        ({"status": "failed", "step": None}, 70, "failed (run directory"),
        ({"status": "failed", "exit_code": 0, "step": None}, 70, "failed (run directory"),
    ],
)
def test_status_is_the_truth(here: Path, status: dict[str, object], code: int, line: str) -> None:
    outcome = start._result_of(here, status)
    assert outcome.code == code
    assert outcome.line.startswith(line)
    assert f"esper resume {here}" in outcome.line


def test_workers_that_end_without_a_word_failed_unless_they_were_stopped() -> None:
    assert start.status_of_silent(Ended(1, None, False), saved=True)["exit_code"] == 70
    for saved, words in ((True, "the last checkpoint stands"), (False, "no checkpoint yet, so it will begin anew")):
        status = start.status_of_silent(Ended(-9, "SIGTERM", True), saved=saved)
        assert status["exit_code"] == 75
        assert status["message"].endswith(words)


def test_the_gravest_code_of_a_sweep_wins() -> None:
    assert max([0, 75, 78, 74, 79, 76], key=launcher._gravity) == 76
    assert max([70, 76, 1], key=launcher._gravity) == 1  # an unknown code hides nothing


# ---------------------------------------------------------------- esper resume


def test_resume_names_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", "nowhere"]) == 74
    assert f"{here}/nowhere: no config.yaml in it, so it is no run" in capsys.readouterr().err
    finished(here, "run", status="preempted", exit_code=75)
    capsys.readouterr()
    assert cli.main(["resume", "run", "--at", "5", "--as", "new"]) == 74
    assert "--at 5: no checkpoint of that step" in capsys.readouterr().err
    for words in (["--at", "5"], ["--as", "new"], ["--rise", "0.3"]):
        with pytest.raises(SystemExit):
            cli.main(["resume", "run", *words])
    assert sorted(path.name for path in here.iterdir()) == ["run"]


WRONG_CHANGES = [
    ("optim.lr=1", "optim.lr=1: cannot change where a run goes on (what can: telemetry, "),
    ("telemetri.console=off", "telemetri.console=off: cannot change where a run goes on"),
    ("run.dir=new", "run.dir=new: the command itself says which run"),
    ("governor.rise", "governor.rise: not readable; expected key=value"),
    ("governor.rise=0.1,0.2", "governor.rise=0.1,0.2: expected one key=value"),
    ("governor.rize=0.3", "governor.rize = 0.3: no such setting; did you mean governor.rise?"),
    ("governor.rise=-1", "governor.rise = -1.0: must be > 0; for example governor.rise=0.1"),
    ("governor=off", "governor = 'off': expected a section of settings"),
]


@pytest.mark.parametrize(("change", "line"), WRONG_CHANGES, ids=[change for change, _ in WRONG_CHANGES])
def test_a_change_at_a_resume_is_checked_like_any_setting(
    here: Path, capsys: pytest.CaptureFixture[str], change: str, line: str
) -> None:
    finished(here, "run", status="diverged", exit_code=79)
    before = (here / "run" / "config.yaml").read_bytes()
    capsys.readouterr()
    assert cli.main(["resume", "run", "telemetry.console=off", change]) == 78
    assert line in capsys.readouterr().err
    assert (here / "run" / "config.yaml").read_bytes() == before
    assert sorted(path.name for path in here.iterdir()) == ["run"]


def test_no_setting_of_a_run_that_is_done_changes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(here, "run", status="done", exit_code=0)
    run = here / "run"
    before = (run / "config.yaml").read_bytes()
    capsys.readouterr()
    assert cli.main(["resume", "run", "governor.errors=5"]) == 78
    assert "is done, so nothing would run with governor.errors=5" in capsys.readouterr().err
    _, plain = load_config(run / "config.yaml")
    resume.change_settings(plain, ["governor.errors=5"])
    with pytest.raises(ConfigError, match="holds a run that is done, with other settings"):
        start.start(build_config(plain), plain)
    assert launcher.main(["run.dir=run", "run.resume=must", "governor.errors=5"]) == 78
    assert "governor.errors = 5: the run has 4; set governor.errors=4" in capsys.readouterr().err
    assert launcher.main(["run.dir=run", "telemetry.console=off"]) == 0, "no result depends on it"
    assert (run / "config.yaml").read_bytes() == before, "it says what the run was trained with"


def test_a_plain_start_with_changes_goes_on_under_them_or_names_the_command_that_does(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(["launch=prepare", "run.dir=run", "optim.lr=0.5", "seed=3"]) == 0
    write_json(here / "run" / "STATUS.json", {"status": "preempted", "step": 5, "message": "", "exit_code": 75})
    changed = ["launch=prepare", "run.dir=run", "run.resume=must", "governor.errors=5"]
    assert launcher.main(changed) == 78
    assert f"; esper resume {here}/run key=value ... takes all others from the run:" in capsys.readouterr().err
    assert launcher.main([*changed, "optim.lr=0.5", "seed=3"]) == 0
    config, _ = load_config(here / "run" / "config.yaml")
    assert (config.governor.errors, config.optim.lr, config.seed) == (5.0, 0.5, 3)


def test_a_run_that_diverged_says_what_helps(here: Path) -> None:
    """Every way that its line names is one that these commands take."""
    finished(here, "run", status="diverged", exit_code=79)
    run = here / "run"
    assert "esper resume" not in start._result_of(run, {"status": "diverged", "exit_code": 79}).line
    store = CheckpointStore(run / "checkpoints", attempt=0, keep=3)
    for step in (10, 20):
        store.write(step, "state.pt", {"step": step})
        store.write(step, "rank-00000.pt", {})
        store.commit(step, tick=1, world_size=1, score=None)
    line = start._result_of(run, {"status": "diverged", "exit_code": 79, "message": "NaN"}).line
    assert f"esper resume {run} governor.enabled=false goes on without a judge" in line
    assert f"esper resume {run} --at 10 --as NEW governor.enabled=false goes on from" in line
    _, plain = load_config(run / "config.yaml")
    resume.change_settings(plain, ["governor.enabled=false"])
    with hold_run(RunConfig(dir=str(run)), plain):
        assert load_config(run / "config.yaml")[0].governor.enabled is False, "config.yaml is written anew"
    line = start._result_of(run, {"status": "diverged", "exit_code": 79, "message": "NaN"}, judged=False).line
    assert f"esper resume {run} --at 10 --as NEW goes on from" in line
    assert "governor.enabled" not in line


def test_a_branch_has_the_config_and_one_checkpoint(here: Path) -> None:
    finished(here, "run", status="done", exit_code=0)
    store = CheckpointStore(here / "run" / "checkpoints", attempt=0, keep=3)
    for step in (10, 20):
        store.write(step, "state.pt", {"step": step})
        store.write(step, "rank-00000.pt", {})
        store.commit(step, tick=1, world_size=1, score=None)
    resume.branch(here / "run", 10, here / "new")
    copy = CheckpointStore(here / "new" / "checkpoints", attempt=0, keep=3)
    assert copy.steps() == [10]
    assert copy.load(10, "state.pt") == {"step": 10}
    copy.verify(10)
    assert sorted(path.name for path in here.iterdir()) == ["new", "run"]
    assert sorted(path.name for path in (here / "new").iterdir()) == ["checkpoints", "config.yaml", "saved.json"]
    assert build_config(load_config(here / "new" / "config.yaml")[1]).run.dir == str(here / "new")
    with pytest.raises(RunDirError, match="exists already"):
        resume.branch(here / "run", 20, here / "new")
    (store.path(20) / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes, the manifest says"):
        resume.branch(here / "run", 20, here / "newer")
    assert not (here / "newer").exists()


# ---------------------------------------------------------------- torchrun


def test_one_host_finds_itself_and_many_use_what_was_configured() -> None:
    alone = torchrun_arguments(WorldConfig(nproc_per_node=3, max_restarts=2), Path("/r/config.yaml"))
    assert {"--nnodes=1", "--nproc-per-node=3", "--rdzv-endpoint=localhost:0", "--max-restarts=2"} <= set(alone)
    assert alone[-3:] == ["-m", "esper.worker", "/r/config.yaml"]
    many = torchrun_arguments(WorldConfig(nnodes=2, rdzv_endpoint="a:29", rdzv_id="j"), Path("/r/config.yaml"))
    assert {"--nnodes=2", "--rdzv-endpoint=a:29", "--rdzv-id=j", "--rdzv-backend=c10d"} <= set(many)
    assert not [word for word in many if word.startswith("--local-addr")]
    gpu = torchrun_environment(WorldConfig(device=Device.GPU, threads=4), TrainerConfig(deterministic=True))
    assert gpu["OMP_NUM_THREADS"] == "4"
    assert gpu["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert gpu["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_on_a_cpu_freed_memory_is_kept_unless_its_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    assert torchrun_environment(WorldConfig(), TrainerConfig()).items() >= MALLOC.items()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "4096")
    assert not torchrun_environment(WorldConfig(), TrainerConfig()).keys() & MALLOC.keys()


class Supervised(Command):
    """A launcher around the stand-in worker, in a process of its own."""

    def __init__(self, folder: Path, mode: str, ranks: int, grace_s: float) -> None:
        self.run, self.ranks = folder / "run", ranks
        words = [sys.executable, "-m", "tests.support.stand_in_launcher"]
        super().__init__(words, str(self.run), str(ranks), str(grace_s), folder=folder, STAND_IN=mode)

    def until_ranks_work(self) -> None:
        """Returns once every rank has named itself and its helper."""
        self.until(lambda: len([*self.run.glob("[0-9]*.pid")]) == self.ranks, "every worker")

    def workers(self) -> list[int]:
        """Workers and their helpers."""
        return [int(pid) for path in self.run.glob("[0-9]*.pid") for pid in path.read_text().split()]


@pytest.fixture
def supervised(here: Path) -> Iterator[list[Supervised]]:
    """Launchers that a test starts; whatever is left of them is ended."""
    started: list[Supervised] = []
    yield started
    for launched in started:
        launched.seen |= set(launched.workers())
        launched.clear()


def test_an_early_stop_reaches_every_worker_once_and_nothing_is_left(here: Path, supervised: list[Supervised]) -> None:
    launched = Supervised(here, "work", ranks=2, grace_s=60)
    supervised.append(launched)
    launched.until(lambda: catches(launched.process.pid, signal.SIGUSR1), "a launcher that listens")
    launched.process.send_signal(signal.SIGUSR1)  # long before any worker can hear it
    assert launched.end() == 0, launched.told()
    assert "stopped='SIGUSR1', forced=False" in launched.out, launched.told()
    assert "SIGUSR1: workers save at the next tick and stop (at most 60 s" in launched.err
    assert [(here / "run" / f"{rank}.signals").read_text() for rank in range(2)] == ["1", "1"]
    status, _ = read_status(here / "run")
    assert status is not None
    assert status["status"] == "preempted"
    assert not [pid for pid in launched.workers() if alive(pid)]


def test_a_second_signal_ends_workers_that_do_not_listen(here: Path, supervised: list[Supervised]) -> None:
    launched = Supervised(here, "stubborn", ranks=1, grace_s=600)
    supervised.append(launched)
    launched.until_ranks_work()
    run, plain = RunConfig(dir=str(here / "run")), {"run": {"dir": "", "resume": "auto"}}
    with pytest.raises(RunDirError, match=f"in use by process {launched.process.pid} on host"), hold_run(run, plain):
        raise AssertionError
    workers = launched.workers()
    assert all(alive(pid) for pid in workers)
    launched.process.send_signal(signal.SIGTERM)
    launched.until(lambda: "SIGTERM: workers save at the next tick" in launched.err, "its word")
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == 0, launched.told()
    assert "stopped='SIGTERM', forced=True" in launched.out, launched.told()
    assert not [pid for pid in workers if alive(pid)]


def test_a_killed_launcher_takes_everything_with_it_and_the_run_stays_locked_until_then(
    here: Path, supervised: list[Supervised]
) -> None:
    launched = Supervised(here, "work", ranks=1, grace_s=600)
    supervised.append(launched)
    launched.until_ranks_work()
    worker = launched.workers()[0]
    run, plain = RunConfig(dir=str(here / "run")), {"run": {"dir": "", "resume": "auto"}}
    launched.process.kill()
    launched.process.wait()

    def unlocked() -> bool:
        try:
            with hold_run(run, plain):
                return True
        except RunDirError:
            return False

    wait_until(unlocked, "the run's lock", Patience(cpu_of(launched.workers)))
    assert not alive(worker)


def test_an_error_of_no_kind_of_its_own_has_no_kind_in_front() -> None:
    for error, line in ((EsperError("nothing to do"), "nothing to do"), (ConfigError("a\nb"), "config: a\nconfig: b")):
        outcomes: list[start.LaunchResult] = []
        with start.results_of_errors(outcomes):
            raise error
        assert (outcomes[0].line, outcomes[0].code) == (line, error.exit_code)


def test_a_process_that_cannot_be_killed_is_named_and_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that waits in the kernel for a dead file system: no signal is delivered, not even SIGKILL."""
    killed: list[int] = []
    monkeypatch.setattr(supervise, "_KILL_AFTER_S", 0.2)
    monkeypatch.setattr(supervise, "_GIVE_UP_S", 0.4)
    monkeypatch.setattr(
        supervise, "_send", lambda pid, signum: killed.append(pid) if signum == signal.SIGKILL else None
    )
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda self, signum: None)
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    asked = supervise.Ended(-signal.SIGKILL, "asked to", True)
    assert supervise.supervise(child, {}, grace_s=0.1, stop_due=lambda: "asked to") == asked
    (stuck,) = set(killed)
    monkeypatch.undo()
    try:
        assert alive(stuck)
        assert re.search(
            rf"^esper: process {stuck} cannot be killed \(state [SDR]( in \w+)?\) and is left behind; RUN stays locked",
            capsys.readouterr().err,
            re.MULTILINE,
        )
    finally:
        os.kill(stuck, signal.SIGKILL)
        os.waitpid(stuck, 0)

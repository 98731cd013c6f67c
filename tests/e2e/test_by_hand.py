"""Workers without a launcher: the torchrun that ``launch=prepare`` prints, and ranks that do not belong together."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from esper import worker
from esper.config.tree import write_config
from esper.nissa.reading import read_events
from esper.run.attempt import latest_attempt
from tests.e2e.conftest import Finished, Start
from tests.support.commands import ESPER, GROWING, NO_WANDB, TRAIN, Command, assert_gone, free_port, mark
from tests.support.dist import run_distributed
from tests.support.killed_runs import assert_same_run, final
from tests.support.patience import Patience, cpu_of, wait_until
from tests.support.tiny import tiny_plain


def test_the_printed_torchrun_does_what_the_launcher_does(grown: Finished, start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepared = start(TRAIN, *GROWING, NO_WANDB, "launch=prepare", "run.dir=run")
    assert prepared.end() == 0, prepared.told()
    where, line = prepared.out.splitlines()
    assert where == f"run directory: {run}"
    words = shlex.split(line)
    assert words[-3:] == ["-m", "esper.worker", str(run / "config.yaml")]
    assert "--nproc-per-node=2" in words
    assert not (run / "events.jsonl").exists()

    typed = start(["sh", "-c"], line)
    assert typed.end() == 0, typed.told()
    assert json.loads((run / "STATUS.json").read_text())["status"] == "done"
    assert "Run done" in typed.out
    assert "wandb sync" not in typed.out, "there is nothing to send"
    assert_same_run(final(run), final(grown.run))


def work_on(rank: int, configs: list[Path]) -> tuple[int, list[str]]:
    """Exit code of a rank's worker, and its lines; each rank has a config file of its own."""
    told = configs[0].parent / f"stderr-{rank}.txt"
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
    code = worker.run(configs[rank])
    return code, told.read_text().splitlines()


def test_config_files_that_differ_between_ranks_are_refused_by_name(tmp_path: Path) -> None:
    write_config(tmp_path / "config.yaml", tiny_plain("cnn"))
    write_config(tmp_path / "other.yaml", tiny_plain("cnn", optim__lr=0.02))
    ranks = run_distributed(work_on, 2, [tmp_path / "config.yaml", tmp_path / "other.yaml"])
    for number, (code, lines) in enumerate(ranks):
        assert code == 76, lines
        (line,) = lines
        assert line.startswith(f"esper: rank {number}: ranks are unequal: config: rank 0 has ")
        assert line.endswith("(start all ranks with the same RUN/config.yaml)")
    status = json.loads((tmp_path / "STATUS.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 76)
    assert {record["kind"] for record in read_events(tmp_path / "events.jsonl")} == {"fault"}, "nothing was trained"


def test_more_ranks_than_samples_is_one_line(tmp_path: Path) -> None:
    """The config was written for one rank; two were started."""
    write_config(tmp_path / "config.yaml", tiny_plain("cnn", trainer__batch=1, world__nproc_per_node=1))
    for number, (code, lines) in enumerate(run_distributed(work_on, 2, [tmp_path / "config.yaml"] * 2)):
        assert code == 78, lines
        *said, last = lines
        assert len(said) == (number == 0), "rank 0 says that the number of ranks is another one"
        assert all(line.startswith("esper: 2 ranks started, and world.nnodes = 1 times ") for line in said)
        assert last == (
            f"esper: rank {number}: trainer.batch = 1: fewer samples than ranks (2); set trainer.batch=2 or higher"
        )
    assert json.loads((tmp_path / "STATUS.json").read_text())["exit_code"] == 78


# A tick takes a second or more, as in a real run, so that the repeats of a signal arrive before it.
LONG = {"trainer__steps": 100_000, "trainer__batch": 32, "control__every": 200, "control__max_steps": 200}


def by_hand(start: Start, run: Path, **variables: str) -> Command:
    """A torchrun typed by hand, without a name for its rendezvous."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return start(torchrun, "-m", "esper.worker", str(run / "config.yaml"), **variables)


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run that tell whose it is and how it ended."""
    files = [run / name for name in ("attempt.json", "STATUS.json", "result.json", "lock")]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def made(run: Path, **settings: Any) -> Path:
    """A run directory that holds a config, as ``launch=prepare`` leaves it."""
    run.mkdir()
    write_config(run / "config.yaml", tiny_plain("cnn", **settings, world__nproc_per_node=2, run__dir=str(run)))
    return run


def stopped(run: Path, command: Command) -> None:
    """The run was stopped as asked for: it has saved, and says so."""
    command.end()
    assert_gone(command, run)
    status = json.loads((run / "STATUS.json").read_text())
    assert status["status"] == "preempted", command.told()
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_a_second_torchrun_is_refused_and_the_first_saves_when_its_agent_is_stopped(
    start: Start, tmp_path: Path
) -> None:
    run = made(tmp_path / "run", **LONG, control__timeout_s=600.0)
    first = by_hand(start, run)
    first.until(lambda: mark(run).tick >= 1, "the first tick")
    with first.held(run):
        before = contents(run)
        second = by_hand(start, run)
        launcher = start(ESPER, "resume", str(run))
        assert second.end() == 1, second.told()
        (line,) = [text for text in second.err.splitlines() if text.startswith("esper: ")]
        assert line.startswith(f"esper: rank 0: run.dir = '{run}': in use by process ")
        assert launcher.end() == 74, launcher.told()
        assert "in use by process " in launcher.err
        assert contents(run) == before
    first.process.send_signal(signal.SIGTERM)
    stopped(run, first)
    assert latest_attempt(run)[0] == 1


def test_two_torchruns_at_the_same_moment_make_one_run_which_saves_when_all_are_stopped(
    start: Start, tmp_path: Path
) -> None:
    """SIGTERM to every process of a job at once, as Slurm and systemd send it."""
    run = made(tmp_path / "run", **LONG)
    pair = [by_hand(start, run) for _ in range(2)]

    def lost() -> list[Command]:
        return [command for command in pair if command.process.poll() is not None]

    patience = Patience(cpu_of(lambda: {pid for one in pair for pid in (one.process.pid, *one.below())}))
    wait_until(lambda: len(lost()) == 2 or (lost() and mark(run).step > 5), "one that trains alone", patience)
    (loser,) = lost()
    (winner,) = [command for command in pair if command is not loser]
    assert loser.end() == 1, loser.told()
    assert "in use by process " in loser.err
    for pid in [*winner.below(), winner.process.pid]:
        os.kill(pid, signal.SIGTERM)
    stopped(run, winner)
    assert latest_attempt(run)[0] == 1

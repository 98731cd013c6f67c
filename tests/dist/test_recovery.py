"""What a run survives beside a kill: damaged checkpoints, another number of ranks, a stop, a disk that is full."""

import ctypes
import errno
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline.errors import CheckpointError, Preempted
from esper.nissa.reading import read_events
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tolaria.checkpoint.store import CheckpointStore, rank_file
from esper.tolaria.data import DigitsConfig
from esper.tolaria.training.engine import Engine
from tests.support.killed_runs import assert_same_run, final, live, prepare_run
from tests.support.tiny import tiny_plain

STEPS, EVERY = 36, 3  # saved at every tick: steps 3, 6, ... 36
NEW_MOUNT_NAMESPACE, PRIVATE, RECURSIVE = 0x20000, 1 << 18, 1 << 14


def plain_of(**settings: Any) -> dict[str, Any]:
    """A CNN that grows within its first half."""
    return tiny_plain(
        "cnn",
        **{
            "data": DigitsConfig(validation=40, probe=512, test=944),
            "trainer__steps": STEPS,
            "trainer__batch": 20,
            "trainer__accumulate": 2,
            "control__every": EVERY,
            "gates__evidence": "observe",  # in so short a run little is shown; what is measured adds up all the same
            "gates__probe_samples": 64,
            "gates__min_samples": 64,
            "checkpoint__every_ticks": 1,
            "checkpoint__keep": 20,
            "telemetry__level": "full",
            "controller": HeuristicConfig(
                warmup_ticks=1, life_ticks=3, tempo_ticks=1, blueprints=["conv_small", "bottleneck"]
            ),
            **settings,
        },
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks; nobody changes this folder."""
    run_dir = prepare_run(tmp_path_factory.mktemp("undisturbed") / "run", plain_of())
    assert live(run_dir, 2) == [0, 0]
    kept = CheckpointStore(run_dir / "checkpoints", attempt=0, keep=1).steps()
    assert kept == list(range(STEPS, 0, -EVERY))
    return run_dir


def until(run_dir: Path, step: int, copy: Path) -> CheckpointStore:
    """A copy of the run as it was when the checkpoint of ``step`` was its newest."""
    shutil.copytree(run_dir, copy)
    for name in ("result.json", "STATUS.json"):
        (copy / name).unlink()
    store = CheckpointStore(copy / "checkpoints", attempt=0, keep=1)
    for later in store.steps():
        if later > step:
            shutil.rmtree(store.path(later))
    return store


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def rubbish(path: Path) -> None:
    path.write_text("{ rubbish")


def unreadable(path: Path) -> None:
    """For everybody, the superuser too: a link to itself."""
    path.unlink()
    path.symlink_to(path)


DAMAGE: list[tuple[int, str, Callable[[Path], Any]]] = [
    (27, "state.pt", truncate),
    (24, rank_file(1), flip),
    (21, rank_file(1), Path.unlink),
    (18, "manifest.json", rubbish),
    (15, "manifest.json", Path.unlink),
    (12, "state.pt", unreadable),
]


def errors_of(run_dir: Path, rank: int) -> str:
    return (run_dir / f"stderr-{rank}.txt").read_text()


def status_of(run_dir: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run_dir / "STATUS.json").read_text())
    return status


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    store = until(undisturbed, 27, run_dir)
    for step, name, harm in DAMAGE:
        harm(store.path(step) / name)
    assert live(run_dir, 2) == [0, 0]
    told = errors_of(run_dir, 0)
    events = read_events(run_dir / "events.jsonl")
    faults = [event["payload"]["what"] for event in events if event["kind"] == "fault"]
    for step, name, _ in DAMAGE:
        path = str(store.path(step) / name)
        assert f"passed over a damaged checkpoint: {path}: " in told
        assert any(path in fault for fault in faults)
    assert len(faults) == len(DAMAGE)
    resumed = [event["payload"]["resumed_from"] for event in events if event["kind"] == "run_started"]
    assert resumed == [None, 9]
    assert_same_run(final(run_dir), final(undisturbed))
    for step in store.steps():
        store.verify(step)  # training again put whole ones in their places


def test_with_no_valid_checkpoint_the_run_refuses_to_begin_anew(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    store = until(undisturbed, 6, run_dir)
    truncate(store.path(6) / "state.pt")
    (store.path(3) / rank_file(1)).unlink()
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}
    assert live(run_dir, 2) == [CheckpointError.exit_code] * 2
    message = status_of(run_dir)["message"]
    for part in (str(store.path(6) / "state.pt"), str(store.path(3) / rank_file(1)), "remove that folder"):
        assert part in message
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")} == before
    assert not (run_dir / "result.json").exists()

    shutil.rmtree(store.folder)  # what the message offers
    (run_dir / "saved.json").unlink()
    assert live(run_dir, 2) == [0, 0]
    assert_same_run(final(run_dir), final(undisturbed))


def hide_checkpoints(run_dir: Path, rank: int) -> None:
    """Rank 1 finds an empty folder of checkpoints: a tmpfs that no other process sees, or the same answer."""
    libc = ctypes.CDLL(None, use_errno=True)
    if rank == 1:
        mounted = (
            libc.unshare(NEW_MOUNT_NAMESPACE) == 0
            and libc.mount(None, b"/", None, PRIVATE | RECURSIVE, None) == 0
            and libc.mount(b"tmpfs", os.fsencode(run_dir / "checkpoints"), b"tmpfs", 0, b"size=4k") == 0
        )
        if not mounted:
            CheckpointStore._names = lambda self: []  # type: ignore[method-assign]


def test_a_run_that_has_saved_never_begins_anew_without_a_word(undisturbed: Path, tmp_path: Path) -> None:
    run_dir, kept = tmp_path / "run", tmp_path / "kept"
    folder = until(undisturbed, 6, run_dir).folder
    mark = f"{run_dir / 'saved.json'} says that the run has saved"

    def refused(*parts: str, prepare: Callable[[int], None] | None = None) -> None:
        assert live(run_dir, 2, prepare=prepare) == [CheckpointError.exit_code] * 2
        message = status_of(run_dir)["message"]
        assert message.startswith(f"{folder}: no checkpoint is valid on all ranks (")
        assert message.endswith(
            "; restore one from a copy, or remove that folder and saved.json beside it to train from the beginning"
        )
        for part in parts:
            assert part in message
        assert not (run_dir / "result.json").exists()

    refused("rank 0: step 6 and 1 more; ", f"rank 1: {mark}", prepare=functools.partial(hide_checkpoints, run_dir))
    folder.rename(kept)
    refused(f"({mark})")  # the folder is lost
    folder.mkdir()
    refused(f"({mark})")  # what was in it is lost
    (kept / "step-00000006").rename(folder / "aside-00000006")
    refused("a rollback set aside-00000006 aside and saved nothing after it")
    shutil.rmtree(folder)
    folder.write_text("a file")
    refused(f"({folder}: cannot be read (Not a directory); {mark})")
    folder.unlink()
    kept.rename(folder)  # what the message offers
    assert live(run_dir, 2) == [0, 0]
    assert_same_run(final(run_dir), final(undisturbed))


def test_a_run_that_has_saved_nothing_begins_anew_and_says_so(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    store = until(undisturbed, 0, run_dir)
    (run_dir / "saved.json").unlink()  # as after a kill before the first save; events.jsonl and attempt.json are there
    assert store.signs() == []
    assert live(run_dir, 2) == [0, 0]
    assert_same_run(final(run_dir), final(undisturbed))


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_read_is_no_empty_one(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[str]:
        raise OSError(error, os.strerror(error))

    store = CheckpointStore(tmp_path / "checkpoints", attempt=0, keep=1)
    assert (store.steps(), store.signs()) == ([], [])
    monkeypatch.setattr("esper.tolaria.checkpoint.store.os.listdir", refuse)
    text = f"{store.folder}: cannot be read ({os.strerror(error)})"
    assert store.signs() == [text]
    with pytest.raises(CheckpointError) as caught:
        store.steps()
    assert str(caught.value) == text


def stop_at(step: int, who: int, number: int, rank: int) -> None:
    """Rank ``who`` gets a real signal in the midst of optimizer step ``step``."""
    train_step = Engine.train_step

    def stopped(self: Engine) -> None:
        if self.step == step and rank == who:
            os.kill(os.getpid(), number)
        train_step(self)

    Engine.train_step = stopped  # type: ignore[method-assign]


@pytest.mark.parametrize(("who", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_a_stop_asked_on_one_rank_is_agreed_saved_and_resumed(
    who: int, number: int, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of(checkpoint__every_ticks=0))
    assert live(run_dir, 2, prepare=functools.partial(stop_at, 16, who, number)) == [0, 0]
    status = status_of(run_dir)
    assert (status["status"], status["step"], status["exit_code"]) == ("preempted", 18, Preempted.exit_code)
    store = CheckpointStore(run_dir / "checkpoints", attempt=0, keep=1)
    assert store.steps() == [18]
    assert store.manifest(18).score is None  # where a run was stopped does not change what validation chooses from
    assert live(run_dir, 2) == [0, 0]
    assert json.loads((run_dir / "result.json").read_text())["best_step"] == STEPS
    found, wanted = final(run_dir), final(undisturbed)
    for outcome in (found, wanted):  # saved at other ticks: other re-wraps, another best checkpoint
        del outcome["plain"]["result"]
        outcome["plain"]["events"] = [event for event in outcome["plain"]["events"] if event[0] != "rewrap"]
    assert_same_run(found, wanted)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Two ranks, then one, then two: to 1e-9 in float64 the run that one rank trains in one go."""
    plain = plain_of(trainer__precision="fp64", checkpoint__every_ticks=0)
    alone = prepare_run(tmp_path / "alone", plain)
    assert live(alone, 1) == [0]
    run_dir = prepare_run(tmp_path / "run", plain)
    assert live(run_dir, 2, prepare=functools.partial(stop_at, 10, 0, signal.SIGTERM)) == [0, 0]
    assert live(run_dir, 1, prepare=functools.partial(stop_at, 22, 0, signal.SIGTERM)) == [0]
    assert live(run_dir, 2) == [0, 0]
    found, wanted = final(run_dir), final(alone)
    common = [name for name in wanted["tensors"] if name.startswith("state.pt")]
    assert common == [name for name in found["tensors"] if name.startswith("state.pt")]
    for name in common:
        torch.testing.assert_close(
            found["tensors"][name], wanted["tensors"][name], rtol=1e-9, atol=1e-9, msg=lambda text, n=name: n + text
        )
    decided = [[event for event in outcome["plain"]["events"] if event[0] == "stage"] for outcome in (found, wanted)]
    assert decided[0] == decided[1]
    assert any(event[4]["target"] == "FOSSILIZED" for event in decided[0])


def fill_the_disk(step: int, rank: int) -> None:
    """For rank 1 the folder in which it writes the save of ``step`` lies on a full disk: a tmpfs of one page, mounted
    where no other process sees it; where mounting is not permitted, the answer that such a disk gives."""
    write = CheckpointStore.write
    libc = ctypes.CDLL(None, use_errno=True)

    def written(self: CheckpointStore, at: int, name: str, payload: dict[str, Any]) -> None:
        if rank == 1 and at == step:
            folder = self._temporary(at)
            folder.mkdir(parents=True, exist_ok=True)
            mounted = (
                libc.unshare(NEW_MOUNT_NAMESPACE) == 0
                and libc.mount(None, b"/", None, PRIVATE | RECURSIVE, None) == 0
                and libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=4k") == 0
            )
            if not mounted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / name))
        write(self, at, name, payload)

    CheckpointStore.write = written  # type: ignore[method-assign]


def test_a_save_that_fails_on_one_rank_costs_that_save_alone(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of())
    assert live(run_dir, 2, prepare=functools.partial(fill_the_disk, 12)) == [0, 0]
    store = CheckpointStore(run_dir / "checkpoints", attempt=0, keep=1)
    assert store.steps() == [step for step in range(STEPS, 0, -EVERY) if step != 12]
    for step in store.steps():
        store.verify(step)
    faults = [event for event in read_events(run_dir / "events.jsonl") if event["kind"] == "fault"]
    assert [(fault["step"], fault["payload"]["where"]) for fault in faults] == [(15, str(store.path(12)))]
    assert "save of step 12 failed on rank 1" in faults[0]["payload"]["what"]
    own = [event["payload"]["what"] for event in read_events(run_dir / "events-rank-00001.jsonl")]
    assert len(own) == 1
    assert "save of step 12 failed here: OSError" in own[0]
    assert_same_run(final(run_dir), final(undisturbed))

"""Checkpoints on disk: whole or not there, verified, retained by count and by score."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline.errors import CheckpointError
from esper.tolaria.checkpoint import store as module
from esper.tolaria.checkpoint.snapshot import share_of
from esper.tolaria.checkpoint.store import FORMAT, CheckpointStore, rank_file

RANKS = 2


def store_in(folder: Path, *, keep: int = 3, attempt: int = 1) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", attempt=attempt, keep=keep)


def write(store: CheckpointStore, step: int) -> None:
    store.write(step, "state.pt", {"step": step, "weights": torch.arange(500.0) + step})
    for rank in range(RANKS):
        store.write(step, rank_file(rank), {"rank": rank})


def save(store: CheckpointStore, step: int, score: float | None = None) -> int:
    write(store, step)
    return store.commit(step, tick=step // 10, world_size=RANKS, score=score)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_a_checkpoint_is_there_once_it_is_committed_and_reads_back_bit_for_bit(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert (store.steps(), store.best()) == ([], None)
    write(store, 10)
    assert store.steps() == []
    assert names(store) == ["step-00000010.a1.tmp"]
    size = store.commit(10, tick=1, world_size=RANKS, score=0.5)
    assert names(store) == ["step-00000010"]
    assert store.steps() == [10]
    manifest = store.verify(10)
    assert (manifest.step, manifest.tick, manifest.world_size, manifest.score) == (10, 1, RANKS, 0.5)
    assert set(manifest.files) == {"state.pt", rank_file(0), rank_file(1)}
    assert size == sum((store.path(10) / name).stat().st_size for name in manifest.files)
    payload = store.load(10, "state.pt")
    assert payload["step"] == 10
    assert torch.equal(payload["weights"], torch.arange(500.0) + 10)


def test_a_save_with_a_rank_missing_is_not_committed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    write(store, 20)
    lost = store.folder / "step-00000020.a1.tmp" / rank_file(1)
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost} is not there; is RUN on a shared file system"):
        store.commit(20, tick=2, world_size=RANKS, score=None)
    assert store.steps() == [10]
    store.abandon(20)
    assert names(store) == ["step-00000010"]


def test_what_this_process_wrote_is_hashed_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit reads only what other processes wrote; what the disk cut off is found all the same."""
    read: list[str] = []
    real = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda path: read.append(path.name) or real(path))
    store, other = store_in(tmp_path), store_in(tmp_path)
    store.write(10, "state.pt", {"weights": torch.arange(500.0)})
    store.write(10, rank_file(0), {"rank": 0})
    other.write(10, rank_file(1), {"rank": 1})
    store.commit(10, tick=1, world_size=RANKS, score=None)
    assert read == [rank_file(1)]
    store.verify(10)
    write(store, 20)
    with (store.folder / "step-00000020.a1.tmp" / "state.pt").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"state\.pt has 100 bytes, \d+ were written"):
        store.commit(20, tick=2, world_size=RANKS, score=None)
    assert store.steps() == [10]


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    for step, score in ((10, 0.1), (20, 0.9), (30, 0.3), (40, None), (50, 0.2), (60, 0.2)):
        save(store, step, score)
    assert store.steps() == [60, 50, 20]
    assert store.best() == 20
    assert store.rank_steps() == [20, 60, 50], "of equals the later"
    assert names(store) == ["step-00000020", "step-00000050", "step-00000060"], "nothing half removed"


def test_what_was_just_saved_is_kept_though_later_ones_lie_there(tmp_path: Path) -> None:
    """After a resume from before damaged ones: the newest by number are not the newest by time."""
    store = store_in(tmp_path, keep=1)
    save(store, 10)
    for step in (40, 50):
        save(store_in(tmp_path, keep=9), step)
    save(store, 20)
    assert 20 in store.steps()
    store.verify(20)


def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path) -> None:
    save(store_in(tmp_path), 10, 0.1)
    again = store_in(tmp_path, attempt=2)
    os.truncate(again.path(10) / "state.pt", 7)
    save(again, 10, 0.2)
    assert again.verify(10).score == 0.2
    assert names(again) == ["step-00000010"]


def test_what_killed_attempts_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    write(store, 20)
    write(store_in(tmp_path, attempt=2), 20)
    (store.folder / "step-00000005.1234.tmp").mkdir()
    assert store.steps() == [10]
    store.clean()
    assert names(store) == ["step-00000010"]
    store.verify(10)
    store_in(tmp_path / "nowhere").clean()


def test_a_kill_while_an_old_one_is_removed_leaves_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, keep=1)
    save(store, 10)

    class Killed(BaseException):
        pass

    def half(path: Path, **_: Any) -> None:
        (Path(path) / "state.pt").unlink()
        raise Killed

    monkeypatch.setattr("esper.tolaria.checkpoint.store.shutil.rmtree", half)
    with pytest.raises(Killed):
        save(store, 20)
    monkeypatch.undo()
    assert store.steps() == [20]
    store.verify(20)
    store.clean()
    assert names(store) == ["step-00000020"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0x10
    path.write_bytes(raw)


def another_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def another_step(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 30}))


def without_a_field(path: Path) -> None:
    plain = json.loads(path.read_text())
    del plain["score"]
    path.write_text(json.dumps(plain))


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("state.pt", truncate, "bytes, the manifest says"),
    ("state.pt", flip, "SHA-256 differs"),
    ("state.pt", Path.unlink, "cannot be read"),
    (rank_file(1), truncate, "bytes, the manifest says"),
    (rank_file(1), Path.unlink, "cannot be read"),
    ("manifest.json", truncate, "not a readable manifest"),
    ("manifest.json", Path.unlink, "not a readable manifest"),
    ("manifest.json", lambda path: path.write_bytes(b"\xff\x00"), "not a readable manifest"),
    ("manifest.json", lambda path: path.write_text("[]"), "not a readable manifest"),
    ("manifest.json", without_a_field, "missing score"),
    ("manifest.json", another_format, f"format 99, step 20; need {FORMAT}, 20"),
    ("manifest.json", another_step, f"format {FORMAT}, step 30; need {FORMAT}, 20"),
]


@pytest.mark.parametrize(("name", "harm", "said"), DAMAGE)
def test_damage_is_found_and_named(name: str, harm: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10, 0.1)
    save(store, 20, 0.2)
    harm(store.path(20) / name)
    with pytest.raises(CheckpointError, match=said) as raised:
        store.verify(20)
    assert str(store.path(20) / name) in str(raised.value)
    assert store.steps() == [20, 10], "a damaged one is still listed, so that nobody passes over it in silence"
    assert store.verify(10).step == 10
    assert store.best() == (10 if name == "manifest.json" else 20)
    if name == rank_file(1):
        store.verify(20, ["state.pt", rank_file(0)])
        with pytest.raises(CheckpointError):
            store.verify(20, ["state.pt", rank_file(1)])


def test_a_rank_without_a_file_of_its_own_verifies_what_there_is(tmp_path: Path) -> None:
    """A run that goes on with more ranks than it was saved by."""
    store = store_in(tmp_path)
    save(store, 10)
    store.verify(10, ["state.pt", rank_file(7)])


def test_a_file_that_is_no_checkpoint_is_a_named_error(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 10)
    (store.path(10) / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"step-00000010/state\.pt: cannot be loaded"):
        store.load(10, "state.pt")


def bytes_read() -> int:
    """Bytes that this process has asked to read, from a disk or not; what is mapped is not among them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_state_is_hashed_by_one_rank_of_a_machine_and_mapped_by_all(tmp_path: Path) -> None:
    store, size = store_in(tmp_path), 2**23
    store.write(10, "state.pt", {"weights": torch.arange(size // 4, dtype=torch.int32)})
    for rank in range(RANKS):
        store.write(10, rank_file(rank), {"rank": rank})
    store.commit(10, tick=1, world_size=RANKS, score=None)
    assert [share_of(*place) for place in ((0, 0), (1, 1), (8, 0))] == [
        None,
        (rank_file(1),),
        ("state.pt", rank_file(8)),
    ]
    for rank, most in ((0, 1.1 * size), (1, 0.1 * size)):
        before = bytes_read()
        store.verify(10, share_of(rank, rank))
        payload = store.load(10, "state.pt", mapped=True)
        assert bytes_read() - before < most
        assert torch.equal(payload["weights"], torch.arange(size // 4, dtype=torch.int32))
    payload["weights"].zero_()
    store.verify(10)  # what is written to a mapped tensor stays with whoever mapped it

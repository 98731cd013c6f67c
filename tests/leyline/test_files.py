"""Files are written whole or not at all: what a reader, a full disk and a crash find."""

import os
import stat
from pathlib import Path

import pytest

from esper.leyline.files import RunDir, package_folder, write_json, write_synced, write_whole


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, in order: names of files and folders."""
    names: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


@pytest.mark.parametrize("content", [b"new", "new", lambda file: file.write(b"new")])
def test_the_file_and_then_its_folder_are_synced(tmp_path, synced, content):
    path = tmp_path / "room" / "STATUS.json"
    path.parent.mkdir()
    path.write_text("old")
    write_whole(path, content)
    assert path.read_text() == "new"
    assert [name.split(".")[1] for name in synced[:1]] == ["STATUS"], "under a temporary name"
    assert synced[1:] == ["room"]
    assert os.listdir(path.parent) == ["STATUS.json"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "attempt.json"
    write_json(path, {"number": 1})

    def half(file):
        file.write(b"{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, half)
    assert path.read_text() == '{\n  "number": 1\n}\n'
    assert os.listdir(tmp_path) == ["attempt.json"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "absent" / "x", b"")


def test_the_mode_is_the_files_from_the_first_moment(tmp_path):
    write_whole(tmp_path / "config.yaml", "seed: 1\n", mode=0o444)
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o444
    write_whole(tmp_path / "config.yaml", "seed: 2\n", mode=0o444)  # a read-only file can be replaced
    assert (tmp_path / "config.yaml").read_text() == "seed: 2\n"


def test_a_file_of_a_folder_that_is_renamed_later_is_synced_alone(tmp_path, synced):
    write_synced(tmp_path / "state.pt", b"1")
    assert synced == ["state.pt"]


def test_names_of_a_run_directory_and_of_the_package():
    run = RunDir(Path("/runs/a"))
    assert run.export(7) == Path("/runs/a/export-00000007")
    assert run.rank_events(3).name == "events-rank-00003.jsonl"
    assert (package_folder() / "leyline" / "files.py").is_file()

"""Two real attempts on one run: the older one, back from a host that was cut off, writes nothing more."""

import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper.leyline.errors import LeaseError
from esper.nissa.reading import read_events
from esper.run.attempt import begin_attempt, find_takeover, latest_attempt
from esper.run.lock import LOCKED
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support.fault_places import strike_at
from tests.support.killed_runs import live, prepare_run
from tests.support.patience import Patience, marks_of, wait_until
from tests.support.tiny import tiny_plain


def cut_off(place: str, tick: int, signs: Path, rank: int) -> None:
    """Rank 0 is out of the world at ``place`` until the file ``back`` is there; its lock does not reach the others."""
    os.environ[LOCKED] = str(signs.parent / "run")

    def wait() -> None:
        if not (signs / "gone").exists():
            (signs / "gone").touch()
            while not (signs / "back").exists():
                time.sleep(0.05)

    if rank == 0:
        strike_at(place, tick, wait)


def what_counts(run: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of the checkpoints, status and result, as it is to the byte and the nanosecond. What bears the older
    attempt's own name is never read, and removed by the next start."""
    kept = [path for path in (run / "checkpoints").rglob("*") if not path.parent.name.endswith(".a1.tmp")]
    files = [*kept, run / "STATUS.json", run / "result.json"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()}


# In training, between two saves; in the thread that commits one, with every file hashed; before the test part.
@pytest.mark.parametrize(("place", "tick"), [("forward", 6), ("hash", 4), ("test", 12)])
def test_an_attempt_that_lost_its_lease_ends_and_leaves_everything_as_it_was(
    place: str, tick: int, tmp_path: Path
) -> None:
    plain = tiny_plain("cnn", checkpoint__every_ticks=2, control__timeout_s=60.0, telemetry__level="full")
    run = prepare_run(tmp_path / "run", plain)
    signs = tmp_path / "signs"
    signs.mkdir()
    with ThreadPoolExecutor(max_workers=1) as pool:
        older = pool.submit(live, run, 2, None, functools.partial(cut_off, place, tick, signs))
        arrived = (signs / "gone").exists
        wait_until(lambda: arrived() or older.done(), f"rank 0 at {place}", Patience(marks_of(run)))
        assert arrived(), older.result()
        assert live(run, 2) == [0, 0]
        before = what_counts(run)
        assert json.loads((run / "STATUS.json").read_text())["status"] == "done"
        assert {path.parent.name for path in before} >= {"step-00000024"}
        (signs / "back").touch()
        codes = older.result()
    assert codes is not None
    assert codes[0] == LeaseError.exit_code
    assert what_counts(run) == before
    assert latest_attempt(run)[0] == 2
    said = (run / "stderr-0.txt").read_text()
    assert f"esper: rank 0: {run}: attempt 2 has begun, this is attempt 1: it writes nothing more" in said
    faults = [e for e in read_events(run / "events.jsonl") if e["kind"] == "fault"]
    assert any(e["attempt"] == 1 and "attempt 2 has begun" in e["payload"]["what"] for e in faults)


def test_ranks_that_torchrun_starts_again_do_not_take_back_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(WorldConfig(nproc_per_node=1), ControlConfig())

    def begin(launch: str, restarts: int) -> int:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        attempt = begin_attempt(tmp_path, world)
        attempt.release()
        return attempt.number

    assert [begin("a", 0), begin("a", 1), begin("b", 0)] == [1, 2, 3]
    with pytest.raises(LeaseError, match=r"attempt 3, of another launch, has begun"):
        begin("a", 2)
    assert latest_attempt(tmp_path) == (3, "b"), "no number was taken"
    assert find_takeover(tmp_path, 2, "a") == 3
    assert find_takeover(tmp_path, 2, "b") is None
    assert find_takeover(tmp_path, 3, "c") is None, "nobody began after us"
    assert begin("a", 0) == 4, "a start by a person or a scheduler does"

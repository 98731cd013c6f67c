"""Marks on a shared file system: who was last seen where, in one line."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.tolaria.ranks.heartbeat import SIZE, Heartbeat


def at(beat: Heartbeat, step: int, tick: int, phase: str, error: str = "") -> Heartbeat:
    beat.step, beat.tick = step, tick
    beat.mark(phase, error)
    return beat


@pytest.fixture
def three(tmp_path):
    beats = [Heartbeat(tmp_path / "marks", rank, 3) for rank in range(3)]
    yield [at(beat, 10, 5, "commit") for beat in beats]
    for beat in beats:
        beat.close()


def test_a_mark_is_read_back_by_every_rank(three):
    before = time.time()
    at(three[1], 120, 7, "observe")
    for reader in three:
        mark = reader.read()[1]
        assert (mark.rank, mark.step, mark.tick, mark.phase, mark.error) == (1, 120, 7, "observe", "")
        assert before <= mark.at <= time.time()


def test_a_shorter_mark_leaves_nothing_of_a_longer_one(three, tmp_path):
    at(three[0], 123456, 789, "failed", "a long story " * 10)
    at(three[0], 1, 2, "x")
    assert three[1].read()[0].phase == "x"
    assert three[1].read()[0].error == ""
    assert (tmp_path / "marks" / "rank-00000").stat().st_size == SIZE


def test_one_who_never_wrote_is_none_and_said_to_have_never_arrived(tmp_path):
    beat = Heartbeat(tmp_path, 0, 3)
    assert [mark is None for mark in beat.read()] == [False, True, True]
    assert beat.explain(patience_s=0.0) == "rank 1 never arrived; rank 2 never arrived"
    beat.close()


def test_a_torn_mark_counts_as_none(three, tmp_path):
    path = tmp_path / "marks" / "rank-00002"
    path.write_bytes(path.read_bytes()[:20])
    assert three[0].read()[2] is None
    at(three[1], 10, 5, "commit", "lost contact in commit")
    assert three[0].explain() == "rank 2 never arrived"


def test_explain_names_the_one_who_is_behind(three):
    at(three[0], 12, 6, "observe")
    at(three[1], 12, 6, "observe", "lost contact in observe")
    assert three[0].explain().startswith("rank 2 was last seen in commit at step 10, tick 5, 0.")
    assert three[0].explain().endswith(" s ago")
    assert "; " not in three[0].explain()


def test_explain_names_another_phase_at_the_same_tick(three):
    at(three[0], 10, 5, "apply", "lost contact in apply")
    at(three[2], 10, 5, "apply")
    assert three[2].explain().startswith("rank 1 was last seen in commit")


def test_who_stopped_where_the_others_wait_is_the_one_who_stays_silent(three):
    with ThreadPoolExecutor() as pool:  # two ranks lose contact, one a little later than the other
        late = pool.submit(lambda: (time.sleep(0.3), three[2].explain(1.0))[1])
        first = three[0].explain(1.0)
    for text in (first, late.result()):
        assert text.startswith("rank 1 was last seen in commit at step 10, tick 5, ")
        assert "; " not in text


def test_ranks_that_wait_apart_name_each_other(three):
    at(three[1], 10, 5, "commit", "lost contact in commit")
    at(three[2], 9, 4, "backward", "lost contact in backward")
    assert three[0].explain().startswith("rank 2 was last seen in backward at step 9")


def test_where_every_rank_says_the_same_nobody_is_blamed(three):
    at(three[1], 12, 6, "commit", "lost contact in commit")  # ahead, in the same phase
    at(three[2], 10, 5, "commit", "lost contact in commit")
    assert three[0].explain() == "every rank says the same: the network between them may be cut"


def test_a_failure_outranks_those_who_wait_for_it(three):
    at(three[1], 10, 5, "failed", "RuntimeError: disk full")
    at(three[2], 3, 1, "failed", "lost contact in forward: rank 1 failed")
    assert three[0].explain() == "rank 1 failed at step 10: RuntimeError: disk full"


@pytest.mark.parametrize("error", ["x" * 5000, "é" * 300, '"\\\n' * 200, "\0" * 300, "日本" * 200])
def test_a_long_or_strange_error_is_cut_and_stays_readable(three, error):
    at(three[1], 10, 5, "failed", error)
    mark = three[0].read()[1]
    assert mark.phase == "failed"
    assert len(mark.error) >= 60
    assert error.startswith(mark.error)


def test_a_mark_is_cheap_enough_for_every_phase_of_a_step(three):
    inode = os.fstat(three[0]._file).st_ino
    for _ in range(100):
        three[0].mark("forward")
    assert os.stat(three[0]._path(0)).st_ino == inode  # overwritten in place, never made anew


def test_close_is_safe_to_call_twice(tmp_path):
    beat = Heartbeat(tmp_path, 0, 1)
    beat.close()
    beat.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        beat.mark("late")


def test_an_errors_mark_is_synced_and_a_disk_that_refuses_hides_no_error(three, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr("esper.tolaria.ranks.heartbeat.sync", lambda path: synced.append(path.name))
    at(three[0], 11, 5, "forward")
    assert synced == []
    at(three[0], 11, 5, "failed", "no luck")
    assert synced == ["rank-00000"]

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("esper.tolaria.ranks.heartbeat.sync", refuse)
    at(three[1], 11, 5, "failed", "no luck either")
    assert three[0].read()[1].error == "no luck either"

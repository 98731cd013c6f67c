"""Who tells how a run ended: each row of the table against what it means for a rank."""

from typing import Any

import pytest

from esper.leyline import errors
from esper.run.ending import (
    DONE,
    SUPERVISED,
    code_for_torchrun,
    ending_of,
    is_witness,
    name_file,
    needs_traceback,
    status_of,
)
from esper.tolaria.ranks.heartbeat import Heartbeat

# failure, status, printed by every rank, written, torchrun's code alone, torchrun's code under our launcher
ROWS = [
    (errors.Preempted("stopped"), "preempted", False, True, 0, 0),
    (errors.DivergedError("nan"), "diverged", False, True, 79, 0),
    (errors.LeaseError("newer"), "failed", True, False, 74, 0),
    (errors.InUseError("in use"), "failed", False, False, 74, 0),
    (errors.RunDirError("full"), "failed", True, True, 74, 74),
    (errors.ConfigError("optim.lr"), "failed", True, True, 78, 0),
    (errors.DataError("absent"), "failed", True, True, 74, 0),
    (errors.CheckpointError("damaged"), "failed", True, True, 74, 74),
    (errors.LockstepError("parted"), "failed", False, True, 76, 76),
    (ZeroDivisionError("division by zero"), "failed", True, True, 70, 70),
]


@pytest.mark.parametrize(("failure", "status", "everybody", "written", "alone", "supervised"), ROWS)
def test_each_failure_has_its_row(failure, status, everybody, written, alone, supervised, monkeypatch):
    row, told = ending_of(failure), status_of(failure, 3)
    assert (row.status, not row.shared, row.writes, told["status"]) == (status, everybody, written, status)
    monkeypatch.delenv(SUPERVISED, raising=False)
    assert code_for_torchrun(row, told["exit_code"]) == alone
    monkeypatch.setenv(SUPERVISED, "1")
    assert code_for_torchrun(row, told["exit_code"]) == supervised


def test_a_bug_is_told_with_its_type():
    assert status_of(ValueError("no such axis"), None)["message"] == "ValueError: no such axis"


def test_an_error_of_the_users_and_a_collective_in_the_users_code_keep_their_traceback():
    def lose(place: dict[str, object]) -> Exception:
        cause = RuntimeError("connection closed")
        try:
            exec("def fail(cause): raise cause", place)
            place["fail"](cause)
        except RuntimeError:
            error = errors.LockstepError("lost contact")
            error.__cause__ = cause
            return error
        raise AssertionError

    assert needs_traceback(ValueError("odd"))
    assert not needs_traceback(errors.LockstepError("parted"))
    assert not needs_traceback(errors.ConfigError("optim.lr"))
    assert needs_traceback(lose({"__name__": "their_lab.hosts"}))


def test_a_file_of_run_that_cannot_be_used_is_named_without_a_traceback(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "lab"
    met = []
    for folder in (run, elsewhere):
        folder.mkdir()
        (folder / "heartbeat").write_text("a file where a folder should be")
        with pytest.raises(OSError) as told:
            Heartbeat(folder / "heartbeat", 0, 1)
        assert told.value.__traceback__ is not None
        met.append(told.value.with_traceback(told.value.__traceback__.tb_next))  # without this test's own frame
    ours = name_file(met[0], run)
    assert isinstance(ours, errors.RunDirError)
    assert ours.exit_code == 74
    assert not needs_traceback(ours)
    assert str(ours) == f"{run}/heartbeat: File exists; see to the disk, then: esper resume {run}"
    assert name_file(met[1], run) is met[1]  # not in RUN
    place: dict[str, Any] = {"__name__": "their_lab.hosts"}
    exec("def write(error): raise error", place)
    with pytest.raises(OSError) as theirs:
        place["write"](OSError(30, "Read-only file system", str(run / "theirs")))
    assert name_file(theirs.value, run) is theirs.value
    assert needs_traceback(theirs.value)


def test_the_witness_is_rank_0_or_the_first_that_failed(tmp_path):
    beats = [Heartbeat(tmp_path, rank, 3) for rank in range(3)]
    broken = ending_of(errors.LockstepError("parted"))
    assert [is_witness(rank, None, broken) for rank in range(3)] == [True] * 3, "before there are heartbeats"
    assert [is_witness(rank, beats[rank], broken) for rank in range(3)] == [True] * 3, "before the first tick"
    for beat in beats:
        beat.tick = 4
        beat.mark("forward")
    beats[2].mark("failed", "out of memory")
    assert [is_witness(rank, beats[rank], broken) for rank in range(3)] == [True, False, True]
    assert [is_witness(rank, beats[rank], DONE) for rank in range(3)] == [True, False, False]
    for beat in beats:
        beat.close()

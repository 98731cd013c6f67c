"""One fault of each kind, one after another, in two runs that a person started: the cells that always run.

Each command ends in the way the table says, the next one goes on where it ended, and what the runs come to is bit for
bit what nobody's disturbance would have made of them.
"""

import re
from pathlib import Path

import pytest

from tests.faults.launching import Mounted, Place, begun, may_mount, plain_of, text_of
from tests.faults.table import train_file
from tests.faults.test_matrix import assert_same
from tests.support.commands import Command
from tests.support.fault_plans import CLOCK_JUMP_S, Strike, plan, struck
from tests.support.killed_runs import final, live, prepare_run


def go(place: Place, strikes: list[Strike]) -> Command:
    """One more command of the user's, to its end."""
    command = place.start("resume", str(place.run), **plan(place.folder / "notes", strikes))
    command.end()
    return command


def test_a_bad_day(tmp_path: Path) -> None:
    """Two ranks with two restarts: slow, a clock jump, killed, forged, stopped, which is once more than the budget has;
    resumed, then the data vanishes with a rank; put back, then everything is killed in the commit of a save."""
    settings = {"data": text_of(tmp_path / "text"), "world__max_restarts": 2}
    reference = tmp_path / "undisturbed"
    prepare_run(reference, plain_of(reference, **settings))
    assert live(reference, 2) == [0, 0]
    with Place(tmp_path) as place:
        place.make(**settings)
        file = train_file(place)
        strikes = [
            Strike(fault="slow", place="forward", tick=2, ranks=[1]),
            Strike(fault="clock back", place="forward", tick=2, ranks=[0]),
            Strike(fault="kill", place="forward", tick=4, ranks=[0]),
            Strike(fault="forged weight", place="before-commit", tick=6, ranks=[1]),
            Strike(fault="stop", place="save", tick=8, ranks=[1]),
            Strike(fault="vanish", place="forward", tick=12, ranks=[1], path=str(file)),
            Strike(fault="kill all", place="rename", tick=14, ranks=[0]),
        ]
        first = go(place, strikes)
        assert first.process.returncode == 76, first.told()
        lines = [
            "esper: rank 1: lost contact in .*: rank 0 was last seen in forward",
            r"esper: rank [01]: ranks parted before tick \d+, step \d+: parameters differs on rank 1 from rank 0",
            "esper: rank 0: lost contact in .*: rank 1 was last seen in",
        ]
        found = [re.search(f"(?m)^{line}", first.err) for line in lines]
        assert all(found), first.told()
        places = [match.start() for match in found if match is not None]
        assert places == sorted(places)
        ages = [float(age) for age in re.findall(r"([-\d.]+) s ago", first.err)]
        assert all(0 <= age < CLOCK_JUMP_S / 2 for age in ages), "an age does not follow a clock that jumps"
        assert "Unable to shutdown" not in first.err, "torchrun waited for the rank that stands still"
        assert "esper: failed at step" in first.err.splitlines()[-1]

        second = go(place, strikes)
        assert second.process.returncode == 74, second.told()
        assert f"{file}: no such file" in second.err.splitlines()[-1]
        assert "Traceback" not in first.err + second.err
        file.with_name("elsewhere").rename(file)

        third = go(place, strikes)
        assert third.process.returncode == -9
        last = go(place, strikes)
        assert last.process.returncode == 0, last.told()
        assert len(struck(tmp_path / "notes")) == len(strikes)
        starts = begun(place.run)
        assert len(starts) == 6
        assert starts == sorted(starts, key=lambda step: step or 0), "never further back"
        assert_same(final(place.run), final(reference), silent=False)


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount in a namespace of its own")
def test_a_bad_disk(tmp_path: Path) -> None:
    """RUN's disk is full for a while, then read-only for good; put right, the run goes on."""
    reference = tmp_path / "undisturbed"
    prepare_run(reference, plain_of(reference))
    assert live(reference, 2) == [0, 0]
    with Mounted(tmp_path, "2m") as place:
        place.make()
        filler = str(place.run / "filler")
        strikes = [
            Strike(fault="fill", place="save", tick=4, ranks=[0], path=filler),
            Strike(fault="free", place="forward", tick=8, ranks=[0], path=filler),
            Strike(fault="freeze", place="save", tick=10, ranks=[0], path=str(place.run)),
        ]
        first = go(place, strikes)
        assert first.process.returncode == 74, first.told()
        assert re.search("save of step 8 failed on rank 0.* No space left on device", first.out), first.told()
        assert "Read-only file system" in first.err.splitlines()[-1]
        assert f"to the disk, then: esper resume {place.run}" in first.err.splitlines()[-1]
        assert "Traceback" not in first.err, first.told()
        place.thaw()
        last = go(place, strikes)
        assert last.process.returncode == 0, last.told()
        assert_same(final(place.seen), final(reference), silent=True)

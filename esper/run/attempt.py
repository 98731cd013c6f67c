"""Attempts: the number that each start of a run takes, and with it the right to write into RUN.

    RUN/attempt.json    number, run_id, token, launch; replaced whole, by rename

Two launchers on one machine exclude each other by RUN/lock. A lock does not reach a machine that was cut off: its ranks
may come back long after the run was resumed elsewhere. So the newest number is a lease. Before rank 0 gives a
checkpoint its name, or writes the result or the status, it reads the number again, and an older attempt ends there by a
named error. The files that it had written until then carry its own number and are never read.
"""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline.errors import LeaseError, RunDirError
from esper.leyline.files import RunDir, write_json
from esper.tolaria.ranks.world import World

BEFORE = "ESPER_ATTEMPT_BEFORE"  # variable: number of the latest attempt when the launcher started torchrun


@dataclass(frozen=True, slots=True)
class Attempt:
    """One process group that works on a run.

    Fields:
        number: counts the attempts of the run, from 1.
        run_id: the run's id.
        token: equal on all ranks that see the same RUN; the start handshake compares it.
        run_dir: RUN.
    """

    number: int
    run_id: str
    token: str
    run_dir: Path

    def check(self) -> None:
        """Does nothing if no newer attempt has begun.

        Raises:
            LeaseError: a newer attempt has begun.
            OSError: RUN cannot be read, or its attempt.json is damaged.
        """
        try:
            newest = json.loads(RunDir(self.run_dir).attempt.read_text())["number"]
        except (ValueError, KeyError) as error:
            raise OSError(f"{RunDir(self.run_dir).attempt}: damaged ({error})") from None
        if newest > self.number:
            raise LeaseError(
                f"{self.run_dir}: attempt {newest} has begun, this is attempt {self.number}: it writes nothing more; "
                "was this host cut off from the others?"
            )

    def holds(self) -> bool:
        """Whether this attempt still has the right to write into RUN, as far as can be read."""
        try:
            self.check()
        except LeaseError:
            return False
        except OSError:  # RUN cannot be written either then, and the write will say so
            return True
        return True


def begin_attempt(run_dir: Path, world: World) -> Attempt:
    """Rank 0 numbers the attempt; every rank reads it back.

    Raises:
        RunDirError: rank 0 cannot write into RUN.
        LeaseError: torchrun has started the ranks again, and another launch has taken up RUN since.
    """
    path, launch = RunDir(run_dir).attempt, os.environ.get("TORCHELASTIC_RUN_ID", "")
    if world.rank == 0:
        before: dict[str, Any] = {"number": 0, "run_id": secrets.token_hex(4)}
        if path.exists():
            before = json.loads(path.read_text())
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        again = restarted and before["number"] > int(
            os.environ.get(BEFORE, "0")
        )  # else the ranks had not come this far before
        if not (again and before["launch"] != launch):
            now = {"number": before["number"] + 1, "token": secrets.token_hex(8), "launch": launch}
            try:
                write_json(path, {**before, **now})
            except OSError as error:
                raise RunDirError(f"{path}: cannot be written ({error.strerror}); is RUN writable?") from error
    world.meet("start-up")
    try:
        record = json.loads(path.read_text())
        attempt = Attempt(record["number"], record["run_id"], record["token"], run_dir)
        if record["launch"] != launch:
            raise LeaseError(f"{run_dir}: attempt {attempt.number}, of another launch, has begun; this one ends here")
        return attempt
    except (OSError, ValueError, KeyError):  # the handshake will name this rank by its token
        return Attempt(1, "", f"rank {world.rank} cannot read {path}", run_dir)


def find_takeover(run_dir: Path, before: int, launch: str) -> int | None:
    """Returns the number of another launch's attempt that began after ours; None if there is none.

    Args:
        run_dir: RUN.
        before: number of the latest attempt when ours was started.
        launch: name of our rendezvous.
    """
    number, latest_launch = latest_attempt(run_dir)
    return number if number > before and latest_launch != launch else None


def latest_attempt(run_dir: Path) -> tuple[int, str]:
    """The number and the launch of the latest attempt; 0 and "" if there is none, or it cannot be read."""
    try:
        record = json.loads(RunDir(run_dir).attempt.read_text())
    except (OSError, ValueError):
        return 0, ""
    return record["number"], record.get("launch", "")  # older versions wrote no launch

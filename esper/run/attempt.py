"""Which process group works on RUN: a number that each start takes, and with it the right to write there.

    RUN/attempt.json    number, run_id, token, launch; replaced whole, by rename

Two launchers of one host exclude each other by RUN/lock. A lock does not reach a host that was cut off: its ranks may
come back when RUN has long been taken up elsewhere. So the newest number is a lease: before rank 0 gives a checkpoint
its name, or writes the result or the status, it reads the number again, and an older attempt ends there by a named
error. What it had written till then bears its own number and is never read.
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

BEFORE = "ESPER_ATTEMPT_BEFORE"  # number of the latest attempt when the launcher started torchrun


@dataclass(frozen=True, slots=True)
class Attempt:
    """This process group's number, from 1, the run's id, and a token that proves that a rank sees RUN."""

    number: int
    run_id: str
    token: str
    run_dir: Path

    def check(self) -> None:
        """Returns while no newer attempt has begun.

        Raises:
            LeaseError: one has.
            OSError: RUN cannot be read, or its attempt is damaged.
        """
        try:
            newest = json.loads((RunDir(self.run_dir).attempt).read_text())["number"]
        except (ValueError, KeyError) as error:
            raise OSError(f"{RunDir(self.run_dir).attempt}: damaged ({error})") from None
        if newest > self.number:
            raise LeaseError(
                f"{self.run_dir}: attempt {newest} has begun, this is attempt {self.number}: it writes nothing more; "
                "was this host cut off from the others?"
            )

    def holds(self) -> bool:
        """Whether RUN is this attempt's, as far as can be read."""
        try:
            self.check()
        except LeaseError:
            return False
        except OSError:  # who cannot read cannot write either, and says so then
            return True
        return True


def begin_attempt(run_dir: Path, world: World) -> Attempt:
    """Rank 0 numbers the attempt; every rank reads it back.

    Raises:
        RunDirError: RUN cannot be written (rank 0), or read (others).
        LeaseError: torchrun has started the ranks again, and another launch has taken up RUN since.
    """
    path, launch = RunDir(run_dir).attempt, os.environ.get("TORCHELASTIC_RUN_ID", "")
    if world.rank == 0:
        before: dict[str, Any] = {"number": 0, "run_id": secrets.token_hex(4)}
        if path.exists():
            before = json.loads(path.read_text())
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        again = restarted and before["number"] > int(os.environ.get(BEFORE, "0"))  # else no rank of ours came this far
        if not (again and before["launch"] != launch):
            now = {"number": before["number"] + 1, "token": secrets.token_hex(8), "launch": launch}
            try:
                write_json(path, {**before, **now})
            except OSError as error:
                raise RunDirError(f"{path}: cannot be written ({error.strerror}); is RUN writable?") from error
    world.meet("start-up")
    try:
        found = json.loads(path.read_text())
        attempt = Attempt(found["number"], found["run_id"], found["token"], run_dir)
        if found["launch"] != launch:
            raise LeaseError(f"{run_dir}: attempt {attempt.number}, of another launch, has begun; this one ends here")
        return attempt
    except (OSError, ValueError, KeyError):
        return Attempt(1, "", f"rank {world.rank} cannot read {path}", run_dir)


def find_takeover(run_dir: Path, before: int, launch: str) -> int | None:
    """Number of the attempt of another launch that began after ours; None where there is none.

    Args:
        before: number of the latest attempt when ours was started. launch: name of our rendezvous.
    """
    number, whose = latest_attempt(run_dir)
    return number if number > before and whose != launch else None


def latest_attempt(run_dir: Path) -> tuple[int, str]:
    """Number and launch of the latest attempt; 0 before there is one, or where it cannot be read."""
    try:
        found = json.loads((RunDir(run_dir).attempt).read_text())
    except (OSError, ValueError):
        return 0, ""
    return found["number"], found.get("launch", "")  # of older versions: nobody's

"""Attempts: the number that each start of a run takes, and with it the right to write into RUN.

    RUN/attempt.json    number, run_id, token, launch; replaced whole, by rename

Two starts on one machine exclude each other by RUN/lock (`esper.run.lock`). A lock does not reach a machine that was
cut off: its ranks may come back long after the run was resumed elsewhere. So the newest number is a lease. Before rank
0 gives a checkpoint its name, or writes the result or the status, it reads the number again, and an older attempt ends
there by a named error. The files that it had written until then carry its own number and are never read.
"""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.leyline.errors import InUseError, LeaseError, RunDirError
from esper.leyline.files import RunDir, write_json
from esper.run.lock import lock_by_hand

if TYPE_CHECKING:
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
        lock: descriptor of RUN/lock where rank 0 itself holds it; the lock lasts until the process ends, or `release`.
    """

    number: int
    run_id: str
    token: str
    run_dir: Path
    lock: int | None = None

    def release(self) -> None:
        """Gives up the lock, if this attempt holds one."""
        if self.lock is not None:
            os.close(self.lock)

    def check(self) -> None:
        """Does nothing if no newer attempt has begun.

        Raises:
            LeaseError: a newer attempt has begun.
            OSError: RUN cannot be read, or its attempt.json is damaged.
        """
        try:
            record = json.loads(RunDir(self.run_dir).attempt.read_text())
            newest, token = record["number"], record["token"]
        except (ValueError, KeyError) as error:
            raise OSError(f"{RunDir(self.run_dir).attempt}: damaged ({error})") from None
        if newest > self.number:
            raise LeaseError(
                f"{self.run_dir}: attempt {newest} has begun, this is attempt {self.number}: it writes nothing more; "
                "was this host cut off from the others?"
            )
        if newest == self.number and token != self.token:
            raise LeaseError(
                f"{self.run_dir}: another attempt {newest} began at the same moment: this one writes nothing more"
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


def begin_attempt(run_dir: Path, world: "World") -> Attempt:
    """Rank 0 locks RUN where no launcher has, numbers the attempt, and hands number and token to every rank.

    Raises:
        RunDirError: rank 0 cannot write into RUN.
        InUseError: another start works in RUN; nothing was written.
        LeaseError: torchrun has started the ranks again, and another launch has taken up RUN since.
        Each has the same text on every rank.
    """
    path, word, lock = RunDir(run_dir).attempt, "", None
    if world.rank == 0:
        try:
            lock = lock_by_hand(run_dir)
            word = json.dumps(_number_attempt(run_dir))
        except RunDirError as error:
            word = json.dumps({"error": type(error).__name__, "text": str(error)[:2000]})
            if lock is not None:
                os.close(lock)
    said = json.loads(world.hear_rank_0(word, what="start-up"))
    if "error" in said:
        raise {kind.__name__: kind for kind in (RunDirError, InUseError, LeaseError)}[said["error"]](said["text"])
    number, run_id, token = int(said["number"]), str(said["run_id"]), str(said["token"])
    try:
        seen = json.loads(path.read_text())
        same = seen["run_id"] == run_id and (seen["token"] == token or seen["number"] > number)
    except (OSError, ValueError, KeyError):
        same = False
    if not same:  # the handshake will name this rank by its token
        token = f"rank {world.rank} cannot read {path}"
    return Attempt(number, run_id, token, run_dir, lock)


def _number_attempt(run_dir: Path) -> dict[str, Any]:
    """Writes the next attempt's number with a new token; returns the record."""
    path, launch = RunDir(run_dir).attempt, os.environ.get("TORCHELASTIC_RUN_ID", "")
    before: dict[str, Any] = {"number": 0, "run_id": secrets.token_hex(4)}
    try:
        if path.exists():
            before = json.loads(path.read_text())
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        # Otherwise the ranks had not come this far before they were started again.
        again = restarted and before["number"] > int(os.environ.get(BEFORE, "0"))
        if again and before["launch"] != launch:
            raise LeaseError(f"{run_dir}: attempt {before['number']}, of another launch, has begun; this one ends here")
        record = {**before, "number": before["number"] + 1, "token": secrets.token_hex(8), "launch": launch}
        write_json(path, record)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written ({error.strerror}); is RUN writable?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path}: damaged ({error}); remove it and start the run again") from None
    return record


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

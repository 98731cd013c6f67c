"""The table of endings: who prints, who writes STATUS.json, and which code torchrun gets when a rank ends.

    failure             status      prints           writes STATUS.json   torchrun gets
    none                done        no rank          rank 0               0
    Preempted           preempted   rank 0           rank 0               0
    DivergedError       diverged    rank 0           rank 0               79; 0 under our launcher
    LeaseError          failed      every rank       no rank (*)          74; 0 under our launcher
    InUseError          failed      rank 0           no rank (*)          74; 0 under our launcher
    ConfigError         failed      every rank       a witness            78; 0 under our launcher
    DataError           failed      every rank       a witness            74; 0 under our launcher
    LockstepError       failed      a witness        a witness            76
    any other           failed      every rank       a witness            its own, or 70

(*) RUN belongs to another attempt then.

A *witness* is rank 0, or the first rank that failed if rank 0 may be gone or has not begun. If every rank has the same
error text, only the witness prints it. Under our launcher torchrun gets 0 for a failure that another start from the
same files would repeat; otherwise it would spend its restarts on it.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline.errors import (
    ConfigError,
    DataError,
    DivergedError,
    EsperError,
    InUseError,
    LeaseError,
    LockstepError,
    Preempted,
    RunDirError,
)
from esper.leyline.files import RunDir, write_json
from esper.run.attempt import Attempt
from esper.run.leaving import leave_with
from esper.run.parent import die_with_parent
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World

SUPERVISED = "ESPER_SUPERVISED"  # a variable that our launcher sets; it reads STATUS.json instead of exit codes


@dataclass(frozen=True, slots=True)
class Ending:
    """One row of the table."""

    status: str
    """``status`` in STATUS.json."""
    shared: bool = False
    """Every rank has the same error text, so only the witness prints it."""
    rank_0_only: bool = False
    """No other rank than 0 is a witness."""
    marked: bool = True
    """The rank's heartbeat says that it failed."""
    writes: bool = True
    """STATUS.json may be written."""
    repeats: bool = False
    """Another start from the same files would fail in the same way."""
    code: int | None = None
    """The exit code that torchrun gets in any case; None for the error's own code."""


# For an error the first row applies that it is an instance of.
TABLE: tuple[tuple[type[Exception], Ending], ...] = (
    (Preempted, Ending("preempted", shared=True, rank_0_only=True, marked=False, code=0)),
    (DivergedError, Ending("diverged", shared=True, rank_0_only=True, repeats=True)),
    (LeaseError, Ending("failed", writes=False, repeats=True)),
    (InUseError, Ending("failed", shared=True, rank_0_only=True, marked=False, writes=False, repeats=True)),
    (ConfigError, Ending("failed", repeats=True)),
    (DataError, Ending("failed", repeats=True)),
    (LockstepError, Ending("failed", shared=True)),
    (Exception, Ending("failed")),
)
DONE = Ending("done", rank_0_only=True, marked=False, code=0)


def ending_of(failure: Exception | None) -> Ending:
    """The row of a failure; `DONE` for None."""
    if failure is None:
        return DONE
    return next(row for kind, row in TABLE if isinstance(failure, kind))


def status_of(error: Exception, attempt: int | None) -> dict[str, Any]:
    """The content of STATUS.json for a run that ended by ``error``, without the step.

    Args:
        error: what ended it.
        attempt: number of the attempt that it ended; None if it had none yet.
    """
    code = error.exit_code if isinstance(error, EsperError) else EsperError.exit_code
    message = str(error) if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"
    status = {"status": ending_of(error).status, "objective": None, "message": message, "exit_code": code}
    return {**status, "attempt": attempt}


def needs_traceback(error: Exception) -> bool:
    """Whether an error is told with its traceback: one that is not ours, and one of ours for a lost rank that came up
    through a collective in the user's code.
    """
    if not isinstance(error, EsperError):
        return True
    return isinstance(error, LockstepError) and not _is_ours(error.__cause__)


def name_file(error: Exception, run_dir: Path) -> Exception:
    """An error of the operating system at a file of RUN as one line of ours; any other error, or one that came up
    through code that is not ours, as it is.

    Args:
        error: what ended the rank.
        run_dir: RUN.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, str) or not error.strerror:
        return error
    if not Path(error.filename).is_relative_to(run_dir) or not _is_ours(error):
        return error
    named = RunDirError(f"{error.filename}: {error.strerror}; see to the disk, then: esper resume {run_dir}")
    named.__cause__ = error
    return named


def _is_ours(error: BaseException | None) -> bool:
    """Whether an error came up through our code, torch and the standard library alone."""
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    names = {frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in frames}
    return names <= {"esper", "torch", "__main__", *sys.stdlib_module_names}


def is_witness(rank: int, beat: Heartbeat | None, ending: Ending) -> bool:
    """Whether this rank reports for the run: rank 0, or the first that failed if rank 0 may be gone.

    Args:
        rank: this rank.
        beat: its heartbeat; None before there is one.
        ending: of this rank.
    """
    if rank == 0:
        return True
    if ending.rank_0_only:
        return False
    if beat is None or beat.tick == 0:
        return True
    first = next((m.rank for m in beat.read() if m is not None and (m.phase == "failed" or m.error)), beat.rank)
    return first == beat.rank


def end_stuck_rank(attempt: Attempt, heartbeat: Heartbeat, text: str) -> None:
    """Ends a rank whose main thread waits for a device and cannot raise; called from the watchdog's thread.

    Args:
        attempt: this start's right to write.
        heartbeat: of this rank.
        text: one line on who is missing.
    """
    error = LockstepError(f"lost contact: {text}")
    heartbeat.mark("failed", str(error))
    if attempt.holds() and is_witness(heartbeat.rank, heartbeat, ending_of(error)):
        with contextlib.suppress(OSError):
            write_json(RunDir(attempt.run_dir).status, {**status_of(error, attempt.number), "step": heartbeat.step})
    print(f"esper: rank {heartbeat.rank}: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def code_for_torchrun(ending: Ending, error_code: int) -> int:
    """The exit code of this process.

    Args:
        ending: of this rank.
        error_code: exit code of the error.
    """
    if ending.code is not None:
        return ending.code
    return 0 if ending.repeats and SUPERVISED in os.environ else error_code


def end_rank(
    failure: Exception | None,
    *,
    run_dir: Path,
    rank: int,
    world: World | None,
    attempt: Attempt | None,
    step: int | None,
) -> int:
    """Tells how a rank ended, as the table says, and leaves its groups; returns the process's exit code.

    Args:
        failure: what ended it; None if its work is done.
        run_dir: RUN.
        rank: this rank.
        world: the ranks; None if they have not met.
        attempt: this start's right to write; None before it has one.
        step: the last optimizer step that began; None if it is not known.
    """
    if failure is not None:
        failure = name_file(failure, run_dir)
    ending = ending_of(failure)
    status: dict[str, Any] = {"message": "", "exit_code": 0}
    if failure is not None:
        status = {**status_of(failure, None if attempt is None else attempt.number), "step": step}
    beat = world.heartbeat if world is not None and isinstance(world.heartbeat, Heartbeat) else None
    if beat is not None and ending.marked:
        beat.mark("failed", status["message"])
    witness = is_witness(rank, beat, ending)
    unwritten = ""
    if failure is not None and witness and ending.writes and (attempt is None or attempt.holds()):
        try:
            write_json(RunDir(run_dir).status, status)
        except OSError as error:
            unwritten = f"esper: {RunDir(run_dir).status}: cannot be written ({error.strerror})"
    if failure is not None and needs_traceback(failure):
        traceback.print_exception(failure)
    if status["message"] and (witness or not ending.shared):
        print(f"esper: rank {rank}: {status['message']}", file=sys.stderr, flush=True)
    if unwritten:
        print(unwritten, file=sys.stderr, flush=True)
    if world is not None:
        world.close()
    if attempt is not None:
        attempt.release()
    return code_for_torchrun(ending, int(status["exit_code"]))


def run_as_rank(run: Callable[[Path], int], module: str, parent: int) -> None:
    """Runs a rank by the one word of the command line, and ends the process with its code.

    Args:
        run: from the path of config.yaml to an exit code.
        module: name of the caller's module, for its usage.
        parent: id of the agent's process, as it was before the imports.
    """
    if len(sys.argv) != 2:
        print(f"usage: torchrun ... -m {module} RUN/config.yaml", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    die_with_parent(parent, signal.SIGHUP)  # if the agent is killed, its ranks must not train on
    code = run(Path(sys.argv[1]))
    leave_with(code)
    if code:
        sys.exit(code)

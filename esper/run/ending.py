"""How a rank's end is told: who writes STATUS.json, who prints, and which code torchrun gets. One table.

    failure             status      says it          writes STATUS.json   torchrun gets
    none                done        nobody           rank 0               0
    Preempted           preempted   rank 0           rank 0               0
    DivergedError       diverged    rank 0           rank 0               79; 0 under our launcher
    LeaseError          failed      every rank       nobody: RUN is a newer attempt's   74; 0 under our launcher
    ConfigError         failed      every rank       a witness            78; 0 under our launcher
    DataError           failed      every rank       a witness            74; 0 under our launcher
    LockstepError       failed      a witness        a witness            76
    any other           failed      every rank       a witness            its own, or 70

A *witness* is rank 0, or the rank that was the first to fail where rank 0 may be gone or has not begun. Of a failure
that every rank has in the same words only the witness prints. Under our launcher torchrun is not told of a failure that
another start from the same files would only repeat: it would spend its restarts on it.
"""

import os
from dataclasses import dataclass
from typing import Any

from esper.leyline.errors import (
    ConfigError,
    DataError,
    DivergedError,
    EsperError,
    LeaseError,
    LockstepError,
    Preempted,
)
from esper.tolaria.ranks.heartbeat import Heartbeat

SUPERVISED = "ESPER_SUPERVISED"  # set by our launcher, which reads STATUS.json


@dataclass(frozen=True, slots=True)
class Ending:
    """One row of the table."""

    status: str
    """``status`` in STATUS.json."""
    shared: bool = False
    """Every rank has it in the same words, so one of them prints it."""
    rank_0_only: bool = False
    """No other rank speaks for the run."""
    marked: bool = True
    """The rank's heartbeat says that it failed."""
    writes: bool = True
    """STATUS.json may be written."""
    repeats: bool = False
    """Another start from the same files would come to the same."""
    code: int | None = None
    """What torchrun gets in any case; None: the error's own code."""


# The first row that an error is an instance of.
TABLE: tuple[tuple[type[Exception], Ending], ...] = (
    (Preempted, Ending("preempted", shared=True, rank_0_only=True, marked=False, code=0)),
    (DivergedError, Ending("diverged", shared=True, rank_0_only=True, repeats=True)),
    (LeaseError, Ending("failed", writes=False, repeats=True)),
    (ConfigError, Ending("failed", repeats=True)),
    (DataError, Ending("failed", repeats=True)),
    (LockstepError, Ending("failed", shared=True)),
    (Exception, Ending("failed")),
)
DONE = Ending("done", rank_0_only=True, marked=False, code=0)


def ending_of(failure: Exception | None) -> Ending:
    """The row of a failure; None: the run is done."""
    if failure is None:
        return DONE
    return next(row for kind, row in TABLE if isinstance(failure, kind))


def status_of(error: Exception) -> dict[str, Any]:
    """What STATUS.json says of a run that ended by ``error``, without the step."""
    code = error.exit_code if isinstance(error, EsperError) else EsperError.exit_code
    message = str(error) if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"
    return {"status": ending_of(error).status, "objective": None, "message": message, "exit_code": code}


def is_witness(rank: int, beat: Heartbeat | None, ending: Ending) -> bool:
    """Whether this rank speaks for the run: rank 0, or the first that failed where rank 0 cannot be asked.

    Args:
        rank: this one.
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


def code_for_torchrun(ending: Ending, own: int) -> int:
    """The exit code of this process.

    Args:
        ending: of this rank.
        own: exit code of the error.
    """
    if ending.code is not None:
        return ending.code
    return 0 if ending.repeats and SUPERVISED in os.environ else own

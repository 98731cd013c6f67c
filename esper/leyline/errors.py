"""Errors that a user sees, each with the exit code of its process.

Codes follow sysexits.h where it names the case: 0 done, 70 our bug, 74 input/output, 75 preempted (try again), 78
configuration. 76 is a lockstep failure and 79 a diverged run.
"""

from collections.abc import Iterable


class EsperError(Exception):
    """Base of all our errors. Each has one clear line: what happened, where, and what to do."""

    exit_code = 70


class ConfigError(EsperError, ValueError):
    """One or more bad settings, reported together.

    Args:
        problems: one line for each, starting with the config path (``optim.lr = -1.0: must be > 0``).
    """

    exit_code = 78

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(EsperError):
    """Data is absent or malformed; the text names path, expected layout and the command that would fix it."""

    exit_code = 74


class CheckpointError(EsperError):
    """A checkpoint is damaged, incomplete or does not fit; the text names the file."""

    exit_code = 74


class LoopError(EsperError):
    """A user's own training loop made calls in an order that cannot work; the text says which call comes first."""

    exit_code = 78


class RunDirError(EsperError):
    """The run directory cannot be used: it is not writable, locked, or belongs to another config."""

    exit_code = 74


class InUseError(RunDirError):
    """Another start works in the run directory; this one has written nothing."""


class LeaseError(RunDirError):
    """A newer attempt owns the run directory; this one must not write to it any more."""


class LockstepError(EsperError):
    """Ranks no longer hold the same network, or a rank is missing; every rank raises the same text."""

    exit_code = 76


class DivergedError(EsperError):
    """Training diverged and could not recover."""

    exit_code = 79


ASKED_IN_WANDB = ", as was asked for in wandb"  # how a stop's message ends then; a person meant it to stop for good


class Preempted(EsperError):
    """The ranks agreed to stop and wrote a checkpoint; the same command continues the run."""

    exit_code = 75


class ExportError(EsperError):
    """An exported model does not compute what the grown one computes."""


class IllegalTransition(EsperError, ValueError):
    """A stage change that is not in the edge table; the text names the legal ones."""


class OwnershipError(EsperError, ValueError):
    """A parameter has no owner, has two, or was about to be trained although it must not be; the text names it."""


class GateError(EsperError, ValueError):
    """An unknown or retired gate was asked for a verdict."""


def one_line(error: BaseException, width: int = 300) -> str:
    """Returns the first line of an error, for a report, with the error's type unless the error is one of ours."""
    text = str(error).strip() if isinstance(error, EsperError) else f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:width] if text else type(error).__name__

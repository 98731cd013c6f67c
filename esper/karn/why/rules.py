"""The rules of `esper why RUN --end`: from the last words of an attempt to whose fault it was and what to do.

The first rule of `RULES` that fits the text decides the cause. What a rule advises holds for a fault that came once.
One that came twice without a new step between (`comes_again`) would come a third time: then it is never "restart".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What is right to do."""

    NOTHING = "nothing"
    RESTART = "restart"
    CHANGE = "change something"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One cause of an end.

    Fields:
        cause: its name.
        pattern: what the error says; groups ``rank``, ``phase``, ``step`` and ``tick`` where it says them.
        codes: exit codes with which it comes; empty: any.
        says: what happened, as a sentence; ``{rank}`` and ``{phase}`` are filled in.
        action: what is right to do when it came once.
        do: what to do before the command, as a sentence; empty: nothing.
        command: the command to type; ``RUN`` stands for the run directory.
    """

    cause: str
    pattern: str
    codes: tuple[int, ...] = ()
    says: str
    action: Action
    do: str = ""
    command: str = "esper resume RUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How one attempt ended.

    Fields:
        attempt: its number.
        cause: of `RULES`; ``silent`` for one that ended without a word.
        rule: the rule that fitted; None for a silent end.
        rank: the rank whose fault it was; None: no rank's, or it is not known.
        phase: what that rank was doing.
        step: optimizer step at which it ended.
        tick: tick at which it ended.
        words: the error.
    """

    attempt: int
    cause: str
    rule: Rule | None
    rank: int | None = None
    phase: str | None = None
    step: int = 0
    tick: int = 0
    words: str = ""


LOST = (
    r"lost contact.*?: rank (?P<rank>\d+) was last seen in (?P<phase>[\w-]+) at step (?P<step>\d+), tick (?P<tick>\d+)"
)
AFTER = "Put that right, then go on."
RULES: tuple[Rule, ...] = (
    Rule(
        cause="disk full",
        pattern=r"No space left on device|Disk quota exceeded",
        says="the disk was full",
        action=Action.CHANGE,
        do="Make room where RUN lies, or keep fewer checkpoints (checkpoint.keep).",
    ),
    Rule(
        cause="read-only",
        pattern=r"Read-only file system|Permission denied|Operation not permitted",
        says="RUN could not be written any more",
        action=Action.CHANGE,
        do="See to the file system and its rights: `esper doctor --run-dir RUN` tries them.",
    ),
    Rule(
        cause="disk broken",
        pattern=r"Input/output error|Stale file handle",
        says="the disk, or the network to it, failed",
        action=Action.CHANGE,
        do="See to the file system that holds RUN: `esper doctor --run-dir RUN` tries it.",
    ),
    Rule(
        cause="no checkpoint",
        pattern=r"no checkpoint is valid on all ranks",
        says="no checkpoint was left that is whole on all ranks",
        action=Action.CHANGE,
        do="Restore one from a copy; without a copy, remove checkpoints/ and saved.json, and the run begins anew.",
    ),
    Rule(
        cause="out of memory",
        pattern=r"OutOfMemoryError|out of memory|Cannot allocate memory",
        says="rank {rank} was out of memory",
        action=Action.CHANGE,
        do="Give it less to hold: a smaller trainer.batch, slots.max_parameters, governor.ring; or a larger machine.",
    ),
    Rule(
        cause="ranks parted",
        pattern=r"ranks parted before tick (?P<tick>\d+), step (?P<step>\d+): .*? differs on rank (?P<rank>\d+)",
        codes=(76,),
        says="rank {rank} no longer held the same network as the others, which was seen at the next tick",
        action=Action.RESTART,
        do="If it happens again, that rank's memory or hardware computes wrong: leave its machine out.",
    ),
    Rule(
        cause="rank failed",
        pattern=r"lost contact.*?: rank (?P<rank>\d+) failed at step (?P<step>\d+): ",
        codes=(76,),
        says="rank {rank} failed by itself, and the others lost contact with it",
        action=Action.CHANGE,
        do=f"What it said is the cause. {AFTER}",
    ),
    Rule(
        cause="rank hung",
        pattern=LOST + r".*(?:Timed out waiting|has not beaten)",
        codes=(76,),
        says="rank {rank} hung in {phase}, or was stopped or cut off: it was still there, and did not answer in time",
        action=Action.RESTART,
        do="If it is only slow there, allow it more time: control.timeout_s.",
    ),
    Rule(
        cause="rank killed",
        pattern=LOST + r".*(?:Connection closed by peer|[Rr]eset by peer|Broken pipe|[Cc]onnection refused)",
        codes=(76,),
        says="rank {rank} died in {phase}: its connections closed without a word, as by kill -9 or for its memory",
        action=Action.RESTART,
    ),
    Rule(
        cause="rank lost",
        pattern=LOST,
        codes=(76,),
        says="rank {rank} was killed, hung or cut off in {phase}; the others lost contact with it",
        action=Action.RESTART,
    ),
    Rule(
        cause="rank lost",
        pattern=r"rank (?P<rank>\d+) (?:never arrived|has not beaten for)",
        codes=(76,),
        says="rank {rank} was killed, hung or cut off, or never came; the others lost contact with it",
        action=Action.RESTART,
    ),
    Rule(
        cause="network cut",
        pattern=r"every rank says the same",
        codes=(76,),
        says="the ranks lost contact with each other, and no rank was missing: the network between them was cut",
        action=Action.RESTART,
        do="See that the machines reach each other.",
    ),
    Rule(
        cause="diverged",
        pattern=r"optimizer steps in a row had a non-finite host gradient",
        codes=(79,),
        says="training left the finite numbers for good",
        action=Action.CHANGE,
        do="Every step would be the same again. Type its own command line anew (environment.json has it), with a lower "
        "optim.lr, or other data, and run.dir=NEW.",
        command="esper report RUN",
    ),
    Rule(
        cause="diverged",
        pattern=r"",
        codes=(79,),
        says="training left the finite numbers for good, or the governor's replays were used up",
        action=Action.CHANGE,
        do="Every step would be the same again. Judge by other limits or not at all; another optim.lr takes a new run.",
        command="esper resume RUN governor.enabled=false",
    ),
    Rule(
        cause="settings",
        pattern=r"",
        codes=(78,),
        says="the settings do not fit, or calls came in a wrong order",
        action=Action.CHANGE,
        do=f"Each line of the error says where and how. {AFTER}",
    ),
    Rule(
        cause="data",
        pattern=r"^data\b|no such file|data",
        codes=(74,),
        says="the data could not be read as it was",
        action=Action.CHANGE,
        do="The error names the file. Put it back, then go on.",
    ),
    Rule(
        cause="files",
        pattern=r"",
        codes=(74,),
        says="a file could not be read or written",
        action=Action.CHANGE,
        do=f"The error names it. {AFTER}",
    ),
    Rule(
        cause="stopped by force",
        pattern=r"ended before the workers could save|interrupted",
        says="it was asked to stop, and ended before it could save",
        action=Action.RESTART,
    ),
    Rule(
        cause="silent",
        pattern=r"without (?:a word|writing|saying)|ended with",
        codes=(70,),
        says="every rank ended without a word: killed, or the machine went down",
        action=Action.RESTART,
    ),
    Rule(
        cause="own code",
        pattern=r"",
        says="an exception that is not one of esper's ended it",
        action=Action.CHANGE,
        do=f"Its traceback is in the output of the run. {AFTER}",
    ),
)


def match_rule(words: str, code: int | None) -> tuple[Rule, dict[str, str | None]]:
    """The first rule that fits an error, and what the error says of rank, phase, step and tick.

    Args:
        words: the error in full.
        code: its exit code; None if that is not known, as in an event.
    """
    for rule in RULES:
        found = re.search(rule.pattern, words, re.S)
        fits = found is not None and (not rule.codes or code in rule.codes or (code is None and rule.pattern))
        if found is not None and fits:
            return rule, dict(found.groupdict())
    raise AssertionError("the last rule fits everything")


def comes_again(failures: Sequence[Failure]) -> bool:
    """Whether the last attempt failed no further on than the one before: a third one would, too.

    Args:
        failures: of all attempts, in order; only those in a row at the end that failed.
    """
    if len(failures) < 2:
        return False
    before, last = failures[-2:]
    return last.attempt == before.attempt + 1 and last.step <= before.step


GIVE_UP_AFTER = 5  # attempts in a row that got no further


def comes_for_ever(failures: Sequence[Failure]) -> bool:
    """Whether so many attempts in a row got no further that going on in this run has no sense."""
    row = failures[-GIVE_UP_AFTER:]
    return len(row) == GIVE_UP_AFTER and all(comes_again(row[i : i + 2]) for i in range(len(row) - 1))

"""How a run ended, whose fault it was, and what to do: `esper.karn.why.rules` applied to what RUN holds."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.karn.store.digest import Digest, Kept, Taker, read_digest
from esper.karn.store.facts import is_running, is_stale, read_json
from esper.karn.store.finding import FoundRun, name_no_run
from esper.karn.why.recoveries import held_recoveries, tell_recoveries
from esper.karn.why.rules import RULES, Action, Failure, comes_again, comes_for_ever, match_rule
from esper.karn.why.sentence import Sentence, say
from esper.leyline.errors import DivergedError
from esper.leyline.files import RunDir
from esper.nissa.reading import Record

FULL_BYTES = 1 << 16  # less is left: not even a small file can be written
PHASES = {
    "start": "start-up",
    "stage": "staging a birth",
    "save-commit": "committing a save",
    "test": "the test at the end",
}


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What a run directory holds of its attempts.

    Fields:
        path: RUN.
        digest: of its events.
        befell: what it got over, of rank 0.
        status: STATUS.json of the last attempt; empty if that ended without one.
        attempts: number of the last one; 0: it never began.
        marks: step, tick and phase at which each rank was last, and its error, by rank.
        place: what is wrong with the place where RUN lies now, in the words of the system; empty: nothing.
        saved: it has saved.
        running: somebody works on it.
    """

    path: Path
    digest: Digest
    befell: Kept
    status: dict[str, Any]
    attempts: int
    marks: dict[int, tuple[int, int, str, str]]
    place: str
    saved: bool
    running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Why a run ended.

    Fields:
        cause: of `RULES`, or ``done``, ``stopped``, ``silent``, ``running``, ``not begun``.
        action: what is right to do.
        command: the command to type; empty: none.
        failures: the attempts that failed, in order.
        sentences: all of it in words.
    """

    cause: str
    action: Action
    command: str
    failures: tuple[Failure, ...] = ()
    sentences: tuple[Sentence, ...] = field(default=())


def read_evidence(path: Path, *takers: Taker) -> Evidence:
    """Reads what RUN holds; nothing is locked or written.

    Args:
        path: RUN.
        takers: see `read_digest`.

    Raises:
        RunDirError: this is no run directory, or a file of it is damaged.
    """
    directory = RunDir(path)
    if not directory.config.is_file():
        raise name_no_run(path)
    attempt, status = read_json(directory.attempt), read_json(directory.status)
    written = directory.status.stat().st_mtime if status else None
    if is_stale(directory, status, attempt):
        status = {}
    marks = {}
    for mark in sorted(directory.heartbeat.glob("rank-*")):
        try:
            step, tick, phase, _, error = json.loads(mark.read_text(errors="replace").strip("\0 \n") or "null")
            marks[int(mark.name.removeprefix("rank-"))] = (int(step), int(tick), str(phase), str(error))
        except (ValueError, TypeError):  # being written at this moment
            continue
    befell = held_recoveries()
    return Evidence(
        path=path,
        digest=read_digest(FoundRun(name=".", path=path), befell, *takers),
        befell=befell,
        status=status,
        attempts=int(attempt.get("number", 0)),
        marks=marks,
        place=judge_place(os.statvfs(path)),
        saved=directory.saved.exists(),
        running=is_running(directory, written),
    )


def judge_place(disk: os.statvfs_result) -> str:
    """What keeps a run from writing to a file system, in the words of the system; empty: nothing."""
    if disk.f_flag & os.ST_RDONLY:
        return "Read-only file system"
    return "No space left on device" if disk.f_bavail * disk.f_frsize < FULL_BYTES else ""


def _fail(attempt: int, words: str, code: int | None, record: Record | None, status: dict[str, Any]) -> Failure:
    rule, said = match_rule(words, code)
    step = said.get("step") or status.get("step") or (record or {}).get("step") or 0
    return Failure(
        attempt=attempt,
        cause=rule.cause,
        rule=rule,
        rank=int(said["rank"]) if said.get("rank") else None,  # type: ignore[arg-type]
        phase=said.get("phase"),
        step=int(step),
        tick=int(said.get("tick") or (record or {}).get("tick") or 0),
        words=words,
    )


def last_words(evidence: Evidence, attempt: int) -> Record | None:
    """The record with which an attempt ended in failure: rank 0's, or else the last fault of another rank."""
    ended = [r for r in evidence.digest.ends if r["attempt"] == attempt]
    if ended:
        return ended[-1]
    others = [r for r in evidence.digest.others if r["attempt"] == attempt and r["kind"] == "fault"]
    return others[-1] if others else None


def _words_of_others(evidence: Evidence, attempt: int) -> list[str]:
    """What other ranks than 0 said of an attempt, in order."""
    return [str(r["payload"]["what"]) for r in evidence.digest.others if r["attempt"] == attempt]


def failures_of(evidence: Evidence) -> list[Failure]:
    """The attempts that failed, in order. One that left no word is ``silent``, where its ranks were last."""
    found = []
    for attempt in range(1, evidence.attempts + 1):
        record = last_words(evidence, attempt)
        payload = record["payload"] if record else {}
        newest = attempt == evidence.attempts
        status = evidence.status if newest else {}
        if status.get("status") in ("done", "preempted") or payload.get("status") in ("done", "preempted"):
            continue
        if newest and evidence.running:
            continue
        if status and status.get("written_by") != "launcher":
            words = status["message"]
            if "see that rank" in words:  # rank 0 knows only that another one failed
                words = "; ".join([words, *_words_of_others(evidence, attempt)[-1:]])
            found.append(_fail(attempt, words, status.get("exit_code"), record, status))
        elif record is not None:
            code = {"diverged": DivergedError.exit_code}.get(payload.get("status", ""))
            words = payload.get("what") or payload["summary"]["message"]
            found.append(_fail(attempt, words, code, record, {}))
        elif status and match_rule(status["message"], status.get("exit_code"))[0].cause != "silent":
            found.append(_fail(attempt, status["message"], status.get("exit_code"), None, status))
        elif newest and (words := evidence.place or last_error(evidence)):
            found.append(_fail(attempt, words, None, None, {}))
        else:
            found.append(_silent(evidence, attempt))
    return found


def last_error(evidence: Evidence) -> str:
    """The error in the marks of the ranks, where one could write that and no more; the first that is not a victim's."""
    errors = [error for *_, error in evidence.marks.values() if error]
    return next((error for error in errors if not error.startswith("lost contact")), next(iter(errors), ""))


def _silent(evidence: Evidence, attempt: int) -> Failure:
    """An attempt that ended without a word. Where its ranks were last is known of the newest attempt alone."""
    if attempt == evidence.attempts and evidence.marks:
        step, tick, phase, _ = max(evidence.marks.values(), key=lambda mark: mark[:2])
        return Failure(attempt=attempt, cause="silent", rule=None, phase=phase, step=step, tick=tick)
    last = evidence.digest.last_of.get(attempt)
    step, tick = (last["step"], last["tick"]) if last else (0, 0)
    return Failure(attempt=attempt, cause="silent", rule=None, step=step, tick=tick)


def _tell(failure: Failure, evidence: Evidence) -> Sentence:
    where = f"at step {failure.step:,} (tick {failure.tick:,})" if failure.step or failure.tick else "in start-up"
    if failure.rule is None:
        last = f"; its ranks were last in {PHASES.get(failure.phase, failure.phase)}" if failure.phase else ""
        return say(
            f"Attempt {failure.attempt} ended {where} without a word{last}: everything was killed at once, or the "
            "machine went down. It was no rank's own fault."
        )
    rank = "a rank" if failure.rank is None else f"rank {failure.rank}"
    says = failure.rule.says.replace("rank {rank}", rank)
    says = says.format(phase=PHASES.get(failure.phase or "", failure.phase or "a phase that is not known"))
    words = failure.words.splitlines()[0].split(" ([")[0]  # without what the transport says
    return say(
        f"Attempt {failure.attempt} ended {where}: {says}. It said: {words}", last_words(evidence, failure.attempt)
    )


def explain_end(path: Path, *takers: Taker) -> Diagnosis:
    """Says why a run ended, whose fault it was, and what to do.

    Args:
        path: RUN.
        takers: see `read_digest`.

    Raises:
        RunDirError: this is no run directory, or a file of it is damaged.
    """
    return diagnose(read_evidence(path, *takers))


def diagnose(evidence: Evidence) -> Diagnosis:
    """Says why a run ended, from what was read of it."""
    failures = failures_of(evidence)
    told = [_tell(failure, evidence) for failure in failures]
    cause, action, command, advice = _judge(evidence, failures)
    befell = tell_recoveries(evidence.digest, evidence.befell)
    return Diagnosis(
        cause=cause,
        action=action,
        command=command.replace("RUN", str(evidence.path)),
        failures=tuple(failures),
        sentences=(*told, *befell, *advice),
    )


def _judge(evidence: Evidence, failures: list[Failure]) -> tuple[str, Action, str, list[Sentence]]:
    """Cause, action, command, and the sentences that say them."""
    status = evidence.status
    ended = evidence.digest.ends[-1] if evidence.digest.ends else None
    if evidence.running:
        return "running", Action.NOTHING, "", [say("The run is going on.")]
    if not evidence.attempts:
        return "not begun", Action.RESTART, "esper resume RUN", [say("The run was prepared, and never began.")]
    newest = ended["payload"]["status"] if ended and ended["attempt"] == evidence.attempts else None
    kind = status.get("status", newest)
    if kind == "done":
        step = status.get("step") or (ended or {}).get("step", 0)
        text = f"The run is done, at step {step:,}. There is nothing to do."
        return "done", Action.NOTHING, "", [say(text, ended)]
    if kind == "preempted":
        by = status.get("reason") or "its launcher was gone, or a signal came to a rank"
        message = status.get("message") or (ended or {})["payload"]["summary"]["message"]
        text = f"The run was asked to stop ({by}): {message}. It goes on from there."
        return "stopped", Action.RESTART, "esper resume RUN", [say(text, ended)]
    last = failures[-1]
    rule = last.rule or next(rule for rule in RULES if rule.cause == "silent")
    if comes_for_ever(failures):
        text = f"{len(failures)} attempts in a row got no further than step {last.step:,}. Go back to an earlier one."
        return last.cause, Action.GIVE_UP, "esper resume RUN --at STEP --as NEW", [say(text)]
    if rule.action is Action.RESTART and comes_again(failures):
        whose = f"rank {last.rank}" if last.rank is not None else "the machine"
        text = (
            f"The attempt before got no further either, so another start would end there again. Look at {whose} first: "
            "the kernel's log (was it killed for its memory?), the output of the run, the hardware."
        )
        return last.cause, Action.CHANGE, "esper doctor --run-dir RUN", [say(text)]
    begins = "it goes on from its newest checkpoint" if evidence.saved else "it had not saved yet, and begins anew"
    text = f"Start it again: {begins}." if rule.action is Action.RESTART else ""
    return last.cause, rule.action, rule.command, [say(" ".join(filter(None, [rule.do, text])))]

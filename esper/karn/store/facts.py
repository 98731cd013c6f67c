"""What a run came to, from its directory alone, finished or not: the row of `esper runs` and of the view ``runs``.

Nothing is locked and nothing is written: whether a run is going on is read from the kernel's list of locks, or, where
it is on another machine, from the age of its ranks' marks.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from esper.karn.lives import by_place
from esper.karn.store.digest import Digest
from esper.karn.store.finding import FoundRun
from esper.leyline.errors import RunDirError
from esper.leyline.files import RunDir
from esper.leyline.stages import Stage
from esper.nissa.console import describe_event
from esper.nissa.envelope import from_record
from esper.nissa.reading import Record

FRESH_S = 60.0  # a run whose ranks were marked so recently is going on


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run in a few numbers. What the record does not hold is None.

    Fields:
        run: its path below the folder that was searched.
        run_id: id for life, the same in every attempt.
        name: ``run.name``, or None.
        state: ``running``, ``done``, ``preempted``, ``failed``, ``diverged``, ``lost`` (it ended without a word) or
            ``prepared`` (it never began).
        exit_code: of the last attempt that ended.
        message: the error in full.
        host: kind of host.
        data: kind of data.
        controller: kind of controller.
        seed: of the run.
        ranks: number of ranks of the last attempt.
        attempts: starts so far.
        started: first event, seconds since 1970.
        ended: last event, seconds since 1970.
        rank_hours: hours of all attempts times their ranks.
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        tick: control ticks done.
        train_loss: of the last tick, in the task's unit.
        validation_loss: the last that was measured.
        validation_accuracy: a share, the last that was measured.
        test_loss: of the checkpoint that validation chose.
        test_accuracy: of the same.
        objective: what a sweep optimises.
        parameters: of the network, the last that was told.
        flops: training FLOPs so far.
        fossils: slots that hold a fossil.
        live_seeds: slots that hold a seed that is neither fossil nor gone.
        slots: number of slots.
        births: seeds that were born.
        faults: records of faults, panics and rollbacks, of all ranks.
        torn_lines: lines of its event files that a kill tore.
        last_word: the newest thing that it said, in words.
    """

    run: str
    run_id: str | None = None
    name: str | None = None
    state: str
    exit_code: int | None = None
    message: str = ""
    host: str | None = None
    data: str | None = None
    controller: str | None = None
    seed: int | None = None
    ranks: int | None = None
    attempts: int | None = None
    started: float | None = None
    ended: float | None = None
    rank_hours: float | None = None
    step: int | None = None
    total_steps: int | None = None
    tick: int | None = None
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    objective: float | None = None
    parameters: int | None = None
    flops: int | None = None
    fossils: int = 0
    live_seeds: int = 0
    slots: int | None = None
    births: int = 0
    faults: int = 0
    torn_lines: int = 0
    last_word: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run directory; empty if it is not there.

    Raises:
        RunDirError: it is damaged.
    """
    try:
        plain = json.loads(path.read_text()) if path.is_file() and not path.is_symlink() else {}
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: not readable ({error}); restore it, or remove it") from None
    if not isinstance(plain, dict):
        raise RunDirError(f"{path}: not a JSON object; restore it, or remove it")
    return plain


def read_settings(directory: RunDir) -> dict[str, Any]:
    """RUN/config.yaml as plain data.

    Raises:
        RunDirError: it is missing or damaged.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.load(directory.config))
    except Exception as error:  # YAML has errors of its own
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunDirError(f"{directory.config}: not readable ({why}); is this a run directory?") from None
    if not isinstance(plain, dict):
        raise RunDirError(f"{directory.config}: not a table of settings; is this a run directory?")
    return {str(key): value for key, value in plain.items()}


def is_stale(directory: RunDir, status: dict[str, Any], attempt: dict[str, Any]) -> bool:
    """Whether STATUS.json is of an earlier attempt than the newest, which has ended without a word or is going on.

    Args:
        directory: RUN.
        status: what STATUS.json holds; empty without one.
        attempt: what attempt.json holds; empty without one.
    """
    if not status or not attempt:
        return False
    if "attempt" in status:
        return status["attempt"] is not None and status["attempt"] < attempt["number"]
    # Of a version that did not write it: by the times of the files.
    return directory.attempt.stat().st_mtime > directory.status.stat().st_mtime


def is_running(directory: RunDir, ended: float | None) -> bool:
    """Whether somebody works on a run now: its lock is held on this machine, or its ranks were marked a moment ago.

    Args:
        directory: RUN.
        ended: when STATUS.json was written, seconds since 1970; None without one.
    """
    try:
        inode = directory.lock.stat().st_ino
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        if any(words[1] == "FLOCK" and words[5].endswith(f":{inode}") for words in held if len(words) > 5):
            return True
    except OSError:  # no lock, or no such list on this system
        pass
    marks = [path.stat().st_mtime for path in directory.heartbeat.glob("rank-*")]
    newest = max(marks, default=0.0)
    return time.time() - newest < FRESH_S and (ended is None or newest > ended + 1.0)


def describe(record: Record) -> str:
    """A record in words; empty if this version has none for it."""
    try:
        told = describe_event(from_record(record))
    except ValueError:  # of another version
        told = None
    return told[0].splitlines()[0] if told else ""


def _value(reading: Any) -> float | None:
    value = reading.get("value") if isinstance(reading, dict) else None
    return None if value is None else float(value)  # 'nan' and 'inf' are written as text


def collect_facts(run: FoundRun, digest: Digest) -> RunFacts:
    """Makes the row of a run.

    Args:
        run: where it is.
        digest: of its events.

    Raises:
        RunDirError: STATUS.json, result.json or config.yaml is damaged.
    """
    directory = run.directory
    status, result, attempt = (read_json(path) for path in (directory.status, directory.result, directory.attempt))
    settings = read_settings(directory)
    if is_stale(directory, status, attempt):
        status = {}
    written = directory.status.stat().st_mtime if status else None
    state = str(status.get("status", "lost" if attempt else "prepared"))
    if is_running(directory, written):
        state = "running"
    said = next(filter(None, map(describe, reversed(digest.newest.values()))), "")
    start = digest.newest["run_started"]["payload"] if "run_started" in digest.newest else {}
    last = [record for record in (digest.newest_record, digest.last_tick) if record is not None]
    newest: Record = max(last, key=by_place, default={})
    tick = digest.last_tick["payload"] if digest.last_tick else {}
    held = list(digest.stages.values())
    ranks = start.get("world_size")
    hours = sum(end - first for first, end in digest.spans.values()) / 3600
    message = str(status.get("message", "")) if state != "running" else ""
    word = message.splitlines()[0] if message else said
    return RunFacts(
        run=run.name,
        run_id=attempt.get("run_id"),
        name=(settings.get("run") or {}).get("name"),
        state=state,
        exit_code=status.get("exit_code"),
        message=message,
        **{kind: (settings.get(kind) or {}).get("kind") for kind in ("host", "data", "controller")},
        seed=settings.get("seed"),
        ranks=ranks,
        attempts=attempt.get("number"),
        started=min((first for first, _ in digest.spans.values()), default=None),
        ended=max((end for _, end in digest.spans.values()), default=None),
        rank_hours=hours * ranks if ranks and digest.spans else None,
        step=status["step"] if state != "running" and status.get("step") is not None else newest.get("step"),
        total_steps=start.get("total_steps"),
        tick=result.get("tick", newest.get("tick")),
        train_loss=_value(tick.get("train_loss")),
        validation_loss=_value(result.get("validation_loss", tick.get("validation_loss"))),
        validation_accuracy=_value(result.get("validation_accuracy", tick.get("validation_accuracy"))),
        test_loss=_value(result.get("test_loss")),
        test_accuracy=_value(result.get("test_accuracy")),
        objective=result.get("objective"),
        parameters=result.get("parameters", tick.get("parameters", start.get("parameters"))),
        flops=result.get("flops", tick.get("flops")),
        fossils=held.count(Stage.FOSSILIZED),
        live_seeds=sum(stage.is_live for stage in held),
        slots=len(start["slots"]) if "slots" in start else None,
        births=digest.births,
        faults=digest.faults,
        torn_lines=digest.torn,
        last_word=word,
    )

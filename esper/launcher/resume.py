"""Resumes a run, from its newest checkpoint or an older one, under some settings that may change."""

import contextlib
import copy
import os
import shlex
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from esper.accord.breaker import BreakerOrder
from esper.config.digest import (
    CHANGEABLE,
    LENGTH,
    changeable_settings,
    length_of,
    length_problem,
    may_change,
    same_length,
)
from esper.config.tree import EsperConfig, Resume, read_plain, write_config
from esper.config.trust import check_trust
from esper.launcher.ahead.process import Ahead
from esper.launcher.start import LaunchResult, start
from esper.leyline.breaker import BreakerPhase
from esper.leyline.errors import CheckpointError, ConfigError, RunDirError
from esper.leyline.files import RunDir
from esper.run.directory import find_run, read_status
from esper.tolaria.checkpoint.store import CheckpointStore


def change_settings(plain: dict[str, Any], changes: Sequence[str]) -> None:
    """Changes settings of a run's plain config, in place, as ``key=value`` of a command line says. Its length is one.

    Raises:
        ConfigError: a change cannot be read, or its setting may not change; the text lists every problem.
    """
    problems: list[str] = []
    for text in changes:
        try:
            change = OverridesParser.create().parse_override(text)
        except HydraException:
            problems.append(f"{text}: not readable; expected key=value, as in governor.enabled=false")
            continue
        key, plainly = change.key_or_group, not (change.is_add() or change.is_delete() or change.is_sweep_override())
        if not plainly or "=" not in text:
            problems.append(f"{text}: expected one key=value, as in governor.enabled=false")
        elif key in ("run", "run.dir", "run.resume"):
            problems.append(f"{text}: the command itself says which run; leave it out")
        elif not may_change(key) and key not in LENGTH:
            may = ", ".join(name for name in (*CHANGEABLE, *LENGTH) if name != "run")
            problems.append(f"{text}: cannot change where a run goes on (what can: {may}); begin a new run with it")
        else:
            _put(plain, key, change.value())
    if problems:
        raise ConfigError(problems)


def _put(plain: dict[str, Any], key: str, value: Any) -> None:
    """Sets a leaf by its dotted path; what is no setting is found when the config is built."""
    *path, name = key.split(".")
    for part in path:
        if not isinstance(plain.get(part), dict):
            plain[part] = {}
        plain = plain[part]
    plain[name] = value


def _trusting(run: Path) -> str:
    """What to type to resume a run of somebody else."""
    return f"type {shlex.join(['esper', 'resume', str(run), '--trust'])}"


def read_run(run: Path, ahead: Ahead, *, trusted: bool = False) -> dict[str, Any]:
    """Reads the settings of a run, checked whole.

    Raises:
        ConfigError: see `esper.config.tree.load_config`.
    """
    plain = read_plain(RunDir(run).config)
    if not trusted:
        check_trust(RunDir(run).config, plain, _trusting(run))
    ahead.check(plain)
    return plain


def branch(run: Path, step: int, new: Path, *, trusted: bool = False, ahead: Ahead | None = None) -> None:
    """Makes the run directory ``new``, which is the caller's own, from a run's config and one of its checkpoints.

    Raises:
        CheckpointError: there is no checkpoint of that step, or it is damaged.
        RunDirError: ``new`` holds something already, or cannot be written.
    """
    plain = read_run(run, ahead or Ahead(), trusted=trusted)
    store = CheckpointStore.of_run(run)
    if step not in store.steps():
        steps = ", ".join(map(str, sorted(store.steps()))) or "none"
        raise CheckpointError(f"--at {step}: no checkpoint of that step in {store.folder}; there are {steps}")
    store.verify(step)
    if new.exists() and not (new.is_dir() and not any(new.iterdir())):
        raise RunDirError(f"--as {new}: exists already; name a new folder")
    plain["run"] |= {"dir": str(new), "resume": str(Resume.AUTO)}
    partial = new.with_name(f".{new.name}.{os.getpid()}.partial")
    try:
        copy = RunDir(partial).checkpoints / store.path(step).name
        partial.mkdir(0o775, parents=True)
        copy.mkdir(parents=True)
        for file in store.path(step).iterdir():  # without modes, which some file systems do not have
            shutil.copyfile(file, copy / file.name)
        write_config(RunDir(partial).config, plain)
        for name in (RunDir(run).data.name, RunDir(run).saved.name):
            if (run / name).exists():
                shutil.copyfile(run / name, partial / name)
        with contextlib.suppress(FileNotFoundError):
            new.rmdir()
        partial.rename(new)
    except OSError as error:
        raise RunDirError(f"--as {new}: cannot be written ({error.strerror}); name a writable folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_order(run: Path, config: EsperConfig, phase: BreakerPhase) -> BreakerOrder:
    """Makes an order that sets the breaker of growth when the run is resumed.

    Raises:
        ConfigError: the run has no governor.
        CheckpointError: the run has no checkpoint yet.
    """
    if not config.governor.enabled:
        raise ConfigError("--breaker: the run has governor.enabled=false, so nothing stops its growth")
    if not CheckpointStore.of_run(run).steps():
        raise CheckpointError(f"--breaker: {run} has no checkpoint to go on from; esper resume {run} begins anew")
    return BreakerOrder(id=uuid.uuid4().hex, phase=phase, why="ordered by esper resume --breaker")


def resume(
    run: Path,
    at: int | None = None,
    new: Path | None = None,
    breaker: BreakerPhase | None = None,
    changes: Sequence[str] = (),
    *,
    trusted: bool = False,
    ahead: Ahead | None = None,
) -> LaunchResult:
    """Resumes a run; see `branch` for ``at`` and ``new``, `make_order` for ``breaker``, `change_settings`.

    With ``trusted`` it may name code even if its config.yaml is not the caller's own. ``ahead`` is as in `start`.

    Raises:
        EsperError: the run cannot be resumed.
    """
    ahead = ahead or Ahead()
    find_run(run)
    plain = read_run(run, ahead, trusted=trusted)
    old = copy.deepcopy(plain)
    change_settings(plain, changes)
    ahead.check(plain)  # before a new folder is made
    if problem := length_problem(old, plain):
        raise ConfigError(problem)
    status, _ = read_status(run)
    finished = status is not None and status["status"] == "done" and same_length(old, plain)
    if finished and new is None and changeable_settings(plain) != changeable_settings(old):
        raise ConfigError(
            f"{run} is done, so nothing would run with {', '.join(changes)}; to make it longer, add "
            "{}=<more than {}>; to go on from an older checkpoint in a new folder, add --at STEP --as NEW".format(
                *length_of(old)
            )
        )
    if new is not None and at is not None:
        branch(run, at, new, trusted=trusted, ahead=ahead)
        run = new
        plain = read_run(run, ahead)
        change_settings(plain, changes)
    plain["run"]["resume"] = str(Resume.MUST)
    config = ahead.check(plain)
    order = None if breaker is None else make_order(run, config, breaker)
    return start(config, plain, order=order, ahead=ahead)

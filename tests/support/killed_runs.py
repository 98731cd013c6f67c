"""Whole runs that are killed and resumed: the real worker in a run directory, and a place where kill -9 strikes.

live(run_dir, world, kill)     one process group, to its end or to the kill; what each rank returned
final(run_dir)                 what the run came to: every bit of its last checkpoint, result, metrics, decisions
"""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper import worker
from esper.config.tree import write_config
from esper.nissa.reading import keep_latest, read_events
from esper.tolaria.checkpoint.store import CheckpointStore
from tests.support.dist import RanksFailed, run_distributed
from tests.support.fault_places import PLACES, WRITING, strike_at
from tests.support.noisy_host import register_noisy


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL on ``rank`` (None: on all) at ``place``, the first time it is reached from ``tick`` on."""

    place: str
    tick: int
    rank: int | None = 0


def _now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill) -> None:
    """Puts the kill in place, in this process for good."""
    strike_at(kill.place, kill.tick, _now)


def _rank(rank: int, run_dir: Path, kill: Kill | None, prepare: Callable[[int], None] | None) -> int:
    register_noisy()
    errors = os.open(run_dir / f"stderr-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    if prepare is not None:
        prepare(rank)
    if kill is not None and kill.rank in (None, rank):
        arm(kill)
    return worker.run(run_dir / "config.yaml")


def prepare_run(run_dir: Path, plain: dict[str, Any]) -> Path:
    """A run directory with its config, as the launcher leaves it."""
    run_dir.mkdir(parents=True)
    write_config(run_dir / "config.yaml", plain)
    return run_dir


def live(
    run_dir: Path, world: int, kill: Kill | None = None, prepare: Callable[[int], None] | None = None
) -> list[int] | None:
    """Starts or resumes the run with ``world`` ranks.

    Args:
        kill: where one rank or all are killed. prepare: runs on each rank before its worker.

    Returns:
        Exit codes; None when the kill has struck (anything else that goes wrong fails the test).
    """
    if kill is None:
        codes: list[int] = run_distributed(_rank, world, run_dir, None, prepare)
        return codes
    with pytest.raises(RanksFailed) as failed:
        run_distributed(_rank, world, run_dir, kill, prepare)
    story = str(failed.value)
    struck = re.findall(r"rank (\d+): died with exit code -9", story)
    wanted = range(world) if kill.rank is None else [kill.rank]
    # Where all are to die the first death may end another rank by a named error before its own kill.
    assert set(map(int, struck)) <= set(wanted), story
    assert struck, story
    assert "late" not in story, story
    for rank in map(int, struck):
        phase = json.loads((run_dir / "heartbeat" / f"rank-{rank:05d}").read_text())[2]
        assert kill.place in WRITING or phase == PLACES[kill.place], story
    return None


MEASURED = ("steps_ms", "data_ms", "own_ms", "tick_ms", "digest_ms", "wrap_ms", "save_ms", "stall_ms")
TOLD = ("tick", "stage", "command", "refusal", "gate", "ramp", "contribution", "rewrap", "veto", "skipped")


def final(run_dir: Path) -> dict[str, Any]:
    """What the run came to; equal for two runs of one config exactly if nothing was lost on the way.

    ``tensors``: every tensor of the last checkpoint, of each rank's own file too; ``plain``: all else of it, the
    result, and the events as they stand, without wall-clock times.
    """
    status = json.loads((run_dir / "STATUS.json").read_text())
    assert status["status"] == "done", status
    store = CheckpointStore(run_dir / "checkpoints", attempt=1, keep=1)
    newest = store.steps()[0]
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}

    def sort(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                sort(item, f"{path}/{key}")
        elif isinstance(value, Tensor):
            tensors[path] = value
        else:
            plain[path] = value

    for name in store.verify(newest).files:
        sort(store.load(newest, name), name)
    # settings that may change where a run goes on, such as where it logs, are no part of what it came to
    plain = {path: value for path, value in plain.items() if not path.startswith("state.pt/settings/")}
    del plain["state.pt/run_id"]
    plain["result"] = json.loads((run_dir / "result.json").read_text())
    events = [event for event in keep_latest(read_events(run_dir / "events.jsonl")) if event["kind"] in TOLD]
    slots: dict[str, Any] = {}  # a tick has those alone that changed, the first of an attempt all of them
    for event in events:
        if event["kind"] == "tick":
            slots |= {line["slot"]: line for line in event["payload"]["slots"]}
            event["payload"]["slots"] = list(slots.values())
    plain["events"] = [
        [
            event["kind"],
            event["step"],
            event["tick"],
            event["epoch"],
            {key: value for key, value in event["payload"].items() if key not in MEASURED},
        ]
        for event in events
    ]
    plain["step"] = newest
    return {"tensors": tensors, "plain": plain}


def assert_same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit for bit; the first difference is told."""
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for name, tensor in wanted["tensors"].items():
        other = found["tensors"][name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (other, tensor)]
        assert torch.equal(*raw), f"{name} differs"
    assert found["plain"].keys() == wanted["plain"].keys()
    for name, value in wanted["plain"].items():
        if isinstance(value, list):
            for one, other in zip(found["plain"][name], value, strict=False):
                assert one == other, f"{name}: found {one}, wanted {other}"
        assert found["plain"][name] == value, f"{name}: found {found['plain'][name]}, wanted {value}"

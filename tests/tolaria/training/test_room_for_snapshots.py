"""Snapshots that a machine cannot hold are told as a run begins, and not by the kernel when memory is used up."""

from typing import Any

import pytest
import torch

from esper.accord.governor.config import GovernorConfig
from esper.accord.state import RunState
from esper.leyline.events import Fault, SnapshotTaken
from esper.tolaria.training import governor as module
from esper.tolaria.training.governor import Governor


class Place:
    rank, size, local_rank, store = 3, 8, 0, None


def begin(free: int | None, monkeypatch: pytest.MonkeyPatch, *, local_rank: int = 0) -> list[Any]:
    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    world: Any = Place()
    world.local_rank = local_rank
    parts: dict[str, Any] = {"terms": None, "store": None}
    governor = Governor(GovernorConfig(ring=3), chance=1.0, world=world, **parts)
    payload = {"model": {"weight": torch.zeros(2**18)}, "controller": {}}  # a MiB
    return governor.begin(RunState(slots=()), lambda state: (payload, {}))


def test_what_does_not_fit_is_one_line_that_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, fault = begin(7 * 2**20, monkeypatch)
    assert (type(taken), taken.bytes) == (SnapshotTaken, 2**20)
    assert isinstance(fault, Fault)
    assert fault.what.startswith("governor.ring = 3: its snapshots take 8 MiB more for the 4 ranks of this machine")
    assert fault.where == "rank 3"
    assert len(begin(7 * 2**20, monkeypatch, local_rank=1)) == 1, "one rank says so"


@pytest.mark.parametrize("free", [None, 8 * 2**20])
def test_what_fits_or_is_not_known_is_no_fault(free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [type(event) for event in begin(free, monkeypatch)] == [SnapshotTaken]

"""What runs of a comparison share: one process, so one derivation of an arm at a time."""

import threading
from pathlib import Path

import pytest

import esper.compare
from esper.arms import load_compare
from esper.compare import Comparer, Job
from esper.leyline.errors import EsperError


def test_arms_are_derived_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, other = threading.Semaphore(1), threading.Event()
    overlaps = []

    def derive(*_: object) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(True)
            other.set()
            raise EsperError("two at once")
        other.wait(0.5)
        inside.release()
        raise EsperError("far enough")

    monkeypatch.setattr(esper.compare, "derive", derive)
    comparer = Comparer(load_compare("digits_cpu", []), tmp_path, lambda text: None)
    comparer.run_all([Job("none", 0), Job("heuristic", 0)], 2)
    assert not overlaps
    assert list(comparer.failures.values()) == ["far enough"] * 2

"""The command for CUDA devices: its plan names what there is, and without a device it refuses in a line."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def benching(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "launch"))
    return lambda name: importlib.import_module(f"benching.{name}")


def test_without_a_device_it_refuses_in_a_line(
    benching: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benching("gpu").main(["--out", str(tmp_path / "out")]) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench.py gpu: torch sees no CUDA device here; ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_plan_has_the_marked_tests_and_every_part_by_its_name(
    benching: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = benching("gpu")
    assert gpu.main(["--plan", "--devices", "4", "--rounds", "7"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    rooms = {"lockstep": ("lockstep", "ticking"), "kasmina": ("kasmina", "library", "compiled")}
    known = {what: {part for room in names for part in benching(room).PARTS} for what, names in rooms.items()}
    assert set(lines) == {"tests", *(f"{what}-{name}" for what, names in gpu.BENCHES.items() for name in names)}
    assert all(name in known[what] for what, names in gpu.BENCHES.items() for name in names)
    assert "-m pytest -m gpu" in lines["tests"]
    assert all("--ranks 4 --rounds 7 --device gpu" in lines[name] for name in lines.keys() - {"tests"})

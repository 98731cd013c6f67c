"""Code that a file names, and that leaves a trace when it is imported or called; files of somebody else.

trap = lay_trap(tmp_path)           # tmp_path/trap_code.py; its folder must be importable
give_away(path)                     # the file is another user's now
assert trap.sprung() == []          # or ["imported", "called"]
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

STRANGER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")

_CODE = """
import pathlib
from torch import nn

def note(what):
    with pathlib.Path(__file__).with_name("trace").open("a") as file:
        file.write(what + chr(10))

note("imported")

class Idle:
    name = "idle"
    def __init__(self, *, slots, seed): note("called")
    def decide(self, observation): return []
    def state_dict(self): return {}
    def load_state_dict(self, state): assert not state

def build(*, input_shape, classes):
    note("called")
    convolution = nn.Conv2d(input_shape[0], 4, 3, padding=1)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
"""


@dataclass(frozen=True)
class Trap:
    """Code in a folder."""

    folder: Path

    def sprung(self) -> list[str]:
        """What has happened to it since the last look."""
        trace = self.folder / "trace"
        lines = trace.read_text().split() if trace.exists() else []
        trace.unlink(missing_ok=True)
        return lines


def lay_trap(folder: Path) -> Trap:
    (folder / "trap_code.py").write_text(_CODE)
    return Trap(folder)


def give_away(path: Path) -> None:
    """Makes a file another user's."""
    os.chown(path, STRANGER, STRANGER)

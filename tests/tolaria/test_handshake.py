"""The start handshake on one process: what it compares, and that nobody is refused by himself."""

import hashlib
import platform
from pathlib import Path

import pytest
import torch

import esper
from esper.tolaria.config import ControlConfig, WorldConfig
from esper.tolaria.handshake import code_digest, machine_fields, newest_valid_everywhere, shake_hands
from esper.tolaria.world import World


@pytest.fixture
def alone(monkeypatch) -> World:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return World(WorldConfig(), ControlConfig())


@pytest.mark.parametrize(
    ("whole", "newest", "read"), [([], None, 3), ([300], 300, 1), ([200, 100], 200, 2), ([100], 100, 3)]
)
def test_alone_the_newest_valid_is_ones_own_and_no_older_one_is_read(alone, whole, newest, read):
    asked = []

    def valid(step: int) -> bool:
        asked.append(step)
        return step in whole

    assert newest_valid_everywhere(alone, [300, 200, 100], valid) == newest
    assert asked == [300, 200, 100][:read]


def test_alone_one_agrees_with_oneself(alone):
    shake_hands(alone, {"config": "abc", "torch": torch.__version__})
    shake_hands(alone, {})


def test_the_code_digest_covers_the_name_and_bytes_of_every_source_file():
    root = Path(esper.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("**/*.py"))
    assert {"worker.py", "tolaria/wire.py", "leyline/stages.py"} <= set(names)
    hasher = hashlib.blake2b(digest_size=8)
    for name in sorted(names, key=Path):
        hasher.update(name.encode() + b"\0" + (root / name).read_bytes())
    assert code_digest() == hasher.hexdigest()


def test_the_machine_is_described_by_what_births_and_sums_depend_on():
    fields = machine_fields(torch.device("cpu"))
    assert fields == {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "device": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }

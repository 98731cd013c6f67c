"""The start handshake: what it compares, that one process agrees with itself, and that unequal code is refused."""

import hashlib
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

import esper
from esper.leyline.errors import LockstepError
from esper.tolaria.ranks import handshake
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.handshake import code_digest, machine_fields, newest_valid_everywhere, shake_hands
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed


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
    assert {"worker.py", "tolaria/lockstep/wire.py", "leyline/stages.py"} <= set(names)
    hasher = hashlib.blake2b(digest_size=8)
    for name in sorted(names, key=Path):
        hasher.update(name.encode() + b"\0" + (root / name).read_bytes())
    assert code_digest() == hasher.hexdigest()


def shake_with_other_code(rank: int, folder: Path, changed: str) -> str:
    """Rank 1 holds a copy of the package in which one file has a line more; what the handshake says."""
    world = World(WorldConfig(), ControlConfig())
    if rank == 1:
        copy = folder / "esper"
        shutil.copytree(Path(esper.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / changed).open("a") as file:
            file.write("# stale\n")
        handshake.package_folder = lambda: copy
    try:
        shake_hands(world, {"code": code_digest()})
    except LockstepError as error:
        return str(error)
    finally:
        world.close()
    return "agreed"


@pytest.mark.parametrize("changed", ["accord/gates.py", "worker.py", "leyline/events/run.py"])
def test_ranks_with_unequal_code_are_refused_wherever_the_difference_is(tmp_path, changed):
    texts = run_distributed(shake_with_other_code, 2, tmp_path, changed)
    assert texts[0] == texts[1]
    assert re.search(r"code: rank 0 has \w+, rank 1 has \w+", texts[0]), texts[0]


def test_the_machine_is_described_by_what_births_and_sums_depend_on():
    fields = machine_fields(torch.device("cpu"))
    assert fields == {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "device": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }

"""Snapshots in memory that ranks share: the same tensors as copies of one's own, counted once, never left behind."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from esper.accord.state import RunState
from esper.leyline.errors import LockstepError
from esper.tolaria.checkpoint.hostcopy import HostCopy
from esper.tolaria.checkpoint.ring import Ring
from esper.tolaria.checkpoint.shared import SharedCopy, share_places
from esper.tolaria.ranks.config import ControlConfig, Device, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support import commands
from tests.support.bitwise import bits
from tests.support.dist import DEVICES, ROOT, run_distributed

MIB = 1 << 20


def pair() -> tuple[SharedCopy, SharedCopy]:
    """The same place for whoever writes it and for another."""
    file = os.memfd_create("place")
    other = os.open(f"/proc/self/fd/{file}", os.O_RDWR)
    return SharedCopy(file, writes=True), SharedCopy(other, writes=False)


def payload(scale: float = 1.0) -> dict[str, Any]:
    tied = torch.arange(6.0).view(2, 3) * scale
    return {
        "weights": {"a": tied, "b": tied, "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        "more": [torch.randn(7).bfloat16(), torch.tensor([True, False]), torch.tensor(3), (torch.empty(0, 4),)],
        "turned": torch.randn(5, 3).t(),
        "rows": torch.randn(1, 4).expand(3, 4),
        "plain": {"step": 5, "name": "run"},
    }


def test_another_process_s_tensors_are_those_that_were_copied() -> None:
    writes, reads = pair()
    for scale in (1.0, 2.0):
        given = payload(scale)
        mine, theirs = writes.take(given), reads.take({**payload(), "rows": given["rows"]})
        for found in (writes.read(mine), reads.read(theirs), HostCopy().take(given)):
            assert found["plain"] == given["plain"]
            leaves, wanted = tree_leaves(found), tree_leaves(given)
            assert len(leaves) == len(wanted)
            for leaf, value in zip(leaves, wanted, strict=True):
                if isinstance(value, Tensor):
                    assert bits(leaf, value) or not value.numel()
                    assert leaf.is_contiguous(memory_format=torch.channels_last) or leaf.ndim != 4
            assert found["weights"]["a"].data_ptr() == found["weights"]["b"].data_ptr()
            assert found["weights"]["a"].data_ptr() % 64 == 0


def test_a_model_that_has_grown_has_more_room_and_one_that_shrank_keeps_it() -> None:
    writes, reads = pair()
    for size in (10, 10_000, 100):
        value = torch.randn(size)
        mine, theirs = writes.take([value]), reads.take([torch.zeros(size)])
        assert bits(writes.read(mine)[0], value)
        assert bits(reads.read(theirs)[0], value)


def test_who_only_reads_can_change_nothing() -> None:
    writes, reads = pair()
    value = torch.ones(9)
    mine, theirs = writes.take([value]), reads.take([value])
    reads.read(theirs)[0].fill_(7.0)
    assert bits(writes.read(mine)[0], value)
    assert bits(reads.read(theirs)[0], value)


@pytest.mark.parametrize("other", [[torch.zeros(3), torch.zeros(4)], [torch.zeros(4, dtype=torch.int32)], []])
def test_what_this_rank_has_not_noted_is_not_gone_back_to(other: list[Tensor]) -> None:
    writes, reads = pair()
    writes.take([torch.zeros(4)])
    noted = reads.take(other)
    with pytest.raises(LockstepError, match="not the one that this rank took"):
        reads.read(noted)


def test_one_that_was_written_over_is_not_gone_back_to() -> None:
    writes, reads = pair()
    noted = reads.take([torch.zeros(4)])
    for _ in range(2):
        writes.take([torch.zeros(4)])
    with pytest.raises(LockstepError, match="not the one that this rank took"):
        reads.read(noted)


# ranks ---------------------------------------------------------------------------------------------------------------


def held() -> dict[str, int]:
    """Bytes of this process: its own, and shared memory that it has mapped or written."""
    rows = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {row[0]: 1024 * int(row[1]) for row in rows if row[0] in ("RssAnon:", "RssShmem:")}


def take_and_go_back(rank: int, alone: bool, device: str) -> dict[str, Any]:
    if alone:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    world = World(WorldConfig(nproc_per_node=1, device=Device(device)), ControlConfig())
    weight = torch.ones(4 * MIB, device=world.device)  # 16 MiB
    torch.randn(10)
    world.meet("start")
    before, ring = held(), Ring(3, share_places(world, 3))
    went: list[float] = []
    for tick in range(1, 9):
        weight.fill_(tick)
        own = {"rng": torch.full((4,), float(rank))}
        ring.take(RunState(tick=tick), {"model": {"w": weight}, "controller": {"rank": rank}}, own)
        world.meet("tick")
        ring.confirm(tick)
        world.meet("tick")
        if tick == 6 or tick == 8:
            found = ring.newest(1 if tick == 8 else 2)
            assert found is not None
            assert found.own is not None
            weights, mine = found.common["model"]["w"], found.own["rng"]
            assert weights.min() == weights.max()
            went += [float(weights[0]), found.common["controller"]["rank"], float(mine[0])]
            del found, weights
            ring.forget_after(tick - 2)
        world.meet("tick")
    spent = {name: now - before[name] for name, now in held().items()}
    world.close()
    return {"went": went, "spent": spent, "bytes": (ring.bytes, ring.own_bytes), "shares": ring.shares}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_go_back_to_one_copy_that_lies_in_memory_once(ranks: int, device: str) -> None:
    results = run_distributed(take_and_go_back, ranks, False, device, device=device)
    for rank, found in enumerate(results):
        assert found["went"] == [4.0, rank, float(rank), 7.0, rank, float(rank)]
        assert found["shares"]
        assert found["bytes"] == (16 * MIB + 16, 16)
    if device == "cpu":
        spent = [(found["spent"]["RssAnon:"], found["spent"]["RssShmem:"]) for found in results]
        assert all(own < 4 * MIB for own, _ in spent), spent
        assert 48 * MIB <= spent[0][1] < 52 * MIB
        assert all(common < 4 * MIB for _, common in spent[1:]), spent


def test_without_shared_memory_each_rank_has_its_own() -> None:
    for rank, found in enumerate(run_distributed(take_and_go_back, 2, True, "cpu")):
        assert found["went"] == [4.0, rank, float(rank), 7.0, rank, float(rank)]
        assert not found["shares"]
        assert found["spent"]["RssAnon:"] >= 48 * MIB


def go_without(rank: int, lack: str) -> dict[str, Any]:
    if lack == "memfd_create":
        del os.memfd_create
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, resource.RLIM_INFINITY))
    return take_and_go_back(rank, False, "cpu")


@pytest.mark.parametrize("lack", ["memfd_create", pytest.param("room in a file", marks=pytest.mark.slow)])
def test_where_there_can_be_no_such_file_each_rank_has_its_own(lack: str) -> None:
    for rank, found in enumerate(run_distributed(go_without, 2, lack)):
        assert found["went"] == [4.0, rank, float(rank), 7.0, rank, float(rank)]
        assert not found["shares"]


OFFER = """
import os, sys, time, torch
from esper.tolaria.checkpoint.shared import SharedCopy
file = os.memfd_create("esper-left-behind")
place = SharedCopy(file, writes=True)
place.take([torch.ones(1 << 20)])
print(os.getpid(), file, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_all_are_killed(tmp_path: Path) -> None:
    """A file in memory without a name goes with the last process that has it open."""

    def ours() -> set[Path]:
        shared = Path("/dev/shm").glob("*esper*")  # others may make and remove theirs meanwhile
        return {*shared, *tmp_path.iterdir()}

    before = ours()
    environment = commands.environment(ROOT) | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", OFFER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as rank:
        assert rank.stdout is not None
        process, file = rank.stdout.readline().split()
        other = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        rank.send_signal(signal.SIGKILL)
    assert os.fstat(other).st_nlink == 0
    assert os.fstat(other).st_size > 4 * MIB, "whoever has it open may still read"
    os.close(other)
    assert ours() == before

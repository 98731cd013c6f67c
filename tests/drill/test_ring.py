"""The model of an all-reduce over many ranks: writes as the kernel counts them, and formula beside simulation."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from esper.drill.crowd import Crowd, run_crowd
from esper.drill.ring import Link, messages_sent, ring_seconds, ring_simulated, writes
from esper.drill.scale import Cluster, Job, commit_bytes, costs, observe_bytes
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.sockets import connections
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed

SIZES, TIMES = (40, 3336, 3 << 20), 20  # bytes: fewer numbers than segments, a tick's, more than one piece a rank


def system_writes() -> int:
    """Write calls of this process and its threads so far."""
    threads = Path("/proc/self/task").iterdir()
    lines = [line for thread in threads for line in (thread / "io").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("syscw"))


def count_writes(rank: int) -> tuple[list[float], int]:
    before = len(connections())
    world = World(WorldConfig(), ControlConfig())
    opened, counted = len(connections()) - before, []
    for size in SIZES:
        vector = torch.ones(size // 8, dtype=torch.float64) * (rank + 1)
        world.all_reduce(vector.clone(), dist.ReduceOp.SUM, what="first")
        began = system_writes()
        for _ in range(TIMES):
            world.all_reduce(vector.clone(), dist.ReduceOp.SUM, what="counted")
        counted.append((system_writes() - began) / TIMES)
    world.close()
    return counted, opened


def test_gloo_writes_what_the_model_says() -> None:
    ranks = 4
    found = run_distributed(count_writes, ranks)
    for rank, (counted, opened) in enumerate(found):
        assert counted == [writes(ranks, rank, size) for size in SIZES]
        store = 1
        assert opened == 3 * (ranks - 1) + store, "a mesh for each of three groups"
    assert len({tuple(counted) for counted, _ in found}) > 1, "short vectors burden ranks unequally"


def test_a_short_vector_costs_as_many_places_as_there_are_ranks() -> None:
    still = Link(latency_s=1.0, cpu_s=0.0, bytes_per_s=1e30)
    assert ring_simulated(2, 32, still) == pytest.approx(4.0), "the word that it waits, then the segment, in each phase"
    for ranks in (64, 256):
        assert 2 * (ranks - 1) <= ring_simulated(ranks, 8, still) <= 2 * (ranks - 1) + 2
    assert messages_sent(1024, 0, 8) == 1
    assert sum(messages_sent(64, rank, 8 * 128) for rank in range(64)) == 64 * 2 * 126


@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_formula_is_within_a_quarter_of_the_messages(ranks: int, spread: float) -> None:
    for latency, cpu in ((20e-6, 20e-6), (5e-6, 10e-6), (50e-6, 5e-6)):
        link = Link(latency_s=latency, cpu_s=cpu, bytes_per_s=2.5e9, spread=spread)
        for size in (observe_bytes(12), commit_bytes(12, ranks)):
            assert ring_simulated(ranks, size, link) == pytest.approx(ring_seconds(ranks, size, link), rel=0.25)


def test_the_bytes_are_those_of_the_protocol() -> None:
    told = run_crowd(Crowd(ranks=5, slots=3, ticks=2))
    assert told.bytes_per_tick == observe_bytes(3) + commit_bytes(3, 5)


def test_costs_follow_from_bytes_and_bandwidths() -> None:
    job, cluster = Job(parameters=1e9, step_s=1.0, seed_parameters=1e6), Cluster(machines=4)
    told = costs(job, cluster)
    assert told.state_bytes == 12e9
    assert told.resume_s == pytest.approx(4 * 12e9 / 20e9 + 12e9 / 1e9), "each machine reads, each rank hashes"
    assert told.seed_step_s == pytest.approx(2 * 31 / 32 * 4e6 / 40e9)
    assert told.share == pytest.approx(told.tick_s / (told.tick_s + 50))
    assert told.open_files == 2 * 31

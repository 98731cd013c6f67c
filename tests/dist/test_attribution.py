"""Attribution sharded over real ranks: counts exact, sums and errors those of one process and of plain loops."""

import math
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.attribution.coalitions import make_plan
from esper.kasmina.attribution.worth import Sums, readings
from esper.tolaria.data.sampler import bounds
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed
from tests.support.grown_hosts import attribute, batches_for, classify, grown_for

CASES: dict[str, dict[str, float]] = {
    "cnn": {"r0c0": 1.0, "r0c1": 0.5, "r2c0": 1.0},
    "gpt": {"r0c1": 1.0, "r1c0": 0.5, "r2c0": 1.0},
    "BC": {"r0c0": 1.0, "r1c0": 0.5, "r3c0": 0.75},  # a model of the user's own: nothing to resume from
}
SAMPLES = 17  # not divisible by 2 or 3; shares are cut into ragged batches below


def samples(kind: str) -> tuple[tuple[Tensor, ...], Tensor]:
    inputs, target = batches_for(kind, (SAMPLES,))[0]
    return inputs if isinstance(inputs, tuple) else (inputs,), target


def share(kind: str, rank: int, size: int) -> list[tuple[Any, Tensor]]:
    """This rank's samples in batches of 4, the last one smaller."""
    inputs, target = samples(kind)
    first, last = bounds(SAMPLES, rank, size)
    cuts = [(at, min(at + 4, last)) for at in range(first, last, 4)]
    return [(tuple(x[a:b] for x in inputs), target[a:b]) for a, b in cuts]


def measured(rank: int, kind: str, pairs: int) -> tuple[Sums, Sums, int]:
    """This rank's own sums, the agreed ones, and the batches it ran."""
    world = World(WorldConfig(), ControlConfig())
    grown = grown_for(kind, CASES[kind])
    plan = make_plan(CASES[kind], pairs=pairs, key=(3,))
    mine = share(kind, rank, world.size)
    own = attribute(grown, plan, mine, classify)
    total = torch.tensor(own.vector(), dtype=torch.float64)
    world.all_reduce(total, dist.ReduceOp.SUM, what="attribution", on="control")
    world.close()
    return own, own.taking(total.tolist()), len(mine)


def by_hand(kind: str) -> dict[str, tuple[float, float, float]]:
    """Per slot: leave-one-out in loss and in accuracy over all samples, standard error of the first. Plain loops."""
    grown = grown_for(kind, CASES[kind])
    inputs, target = samples(kind)
    grown.model.eval()

    def values(off: dict[str, float]) -> list[tuple[float, float]]:
        found = []
        for i in range(SAMPLES):
            with torch.no_grad(), grown.override(CASES[kind] | off):
                logits = grown.model(*(x[i : i + 1] for x in inputs))[0]
            loss = F.cross_entropy(logits, target[i], reduction="none").reshape(-1)
            hits = (logits.argmax(-1) == target[i]).double().reshape(-1)
            found.append((loss.mean().item(), hits.mean().item()))
        return found

    everyone, worth = values({}), {}
    for slot in CASES[kind]:
        without = values({slot: 0.0})
        saved = [b[0] - a[0] for a, b in zip(everyone, without)]
        hits = statistics.fmean(a[1] - b[1] for a, b in zip(everyone, without))
        worth[slot] = (statistics.fmean(saved), hits, statistics.stdev(saved) / math.sqrt(SAMPLES))
    return worth


@pytest.mark.parametrize(("kind", "size", "pairs"), [("cnn", 3, 0), ("gpt", 2, 2), ("gpt", 3, 0), ("BC", 2, 0)])
def test_ragged_shards_add_up_to_one_process_and_to_plain_loops(kind, size, pairs):
    found = run_distributed(measured, size, kind, pairs)
    plan = make_plan(CASES[kind], pairs=pairs, key=(3,))
    alone = attribute(grown_for(kind, CASES[kind]), plan, share(kind, 0, 1), classify)
    agreed = found[0][1]
    assert all(total == agreed for _, total, _ in found)
    assert sum(own.samples for own, _, _ in found) == SAMPLES
    assert len({own.samples for own, _, _ in found}) == 2, "ragged"
    assert agreed.samples == alone.samples == SAMPLES
    assert agreed.forwards == sum(batches for _, _, batches in found) * len(plan.coalitions)
    assert agreed.work() == alone.work() == sum((own.work() for own, _, _ in found[1:]), found[0][0].work())
    assert (agreed.order is None) == (kind == "BC")
    assert agreed.vector()[2:] == pytest.approx(alone.vector()[2:], abs=1e-12)
    worth, one = (readings(sums, tick=1, min_samples=2) for sums in (agreed, alone))
    for slot in CASES[kind]:
        for shared, whole in ((worth.shapley[slot], one.shapley[slot]), (worth.solo[slot], one.solo[slot])):
            for unit in ("loss", "accuracy"):
                got, wanted = getattr(shared, unit), getattr(whole, unit)
                assert (got.n, got.value) == (SAMPLES, pytest.approx(wanted.value, abs=1e-12))
                assert got.se == pytest.approx(wanted.se, abs=1e-12)
    for slot, (loss, hits, se) in by_hand(kind).items():
        assert worth.leave_one_out[slot].loss.value == pytest.approx(loss, abs=1e-12)
        assert worth.leave_one_out[slot].accuracy.value == pytest.approx(hits, abs=1e-12)
        assert worth.leave_one_out[slot].loss.se == pytest.approx(se, rel=1e-9)
        assert worth.leave_one_out[slot].loss.n == SAMPLES

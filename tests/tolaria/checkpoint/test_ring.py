"""Snapshots in memory: which one is gone back to, what becomes of the buffers, that a snapshot stands for itself."""

import os
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.accord.state import RunState
from esper.tolaria.checkpoint.hostcopy import HostCopy
from esper.tolaria.checkpoint.ring import Ring
from esper.tolaria.checkpoint.shared import SharedCopy


class Life:
    """A weight that is the tick's number, a controller's list of ticks, and a ring of them."""

    def __init__(self, size: int = 3) -> None:
        self.ring, self.weight, self.decided, self.tick = Ring(size), torch.zeros(4), [0], 0

    def go(self, tick: int) -> None:
        self.tick = tick
        self.weight.fill_(tick)
        self.decided.append(tick)

    def take(self) -> None:
        state = RunState(tick=self.tick, step=2 * self.tick)
        common: dict[str, Any] = {"model": {"w": self.weight}, "controller": {"decided": self.decided}}
        self.ring.take(state, common, {"rng_cpu": self.weight + 0.5})

    def newest(self, back: int = 1, **options: int) -> tuple[int, float, float, list[int]] | None:
        found = self.ring.newest(back, **options)
        if found is None:
            return None
        weight: Tensor = found.common["model"]["w"]
        assert found.own is not None
        return found.state.tick, float(weight[0]), float(found.own["rng_cpu"][0]), found.common["controller"]["decided"]


def lived(ticks: int = 8, every: int = 2, size: int = 3) -> Life:
    life = Life(size)
    for tick in range(1, ticks + 1):
        life.go(tick)
        life.ring.confirm(tick)
        if tick % every == 0:
            life.take()
    return life


def test_the_newest_that_a_later_healthy_tick_has_confirmed() -> None:
    life = lived()
    assert life.newest() == (6, 6.0, 6.5, list(range(7)))
    life.ring.confirm(8)
    assert life.newest() is not None
    assert life.newest()[0] == 6, "a tick does not confirm itself"
    life.ring.confirm(9)
    assert [life.newest(back)[0] for back in (1, 2, 3, 9)] == [8, 6, 4, 4], "the oldest if there are fewer"
    assert life.newest(9, from_step=10)[0] == 6
    assert life.newest(1, from_step=17) is None
    assert Ring(2).newest(1) is None


def test_it_stands_for_itself_and_may_be_gone_back_to_again() -> None:
    life = lived()
    found = life.ring.newest(1)
    assert found is not None
    found.common["controller"]["decided"].append(99)
    life.go(50)
    assert life.newest() == (6, 6.0, 6.5, list(range(7)))


def test_what_came_after_a_generation_is_forgotten_though_it_would_be_confirmed_later() -> None:
    life = lived()
    life.ring.forget_after(12)
    life.ring.confirm(9)
    assert [life.newest(back)[0] for back in (1, 2)] == [6, 4]
    life.go(8)
    life.take()
    life.ring.confirm(9)
    assert [life.newest(back)[0] for back in (1, 2, 3)] == [8, 6, 4]
    assert len(life.ring) == 3


@given(st.integers(2, 4), st.lists(st.sampled_from(["take", "forget"]), min_size=8, max_size=30))
def test_buffers_are_written_over_and_never_more_than_there_are_places(size: int, deeds: list[str]) -> None:
    life, known = Life(size), set()
    for tick, deed in enumerate(deeds, start=1):
        life.go(tick)
        life.ring.confirm(tick)
        if deed == "take":
            life.take()
        else:
            life.ring.forget_after(2 * tick - 4)
        assert len(life.ring) <= size
        known |= {h.generation.common["model"]["w"].data_ptr() for h in life.ring._held}
        cleared = [h.generation.state.tick for h in life.ring._held if h.generation.cleared]
        assert [h.generation.state.tick for h in life.ring._held] == sorted(
            h.generation.state.tick for h in life.ring._held
        )
        assert (life.newest() or (None,))[0] == (cleared[-1] if cleared else None)
        for held in life.ring._held:
            assert float(held.generation.common["model"]["w"][0]) == held.generation.state.tick
    assert len(known) <= size


def test_what_each_rank_fills_by_itself_is_no_part_of_what_is_shared() -> None:
    """Two ranks of a machine: the weight is rank 0's for both, the queue is each one's own."""
    file = os.memfd_create("esper-test")
    places = [
        [SharedCopy(os.dup(file), writes=True), HostCopy()],
        [SharedCopy(os.dup(file), writes=False), HostCopy()],
    ]
    os.close(file)
    rings = [Ring(2, shared) for shared in places]
    for rank, ring in enumerate(rings):
        model = {"w": torch.full((4,), 7.0 + rank), "queue": torch.full((2 + rank,), float(rank))}
        ring.take(RunState(tick=1), {"model": model, "controller": {}}, {}, apart={"queue"})
        ring.confirm(2)
    for rank, ring in enumerate(rings):
        found = ring.newest(1)
        assert found is not None
        assert found.common["model"]["w"].tolist() == [7.0] * 4
        assert found.common["model"]["queue"].tolist() == [float(rank)] * (2 + rank)

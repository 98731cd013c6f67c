"""No net changes another's numbers: which ones run beside it, and what is broken in them, is all the same to it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.blueprints import registry
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Op
from esper.leyline.topology import Topology
from esper.simic.batched import BatchedTrials
from tests.support.many_hosts import trials_of, weights_of
from tests.support.tiny import tiny_config

BORN = [Command(slot="r0c0", op=Op.GERMINATE, blueprint="norm", ticks=1)]
ON = [Command(slot="r0c0", op=Op.ADVANCE)]


def life(places: int, commands: dict[int, list[Command]], poisoned: tuple[int, int] | None = None) -> list[Any]:
    """States and weights of the first net after each of six ticks; beside it others that have the same commands.

    Args:
        places: nets.
        commands: by tick.
        poisoned: net whose every weight becomes NaN, and at which tick.
    """
    configs = [
        tiny_config("cnn", seed=9 + place, trainer__precision="fp64", slots__incubation="immediate")
        for place in range(places)
    ]
    trials, seen = trials_of(configs), []
    for tick in range(1, 7):
        first = trials.nets[0]
        assert first is not None
        seen.append((first.state, copies_of(trials, 0)))
        if poisoned is not None and poisoned[1] == tick:
            weights = weights_of(trials, poisoned[0])
            for key in weights.named(poisoned[0]):
                block = weights.blocks[key]
                block.theta[block.nets.index(poisoned[0])].fill_(math.nan)
        trials.advance([commands.get(tick, []) for _ in configs])
    return seen


def copies_of(trials: BatchedTrials[Any], place: int) -> dict[str, Tensor]:
    """Copies of a net's weights."""
    named = weights_of(trials, place).named(place)
    return {f"{key} {name}": t.clone() for key, tensors in named.items() for name, t in tensors.items()}


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two lives are equal, bit for bit."""
    return all(
        a[0] == b[0] and set(a[1]) == set(b[1]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])
        for a, b in zip(one, other, strict=True)
    )


def test_alone_and_beside_fifteen() -> None:
    commands = {1: BORN, 2: [], 3: ON}
    assert same(life(1, commands), life(16, commands))


@pytest.mark.parametrize("tick", [1, 4])
def test_a_broken_neighbour(tick: int) -> None:
    commands = {1: BORN, 3: ON}
    assert same(life(1, commands), life(3, commands, poisoned=(1, tick)))


def test_a_dead_seed_is_not_computed() -> None:
    """A seed in GERMINATED that is full of NaN leaves its own host alone too."""
    config = tiny_config("cnn", trainer__precision="fp64", slots__incubation="immediate")
    hosts = []
    for broken in (False, True):
        trials = trials_of([config])
        for tick in range(1, 5):
            trials.advance([BORN if tick == 1 else []])
            weights = weights_of(trials, 0)
            if broken and weights.has(("r0c0", "norm"), 0):
                weights.blocks["r0c0", "norm"].theta.fill_(math.nan)
        assert weights.has(("r0c0", "norm"), 0)
        hosts.append({name: t for name, t in copies_of(trials, 0).items() if "'host'" in name})
    assert all(torch.equal(hosts[0][name], hosts[1][name]) for name in hosts[0])
    assert hosts[0]


def test_a_planted_seed_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("cnn", slots__planted={"r0c0": "norm"}, slots__incubation="immediate")
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    entry = registry.get(Topology.FEATURE_MAP, "norm")

    def build(dim: int, **arguments: Any) -> nn.Module:
        if torch.get_default_device().type != "meta":  # where it is only counted what it costs
            raise RuntimeError("there is no such kernel")
        return entry.factory(dim, **arguments)

    broken: Any = build
    monkeypatch.setitem(registry._REGISTRY, (Topology.FEATURE_MAP, "norm"), replace(entry, factory=broken))
    with pytest.raises(ConfigError, match=r"^slots\.planted\.r0c0: norm cannot be built \(BUILD_FAILED\)$"):
        trials_of([config])

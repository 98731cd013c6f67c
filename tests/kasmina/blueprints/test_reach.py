"""What a blueprint says of the positions it mixes is what it does, the statistics of its norm left out."""

import pytest
import torch
from torch import nn

from esper.kasmina.axes.positions import FREE, Mixing
from esper.kasmina.blueprints import blueprint, get, names
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Reach, Topology

DIM, SIDE, MIDDLE = 8, 9, 4
EVERY = [(topology, name) for topology in Topology for name in names(topology)]
NORMS = (nn.GroupNorm, nn.LayerNorm)


def without_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, NORMS):
            setattr(module, name, nn.Identity())
        else:
            without_norms(child)
    return module


@pytest.mark.parametrize(("topology", "name"), EVERY)
def test_reach_is_what_a_changed_position_changes(topology: Topology, name: str) -> None:
    torch.manual_seed(0)
    seed = without_norms(get(topology, name).build(DIM)).eval()
    shape = [2 if axis == "B" else DIM if axis == "C" else SIDE for axis in topology.value]
    x = torch.randn(shape)
    varied = x.clone()
    places = [axis for axis, letter in enumerate(topology.value) if letter not in "BC"]
    where = tuple(MIDDLE if axis in places else slice(None) for axis in range(x.ndim))
    varied[where] += 3.0
    told = (FREE,) if isinstance(seed, Mixing) else ()
    changed = (seed(x, *told) - seed(varied, *told)).abs().amax([a for a in range(x.ndim) if a not in places]) > 1e-6
    others = changed.clone()
    if places:
        others[(MIDDLE,) * len(places)] = False
    count, reach = int(others.sum()), get(topology, name).info(DIM, SIDE ** len(places)).reach
    near = 5 ** len(places) - 1  # two convolutions of 3 in a row
    assert reach is {True: Reach.POINT, False: Reach.NEAR if count <= near else Reach.ALL}[count == 0 or not places]


def test_a_contradiction_is_refused() -> None:
    def make(declared: Reach) -> None:
        @blueprint(
            "two_faced",
            topology=Topology.SEQUENCE,
            parameters=lambda dim: 0,
            flops=lambda dim, positions: 0,
            reach=declared,
        )
        class Alone(nn.Module):
            def __init__(self, dim: int) -> None:
                super().__init__()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 0.0

    with pytest.raises(ConfigError, match="reach = ALL, but it sees one position at a time"):
        make(Reach.ALL)
    assert "two_faced" not in names(Topology.SEQUENCE)

"""Seeds that add nothing: found before they are born, and exactly those that export folds into a layer that learns."""

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.parts import LayerScale
from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.export.exporter import export
from esper.kasmina.export.record import Way
from esper.kasmina.foldable import _has_offset, find_foldable
from esper.kasmina.slots.grown import Grown
from esper.leyline.topology import Topology
from tests.support.working_seeds import born, set_to_work

LOW_RANK = {Topology.VECTOR: {"lora"}, Topology.SEQUENCE: {"lora", "lora_large"}}


class Stream(nn.Module):
    """A residual stream whose two branches end in a Linear; the second one's lies in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.branch = nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.GELU()), nn.Sequential(nn.Linear(12, 8)))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.out(h + self.branch(h))


def grown_at(sites: dict[str, str], host: nn.Module | None = None, shape: tuple[int, ...] = (4, 6)) -> Grown:
    torch.manual_seed(2)
    x = torch.randn(shape)
    return esper.attach(host or Stream(), sites, x, layout="BC" if x.ndim == 2 else "BTC")


@pytest.mark.parametrize(
    ("shape", "site", "layer"),
    [((4, 6), "branch", "branch.1.0"), ((4, 6), "branch.0", None), ((4, 5, 6), "first", "first")],
)
def test_what_is_found_is_what_export_folds(shape: tuple[int, ...], site: str, layer: str | None) -> None:
    topology = Topology.VECTOR if len(shape) == 2 else Topology.SEQUENCE
    found = find_foldable(grown_at({"r0c0": site}, shape=shape))
    assert found == ({} if layer is None else {"r0c0": dict.fromkeys(sorted(LOW_RANK[topology]), layer)})
    for name in registry.names(topology):
        if layer is not None or name == "lora":
            grown = grown_at({"r0c0": site}, shape=shape)
            set_to_work(grown, "r0c0", born(grown, "r0c0", name), 1.0)
            folded = export(grown).slots[0].way is Way.FOLDED
            assert folded == (name in found.get("r0c0", {})), name


def test_behind_what_does_not_learn_a_low_rank_seed_adds_something() -> None:
    grown = grown_at({"r0c0": "first", "r1c0": "out"})
    both = {"r0c0": {"lora": "first"}, "r1c0": {"lora": "out"}}
    assert find_foldable(grown) == both
    grown.model.first.weight.requires_grad_(False)
    assert find_foldable(grown) == {"r1c0": {"lora": "out"}}
    grown.model.first.weight.requires_grad_(True)
    grown.model.out.bias.requires_grad_(False)  # h + A h needs a bias of (I + A) b
    assert find_foldable(grown) == {"r0c0": {"lora": "first"}}
    grown.model.out.bias.requires_grad_(True)
    assert find_foldable(grown) == both, "by what learns now"


def test_a_layer_that_cannot_take_it_is_none() -> None:
    tied = Stream()
    tied.again = nn.Linear(6, 8)
    tied.again.weight = tied.first.weight
    assert find_foldable(grown_at({"r0c0": "first"}, tied)) == {}
    watched = Stream()
    watched.first.register_forward_hook(lambda module, args, output: None)
    found = {"r0c0": {"lora": "first"}}
    assert find_foldable(grown_at({"r0c0": "first"}, watched)) == found, "a hook may be one rank's alone, as a logger's"
    normed = Stream()
    nn.utils.parametrizations.weight_norm(normed.first)
    assert find_foldable(grown_at({"r0c0": "first"}, normed)) == {}
    within = grown_at({"r0c0": "branch", "r0c1": "branch.1"})  # a seed at the inner site comes between
    assert find_foldable(within) == {"r0c1": {"lora": "branch.1.0"}}


def test_an_offset_needs_a_bias_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @blueprint("shift", topology=Topology.VECTOR, parameters=lambda dim: 2 * dim, flops=lambda dim, positions: 0)
    class Shift(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.by, self.scale = nn.Parameter(torch.zeros(dim)), LayerScale(dim, Topology.VECTOR)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x + self.by)

    for bias in (True, False):
        host = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.ReLU())
        (found,) = find_foldable(grown_at({"r0c0": "0"}, host)).values()
        assert set(found) == ({"lora", "shift"} if bias else {"lora"})


def test_no_random_number_is_drawn() -> None:
    _has_offset.cache_clear()
    grown = grown_at({"r0c0": "first"})
    before = torch.get_rng_state()
    find_foldable(grown)
    assert torch.equal(before, torch.get_rng_state())

"""What is linear becomes part of the weights beside it: against closed forms, and only where it may."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from esper.kasmina.attach import attach
from esper.kasmina.export.exporter import export
from esper.kasmina.export.folding import affine_map, fold_scale
from esper.kasmina.export.record import Way
from esper.kasmina.export.tracing import as_graph
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.topology import Topology
from tests.support.working_seeds import born, set_to_work


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


X = normal(5, 4)


def grown_at(host: nn.Module, sites: dict[str, str], x: Tensor = X, layout: str | None = None) -> Grown:
    torch.manual_seed(1)
    for parameter in host.parameters():
        nn.init.normal_(parameter)
    return attach(host.double(), sites, x, layout=layout)


def low_rank(grown: Grown, slot: str) -> tuple[nn.Module, Tensor]:
    """A LoRA seed, and its map as a matrix."""
    seed = born(grown, slot, "lora", torch.float64)
    return seed, seed.scale.gamma[:, None] * (seed.up.weight @ seed.down.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", [Operator.ADD, Operator.CHANNEL])
def test_a_lora_at_a_linear_layer_goes_into_its_weights(bias, operator):
    host = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU())
    grown = grown_at(host, {"r0c0": "0"})
    seed, matrix = low_rank(grown, "r0c0")
    set_to_work(grown, "r0c0", seed, 0.5, operator)
    v = torch.arange(6) / 6 if operator is Operator.CHANNEL else torch.ones(6)
    exported = export(grown, partial=True)
    (slot,) = exported.slots
    assert (slot.way, slot.where) == (Way.FOLDED, "0")
    assert list(exported.module.state_dict()) == (["0.weight", "0.bias"] if bias else ["0.weight"])
    assert [type(part) for part in exported.module] == [nn.Linear, nn.ReLU]
    assert not exported.module[0]._forward_hooks
    total = torch.eye(6) + 0.5 * v[:, None] * matrix
    assert torch.allclose(exported.module[0].weight, total @ host[0].weight, atol=1e-7)
    if bias:
        assert torch.allclose(exported.module[0].bias, total @ host[0].bias, atol=1e-7)
    assert torch.allclose(exported.module(X), grown.model.eval()(X), atol=1e-12)
    assert {key: now for key, now in exported.keys.items() if now is None} == {
        f"esper_slots.r0c0.seed.{name}": None for name in seed.state_dict()
    }


def test_a_site_that_ends_in_a_linear_layer_counts_and_two_slots_fold_in_the_order_they_run():
    host = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 6)), nn.ReLU())
    grown = grown_at(host, {"r0c0": "0", "r1c0": "0.1"})  # the inner one runs first
    first, inner = low_rank(grown, "r1c0")
    second, outer = low_rank(grown, "r0c0")
    set_to_work(grown, "r1c0", first)
    set_to_work(grown, "r0c0", second)
    exported = export(grown)
    assert [slot.where for slot in exported.slots] == ["0.1", "0.1"]
    total = (torch.eye(6) + outer) @ (torch.eye(6) + inner)
    assert torch.allclose(exported.module[0][1].weight, total @ host[0][1].weight, atol=1e-12)


def test_behind_a_seed_that_stays_nothing_is_folded():
    host = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 6)), nn.ReLU())
    grown = grown_at(host, {"r0c0": "0", "r1c0": "0.1"})
    set_to_work(grown, "r1c0", born(grown, "r1c0", "mlp", torch.float64))
    set_to_work(grown, "r0c0", low_rank(grown, "r0c0")[0])
    assert [slot.way for slot in export(grown).slots] == [Way.MODULE, Way.MODULE]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def hooked() -> nn.Module:
    host = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    host[0].register_forward_hook(lambda module, args, output: output * 2)
    return host


def reparametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())


@pytest.mark.parametrize(("build", "site"), [(Tied, "one"), (hooked, "0"), (reparametrised, "0")])
def test_weights_that_serve_elsewhere_are_left_alone(build, site):
    grown = grown_at(build(), {"r0c0": site})
    set_to_work(grown, "r0c0", low_rank(grown, "r0c0")[0])
    exported = export(grown)
    assert [slot.way for slot in exported.slots] == [Way.MODULE]
    assert torch.allclose(exported.module(X), grown.model.eval()(X), atol=1e-12)


def test_an_offset_needs_a_bias_to_go_to():
    grown = grown_at(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU()), {"r0c0": "0"})
    set_to_work(grown, "r0c0", nn.Linear(4, 4).double())
    assert [slot.way for slot in export(grown).slots] == [Way.MODULE]
    wide = grown_at(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"r0c0": "0"})
    set_to_work(wide, "r0c0", nn.Linear(4, 4).double(), 0.5)
    assert [slot.way for slot in export(wide, partial=True).slots] == [Way.FOLDED]


@pytest.mark.parametrize(
    ("blueprint", "layer"),
    [("conv_light", "conv"), ("conv_heavy", "second"), ("bottleneck", "up"), ("norm", "norm"), ("attention", None)],
)
def test_the_last_scale_of_a_seed_and_alpha_go_into_the_layer_before(blueprint, layer):
    x = normal(2, 8, 5, 5)
    grown = grown_at(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), {"r0c0": "0"}, x)
    seed = born(grown, "r0c0", blueprint, torch.float64)
    for parameter in seed.parameters():
        nn.init.normal_(parameter)
    set_to_work(grown, "r0c0", seed, 0.25)
    exported = export(grown, partial=True)
    assert torch.allclose(exported.module(x), grown.model.eval()(x), atol=1e-11)
    join = exported.module.grown.r0c0
    products = [node for graph in (join, join.seed) for node in graph.graph.nodes if "mul" in str(node.target)]
    if layer is None:  # squeeze-and-excitation multiplies by what it sees
        assert len(products) == 3
        assert "grown.r0c0.seed.scale.gamma" in exported.module.state_dict()
        return
    assert products == []
    assert exported.keys["esper_slots.r0c0.seed.scale.gamma"] is None
    before, after = getattr(seed, layer).weight, getattr(join.seed, layer).weight
    by_channel = 0.25 * seed.scale.gamma.view(-1, *[1] * (before.ndim - 1))
    assert torch.allclose(after, by_channel * before, atol=1e-14)


@pytest.mark.parametrize("topology", list(Topology))
def test_a_noop_is_dropped(topology):
    x = normal(2, *[4] * (topology.ndim - 1))
    grown = grown_at(nn.Sequential(nn.ReLU(), nn.Tanh()), {"r0c0": "0"}, x, topology.value)
    set_to_work(grown, "r0c0", born(grown, "r0c0", "noop"))
    exported = export(grown)
    assert [slot.way for slot in exported.slots] == [Way.LEFT_OUT]
    assert [type(part) for part in exported.module] == [nn.ReLU, nn.Tanh]


class Chain(nn.Module):
    """x -> 2 layers with sums and products by constants between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 3)
        self.shift, self.scale = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.two(self.one(x) + self.shift)


class Bent(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


class Residual(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Squared(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x * x)


def test_an_affine_map_is_read_off_a_chain_and_off_nothing_else():
    torch.manual_seed(0)
    chain, x = Chain().double(), normal(7, 3)
    matrix, offset = affine_map(as_graph(chain, (x,), what="seed"), 3)
    assert torch.allclose(x @ matrix.T + offset, chain(x), atol=1e-12)
    for other in (Bent, Residual, Squared):
        assert affine_map(as_graph(other().double(), (x,), what="seed"), 3) is None
    assert affine_map(nn.ReLU(), 3) is None


class Twice(nn.Module):
    """Its last layer works twice, so that its scale belongs to one of two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gamma = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) * self.gamma


class Reused(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * self.gamma.view(-1) + y


class Transposed(Twice):
    """The factor lies along another axis than the layer's channels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gamma.view(-1, 1)


@pytest.mark.parametrize("seed", [Twice, Reused, Transposed])
def test_a_scale_that_is_not_the_last_layers_own_stays(seed):
    torch.manual_seed(0)
    x = torch.randn(3, 3)
    graph = as_graph(seed(), (x,), what="seed")
    before = copy.deepcopy(graph)
    assert fold_scale(graph, 0.5) is None
    assert isinstance(graph, fx.GraphModule)
    assert graph.code == before.code
    assert torch.equal(graph(x), before(x))

"""FLOPs of hosts and seeds against counts by hand: a multiplication and an addition for each term of each product."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import esper
from esper.accord.account import Costs
from esper.kasmina.blueprints import counting, registry
from esper.kasmina.flops import host_cost, seed_cost
from esper.kasmina.memory import seed_memory
from esper.kasmina.products import FORMULAS
from esper.kasmina.streams import moved, read_streams
from esper.leyline.topology import Topology

BATCH, TIME, DIM = 2, 7, 6
GROUPS = torch.tensor([3, BATCH * TIME], dtype=torch.int32)


class After(nn.Module):
    """A linear layer that holds the slot, then what is counted."""

    def __init__(self, call, *parts) -> None:
        super().__init__()
        self.stem, self.call, self.parts = nn.Linear(DIM, DIM), call, nn.ModuleList(parts)
        self.w = nn.Parameter(torch.randn(DIM, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.call(self, y, *self.parts)
        return y[0] if isinstance(y, tuple) else y


def rows(call):
    """Calls something on each row [DIM] of a feature [BATCH, TIME, DIM] by itself."""
    return lambda m, x, *parts: torch.stack([call(m, row) for row in x.flatten(0, -2)]).unflatten(0, x.shape[:-1])


def cost_of(model, example, site="stem"):
    layout = "BTC" if site == "stem" else None
    return host_cost(esper.attach(model, {"r0c0": site}, example, layout=layout), example)


def lstm(hidden, layers, directions):
    weights = sum(4 * hidden * ((DIM if i == 0 else directions * hidden) + hidden) for i in range(layers))
    return 2 * directions * TIME * weights


N = TIME  # products of one row each
HAND = {  # what is called, its parts; FLOPs of a forward on one sample, of a backward to input and weights
    "lstm": (lambda m, x, p: p(x), [nn.LSTM(DIM, 5, batch_first=True)], lstm(5, 1, 1), 2 * lstm(5, 1, 1)),
    "lstm, two layers, both ways": (
        lambda m, x, p: p(x),
        [nn.LSTM(DIM, 5, 2, batch_first=True, bidirectional=True)],
        lstm(5, 2, 2),
        2 * lstm(5, 2, 2),
    ),
    "gru": (lambda m, x, p: p(x), [nn.GRU(DIM, 5, batch_first=True)], 2 * N * 15 * 11, 4 * N * 15 * 11 - 2 * 15 * 5),
    "bilinear": (  # three gradients: for each a product of all three factors, in the order that torch takes them
        lambda m, x, p: p(x, x),
        [nn.Bilinear(DIM, DIM, 8)],
        2 * N * 8 * (36 + 6),
        2 * N * ((8 * 36 + 36) + (8 * 6 + 8 * 36) + (8 * 36 + 8 * 6)),
    ),
    "mv": (rows(lambda m, row: torch.mv(m.w.t(), row)), [], N * 2 * DIM * 5, N * 4 * DIM * 5),
    "addmv": (rows(lambda m, row: torch.addmv(row[:5], m.w.t(), row)), [], N * 2 * DIM * 5, N * 4 * DIM * 5),
    "dot": (rows(lambda m, row: torch.dot(row, m.w[:, 0])[None]), [], N * 2 * DIM, 0),  # gradients scale a vector
    "addbmm": (
        lambda m, x: torch.addbmm(torch.zeros(TIME, 5), x, m.w.expand(len(x), -1, -1)).expand(len(x), -1, -1),
        [],
        2 * N * DIM * 5,
        4 * N * DIM * 5,
    ),
    "conv_tbc": (
        lambda m, x: torch.conv_tbc(x.transpose(0, 1).contiguous(), m.w.repeat(3, 1, 1), torch.zeros(5)),
        [],
        2 * (N - 2) * 3 * DIM * 5,
        4 * (N - 2) * 3 * DIM * 5,
    ),
    "fused attention on CPU": (
        lambda m, x: fused_attention(x[:, None])[:, 0],
        [],
        2 * 2 * N * N * DIM,
        4 * 2 * N * N * DIM,
    ),
}


def fused_attention(x):
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("name", HAND)
def test_a_host_costs_what_a_count_by_hand_says(name):
    call, parts, forward, backward = HAND[name]
    cost = cost_of(After(call, *parts), torch.randn(BATCH, TIME, DIM))
    stem = 2 * TIME * DIM * DIM
    assert cost.forward == stem + forward
    assert cost.backward == stem + backward  # of the stem the weights' gradient alone: its input needs none
    assert cost.uncounted == ()


CONVOLUTIONS = {
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), 2 * 8 * 9 * 81),
    "grouped, strided, dilated": (nn.Conv2d(8, 12, 3, stride=2, dilation=2, groups=4), 2 * 12 * 2 * 9 * 9),
    "transposed, grouped": (nn.ConvTranspose2d(8, 12, 3, stride=2, groups=4), 2 * 8 * 3 * 9 * 81),
    "plain": (nn.Conv2d(8, 12, 3), 2 * 8 * 12 * 9 * 49),
    "over time, grouped": (nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 5, groups=2)), 2 * 8 * 4 * 5 * 77),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_backward_of_a_convolution_costs_its_forward_for_each_gradient_whatever_the_groups(name):
    layer, forward = CONVOLUTIONS[name]
    example = torch.randn(BATCH, 8, 9, 9)
    cost = cost_of(nn.Sequential(nn.Conv2d(8, 8, 1), layer), example, "0")
    stem = 2 * 8 * 8 * 81
    assert cost.forward == stem + forward
    assert cost.backward == stem + 2 * forward
    assert cost.down_to == {"r0c0": forward}  # activations alone


def test_products_of_groups_cost_those_of_all_rows():
    x = torch.randn(BATCH * TIME, 16)
    shapes = [x.shape, (2, 16, 8)], [(2, TIME, 16), (16, 8)], [(2, TIME, 16), (2, 16, 8)], [(16, 14), (14, 8)]
    rows_of = FORMULAS[torch.ops.aten._grouped_mm]
    by_hand = 2 * BATCH * TIME * 16 * 8, 2 * TIME * 16 * 8, 2 * 2 * TIME * 16 * 8, 2 * 16 * 14 * 8
    assert tuple(rows_of(*pair, GROUPS.shape) for pair in shapes) == by_hand


@pytest.mark.parametrize("packed", [False, True])
def test_the_formula_of_recurrent_kernels_on_gpus(packed):
    size = torch.Size
    weights = [size(s) for s in ((20, DIM), (20, 5), (20,), (20,))]
    x = size([9, DIM]) if packed else size([TIME, BATCH, DIM])
    sizes, tokens = ([4, 3, 2], 9) if packed else ([], TIME * BATCH)
    once = 2 * tokens * 20 * (DIM + 5)
    rest = [2, 5, 0, 1, False, 0.0, True, False, sizes, None]  # mode ... batch_sizes, dropout_state
    hidden = [size([1, BATCH, 5])] * 2
    cudnn, backward = FORMULAS[torch.ops.aten._cudnn_rnn], FORMULAS[torch.ops.aten._cudnn_rnn_backward]
    assert cudnn(x, weights, 4, None, *hidden, *rest) == once
    head = [x, weights, 4, size([99]), *hidden, size([9, 5]), size([9, 5]), None, None]
    assert backward(*head, *rest, size([7]), [True, False, False, True]) == 2 * once
    assert backward(*head, *rest, size([7]), [True, False, False, False]) == once


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_a_backward_of_the_depthwise_blueprint_costs_twice_its_forward(dim):
    cost = seed_cost(Topology.FEATURE_MAP, "depthwise", dim, (dim, 8, 8))
    assert cost.forward == 2 * dim * 64 * (9 + dim)
    assert (cost.full, cost.passing) == (2 * cost.forward, cost.forward)


def test_every_operator_of_the_shipped_blueprints_is_counted_or_free():
    shapes = {Topology.FEATURE_MAP: (16, 8, 8), Topology.SEQUENCE: (12, 16), Topology.VECTOR: (16,)}
    for topology, shape in shapes.items():
        for name in registry.names(topology):
            assert seed_cost(topology, name, 16, shape).uncounted == (), name


def test_a_small_seed_counted_on_the_cpu_counts_what_it_does_on_the_meta_device(monkeypatch):
    shapes = {
        Topology.FEATURE_MAP: (16, 8, 6),
        Topology.SEQUENCE: (12, 16),
        Topology.SIGNAL: (16, 12),
        Topology.VECTOR: (16,),
    }
    assert set(shapes) == set(Topology)
    asked = [(topology, name, 16, shape) for topology, shape in shapes.items() for name in registry.names(topology)]
    before = read_streams()
    on_cpu = [seed_cost.__wrapped__(*site) for site in asked]
    memory = [seed_memory.__wrapped__(*site, torch.float32) for site in asked]
    assert not moved(before, read_streams()), "a seed that is built to be counted draws nothing"
    monkeypatch.setattr(counting, "SMALL", 0)
    assert on_cpu == [seed_cost.__wrapped__(*site) for site in asked]
    assert memory == [seed_memory.__wrapped__(*site, torch.float32) for site in asked]
    assert len({(cost.full, cost.weights, cost.passing) for cost in on_cpu}) > 10


@torch.library.custom_op("esper_tests::halved", mutates_args=())
def halved(x: Tensor, w: Tensor) -> Tensor:
    return 0.5 * (x @ w)


torch.library.register_autograd("esper_tests::halved", lambda ctx, grad: (torch.cat([grad, grad[..., :1]], -1), None))


def test_operators_without_a_formula_are_named():
    model = After(lambda m, x: torch.fft.fft(halved(x.contiguous(), m.w)).real)
    cost = cost_of(model, torch.randn(BATCH, TIME, DIM))
    assert cost.uncounted == ("aten::_fft_c2c", "aten::_fft_r2c", "esper_tests::halved")
    seed = seed_cost(Topology.VECTOR, "mlp", 16, (16,))
    said = Costs(host=cost, seeds={"r0c0": {"mlp": seed}}).uncounted
    assert said == tuple(f"{name} (the host)" for name in cost.uncounted)


def test_a_frozen_host_costs_what_it_costs_in_training():
    example = torch.randn(BATCH, 8, 9, 9)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(100, 3))
    grown = esper.attach(model, {"r0c0": "1"}, example)
    free = host_cost(grown, example)
    model[0].requires_grad_(False)
    assert host_cost(grown, example) == free
    model.requires_grad_(False)
    assert host_cost(grown, example) == free
    convolutions, head = (2 * 8 * 8 * 9 * 49, 2 * 8 * 4 * 9 * 25), 2 * 100 * 3
    assert free.forward == sum(convolutions) + head
    assert free.backward == convolutions[0] + 2 * (convolutions[1] + head)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

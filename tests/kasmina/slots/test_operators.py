"""What operators ask for and what they leave behind: logits, vectors, gates, tallies."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from esper.accord.config import SlotsConfig
from esper.kasmina.attach import attach
from esper.kasmina.births.build import build_gate, gate_key
from esper.kasmina.slots.confidence import class_logits, confident
from esper.kasmina.slots.gating import BlendGate, margin
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.channels import MAX_CHARACTERS, parse_channels, summarize_channels, usable_operators
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology
from tests.support.bitwise import bits
from tests.support.operator_slots import SHAPES, V, born, equip, features, joined

# GATE ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", Topology)
def test_the_gate_is_the_mlp_of_a_pool(topology: Topology) -> None:
    gate = BlendGate(8, topology).double()
    x = features(topology, torch.float64)
    g = gate(x).detach()

    def mlp(pooled: Tensor) -> Tensor:
        return torch.sigmoid(gate.outer(torch.tanh(gate.inner(pooled))))

    if topology is Topology.FEATURE_MAP:
        wanted = mlp(x.mean((2, 3)))[:, :, None, None]
    elif topology is Topology.SEQUENCE:
        wanted = torch.stack([mlp(x[:, : t + 1].mean(1)) for t in range(x.shape[1])], 1)
    elif topology is Topology.SIGNAL:
        wanted = torch.stack([mlp(x[:, :, : t + 1].mean(2)) for t in range(x.shape[2])], 2)
    else:
        wanted = mlp(x)
    torch.testing.assert_close(g, wanted)
    shapes = {
        Topology.FEATURE_MAP: (3, 1, 1, 1),
        Topology.SEQUENCE: (3, 5, 1),
        Topology.SIGNAL: (3, 1, 5),
        Topology.VECTOR: (3, 1),
    }
    assert g.shape == shapes[topology]
    hidden = 4
    assert sum(p.numel() for p in gate.parameters()) == (8 + 2) * hidden + 1
    assert 0.0 < float(g.min()) <= float(g.max()) < 1.0
    assert g.std() > 0.001, "it depends on its input"


def test_a_causal_host_sees_nothing_of_its_future_through_the_gate() -> None:
    slot = joined(Topology.SEQUENCE, born(Topology.SEQUENCE, "mlp_small", torch.float64), Operator.GATE, alpha=0.5)
    x = features(Topology.SEQUENCE, torch.float64).requires_grad_()
    for t in range(x.shape[1]):
        (grad,) = torch.autograd.grad(slot(x, x)[:, t].sum(), x)
        assert not grad[:, t + 1 :].any()
        assert bool(grad[:, : t + 1].flatten(2).any(-1).all())


def test_gates_are_born_alike_and_move_no_other_stream() -> None:
    before = torch.get_rng_state()
    made = [
        build_gate(dim=6, topology=Topology.VECTOR, key=gate_key(*key), dtype=torch.float32, device="cpu")
        for key in [(1, "r0c0", 2, 30), (1, "r0c0", 2, 30), (1, "r0c0", 2, 31), (1, "r0c1", 2, 30), (2, "r0c0", 2, 30)]
    ]
    assert torch.equal(torch.get_rng_state(), before)
    weights = [gate.inner.weight for gate in made]
    assert bits(weights[0], weights[1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights[1:], 2))


def test_gate_without_a_gate_is_an_error() -> None:
    slot = joined(Topology.VECTOR, born(Topology.VECTOR, "lora", torch.float32), Operator.ADD, alpha=0.5)
    slot.operator = Operator.GATE
    with pytest.raises(ConfigError, match="slot r0c0: GATE without a gate"):
        slot(*[features(Topology.VECTOR, torch.float32)] * 2)


# CONFIDENCE ---------------------------------------------------------------------------------------------------------


def test_margin_is_top_1_minus_top_2_and_hands_no_gradient_back() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [0.5, 0.5, 0.0]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    g = margin(logits, 3, "r0c0")
    torch.testing.assert_close(g, torch.tensor([0.5, 0.85, 0.0], dtype=torch.float64))
    assert not g.requires_grad
    assert margin(p.log().bfloat16(), 3, "r0c0").dtype == torch.float32
    assert margin(torch.zeros(3, 2), 3, "r0c0").tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("handed", "got"),
    [
        (None, "nothing"),
        ([[1.0, 2.0]], "list"),
        (torch.zeros(3), r"torch.float32 \[3\]"),
        (torch.zeros(3, 1), r"torch.float32 \[3, 1\]"),
        (torch.zeros(3, 5, 2), r"torch.float32 \[3, 5, 2\]"),
        (torch.zeros(4, 5), r"torch.float32 \[4, 5\]"),
        (torch.zeros(3, 5, dtype=torch.int64), r"torch.int64 \[3, 5\]"),
    ],
)
def test_anything_but_class_logits_is_an_error(handed: object, got: str) -> None:
    slot = joined(Topology.VECTOR, born(Topology.VECTOR, "lora", torch.float32), Operator.CONFIDENCE, alpha=0.5)
    assert slot.beat is not None
    slot.beat.logits = handed  # type: ignore[assignment]
    x = features(Topology.VECTOR, torch.float32)
    for alpha in (0.5, 0.0):  # at 0 too: what is wrong shows before it matters
        slot.set_alpha(alpha)
        with pytest.raises(ConfigError, match=f"slot r0c0: CONFIDENCE got {got} for 3 samples, needs class logits"):
            slot(x, x)
    with torch.no_grad():
        assert slot(x, x) is x, "a forward at alpha 0 without a gradient needs nothing"


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.middle, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(torch.tanh(self.middle(torch.tanh(self.below(x)))))))


def test_class_logits_are_those_without_the_seeds_that_ask_and_leave_no_trace() -> None:
    torch.manual_seed(0)
    x = features(Topology.VECTOR, torch.float32)
    grown = attach(Classifier(), {"r0c0": "below", "r1c0": "middle"}, x)
    assert class_logits(grown, x) is None
    for holder, operator in zip(grown.slots.values(), (Operator.CONFIDENCE, Operator.ADD)):
        holder.plant(born(Topology.VECTOR, "lora", torch.float32, fill=0.2))
        holder.phase, holder.operator = Phase.BLEND, operator
        holder.set_alpha(0.5)
    before = copy.deepcopy(grown.model.state_dict())
    stream = torch.get_rng_state()
    logits = class_logits(grown, x)
    assert logits is not None
    assert not logits.requires_grad
    assert grown.model.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[key]) for key, value in grown.model.state_dict().items())
    with grown.override({"r0c0": 0.0}), torch.no_grad():
        assert bits(grown.model.eval()(x), logits)
        assert class_logits(grown, x) is None, "a seed that is off asks for nothing"
    with torch.no_grad(), confident(grown, x):
        on = grown.model(x)
    assert not torch.equal(on, logits)
    with pytest.raises(ConfigError, match="CONFIDENCE got nothing"):
        grown.model(x)


# CHANNEL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", Topology)
def test_each_channel_has_its_own_strength(topology: Topology) -> None:
    x = features(topology, torch.float32, seed=1)
    slot = joined(topology, nn.Identity(), Operator.CHANNEL, alpha=0.5)
    axis = topology.channel_axis
    for channel, v in enumerate(V):
        one = x.select(axis, channel)
        torch.testing.assert_close(slot(x, x).select(axis, channel), one + 0.5 * v * one)
    for moved in (slot.bfloat16(), slot.double(), copy.deepcopy(slot)):
        assert moved.channels is not None
        assert moved.channels.dtype == torch.float32
        assert moved.channels.flatten().tolist() == list(V), "no cast rounds v"
    assert not slot.state_dict()


def test_a_vector_of_another_length_or_none_is_an_error() -> None:
    slot = joined(Topology.VECTOR, nn.Identity(), Operator.CHANNEL, alpha=0.5)
    with pytest.raises(ConfigError, match=r"slots.channels = {r0c0: ...}: 2 values, the slot has C = 8 channels"):
        slot.set_channels([1.0, 0.5])
    slot.set_channels(None)
    with pytest.raises(ConfigError, match=r"slot r0c0: CHANNEL without a vector v; set slots\.channels\.r0c0"):
        slot(*[features(Topology.VECTOR, torch.float32)] * 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "channel 0 is '', must be a number in"),
        ("1,0.5,", "channel 2 is ''"),
        ("1,nan", "channel 1 is 'nan'"),
        ("1,inf", "channel 1 is 'inf'"),
        ("1.5", "channel 0 is '1.5'"),
        ("0,-0.1", "channel 1 is '-0.1'"),
        ("0;1", "channel 0 is '0;1'"),
        ("0," * MAX_CHARACTERS, f"{2 * MAX_CHARACTERS} characters, at most {MAX_CHARACTERS} are read"),
    ],
)
def test_a_bad_vector_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_channels(text, "slots.channels.r0c0")
    with pytest.raises(ConfigError, match=rf"^channels = {{r0c0: \.\.\.}}: {message}"):
        SlotsConfig(channels={"r0c0": text})


def test_a_vector_of_a_slot_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a slot id"):
        SlotsConfig(channels={"early": "1"})


def test_what_is_observed_of_a_vector() -> None:
    values = parse_channels(" 0, 1,0.25 ,0e0", "here")
    assert values == (0.0, 1.0, 0.25, 0.0)
    info = summarize_channels(values)
    assert (info.mean, info.sparsity) == (0.3125, 0.5)
    assert info.p95 == pytest.approx(torch.tensor(values).quantile(0.95).item())
    assert summarize_channels((0.5,)).p95 == 0.5


def test_which_operators_a_slot_may_use() -> None:
    every = usable_operators("r0c0", {"r0c0": "1"}, class_logits=True)
    assert every == tuple(Operator)
    assert usable_operators("r0c1", {"r0c0": "1"}, class_logits=False) == (
        Operator.ADD,
        Operator.MULTIPLY,
        Operator.GATE,
    )


# what is counted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", Topology)
@pytest.mark.parametrize("operator", [Operator.GATE, Operator.CONFIDENCE])
def test_the_tally_is_that_of_the_training_samples(operator: Operator, topology: Topology) -> None:
    name = "norm" if topology.channel_axis == 1 < topology.ndim - 1 else "lora"
    slot = joined(topology, born(topology, name, torch.float64), operator)
    assert slot.beat is not None
    wanted: list[float] = []
    weights = torch.tensor([1.0, 0.0, 1.0])
    for index, alpha in enumerate((0.0, 0.25, 0.75)):
        x = features(topology, torch.float64, seed=index)
        slot.set_alpha(alpha)
        slot(x, x)  # not tallied: no training
        slot.beat.weights = weights
        slot(x, x)
        slot.override(0.5)
        slot(x, x)  # not tallied: a counterfactual
        slot.override(None)
        slot.beat.weights = None
        if operator is Operator.GATE:
            assert slot.gate is not None
            g = slot.gate(x)
        else:
            g = margin(slot.beat.logits, len(x), "r0c0").view(-1, 1)
        per_sample = (g + (1 - g) * alpha).detach().flatten(1).mean(1)
        wanted += [float(value) for value, weight in zip(per_sample, weights) if weight]
    count, total, squares = slot.tally.take()
    assert count == len(wanted) == 6
    assert total == pytest.approx(sum(wanted), rel=1e-6)
    assert squares == pytest.approx(sum(value * value for value in wanted), rel=1e-6)
    assert slot.tally.take() == (0.0, 0.0, 0.0)


def test_weights_of_another_batch_are_an_error() -> None:
    slot = joined(Topology.VECTOR, born(Topology.VECTOR, "lora", torch.float32), Operator.GATE, alpha=0.5)
    assert slot.beat is not None
    slot.beat.weights = torch.ones(2)
    with pytest.raises(ValueError, match=r"\[2\] sample weights for 3 samples"):
        slot(*[features(Topology.VECTOR, torch.float32)] * 2)


@pytest.mark.parametrize("operator", Operator)
@pytest.mark.parametrize("topology", Topology)
def test_straight_through_is_the_gradient_of_the_operator_at_full_alpha(topology: Topology, operator: Operator) -> None:
    """Before blending a gated operator is ADD already, so that only these are met."""
    if operator.is_gated:
        operator = Operator.ADD
    name = "norm" if topology.channel_axis == 1 < topology.ndim - 1 else "lora"
    host, r = features(topology, torch.float64, seed=1), features(topology, torch.float64, seed=2)
    straight = joined(topology, born(topology, name, torch.float64), operator, phase=Phase.STRAIGHT)
    full = joined(topology, born(topology, name, torch.float64), operator, alpha=1.0)
    assert bits(straight(host, host), host)
    found = torch.autograd.grad(straight(host, host), list(straight.parameters()), r)
    wanted = torch.autograd.grad(full(host, host), list(full.parameters()), r)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_uprooting_leaves_nothing() -> None:
    slot = joined(Topology.VECTOR, born(Topology.VECTOR, "lora", torch.float32), Operator.GATE, alpha=0.5)
    assert any(key.startswith("gate.") for key in slot.state_dict())
    slot.uproot()
    assert not slot.state_dict()
    assert not list(slot.parameters())
    assert (slot.operator, slot.fades_from, slot.level, slot.fade_level) == (Operator.ADD, None, 0.0, 1.0)
    slot.plant(born(Topology.VECTOR, "norm", torch.float32))
    equip(slot, Operator.ADD)
    x = torch.randn(SHAPES[Topology.VECTOR])
    assert bits(slot(x, x), x)

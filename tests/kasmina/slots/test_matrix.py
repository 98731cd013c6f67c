"""Operator x blueprint x topology x dtype x what the slot does: the contracts that hold for all of them.

The standing suite takes every pair of operator and blueprint in one number format, so that every blueprint and every
operator meets every format; the full product is under ``slow``.
"""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from esper.kasmina.blueprints import names
from esper.kasmina.slots.blend import MULTIPLY_BOUND
from esper.kasmina.slots.slot import Phase, SeedSlot
from esper.leyline.alpha import Operator
from esper.leyline.topology import Topology
from tests.support.bitwise import bits
from tests.support.operator_slots import born, equip, features, joined

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EVERY = [(topology, name) for topology in Topology for name in names(topology)]
FULL = list(itertools.product(Operator, EVERY, DTYPES))
SAMPLE = [
    (operator, pair, DTYPES[(int(operator) + index) % 3]) for operator in Operator for index, pair in enumerate(EVERY)
]


def label(case: tuple[Operator, tuple[Topology, str], torch.dtype]) -> str:
    operator, (topology, name), dtype = case
    return f"{operator.name}-{topology.value}-{name}-{str(dtype).removeprefix('torch.')}"


CASES = [
    pytest.param(*case, id=label(case), marks=[] if case in SAMPLE else [pytest.mark.slow])
    for case in sorted(FULL, key=label)
]
over_the_matrix = pytest.mark.parametrize(("operator", "pair", "dtype"), CASES)
that_learn = pytest.mark.parametrize(
    ("operator", "pair", "dtype"),
    [case for case in CASES if case.values[1][1] != "noop"],  # type: ignore[index]
)


def test_the_sample_meets_every_pair() -> None:
    assert len(SAMPLE) == len(Operator) * len(EVERY)
    for a, b in itertools.combinations(range(3), 2):
        every = {(case[a], case[b]) for case in FULL}
        assert {(case[a], case[b]) for case in SAMPLE} == every


def awkward(topology: Topology, dtype: torch.dtype) -> Tensor:
    """Features with both zeros, infinities, the smallest number and a NaN."""
    found = features(topology, dtype)
    zero = torch.zeros((), dtype=dtype)
    special = [-zero, zero, zero + float("inf"), zero - float("inf"), torch.nextafter(zero, zero + 1), zero / 0]
    found.view(-1)[: len(special)] = torch.stack(special)
    return found


@over_the_matrix
def test_at_alpha_0_nothing_changes_forward_or_backward(
    operator: Operator, pair: tuple[Topology, str], dtype: torch.dtype
) -> None:
    """Bit for bit, in every phase, whatever the seed holds, mid-fade too; and a leaf's gradient is the upstream one."""
    topology, name = pair
    host = awkward(topology, dtype)
    upstream = features(topology, dtype, seed=9)
    other = Operator((int(operator) + 1) % len(Operator))
    fading = itertools.cycle([None, other, other, None])
    for (fill, phase), fades_from in zip(itertools.product((None, float("inf")), Phase), fading):
        slot = joined(topology, born(topology, name, dtype, fill), operator, phase=phase, fades_from=fades_from)
        slot.set_alpha(0.0, 0.3)
        leaf = host.clone().requires_grad_()
        (grad,) = torch.autograd.grad(slot(leaf, leaf), leaf, upstream)
        assert bits(slot(host, host), host), (fill, phase, fades_from)
        assert bits(grad, upstream), (fill, phase, fades_from)
        with torch.no_grad():
            assert bits(slot(host, host), host)
        slot.set_alpha(1.0)
        slot.override(0.0)
        assert bits(slot(host, host), host), "an override by 0 in a slot at full alpha"


@over_the_matrix
def test_the_path_to_the_host_stays_open_and_grows_with_alpha(
    operator: Operator, pair: tuple[Topology, str], dtype: torch.dtype
) -> None:
    """h and x apart: the direct path has factor 1, under MULTIPLY 1 - ca to 1 + ca; what is added grows with alpha."""
    topology, name = pair
    seed = born(topology, name, dtype)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.mul_(4.0)  # away from near identity
    slot = joined(topology, seed, operator).eval()
    host, x, r = (features(topology, dtype, seed=i) for i in (1, 2, 3))
    before = host.clone(), x.clone()
    eps = torch.finfo(dtype).eps
    added = torch.zeros_like(host, dtype=torch.float64)
    for alpha in (0.125, 0.375, 0.75, 1.0):
        slot.set_alpha(alpha)
        leaf = host.clone().requires_grad_()
        output = slot(leaf, x)
        (grad,) = torch.autograd.grad(output, leaf, r)
        factor = grad.double() / r.double()
        bound = MULTIPLY_BOUND * alpha if operator is Operator.MULTIPLY else 0.0
        assert bool(((factor - 1.0).abs() <= bound + 8 * eps).all())
        assert bool((factor >= 1 - MULTIPLY_BOUND - 8 * eps).all())
        now = output.detach().double() - host.double()
        slack = 8 * eps * (1.0 + host.double().abs() + now.abs())
        assert bool((now.abs() >= added.abs() - slack).all()), alpha
        if operator is Operator.MULTIPLY:
            assert bool((now.abs() <= MULTIPLY_BOUND * alpha * host.double().abs() + slack).all())
        added = now
    assert bits(host, before[0])
    assert bits(x, before[1]), "a slot changes no tensor of its caller"
    if name != "noop":
        assert bool(added.any())


@that_learn
def test_everything_learns_and_the_loss_falls(
    operator: Operator, pair: tuple[Topology, str], dtype: torch.dtype
) -> None:
    topology, name = pair
    slot = joined(topology, born(topology, name, dtype), operator, alpha=0.5)
    named = dict(slot.named_parameters())
    assert ("gate.inner.weight" in named) == (operator is Operator.GATE)
    host = features(topology, dtype, seed=1)
    axis = topology.channel_axis
    target = host + 0.5 * torch.tanh(host.roll(1, axis)) * host  # of the seed's own reach under every operator
    optimizer = torch.optim.Adam(named.values(), lr=3e-3)
    live: set[str] = set()
    losses = []
    for _ in range(12):
        loss = (slot(host, host).double() - target.double()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        live |= {key for key, p in named.items() if p.grad is not None and bool(p.grad.any())}
    assert live == set(named), "born dead"
    assert min(losses[6:]) < losses[0], losses


GRADCHECK = [
    pytest.param(operator, topology, name, id=f"{operator.name}-{topology.value}-{name}", marks=marks)
    for operator in Operator
    for topology in Topology
    for index, name in enumerate(n for n in names(topology) if n != "noop")
    for marks in [[] if index == int(operator) % 3 else [pytest.mark.slow]]
]


@pytest.mark.parametrize(("operator", "topology", "name"), GRADCHECK)
def test_gradcheck(operator: Operator, topology: Topology, name: str) -> None:
    """Of the features and of every tensor of seed and gate, at a partial alpha, mid-fade."""
    other = Operator((int(operator) + 3) % len(Operator))
    seed = born(topology, name, torch.float64)
    slot = joined(topology, seed, operator, alpha=0.375, fades_from=other, fade=0.25).eval()
    named = {key: p.detach() for key, p in slot.named_parameters()}

    def call(host: Tensor, x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = functional_call(slot, dict(zip(named, values, strict=True)), (host, x))
        return out

    inputs = [features(topology, torch.float64, seed=1), features(topology, torch.float64, seed=2), *named.values()]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


class Constant(nn.Module):
    """A seed whose delta is given."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, x: Tensor) -> Tensor:
        return self.delta.expand_as(x)


def by_hand(slot: SeedSlot, operator: Operator, host: Tensor, delta: Tensor, a: float) -> Tensor:
    """The table of formulas, written out once more."""
    if operator is Operator.ADD:
        return torch.lerp(host, host + delta, a)
    if operator is Operator.MULTIPLY:
        return host * (1 + a * 0.9 * torch.tanh(delta))
    if operator is Operator.CHANNEL:
        assert slot.channels is not None
        return host + a * slot.channels.double() * delta
    if operator is Operator.GATE:
        assert slot.gate is not None
        g = slot.gate(host)
    else:
        assert slot.beat is not None
        assert slot.beat.logits is not None
        p = slot.beat.logits.softmax(-1).sort(-1, descending=True).values
        g = (p[:, 0] - p[:, 1]).view(-1, *[1] * (host.ndim - 1))
    return host + a * (g + (1 - g) * a) * delta


ALPHA = st.floats(0.0009765625, 1.0, width=32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    operator=st.sampled_from(Operator),
    fades_from=st.none() | st.sampled_from(Operator),
    topology=st.sampled_from(Topology),
    alpha=ALPHA,
    fade=st.floats(0.0, 1.0, width=32),
    size=st.floats(-30.0, 30.0),
)
def test_outputs_are_those_of_the_formulas(
    operator: Operator, fades_from: Operator | None, topology: Topology, alpha: float, fade: float, size: float
) -> None:
    host = features(topology, torch.float64, seed=1)
    delta = size * features(topology, torch.float64, seed=2)
    fades_from = None if fades_from is operator else fades_from
    slot = joined(topology, Constant(delta), operator, alpha=alpha, fades_from=fades_from, fade=fade)
    wanted = by_hand(slot, operator, host, delta, alpha)
    if fades_from is not None:
        wanted = torch.lerp(by_hand(slot, fades_from, host, delta, alpha), wanted, fade)
    torch.testing.assert_close(slot(host, host), wanted, rtol=1e-6, atol=1e-6)  # g and alpha are float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", Topology)
@pytest.mark.parametrize("operator", [Operator.GATE, Operator.CONFIDENCE])
def test_at_full_alpha_a_gated_operator_is_add_bit_for_bit(
    operator: Operator, topology: Topology, dtype: torch.dtype
) -> None:
    """So the gate can leave without a jump; there it also gets a gradient, which is zero."""
    host, delta = features(topology, dtype, seed=1), features(topology, dtype, seed=2)
    slot = joined(topology, Constant(delta), operator, alpha=1.0)
    gated = slot(host, host)
    if slot.gate is not None:
        grads = torch.autograd.grad(gated.sum(), list(slot.gate.parameters()))
        assert not any(bool(grad.any()) for grad in grads)
    equip(slot, Operator.ADD)
    assert bits(gated, slot(host, host))


@pytest.mark.parametrize("topology", Topology)
@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(Operator, 2)))
def test_a_switch_begins_and_ends_where_its_operators_stand(old: Operator, new: Operator, topology: Topology) -> None:
    host, delta = features(topology, torch.float32, seed=1), features(topology, torch.float32, seed=2)
    for fade, alone in ((0.0, old), (1.0, new)):
        slot = joined(topology, Constant(delta), new, alpha=0.4, fades_from=old, fade=fade)
        fading = slot(host, host)
        slot.operator, slot.fades_from = alone, None
        torch.testing.assert_close(fading, slot(host, host), rtol=0, atol=0)

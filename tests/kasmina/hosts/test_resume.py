"""Stopping at a slot and going on from there, on every built-in host and slot: bit for bit the forward."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.hosts import CNNConfig, GPTConfig, ResNet20Config, build_host
from esper.kasmina.hosts.cnn import CNN
from esper.kasmina.hosts.registry import InjectionPoint
from esper.kasmina.hosts.resume import Chain, Resumable, resumable
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology
from tests.support.grown_hosts import Delta, plant
from tests.support.tiny import bits

ALL = ["block", "attention", "mlp"]
HOSTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cnn": (CNNConfig(widths=[4, 4, 6]), (1, 8, 8)),
    "cnn stages": (CNNConfig(widths=[4, 4, 6]), (1, 8, 8)),
    "resnet20": (ResNet20Config(width=2), (1, 8, 8)),
    "gpt": (GPTConfig(layers=2, heads=2, dim=8, block=6), (6,)),
    "gpt attention": (GPTConfig(layers=2, heads=2, dim=8, block=6, sites=["attention"]), (6,)),
    "gpt all": (GPTConfig(layers=2, heads=2, dim=8, block=6, sites=ALL), (6,)),
}
ORDERS = {
    "cnn": ("r0c0", "r0c1", "r1c0", "r1c1", "r2c0"),
    "cnn stages": ("r1c0", "r2c0"),
    "resnet20": ("r0c0", "r1c0", "r2c0"),
    "gpt": ("r0c0", "r1c0"),
    "gpt attention": ("r0c1", "r1c1"),
    "gpt all": ("r0c1", "r0c2", "r0c0", "r1c1", "r1c2", "r1c0"),
}
PAIRS = [(name, slot, until) for name, order in ORDERS.items() for slot, until in itertools.combinations(order, 2)]


class SomeLinks(CNN):
    """Slots on some of its links only."""

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        return tuple(point for point in super().injection_points() if point.module in ("stages.1", "stages.2"))


class Elsewhere(CNN):
    """One of its slots is on none of its links."""

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        inside = InjectionPoint(slot="r9c0", module="stages.0.conv", topology=Topology.FEATURE_MAP)
        return (*super().injection_points(), inside)


def host(name: str) -> nn.Module:
    torch.manual_seed(4)
    config, shape = HOSTS[name]
    if name == "cnn stages":
        return SomeLinks(config, channels=1, classes=5)
    return build_host(config, shape, 5)


def sample(name: str, samples: int = 3) -> Tensor:
    stream = torch.Generator().manual_seed(7)
    shape = HOSTS[name][1]
    if len(shape) == 1:
        return torch.randint(5, (samples, *shape), generator=stream)
    return torch.randn(samples, *shape, generator=stream)


def grow(name: str) -> Grown:
    """A blended seed in every slot, each at an alpha of its own."""
    grown = attach(host(name), {p.slot: p.module for p in host(name).injection_points()}, sample(name))
    for i, (slot, site) in enumerate(grown.sites.items()):
        plant(grown, slot, Delta(site.dim, site.topology.channel_axis), 1.0 / (1 + i))
    return grown


@pytest.mark.parametrize("name", HOSTS)
def test_slots_run_in_the_order_that_the_host_says_every_time(name):
    network, fired = host(name), []
    for point in network.injection_points():
        network.get_submodule(point.module).register_forward_hook(lambda *_, slot=point.slot: fired.append(slot))
    for _ in range(3):
        network(sample(name))
    assert network.slot_order() == ORDERS[name]
    assert tuple(fired) == 3 * ORDERS[name]
    assert isinstance(network, Resumable)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_from_a_slot_to_the_end_equals_the_forward_bit_for_bit_with_its_gradients_and_statistics(name, training):
    whole = grow(name)
    parts = {slot: Grown(copy.deepcopy(whole.model), whole.sites) for slot in ORDERS[name]}
    x = sample(name)

    def trained(grown: Grown, output: Tensor) -> dict[str, str]:
        output.square().sum().backward()
        grads = [(f"{n}.grad", p.grad) for n, p in grown.model.named_parameters() if p.grad is not None]
        assert len(grads) == len(list(grown.model.parameters()))
        return bits([("output", output), *grads, *grown.model.named_buffers()])

    expected = trained(whole, whole.model.train(training)(x))
    for slot, grown in parts.items():
        model = grown.model.train(training)
        assert trained(grown, model.forward_from(model.forward_to(x, slot), slot)) == expected, slot


@pytest.mark.parametrize("name", HOSTS)
def test_without_slots_or_seeds_it_is_the_bare_host(name):
    bare, x = host(name).eval(), sample(name)
    empty = attach(copy.deepcopy(bare), {p.slot: p.module for p in bare.injection_points()}, x).model.eval()
    expected = bits([("", bare(x))])
    for model in (bare, empty):
        for slot in ORDERS[name]:
            assert bits([("", model.forward_from(model.forward_to(x, slot), slot))]) == expected


@pytest.mark.parametrize(("name", "slot", "until"), PAIRS)
def test_a_part_between_two_slots_leaves_what_the_forward_has_at_the_second(name, slot, until):
    grown, x = grow(name), sample(name)
    model = grown.model.eval()
    with torch.no_grad():
        state = model.forward_to(x, slot)
        kept = bits(enumerate(state))
        between, direct = model.forward_from(state, slot, until=until), model.forward_to(x, until)
        assert bits(enumerate(between)) == bits(enumerate(direct))
        for alpha in (0.0, 0.25):  # one state serves any alpha from its slot on
            with grown.override({slot: alpha, until: 1.0 - alpha}):
                assert bits([("", model.forward_from(state, slot))]) == bits([("", model(x))])
        assert bits(enumerate(state)) == kept


@pytest.mark.parametrize("name", ["cnn", "gpt all"])
def test_the_state_holds_the_feature_before_its_seed_joined(name):
    grown, x = grow(name), sample(name)
    seen: dict[str, Tensor] = {}
    bare = host(name)
    for point in bare.injection_points():
        bare.get_submodule(point.module).register_forward_hook(lambda m, a, out, s=point.slot: seen.update({s: out}))
    bare(x)
    first = ORDERS[name][0]
    assert torch.equal(grown.model.forward_to(x, first)[0], seen[first])


def test_a_chain_without_its_parts_cannot_be_built():
    class Incomplete(Chain):
        def _links(self) -> tuple[str, ...]:
            return ()

    with pytest.raises(TypeError, match=r"abstract method.*_stem.*_tail.*injection_points"):
        Incomplete()


def test_unknown_slots_earlier_ends_and_too_long_inputs_are_one_line():
    for name in ("cnn", "gpt all"):
        model, (first, second, *_) = host(name), ORDERS[name]
        state = model.forward_to(sample(name), second)
        with pytest.raises(ConfigError, match="slot 'r9c9': no such slot; this host has r0c"):
            model.forward_to(sample(name), "r9c9")
        with pytest.raises(ConfigError, match="slot 'r9c9': no such slot"):
            model.forward_from(state, "r9c9")
        with pytest.raises(ConfigError, match="slot 'r9c9': no such slot"):
            model.forward_from(state, second, until="r9c9")
        for until in (first, second):
            with pytest.raises(
                ValueError, match=rf"until = '{until}' does not run after {second}; slots run in the order"
            ):
                model.forward_from(state, second, until=until)
    with pytest.raises(ValueError, match=r"7 tokens.*host\.block = 6"):
        host("gpt").forward_to(torch.zeros(1, 7, dtype=torch.int64), "r0c0")


def test_only_hosts_on_which_nothing_would_be_passed_over_resume():
    grown = grow("gpt all")
    assert resumable(grown) is grown.model
    handle = grown.model.norm.register_forward_hook(lambda *_: None)  # somebody watches
    assert resumable(grown) is None
    handle.remove()
    handle = grown.model.blocks[0].project.register_forward_pre_hook(lambda *_: None)
    assert resumable(grown) is None
    handle.remove()
    assert resumable(grown) is grown.model
    other = attach(host("cnn"), {"r0c0": "stages.1"}, sample("cnn"))  # the host's own r0c0 is stages.0
    assert resumable(other) is None
    some = attach(host("cnn"), {"r1c0": "stages.1"}, sample("cnn"))
    assert resumable(some) is some.model
    some = attach(Elsewhere(HOSTS["cnn"][0], channels=1, classes=5), {"r1c0": "stages.1"}, sample("cnn"))
    assert resumable(some) is some.model
    some = attach(Elsewhere(HOSTS["cnn"][0], channels=1, classes=5), {"r9c0": "stages.0.conv"}, sample("cnn"))
    assert resumable(some) is None
    foreign = attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), {"r0c0": "0"}, torch.zeros(2, 4))
    assert resumable(foreign) is None

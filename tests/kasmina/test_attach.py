"""Slots on any module: what is inferred, what is refused and in which words, and what attaching must leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.slots.grown import HOST
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology
from tests.support.stateful_model import IMAGES, VECTORS, WHERE, images, seed_for


class Sites(nn.Module):
    """Submodules that a forward uses in every wrong way."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.training_only = nn.Linear(4, 4)
        self.nothing, self.unclear = Returns(lambda x: (None, "x")), Returns(lambda x: (0, x, x))
        self.volume = nn.Identity()
        self.integer = nn.Identity()
        self.good = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        if self.training:
            x = self.training_only(x)
        self.nothing(x)
        self.unclear(x)
        self.volume(x[:, None, None, None])
        self.integer(x.argmax(1, keepdim=True))
        return self.good(x)


class Returns(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.forward = what


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.pooled = nn.Linear(6, 5)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        return self.pooled((self.embed(tokens) * scale).mean(1))


# what is inferred -------------------------------------------------------------------------------------------------


def test_feature_maps_are_described_row_major_from_one_example():
    grown = attach(images(), WHERE, IMAGES)
    assert list(grown.sites) == list(grown.slots) == ["r0c0", "r0c1", "r1c0"]
    assert {s.slot: (s.module, s.topology, s.dim, s.shape, s.positions) for s in grown.sites.values()} == {
        "r0c0": ("norm", Topology.FEATURE_MAP, 4, (4, 8, 8), 64),
        "r0c1": ("blocks.0", Topology.FEATURE_MAP, 6, (6, 4, 4), 16),
        "r1c0": ("blocks.1", Topology.FEATURE_MAP, 8, (8, 4, 4), 16),
    }


def test_sequences_and_vectors_are_told_apart_and_a_tuple_is_several_inputs():
    example = (torch.arange(14).view(2, 7) % 11, torch.tensor(2.0))
    grown = attach(Text(), {"r0c0": "embed", "r1c0": "pooled"}, example)
    sequence, vector = grown.sites.values()
    assert (sequence.topology, sequence.dim, sequence.shape, sequence.positions) == (Topology.SEQUENCE, 6, (7, 6), 7)
    assert (vector.topology, vector.dim, vector.shape, vector.positions) == (Topology.VECTOR, 5, (5,), 1)


# what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ({"r0c0": "block.1"}, "slot r0c0: the model has no module 'block.1'; did you mean blocks.1"),
        ({"r0c0": "layer4"}, "slot r0c0: the model has no module 'layer4'; it has stem, norm, drop, blocks, blocks.0"),
        ({}, "sites = {}: expected a mapping of slot ids to names of modules, or a pattern of names"),
        (["norm"], "sites = ['norm']: expected a mapping"),
        ({"r0c0": "norm", "r0c1": "norm"}, "two slots name the same module"),
        ({"early": "norm"}, "slot 'early': not a slot id; write r<row>c<col>, for example r0c1"),
        ({"R0C0": "norm"}, "slot 'R0C0': not a slot id"),
        ({"r00c1": "norm"}, "slot 'r00c1': not a slot id"),
    ],
)
def test_sites_that_the_model_does_not_have(sites, said):
    model = images()
    with pytest.raises(ConfigError) as caught:
        attach(model, sites, IMAGES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, CONTAINER)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("twice", "fired 2 times in one train() forward, need exactly once"),
        ("never", "fired 0 times in one train() forward, need exactly once"),
        ("training_only", "fired 0 times in one eval() forward, need exactly once"),
        ("nothing", "returns tuple of NoneType, str, need a tensor, or a container that holds a float tensor"),
        ("unclear", "returns tuple with float tensors at [1, 2]; need a single one, or one that comes first"),
        ("volume", "returns torch.float32 (3, 1, 1, 1, 4), need float BCHW, BHWC, BTC, TBC, BCT or BC"),
        ("integer", "returns torch.int64 (3, 1), need float BCHW, BHWC, BTC, TBC, BCT or BC"),
    ],
)
def test_sites_that_do_not_behave_are_named_and_nothing_is_left_behind(module, said):
    model = Sites()
    with pytest.raises(ConfigError) as caught:
        attach(model, {"r0c0": "good", "r0c1": module}, VECTORS)
    assert f"site {module!r} of slot r0c1" in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, CONTAINER)
    assert all(not part._forward_hooks for part in model.modules())
    assert attach(model, {"r0c0": "good"}, VECTORS).sites["r0c0"].dim == 4


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="attach: got function, expected a model"):
        attach(lambda x: x, {"r0c0": "norm"}, IMAGES)


def test_attach_happens_once():
    model = images()
    attach(model, {"r0c0": "norm"}, IMAGES)
    with pytest.raises(ConfigError, match="this model already has slots; attach once, with all sites"):
        attach(model, {"r0c1": "blocks.0"}, IMAGES)


def compiled_from_outside() -> nn.Module:
    return torch.compile(images(), backend="eager")


def compiled_in_place() -> nn.Module:
    model = images()
    model.compile(backend="eager")
    return model


def compiled_in_part() -> nn.Module:
    model = images()
    model.blocks[0].compile(backend="eager")
    return model


def wrapped(tmp_path) -> nn.Module:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(images())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [compiled_from_outside, compiled_in_place, compiled_in_part])
def test_attach_comes_before_compile(make):
    with pytest.raises(ConfigError, match=r"attach comes before torch\.compile and before DistributedDataParallel"):
        attach(make(), {"r0c0": "norm"}, IMAGES)


def test_attach_comes_before_ddp(tmp_path):
    with pytest.raises(ConfigError, match=r"attach comes before torch\.compile and before DistributedDataParallel"):
        attach(wrapped(tmp_path), {"r0c0": "norm"}, IMAGES)


# what attaching leaves alone --------------------------------------------------------------------------------------


def test_the_dry_run_leaves_random_stream_buffers_and_flags_untouched():
    model = images()
    example = IMAGES.clone()
    state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    flags = {name: (m.training, [p.requires_grad for p in m.parameters()]) for name, m in model.named_modules()}
    assert flags["drop"] == (False, [])
    assert flags[""][0]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, WHERE, example)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(example, IMAGES)
    after = dict(model.named_buffers())
    assert buffers["norm.num_batches_tracked"] == 0
    for name, buffer in buffers.items():
        assert torch.equal(after[name], buffer), name
    for name, module in model.named_modules():
        if not name.startswith(CONTAINER):
            assert (module.training, [p.requires_grad for p in module.parameters()]) == flags[name], name
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0))


def test_a_model_that_writes_into_its_input_does_not_spoil_the_example():
    example = VECTORS.clone()
    root = nn.Module()
    root.inner, root.forward = InPlace(4, 4), lambda x: root.inner(x)
    attach(root, {"r0c0": "inner"}, example)
    assert torch.equal(example, VECTORS)


def test_state_comes_back_also_when_the_dry_run_fails():
    model = images()
    model.train()
    model.drop.train()
    state, mean = torch.get_rng_state(), model.norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="to have 1 channels"):
        attach(model, WHERE, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(ConfigError, match="fired 0 times"):
        attach(model, {"r0c0": "blocks"}, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm.running_mean, mean)
    assert model.training
    assert model.drop.training


def test_host_keys_stay_and_only_a_planted_seed_adds_its_own():
    plain = list(images().state_dict())
    grown = attach(images(), WHERE, IMAGES)
    assert list(grown.model.state_dict()) == plain
    seed = seed_for(grown, "r0c1")
    grown.slots["r0c1"].plant(seed)
    keys = list(grown.model.state_dict())
    assert keys == plain + [f"{CONTAINER}.r0c1.seed.{name}" for name in seed.state_dict()]
    grown.slots["r0c1"].uproot()
    assert list(grown.model.state_dict()) == plain
    assert grown.seed_parameters("r0c1") == 0


def test_owners_are_the_host_and_then_the_slots_row_major_whatever_the_order_of_birth():
    grown = attach(images(), WHERE, IMAGES)
    for slot in ("r1c0", "r0c1"):
        grown.slots[slot].plant(seed_for(grown, slot))
    owners = grown.owner_parameters()
    assert list(owners) == [HOST, "r0c1", "r1c0"]
    assert [name for name, _ in owners[HOST]] == [name for name, _ in images().named_parameters()]
    assert sum(p.numel() for _, p in owners["r0c1"]) == grown.seed_parameters("r0c1") > 0
    assert {id(p) for named in owners.values() for _, p in named} == {id(p) for p in grown.model.parameters()}


def test_a_sequential_root_keeps_its_keys_and_computes_as_before():
    torch.manual_seed(1)
    host = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    keys, expected = list(host.state_dict()), host(IMAGES)
    grown = attach(host, {"r0c0": "0", "r1c0": "2"}, IMAGES)
    assert torch.equal(host(IMAGES), expected)
    assert list(host.state_dict()) == keys
    grown.slots["r1c0"].plant(seed_for(grown, "r1c0"))
    with grown.override({"r1c0": 1.0}):
        assert torch.equal(host(IMAGES), expected + grown.slots["r1c0"].seed(expected))


class OwnOrder(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[-1](x)


@pytest.mark.parametrize("root", [OwnOrder(nn.Linear(4, 4)), nn.ModuleList([nn.Linear(4, 4)])])
def test_a_root_that_iterates_over_its_children_in_its_own_way_is_refused(root):
    with pytest.raises(ConfigError, match="is itself a container: make it a child of a module of your own"):
        attach(root, {"r0c0": "0"}, VECTORS)


def test_a_root_whose_fused_path_the_hooks_would_switch_off_is_refused():
    with pytest.raises(ConfigError, match="the root TransformerEncoderLayer is itself a fused layer: make it a child"):
        attach(nn.TransformerEncoderLayer(4, 2, 8), {"r0c0": "linear1"}, torch.zeros(2, 3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_dry_run_leaves_the_stream_of_the_device_untouched():
    model = images().cuda()
    model.drop.train()
    before = torch.cuda.get_rng_state()
    attach(model, WHERE, IMAGES.cuda())
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_parameters_without_a_gradient_are_named_and_nothing_is_touched() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.norm(self.used(x)))

    host, x = Idle(), torch.randn(4, 3)
    grown = attach(host, {"r0c0": "used"}, x)
    before, rng = {k: v.clone() for k, v in host.state_dict().items()}, torch.get_rng_state()
    assert grown.parameters_without_gradient(x) == ["idle.weight", "idle.bias"]
    assert all(torch.equal(before[key], value) for key, value in host.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in host.parameters())
    host.idle.requires_grad_(False)
    assert grown.parameters_without_gradient(x) == []

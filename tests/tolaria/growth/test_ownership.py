"""One owner of parameters against plain torch: steps, membership, clipping, what is not finite."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.slots.grown import HOST
from esper.kasmina.slots.sites import CONTAINER
from esper.tolaria.growth.config import OptimConfig, OptimizerKind, Schedule
from esper.tolaria.growth.ownership import ParameterOwner
from tests.support.parameter_owners import (
    ADAMW,
    FUSED,
    INF,
    KINDS,
    NAN,
    SGD,
    STEPS,
    birth,
    equal,
    give_gradients,
    grown_host,
    moments,
    owners,
    told,
    train,
    values,
)
from tests.support.tensor_reads import counted_reads


class Plain:
    """torch's own optimizer over the same names, in the order of plain `named_parameters`, one group a tensor."""

    def __init__(self, config: OptimConfig, named: dict[str, Tensor]) -> None:
        self.config = config
        made = {name: nn.Parameter(value.clone()) for name, value in named.items()}
        groups = [self.group(name, parameter) for name, parameter in made.items()]
        if config.kind is OptimizerKind.SGD:
            self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=config.fused)
        else:
            betas = (config.beta1, config.beta2)
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=config.fused)
        self.parameters = made

    def group(self, name: str, parameter: nn.Parameter) -> dict:
        decay = self.config.seed_weight_decay if CONTAINER in name else self.config.weight_decay
        return {"params": [parameter], "weight_decay": decay if parameter.ndim > 1 else 0.0}

    def add(self, named: dict[str, Tensor]) -> None:
        for name, value in named.items():
            self.parameters[name] = nn.Parameter(value.clone())
            self.optimizer.add_param_group(self.group(name, self.parameters[name]) | {"lr": self.config.lr})

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone() if name in gradients else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


# stepping against plain torch -------------------------------------------------------------------------------------


@KINDS
def test_steps_are_those_of_plain_torch_bit_for_bit_over_two_growths(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    plain = Plain(config, values(grown))
    births = {5: "r1c0", 9: "r0c1"}
    for step in range(15):
        if step in births:
            before = values(grown)
            birth(grown, owner, births[step])
            plain.add({name: value for name, value in values(grown).items() if name not in before})
        gradients = give_gradients(grown, step)
        lr = owner.set_lr(step, {})
        owner.step()
        plain.step(gradients, lr)
        found = values(grown)
        assert equal(found, {name: plain.values()[name] for name in found})
    assert len(plain.parameters) == 7 + 4


def test_decay_is_for_matrices_and_seeds_have_their_own():
    config = replace(ADAMW, weight_decay=0.3, seed_weight_decay=0.2)
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r0c0")
    decay = {id(p): group["weight_decay"] for group in owner.optimizer.param_groups for p in group["params"]}
    for name, parameter in grown.model.named_parameters():
        own = 0.2 if name.startswith(CONTAINER) else 0.3
        assert decay[id(parameter)] == (own if name.endswith("weight") else 0.0), name


# membership -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [["r1c0", "r0c0", "r0c1"], ["r0c1", "r1c0", "r0c0"], ["r0c0", "r0c1", "r1c0"]])
def test_groups_stand_in_canonical_order_whatever_the_order_of_birth(order):
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    for slot in order:
        birth(grown, owner, slot)
    assert owners(owner) == [name for name in (HOST, "r0c0", "r0c1", "r1c0") for _ in range(2)]
    owner.release("r0c1")
    grown.slots["r0c1"].uproot()
    assert owners(owner) == [name for name in (HOST, "r0c0", "r1c0") for _ in range(2)]
    birth(grown, owner, "r0c1")
    assert owners(owner) == [name for name in (HOST, "r0c0", "r0c1", "r1c0") for _ in range(2)]


@KINDS
def test_moments_survive_a_growth_and_the_new_start_at_zero(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r1c0")
    train(grown, owner, range(5))
    before = moments(owner)
    assert before
    assert any(value.abs().max() > 0 for value in before.values())
    birth(grown, owner, "r0c0")
    assert equal({k: v for k, v in moments(owner).items() if k in before}, before)
    fresh = f"{CONTAINER}.r0c0.seed.weight"
    assert owner.state_by_name()[fresh] == {}
    train(grown, owner, range(5, 6))
    if config.kind is OptimizerKind.ADAMW:
        assert owner.state_by_name()[fresh]["step"] == 1
        assert owner.state_by_name()["scale"]["step"] == 6


@KINDS
def test_release_leaves_nothing_of_a_seed(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r0c1")
    birth(grown, owner, "r1c0")
    train(grown, owner, range(3))
    seed = grown.slots["r0c1"].seed
    gone = [weakref.ref(seed), *(weakref.ref(parameter) for parameter in seed.parameters())]
    kept = {k: v for k, v in moments(owner).items() if "r0c1" not in k}
    count = len(owner.optimizer.state)
    owner.release("r0c1")
    grown.slots["r0c1"].uproot()
    del seed
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    assert len(owner.optimizer.state) == count - 2
    assert "r0c1" not in owners(owner)
    assert equal(moments(owner), kept)
    assert not any("r0c1" in name for name in owner.gradient_set())
    train(grown, owner, range(3, 5))


def test_a_seed_without_parameters_is_owned_and_released():
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    grown.slots["r0c0"].plant(nn.Identity())
    owner.register("r0c0")
    assert "r0c0" in owner.owned_slots()
    assert owners(owner) == [HOST, HOST]
    owner.release("r0c0")
    train(grown, owner, range(1))


def test_owned_means_once_and_in_the_slots_own_group():
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    birth(grown, owner, "r0c0")
    assert "r0c0" in owner.owned_slots()
    extra = nn.Parameter(torch.zeros(2))
    grown.slots["r0c0"].seed.extra = extra
    assert "r0c0" not in owner.owned_slots()  # stands in no group
    owner.optimizer.param_groups[0]["params"].append(extra)
    assert "r0c0" not in owner.owned_slots()  # stands in the host's
    owner.optimizer.param_groups[0]["params"].pop()
    owner.optimizer.param_groups[-1]["params"].append(extra)
    assert "r0c0" in owner.owned_slots()
    owner.optimizer.param_groups[0]["params"].append(extra)
    assert "r0c0" not in owner.owned_slots()  # stands in two


def test_a_frozen_seed_has_no_gradient_no_update_and_no_place_in_the_gradient_set():
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    host = tuple(name for name, _ in grown.model.named_parameters())
    birth(grown, owner, "r1c0")
    birth(grown, owner, "r0c0")
    seeds = [f"{CONTAINER}.{slot}.seed.{name}" for slot in ("r0c0", "r1c0") for name in ("weight", "bias")]
    assert owner.gradient_set() == (*host, *seeds)
    give_gradients(grown, 0)
    owner.set_learning("r0c0", False)
    assert owner.gradient_set() == (*host, *seeds[2:])
    assert all(p.grad is None for p in grown.slots["r0c0"].seed.parameters())
    before = values(grown)
    train(grown, owner, range(3))
    after = values(grown)
    assert {name for name in after if torch.equal(after[name], before[name])} == set(seeds[:2])


# clipping and what is not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.5, 2.5, 1e6])
def test_each_owner_is_clipped_by_itself_as_torch_clips(clip):
    config = replace(SGD, clip_norm=clip, momentum=0.0, weight_decay=0.0, lr=1.0, schedule=Schedule.CONSTANT)
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r0c0")
    birth(grown, owner, "r1c0")
    before = values(grown)
    gradients = give_gradients(grown, 0)
    for name in gradients:
        if "r1c0" in name:
            grown.model.get_parameter(name).grad.mul_(0.01)
            gradients[name] *= 0.01
    expected, norms = {}, {}
    for who in (HOST, "r0c0", "r1c0"):
        own = {name: g for name, g in gradients.items() if (who in name if who != HOST else CONTAINER not in name)}
        stand_ins = [nn.Parameter(torch.zeros_like(g)) for g in own.values()]
        for stand_in, gradient in zip(stand_ins, own.values()):
            stand_in.grad = gradient.clone()
        norms[who] = torch.nn.utils.clip_grad_norm_(stand_ins, clip).item()
        expected |= {name: before[name] - stand_in.grad for name, stand_in in zip(own, stand_ins)}
    owner.set_lr(0, {"r0c0": 0, "r1c0": 0})
    report = told(owner.step())
    assert report.norms == pytest.approx(norms, rel=1e-6)
    assert (report.broken, report.skipped) == ((), False)
    for name, value in values(grown).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in grown.model.parameters())


@KINDS
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_slots_broken_gradient_is_dropped_and_touches_nobody_else(config, poison, clip):
    config = replace(config, clip_norm=clip)
    worlds = []
    for broken in (False, True):
        grown = grown_host()
        owner = ParameterOwner(grown, config, STEPS)
        birth(grown, owner, "r0c0")
        birth(grown, owner, "r1c0")
        train(grown, owner, range(3))
        before = values(grown)
        give_gradients(grown, 3)
        if broken:
            grown.slots["r0c0"].seed.weight.grad[1, 2] = poison
        owner.set_lr(3, {})
        worlds.append((grown, owner, before, told(owner.step())))
    (healthy, healthy_owner, _, healthy_report), (grown, owner, before, report) = worlds
    assert (report.broken, report.skipped) == (("r0c0",), False)
    assert report.norms == {name: norm for name, norm in healthy_report.norms.items() if name != "r0c0"}
    mine = [name for name in before if "r0c0" in name]
    assert len(mine) == 2
    for name, value in values(grown).items():
        assert torch.equal(value, before[name] if name in mine else values(healthy)[name]), name
    ours = moments(owner)
    for key, moment in moments(healthy_owner).items():
        assert torch.equal(ours[key], moment) == ("r0c0" not in key), key
    assert all(p.grad is None for p in grown.model.parameters())


@KINDS
def test_a_broken_host_gradient_skips_the_whole_step(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r0c0")
    train(grown, owner, range(3))
    before, before_moments = values(grown), moments(owner)
    give_gradients(grown, 3)
    grown.model.scale.grad[0] = NAN
    report = told(owner.step())
    assert (report.broken, report.skipped) == ((HOST,), True)
    assert set(report.norms) == {"r0c0"}
    assert equal(values(grown), before)
    assert equal(moments(owner), before_moments)
    assert all(p.grad is None for p in grown.model.parameters())


@KINDS
def test_a_first_step_that_is_left_out_is_as_if_it_had_not_been(config):
    """A fused kernel that leaves a first step out leaves its memory as it found it."""
    found = []
    for broken in (HOST, "r0c0", ""):
        grown = grown_host()
        owner = ParameterOwner(grown, config, STEPS)
        birth(grown, owner, "r0c0")
        give_gradients(grown, 0)
        if broken:
            whose = grown.model.scale if broken == HOST else grown.slots["r0c0"].seed.weight
            whose.grad[0] = NAN
            owner.step()
        train(grown, owner, range(1, 4))
        found.append((values(grown), moments(owner)))
    seed = [name for name in found[0][0] if "r0c0" in name]
    assert len(seed) == 2
    for (host_values, host_moments), wanted in ((found[0], found[2]), (found[1], found[0])):
        same = [name for name in wanted[0] if torch.equal(host_values[name], wanted[0][name])]
        assert same == (list(wanted[0]) if wanted is found[2] else seed)
        assert all(moment.isfinite().all() for moment in host_moments.values())


@pytest.mark.parametrize(("config", "waits"), [(ADAMW, 1), (FUSED[0], 0), (FUSED[1], 0)])
def test_a_fused_step_waits_for_no_device_and_every_other_once(config, waits, monkeypatch):
    grown = grown_host()
    owner = ParameterOwner(grown, replace(config, clip_norm=1.0), STEPS)
    birth(grown, owner, "r0c0")
    train(grown, owner, range(2))
    give_gradients(grown, 2)
    grown.slots["r0c0"].seed.weight.grad[0] = NAN
    optimizer = owner.optimizer.step
    reads = counted_reads(monkeypatch)

    def uncounted() -> None:  # on a CPU an unfused torch optimizer reads its own step counts
        before = len(reads)
        optimizer()
        del reads[before:]

    if not config.fused:
        monkeypatch.setattr(owner.optimizer, "step", uncounted)
    step = owner.step()
    assert len(reads) == waits
    assert told(step).broken == ("r0c0",)
    assert len(reads) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [ADAMW, SGD])
def test_on_a_gpu_torch_sees_no_wait_in_a_step(config):
    grown = grown_host()
    grown.model.to("cuda")
    owner = ParameterOwner(grown, replace(config, clip_norm=1.0), STEPS)
    assert owner.late
    steps = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(4):
            for parameter in grown.model.parameters():
                parameter.grad = torch.ones_like(parameter) * (NAN if number == 2 else 1.0)
            owner.set_lr(number, {})
            steps.append(owner.step())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [told(step).skipped for step in steps] == [False, False, True, False]


@KINDS
def test_norms_are_those_of_torch_to_the_bit(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r0c0")
    gradients = give_gradients(grown, 0)
    seed = [gradient for name, gradient in gradients.items() if "r0c0" in name]
    host = [grown.model.get_parameter(name).grad for _, name in _as_grouped(owner)]
    wanted = {HOST: torch.nn.utils.get_total_norm(host).item(), "r0c0": torch.nn.utils.get_total_norm(seed).item()}
    assert told(owner.step()).norms == wanted


def _as_grouped(owner: ParameterOwner) -> list[tuple[str, str]]:
    """Owner and name of the host's parameters, as they stand in its groups."""
    names = {id(p): name for name, p in owner.grown.model.named_parameters()}
    groups = [group for group in owner.optimizer.param_groups if group["owner"] == HOST]
    return [(HOST, names[id(p)]) for group in groups for p in group["params"]]


@KINDS
def test_a_step_without_any_gradient_changes_nothing(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    before = values(grown)
    report = told(owner.step())
    assert (report.norms, report.broken, report.skipped) == ({}, (), False)
    assert equal(values(grown), before)

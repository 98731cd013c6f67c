"""Gradient health: shares weighted by parameters, counts of what is not a number, and a reading once a tick."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esper.tolaria.growth import health
from esper.tolaria.growth.health import GradientMeter, OwnerHealth, norms_batched, norms_one_by_one, sample_rows
from tests.support.tensor_reads import counted_reads


def meter(**changes) -> GradientMeter:
    return GradientMeter(**{"vanishing_rms": 1e-3, "exploding_rms": 1e3, "every": 1, **changes})


def full(rms: float, *shape: int) -> Tensor:
    """A tensor of that root mean square, with both signs."""
    signs = torch.tensor([1.0, -1.0]).repeat(math.prod(shape))[: math.prod(shape)]
    return (rms * signs).reshape(shape)


def without_sizes(found: dict[str, OwnerHealth]) -> dict[str, OwnerHealth]:
    """The sums without those of RMS."""
    return {owner: replace(one, numbers=0) for owner, one in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [[3], [1, 5, 7], [40_000, 2, 3, 20_000, 1], [40_000, 20_000], [0, 4, 6]])
def test_norms_are_those_of_each_tensor_batched_or_one_by_one(sizes, dtype):
    torch.manual_seed(4)
    tensors = [(torch.randn(size) * 10.0**power).to(dtype) for power, size in enumerate(sizes)]
    expected = [math.sqrt(math.fsum(x * x for x in tensor.double().tolist())) for tensor in tensors]
    rel = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    for norms in (norms_one_by_one(tensors), norms_batched(tensors)):
        assert norms.dtype is torch.float64
        assert norms.tolist() == pytest.approx(expected, rel=rel, abs=0.0)


def test_batched_norms_take_matrices_views_and_scalars():
    tensors = [torch.randn(3, 4).t(), torch.randn(5, 2)[::2], torch.randn(()), torch.randn(2, 3, 3, 3)]
    assert torch.allclose(norms_batched(tensors), norms_one_by_one(tensors), rtol=1e-6)
    broken = [torch.full((2,), math.nan), torch.full((2,), math.inf), torch.ones(4)]
    assert [str(x) for x in norms_batched(broken).tolist()] == ["nan", "inf", "2.0"]


def test_shares_count_parameters_and_not_tensors():
    own = meter()
    own.step({"host": [full(1.0, 60), full(1e-4, 30), full(1e4, 2, 5)], "r0c0": [full(1e-4, 8), full(1.0, 2, 4)]}, {})
    found = own.take()
    assert (found["host"].vanishing, found["host"].exploding) == (pytest.approx(0.3), pytest.approx(0.1))
    assert (found["r0c0"].vanishing, found["r0c0"].exploding) == (0.5, 0.0)
    assert {(one.health_steps, one.nans, one.infs) for one in found.values()} == {(1, 0, 0)}


@pytest.mark.parametrize("factor", [1, 10, 100])
def test_a_larger_tensor_of_the_same_gradient_is_as_healthy(factor):
    own = meter()
    own.step({"r0c0": [full(0.5, 4 * factor), full(1e-5, factor)]}, {})
    assert without_sizes(own.take())["r0c0"] == OwnerHealth(pytest.approx(0.2), 0.0, 1, 0, 0)


def norms(**tensors: list[Tensor]) -> dict[str, Tensor]:
    return {owner: norms_one_by_one(found) for owner, found in tensors.items()}


def test_what_is_not_finite_is_counted_by_tensor_and_kind_and_neither_vanishes_nor_explodes():
    own = meter(every=4)
    nan, inf, fine = torch.ones(10), torch.ones(10), torch.ones(30)
    nan[:3], nan[3], inf[4] = math.nan, -math.inf, -math.inf
    own.step({"host": [fine], "r0c0": [fine]}, norms(host=[fine], r0c0=[fine]))
    own.step({"host": [fine], "r0c0": [nan, inf, fine]}, norms(r0c0=[nan, inf, fine]))
    own.step({"host": [inf, inf], "r0c0": [nan]}, norms(host=[inf, inf], r0c0=[nan]))
    own.step({"host": [inf, fine], "r0c0": [nan]}, norms(host=[inf, fine], r0c0=[nan]))
    found = own.take()
    assert (found["r0c0"].nans, found["r0c0"].infs) == (3, 1)
    assert (found["host"].nans, found["host"].infs) == (0, 3)
    own.step({"r0c0": [nan, full(1e4, 30)]}, norms(r0c0=[nan, full(1e4, 30)]))
    assert without_sizes(own.take()) == {"r0c0": OwnerHealth(0.0, pytest.approx(0.75), 1, 1, 0)}


def test_the_first_step_after_a_reading_is_sampled_and_then_every_nth():
    own = meter(every=3)
    for steps, sampled in ((1, 1), (3, 1), (4, 2), (7, 3)):
        for step in range(steps):
            own.step({"host": [full(1e-4 if step % 3 == 0 else 1.0, 6)]}, {})
        assert without_sizes(own.take()) == {"host": OwnerHealth(float(sampled), 0.0, sampled, 0, 0)}
    assert own.take() == {}


def test_owners_may_come_and_go_between_readings():
    own = meter()
    own.step({"host": [full(1e-4, 6)]}, {})
    own.step({"host": [full(1e-4, 6)], "r0c0": [full(1.0, 2)]}, {})
    own.step({}, {})
    own.step({"host": [full(1.0, 6)]}, {})
    assert without_sizes(own.take()) == {"host": OwnerHealth(2.0, 0.0, 3, 0, 0), "r0c0": OwnerHealth(0.0, 0.0, 1, 0, 0)}


def test_both_paths_give_the_same_shares(monkeypatch):
    torch.manual_seed(1)
    gradients = {
        "host": [torch.randn(50) * 10.0**p for p in range(-6, 6)],
        "r0c0": [torch.randn(20_000), torch.randn(3)],
    }
    batched, plain = meter(), meter()
    batched.step(gradients, {})
    monkeypatch.setattr(health, "norms_batched", norms_one_by_one)
    plain.step(gradients, {})
    assert batched.take() == plain.take()


def test_a_step_waits_for_no_device_and_a_reading_waits_once(monkeypatch):
    gradients = {"host": [torch.randn(50), torch.randn(20_000)], "r0c0": [torch.full((4,), math.nan)]}
    own = meter()
    reads = counted_reads(monkeypatch)
    for _ in range(3):
        own.step(gradients, norms(r0c0=gradients["r0c0"]))
    assert reads == []
    own.take()
    assert reads == ["tolist", "tolist"], "one for the shares, one for the owner that was broken"


def test_what_was_taken_goes_on_elsewhere():
    """A window that is saved in its middle."""
    torch.manual_seed(3)
    steps = [{"host": [torch.randn(4) * 10.0**-step], "r0c0": [torch.tensor([1.0, torch.nan])]} for step in range(6)]
    options = {"vanishing_rms": 1e-2, "exploding_rms": 1.0, "every": 2}
    whole, first, second = (GradientMeter(**options) for _ in range(3))
    for index, gradients in enumerate(steps):
        whole.step(gradients, norms(r0c0=gradients["r0c0"]))
        (first if index < 3 else second).step(gradients, norms(r0c0=gradients["r0c0"]))
        if index == 2:
            second.load(first.state(), torch.device("cpu"))
    assert second.take() == whole.take()


def step_once(own: GradientMeter, optimizer: torch.optim.Optimizer, groups: dict[str, list[dict]]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    gradients = {owner: [p.grad for group in mine for p in group["params"]] for owner, mine in groups.items()}
    own.step(gradients, {}, groups)
    optimizer.step()
    own.count_moved()


@pytest.mark.parametrize("rate", [1e-4, 1e-2])
def test_a_half_precision_seed_whose_weights_stand_still_is_seen(rate):
    """Near 1 the last digit of bfloat16 is 2^-8 below: a step of 1e-4 rounds to nothing, though the gradient is 1."""
    rows = {"r0c0": torch.ones(6, dtype=torch.bfloat16), "r0c1": torch.ones(4), "host": torch.ones(3)}
    groups = {owner: [{"params": [torch.nn.Parameter(value)]}] for owner, value in rows.items()}
    optimizer = torch.optim.SGD([group for mine in groups.values() for group in mine], lr=rate)
    own = meter(every=2)
    for _ in range(5):
        step_once(own, optimizer, groups)
    found = own.take()
    assert {owner: (one.moved, one.moved_steps) for owner, one in found.items()} == {
        "r0c0": (0.0 if rate < 1e-3 else 3.0, 3),
        "r0c1": (3.0, 3),
        "host": (0.0, 0),
    }
    assert found["r0c0"].vanishing == 0.0, "its gradient is as healthy as the other's"


def test_shares_that_moved_count_numbers_and_go_on_elsewhere():
    """One weight of eight is large, so that it stands still; the reading survives a save in its middle."""
    value = torch.tensor([1.0, *[1e-3] * 7], dtype=torch.bfloat16)
    groups = {"r0c0": [{"params": [torch.nn.Parameter(value)]}]}
    optimizer, first, second = torch.optim.SGD(groups["r0c0"], lr=1e-4), meter(), meter()
    step_once(first, optimizer, groups)
    second.load(first.state(), torch.device("cpu"))
    step_once(second, optimizer, groups)
    found = second.take()["r0c0"]
    assert (found.moved, found.moved_steps) == (2 * 7 / 8, 2)
    assert second.take() == {}


def test_the_size_of_an_update_is_a_root_of_a_mean_square_over_an_owner():
    """Of the host it is measured only beside a seed that learns."""
    torch.manual_seed(0)
    values = {"host": [torch.randn(4, 3), torch.randn(5)], "r0c0": [torch.randn(2, 2)]}
    groups = {owner: [{"params": [torch.nn.Parameter(v) for v in own]}] for owner, own in values.items()}
    parameters = {owner: own[0]["params"] for owner, own in groups.items()}
    optimizer, own = torch.optim.AdamW([*groups["host"], *groups["r0c0"]], lr=0.1), meter()
    wanted = dict.fromkeys(("host", "r0c0"), 0.0)
    for _ in range(3):
        before = {owner: torch.cat([p.detach().flatten() for p in mine]) for owner, mine in parameters.items()}
        for p in (p for mine in parameters.values() for p in mine):
            p.grad = torch.randn_like(p)
        gradients = {owner: [p.grad for p in mine] for owner, mine in parameters.items()}
        own.step(gradients, {}, groups)
        optimizer.step()
        own.count_moved()
        for owner, mine in parameters.items():
            change = torch.cat([p.detach().flatten() for p in mine]) - before[owner]
            wanted[owner] += float(change.square().mean().sqrt())
    found = own.take()
    for owner, update in wanted.items():
        assert found[owner].update_steps == 3
        assert found[owner].update_rms == pytest.approx(update, rel=1e-5)
    assert {owner: one.numbers for owner, one in found.items()} == {"host": 3 * 17, "r0c0": 3 * 4}
    parameters["r0c0"][0].grad = None
    own.step({"host": gradients["host"]}, {}, groups)
    own.count_moved()
    (host,) = own.take().values()
    assert (host.numbers, host.update_steps) == (17, 0)


def test_of_a_large_host_a_share_of_each_tensor_is_copied(monkeypatch):
    monkeypatch.setattr("esper.tolaria.growth.health.MOST_COPIED", 30)
    tensors = [torch.zeros(20, 2), torch.zeros(10), torch.zeros(10), torch.zeros(())]
    assert [len(t) if t.ndim else 1 for t in sample_rows(tensors)] == [9, 4, 4, 1]

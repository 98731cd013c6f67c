"""Attribution that shares prefixes: to the bits of full forwards, and exactly the work that its account says."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.attribution.coalitions import Plan, QuantityKind, make_plan
from esper.kasmina.attribution.prefixes import How
from esper.kasmina.attribution.worth import blended, readings
from esper.kasmina.compiler import Compiler
from esper.kasmina.slots.confidence import confident
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.regions import region_of
from esper.leyline.alpha import Operator
from tests.support.grown_hosts import Delta, attribute, batches_for, classify, grown_for, plant

SEEDS = {
    "cnn": {"r0c0": 1.0, "r0c1": 0.5, "r2c0": 1.0},
    "resnet20": {"r0c0": 0.5, "r1c0": 1.0, "r2c0": 1.0},
    "gpt": {"r0c1": 1.0, "r0c2": 0.25, "r1c0": 0.5, "r2c1": 1.0, "r2c0": 1.0},
}
ONLY = (QuantityKind.LEAVE_ONE_OUT,)


def grow(kind: str) -> Grown:
    """Seeds in blend per `SEEDS`, and one that nobody asks about."""
    grown = grown_for(kind, SEEDS[kind])
    other = {"cnn": "r1c0", "gpt": "r1c2"}.get(kind)
    if other is not None:
        site = grown.sites[other]
        plant(grown, other, Delta(site.dim, site.topology.channel_axis).double(), 0.5)
    return grown


def plans(kind: str) -> list[Plan]:
    exact = {} if len(SEEDS[kind]) < 5 else {"pairs": 3}
    return [make_plan(SEEDS[kind], **exact), make_plan(SEEDS[kind], ask=ONLY), make_plan(SEEDS[kind], pairs=2)]


@pytest.mark.parametrize("kind", SEEDS)
def test_shared_prefixes_give_the_bits_of_full_forwards(kind):
    grown, batches = grow(kind), batches_for(kind)
    for plan in plans(kind):
        shared, full = (attribute(grown, plan, batches, classify, how=how) for how in (How.SHARED, How.FULL))
        assert shared.order == grown.model.slot_order()
        assert full.order is None
        assert [x.hex() for x in shared.vector()] == [x.hex() for x in full.vector()]
        assert shared.forwards == 3 * len(plan.coalitions)


@pytest.mark.parametrize("kind", SEEDS)
def test_under_autocast_too(kind):
    grown, batches = grow(kind), batches_for(kind)
    grown.model.float()
    batches = [(x.float() if x.is_floating_point() else x, y) for x, y in batches]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared, full = (attribute(grown, plans(kind)[0], batches, classify, how=how) for how in (How.SHARED, How.FULL))
    assert shared.vector() == full.vector()


def flops(work: Any, *args: Any, **kwargs: Any) -> int:
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter, torch.no_grad():
        work(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", SEEDS)
def test_the_account_times_the_costs_of_parts_and_seeds_is_what_torch_counts(kind):
    grown, batches = grow(kind), batches_for(kind, (2, 1))
    model, x = grown.model.eval(), batches[0][0]
    off = dict.fromkeys(SEEDS[kind], 0.0)
    parts: dict[tuple[str | None, str | None], int] = {}  # of the host, and of the seed that nobody asks about

    def of(start: str | None, until: str | None) -> int:
        if (start, until) not in parts:
            with grown.override(off), torch.no_grad():
                state = None if start is None else model.forward_to(x, start)
                if start is not None:
                    parts[start, until] = flops(model.forward_from, state, start, until=until)
                else:
                    parts[start, until] = flops(*((model, x) if until is None else (model.forward_to, x, until)))
        return parts[start, until]

    def of_seed(slot: str) -> int:
        with grown.override(off):
            without = flops(model, x)
        with grown.override(off | {slot: SEEDS[kind][slot]}):
            return flops(model, x) - without

    seeds = {slot: of_seed(slot) for slot in SEEDS[kind]}
    assert min(seeds.values()) > 0
    for plan, how in ((plans(kind)[1], How.SHARED), (plans(kind)[1], How.FULL), (plans(kind)[2], How.STACKED)):
        sums = attribute(grown, plan, batches, classify, how=how)
        wanted = sum(n * (of(e.start, e.until) + sum(seeds[s] for s in e.seeds)) for e, n in sums.work().items())
        assert flops(attribute, grown, plan, batches, classify, how=how) * len(x) == wanted
        assert sums.samples == 3


def test_leave_one_out_of_three_seeds_runs_each_module_as_often_as_the_tree_says():
    grown, batches = grow("cnn"), batches_for("cnn", (6,))
    calls: Counter[str] = Counter()
    modules = dict(grown.model.named_modules())
    watched = {name: m for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.Linear)}
    for name, module in watched.items():
        plain = module.forward
        module.forward = lambda *a, n=name, f=plain: (calls.update([n]), f(*a))[1]
    attribute(grown, make_plan(SEEDS["cnn"], ask=ONLY), batches, classify)
    seeds = {slot: f"esper_slots.{slot}.seed.map" for slot in grown.slots if grown.slots[slot].seed is not None}
    assert calls == {
        "stages.0.conv": 1,
        seeds["r0c0"]: 1,
        "pools.0": 2,
        seeds["r0c1"]: 2,
        "stages.1.conv": 3,
        seeds["r1c0"]: 3,
        "pools.1": 3,
        "stages.2.conv": 3,
        seeds["r2c0"]: 3,
        "head": 4,
    }


class Restless(nn.Module):
    """A seed that draws random numbers in eval() too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)


def test_seeds_that_draw_see_the_numbers_that_a_full_forward_would_hand_them():
    grown, batches = grown_for("cnn", {}), batches_for("cnn")
    for slot in ("r0c0", "r0c1", "r2c0"):
        plant(grown, slot, Restless(), 1.0)
    stream = torch.get_rng_state()
    plan = make_plan(blended(grown))
    shared, full = (attribute(grown, plan, batches, classify, how=how) for how in (How.SHARED, How.FULL))
    assert shared.vector() == full.vector()
    assert len({row[0] for row in shared.moments}) == len(plan.quantities)
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_hook_of_somebody_elses_is_not_passed_over():
    grown, batches = grow("gpt"), batches_for("gpt")
    plan = make_plan(SEEDS["gpt"], ask=ONLY)
    handle = grown.model.blocks[1].register_forward_hook(lambda m, a, out: out * 2.0)
    with_hook = attribute(grown, plan, batches, classify)
    assert with_hook.order is None
    assert with_hook.vector() == attribute(grown, plan, batches, classify, how=How.FULL).vector()
    handle.remove()
    assert attribute(grown, plan, batches, classify).vector() != with_hook.vector()


def test_only_what_was_asked_is_run_and_read():
    grown, batches = grow("resnet20"), batches_for("resnet20")
    every = readings(attribute(grown, make_plan(SEEDS["resnet20"]), batches, classify), tick=1, min_samples=2)
    sums = attribute(grown, make_plan(SEEDS["resnet20"], ask=ONLY), batches, classify)
    assert sums.forwards == 3 * 4
    few = readings(sums, tick=1, min_samples=2)
    assert few.leave_one_out == every.leave_one_out
    assert (few.shapley, few.solo, few.coalitions) == ({}, {}, {})
    ask = (QuantityKind.COALITION,)
    alone = readings(attribute(grown, make_plan(SEEDS["resnet20"], ask=ask), batches, classify), tick=1, min_samples=2)
    assert (alone.solo, alone.together) == (every.solo, every.together)
    assert not math.isclose(every.solo["r0c0"].loss.value, every.leave_one_out["r0c0"].loss.value, abs_tol=1e-6)


def test_class_logits_depend_on_every_seed_so_that_nothing_is_shared_and_the_forward_that_makes_them_is_counted():
    grown, batches = grow("cnn"), batches_for("cnn", (3,))
    grown.slots["r0c1"].operator = Operator.CONFIDENCE
    plan = make_plan(SEEDS["cnn"], ask=ONLY)
    sums = attribute(grown, plan, batches, classify)
    assert (sums.order, sums.asking) == (None, ("r0c1",))
    calls: Counter[str] = Counter()
    grown.model.head.register_forward_pre_hook(lambda *_: calls.update(["head"]))
    attribute(grown, plan, batches, classify)
    assert calls["head"] * 3 == sums.work().total() == (4 + 3) * 3  # one of the four is without that seed
    x, target = batches[0]
    for slot, worth in readings(sums, tick=1, min_samples=2).leave_one_out.items():
        value = []
        for others in ({}, {slot: 0.0}):
            with grown.override(SEEDS["cnn"] | others), confident(grown, x), torch.no_grad():
                value.append(-classify(grown.model.eval()(x), target)[0].mean().item())
        assert worth.loss.value == pytest.approx(value[0] - value[1], abs=1e-12)


@pytest.mark.parametrize("kind", ["cnn", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_a_compiled_host_shares_prefixes_to_the_same_bits_without_another_graph(kind):
    grown, batches = grow(kind), batches_for(kind, (6, 6))
    plan = make_plan(SEEDS[kind], ask=ONLY)
    eager = attribute(grown, plan, batches, classify)
    Compiler(grown, "eager", train_sizes=(6,), eval_sizes=(6,)).host(batches[0][0])
    regions = [region for module in grown.model.modules() if (region := region_of(module)) is not None]
    compiles = [region.graphs for region in regions]
    assert sum(compiles) > 0
    shared, full = (attribute(grown, plan, batches, classify, how=how) for how in (How.SHARED, How.FULL))
    assert shared.order is not None
    assert shared.vector() == full.vector() == pytest.approx(eager.vector(), abs=1e-12)
    assert [region.graphs for region in regions] == compiles

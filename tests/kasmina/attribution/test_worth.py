"""Attribution of real grown models against copies without the seeds, closed forms and plain statistics."""

import copy
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.attribution.coalitions import Plan, make_plan
from esper.kasmina.attribution.worth import Attribution, blended, readings
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import ABSENT
from tests.support.dist import ROOT
from tests.support.grown_hosts import attribute, batches_for, branches, classify, deltas, grown_for, plant
from tests.support.tiny import bits

CASES = [
    ("BCHW", {"r0c0": 1.0, "r0c1": 0.25, "r1c0": 0.5}),
    ("BTC", {"r0c0": 0.75, "r1c0": 1.0}),
    ("BC", {"r0c0": 1.0, "r1c0": 0.5, "r3c0": 0.75, "r4c0": 1.0}),
    ("cnn", {"r0c0": 1.0, "r0c1": 0.5, "r1c1": 0.75, "r2c0": 1.0}),
    ("resnet20", {"r0c0": 0.5, "r1c0": 1.0, "r2c0": 1.0}),
    ("gpt", {"r0c1": 1.0, "r1c0": 0.5, "r1c1": 1.0, "r2c2": 0.75}),
]


def values_of_copies(grown: Grown, batches: list[Any]) -> Callable[[frozenset[str]], list[tuple[float, float]]]:
    """Per-sample (minus loss, correct) of deep copies in which only the seeds of a coalition are left."""
    known: dict[frozenset[str], list[tuple[float, float]]] = {}

    def value(coalition: frozenset[str]) -> list[tuple[float, float]]:
        if coalition not in known:
            twin = Grown(copy.deepcopy(grown.model).eval(), grown.sites)
            for slot in twin.slots:
                if slot not in coalition and twin.slots[slot].seed is not None:
                    twin.slots[slot].uproot()
            known[coalition] = []
            for inputs, target in batches:
                with torch.no_grad():
                    loss, correct = classify(twin.model(*(inputs if isinstance(inputs, tuple) else (inputs,))), target)
                known[coalition] += zip((-loss).tolist(), correct.tolist())
        return known[coalition]

    return value


def means(within: list[Any], without: list[Any]) -> list[float]:
    return [statistics.fmean(a[unit] - b[unit] for a, b in zip(within, without)) for unit in (0, 1)]


def numbers(worth) -> list[float]:
    return [worth.loss.value, worth.accuracy.value]


def measure(grown: Grown, batches: list[Any], plan: Plan | None = None, per_sample=classify) -> Attribution:
    return readings(attribute(grown, plan or make_plan(blended(grown)), batches, per_sample), tick=7, min_samples=2)


@pytest.mark.parametrize(("kind", "alphas"), CASES, ids=[kind for kind, _ in CASES])
def test_counterfactuals_equal_those_of_copies_without_the_seeds(kind, alphas):
    grown, batches = grown_for(kind, alphas), batches_for(kind)
    found, value = measure(grown, batches), values_of_copies(grown, batches)
    everyone, nobody = frozenset(alphas), frozenset[str]()
    assert len(found.coalitions) == 2 ** len(alphas) - 1
    for members, worth in found.coalitions.items():
        assert numbers(worth) == pytest.approx(means(value(frozenset(members)), value(nobody)), abs=1e-12)
    assert numbers(found.together) == pytest.approx(means(value(everyone), value(nobody)), abs=1e-12)
    assert all(worth.loss.se > 1e-4 for worth in found.coalitions.values())
    orders = list(itertools.permutations(alphas))
    for slot in alphas:
        without = value(everyone - {slot})
        assert numbers(found.leave_one_out[slot]) == pytest.approx(means(value(everyone), without), abs=1e-12)
        assert numbers(found.solo[slot]) == pytest.approx(means(value(frozenset({slot})), value(nobody)), abs=1e-12)
        joined = [frozenset(order[: order.index(slot)]) for order in orders]
        marginals = [means(value(before | {slot}), value(before)) for before in joined]
        shapley = [statistics.fmean(column) for column in zip(*marginals)]
        assert numbers(found.shapley[slot]) == pytest.approx(shapley, abs=1e-12)
        assert found.shapley[slot].loss_order_se == 0.0


@pytest.mark.parametrize(("kind", "alphas"), CASES, ids=[kind for kind, _ in CASES])
def test_model_buffers_random_streams_flags_and_alphas_stay_as_they_were(kind, alphas):
    grown = grown_for(kind, alphas)
    grown.model.head.eval()

    def everything(model: nn.Module = grown.model) -> tuple:
        slots = [(s.level, s.overridden, s.phase, s.alpha.item()) for s in grown.slots.values()]
        flags = [module.training for module in model.modules()]
        grads = [(p.grad, p.requires_grad) for p in model.parameters()]
        state = bits([*model.named_parameters(), *model.named_buffers(), ("rng", torch.get_rng_state())])
        return slots, flags, grads, state, torch.is_grad_enabled()

    batches, before = batches_for(kind), everything()
    inputs = copy.deepcopy(batches)
    measure(grown, batches)
    assert everything() == before
    torch.testing.assert_close(batches, inputs, rtol=0, atol=0)

    with pytest.raises(IndexError):
        measure(grown, batches, per_sample=lambda output, target: output.sum(99))
    assert everything() == before


def inner(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return -(output * target).sum(1), (output[:, 0] > 0).double()


def squared(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return ((output - target) ** 2).sum(1), (output[:, 0] > 0).double()


@pytest.mark.parametrize(("count", "pairs"), [(4, 0), (4, 3), (6, 2)])
def test_in_an_additive_game_every_seed_gets_its_own_value(count, pairs):
    grown, batches = branches(count, deltas(count))
    found = measure(grown, batches, make_plan(blended(grown), pairs=pairs), inner)
    x, target = (torch.cat(parts) for parts in zip(*batches))
    for i, slot in enumerate(grown.slots):
        with torch.no_grad():
            delta = grown.slots[slot].seed(F.linear(x, *grown.model.branches[i].parameters()))
        own = (delta * target).sum(1).mean().item()
        for worth in (found.shapley[slot], found.solo[slot], found.leave_one_out[slot]):
            assert worth.loss.value == pytest.approx(own, abs=1e-12)
        assert found.shapley[slot].loss_order_se == pytest.approx(0.0, abs=1e-12)


def test_equal_seeds_get_equal_shares_a_null_player_nothing_and_the_shares_sum_to_the_whole():
    twin, idle, other = deltas(3)
    torch.nn.utils.vector_to_parameters(torch.zeros(20, dtype=torch.float64), idle.parameters())
    grown, batches = branches(4, [twin, idle, other, copy.deepcopy(twin)])
    found = measure(grown, batches, per_sample=squared)
    assert numbers(found.shapley["r0c0"]) == pytest.approx(numbers(found.shapley["r0c3"]), abs=1e-12)
    assert numbers(found.shapley["r0c1"]) == [0.0, 0.0]
    assert abs(found.shapley["r0c0"].loss.value - found.solo["r0c0"].loss.value) > 1e-3
    assert [math.fsum(column) for column in zip(*map(numbers, found.shapley.values()))] == pytest.approx(
        numbers(found.together), abs=1e-12
    )


def test_drawn_orders_keep_the_sum_and_come_within_their_stated_error_of_the_exact_value():
    grown, batches = grown_for("BC", CASES[2][1]), batches_for("BC")
    exact = measure(grown, batches)
    drawn = measure(grown, batches, make_plan(blended(grown), pairs=48, key=(5, 1)))
    whole = math.fsum(worth.loss.value for worth in drawn.shapley.values())
    assert whole == pytest.approx(exact.together.loss.value, abs=1e-12)
    for slot, worth in drawn.shapley.items():
        assert 0.0 < worth.loss_order_se < worth.loss.se
        assert abs(worth.loss.value - exact.shapley[slot].loss.value) < 4 * worth.loss_order_se


def test_five_seeds_take_drawn_orders_and_agree_with_all_of_them():
    alphas = {f"r{i}c0": 1.0 for i in range(5)}
    grown, batches = grown_for("BC", alphas), batches_for("BC")
    value, plan = values_of_copies(grown, batches), make_plan(blended(grown), pairs=30)
    sums = attribute(grown, plan, batches, classify)
    assert sums.forwards == 3 * len(plan.coalitions) <= 3 * 2**5
    found = readings(sums, tick=1, min_samples=2)
    for slot, worth in found.shapley.items():
        joined = [frozenset(order[: order.index(slot)]) for order in itertools.permutations(alphas)]
        exact = [means(value(before | {slot}), value(before))[0] for before in joined]
        assert abs(worth.loss.value - statistics.fmean(exact)) < 4 * worth.loss_order_se


def dyadic(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses on a grid of 1/1024: sums of them and of their squares are exact in float64, in any order."""
    loss, correct = classify(output, target)
    return (loss * 1024).round() / 1024, correct


def test_shards_add_up_exactly():
    grown, batches = grown_for("BTC", CASES[1][1]), batches_for("BTC", (4, 2, 5, 1))
    plan = make_plan(blended(grown))
    whole = attribute(grown, plan, batches, dyadic)
    assert (whole.samples, whole.forwards, whole.work().total()) == (12, 4 * 4, 12 * 4)
    for shares in ([batches[:1], batches[1:]], [batches[2:], [], batches[:2]], [[batch] for batch in batches[::-1]]):
        first, *rest = [attribute(grown, plan, share, dyadic) for share in shares]
        assert sum(rest, first) == whole
        travelled = torch.stack([torch.tensor(s.vector(), dtype=torch.float64) for s in (first, *rest)]).sum(0)
        assert whole.taking(travelled.tolist()) == whole
    one_by_one = [(inputs[i : i + 1], target[i : i + 1]) for inputs, target in batches for i in range(len(target))]
    fine = attribute(grown, plan, one_by_one, classify)
    assert fine.vector()[2:] == pytest.approx(attribute(grown, plan, batches, classify).vector()[2:], abs=1e-12)


def test_sums_of_different_plans_do_not_mix():
    grown, batches = grown_for("BTC", CASES[1][1]), batches_for("BTC", (4,))
    sums = attribute(grown, make_plan({"r0c0": 1.0, "r1c0": 1.0}), batches, classify)
    other = attribute(grown, make_plan({"r0c0": 1.0, "r1c0": 0.5}), batches, classify)
    with pytest.raises(ValueError, match="different plans"):
        sums + other
    with pytest.raises(ValueError, match="3 numbers do not fit the plan: need 30"):
        sums.taking([1.0, 2.0, 3.0])


def test_readings_are_mean_and_standard_error_over_samples_and_absent_below_enough():
    grown, batches = grown_for("BTC", CASES[1][1]), batches_for("BTC")
    sums, value = attribute(grown, make_plan(blended(grown)), batches, classify), values_of_copies(grown, batches)
    reading = readings(sums, tick=7, min_samples=15).leave_one_out["r0c0"].loss
    d = [a[0] - b[0] for a, b in zip(value(frozenset({"r0c0", "r1c0"})), value(frozenset({"r1c0"})))]
    assert (reading.n, reading.tick, reading.is_measured) == (15, 7, True)
    assert reading.se == pytest.approx(statistics.stdev(d) / math.sqrt(15), rel=1e-9)
    few = readings(sums, tick=7, min_samples=16).shapley["r0c0"]
    assert (few.loss, few.accuracy, few.loss_order_se) == (ABSENT, ABSENT, None)


@pytest.mark.parametrize("pairs", [0, 2])
def test_a_broken_seed_is_absent_and_says_nothing_about_coalitions_without_it(pairs):
    grown, batches = grown_for("BC", CASES[2][1]), batches_for("BC")
    sound = measure(grown, batches)
    nn.init.constant_(grown.slots["r4c0"].seed.map.weight, math.nan)
    found = measure(grown, batches, make_plan(blended(grown), pairs=pairs))
    assert found.solo["r4c0"].loss.value is None
    assert found.shapley["r4c0"].loss.value is None
    assert found.solo["r0c0"] == sound.solo["r0c0"]


class Restless(nn.Module):
    """Writes into its input, and draws random numbers in eval() too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x.mul_(2.0)), 0.5, training=True)


def test_coalitions_see_the_same_inputs_and_the_same_random_numbers():
    torch.manual_seed(0)
    x, target = torch.randn(8, 4), torch.randint(3, (8,))
    grown = attach(Restless(), {"r0c0": "layer"}, x.clone())
    plant(grown, "r0c0", nn.Identity(), 0.0)
    before, stream = x.clone(), torch.get_rng_state()
    assert numbers(measure(grown, [(x, target)]).solo["r0c0"]) == [0.0, 0.0]
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("levels", "error", "text"),
    [
        ({"r9c9": 1.0}, ConfigError, "slot 'r9c9': no such slot; this host has r0c0, r0c1, r1c0"),
        ({"stem": 1.0}, ConfigError, "slot 'stem': not a slot id"),
        ({"r1c0": 1.0}, ConfigError, "slot r1c0: holds no seed"),
        ({"r0c0": math.nan}, ValueError, r"alpha of r0c0 = nan: must be a finite number in \[0, 1\]"),
        ({"r0c0": 1.5}, ValueError, r"alpha of r0c0 = 1.5: must be a finite number in \[0, 1\]"),
        ({"r0c0": -0.1}, ValueError, "alpha of r0c0 = -0.1"),
        ({}, ConfigError, "attribution of no seeds"),
    ],
)
def test_impossible_overrides_are_one_clear_line(levels, error, text):
    grown = grown_for("BCHW", {"r0c0": 1.0, "r0c1": 1.0})
    with pytest.raises(error, match=rf"\A{text}[^\n]*\Z"):
        attribute(grown, make_plan(levels), batches_for("BCHW"), classify)


def test_a_mean_loss_is_refused():
    grown = grown_for("BCHW", {"r0c0": 1.0})
    with pytest.raises(ValueError, match=r"loss \[\] and correct \[6\], need both \[B\]"):
        measure(grown, batches_for("BCHW"), per_sample=lambda o, t: (F.cross_entropy(o, t), t.double()))


def test_the_example_in_the_docs_runs_as_it_stands(capsys):
    text = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    grown, batches = grown_for("BCHW", CASES[0][1]), batches_for("BCHW", (20, 12))
    world: dict[str, Any] = {"grown": grown, "batches": batches, "train_batches": None}
    exec(code, world)
    printed = capsys.readouterr().out.splitlines()
    expected = measure(grown, batches)
    assert [line.split(":")[0] for line in printed[:-1]] == list(CASES[0][1])
    assert all(str(expected.shapley[slot].loss) in line for slot, line in zip(CASES[0][1], printed))
    assert str(expected.together.loss) in printed[-1]

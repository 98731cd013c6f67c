"""Shapley values of games given as tables: closed forms, all orders written out, and the error that drawing states."""

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from esper.kasmina.attribution.coalitions import Plan, Quantity, QuantityKind, make_plan
from esper.kasmina.attribution.prefixes import How
from esper.kasmina.attribution.worth import Attribution, Sums, differences, readings
from esper.leyline.errors import ConfigError

SAMPLES = 7


def slots(n: int) -> dict[str, float]:
    return {f"r{i}c0": 1.0 for i in range(n)}


def play(plan: Plan, game: Tensor) -> Attribution:
    """Readings of a game [2**n, 2, B] of values per coalition, unit and sample."""
    d = differences(plan, game[list(plan.coalitions)])
    moments = torch.stack([d.sum(2), (d * d).sum(2)], 2).flatten(1).tolist()
    return readings(Sums(plan, game.shape[2], 0, tuple(map(tuple, moments)), None, How.FULL, ()), tick=1, min_samples=2)


def random_game(n: int, seed: int) -> Tensor:
    return torch.randn(2**n, 2, SAMPLES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_orders(game: Tensor, n: int) -> list[float]:
    """The definition: the mean marginal in loss over all n! orders."""
    value = game[:, 0].mean(1).tolist()
    shares = [0.0] * n
    for order in itertools.permutations(range(n)):
        coalition = 0
        for player in order:
            shares[player] += (value[coalition | 1 << player] - value[coalition]) / math.factorial(n)
            coalition |= 1 << player
    return shares


def shares(found: Attribution) -> list[float]:
    return [worth.loss.value for worth in found.shapley.values()]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_exact_values_are_the_mean_over_all_orders_and_sum_to_the_whole(n):
    game = random_game(n, n)
    found = play(make_plan(slots(n)), game)
    assert shares(found) == pytest.approx(all_orders(game, n), abs=1e-12)
    assert math.fsum(shares(found)) == pytest.approx(found.together.loss.value, abs=1e-12)
    assert found.together.loss.value == pytest.approx((game[-1, 0] - game[0, 0]).mean().item(), abs=1e-12)


def test_symmetric_players_share_alike_and_a_null_player_gets_nothing():
    # worth 6 as soon as two of the players 0, 1, 2 are in; player 3 adds nothing: 2 each
    votes = [6.0 if (mask & 0b0111).bit_count() >= 2 else 0.0 for mask in range(16)]
    game = torch.tensor(votes, dtype=torch.float64).view(16, 1, 1).expand(16, 2, SAMPLES)
    found = play(make_plan(slots(4)), game)
    assert shares(found) == pytest.approx([2.0, 2.0, 2.0, 0.0], abs=1e-12)
    assert [worth.loss.value for worth in found.leave_one_out.values()] == [0.0] * 4
    assert [worth.loss.value for worth in found.solo.values()] == [0.0] * 4


@pytest.mark.parametrize("pairs", [0, 2])
def test_in_an_additive_game_everyone_gets_what_they_bring(pairs):
    own = [1.0, -2.5, 0.0, 4.0]
    total = [sum(own[i] for i in range(4) if mask >> i & 1) for mask in range(16)]
    game = torch.tensor(total, dtype=torch.float64).view(16, 1, 1).expand(16, 2, SAMPLES)
    found = play(make_plan(slots(4), pairs=pairs), game)
    assert shares(found) == pytest.approx(own, abs=1e-12)


def test_an_order_and_its_reverse_are_exact_for_pairwise_interactions():
    n = 6
    stream = torch.Generator().manual_seed(2)
    weights = torch.randn(n, n, generator=stream, dtype=torch.float64).triu()
    members = torch.tensor([[mask >> i & 1 for i in range(n)] for mask in range(2**n)], dtype=torch.float64)
    game = torch.einsum("mi,ij,mj->m", members, weights, members).view(-1, 1, 1).expand(-1, 2, SAMPLES)
    found = play(make_plan(slots(n), pairs=2, key=(9,)), game)
    both = weights - weights.diag().diag()
    assert shares(found) == pytest.approx((weights.diag() + (both.sum(0) + both.sum(1)) / 2).tolist(), abs=1e-12)
    assert all(worth.loss_order_se < 1e-12 for worth in found.shapley.values())


def test_drawn_values_are_unbiased_over_keys_and_their_stated_error_is_their_error():
    game = random_game(4, 11)
    exact = shares(play(make_plan(slots(4)), game))
    errors, stated = [], []
    for key in range(250):
        found = play(make_plan(slots(4), pairs=8, key=(3, key)), game)
        errors.append([a - b for a, b in zip(shares(found), exact)])
        stated.append([worth.loss_order_se for worth in found.shapley.values()])
    for error, se in zip(zip(*errors), zip(*stated)):
        spread = statistics.pstdev(error)
        assert abs(statistics.fmean(error)) < 3.5 * spread / math.sqrt(len(error))
        assert math.sqrt(statistics.fmean(x * x for x in se)) == pytest.approx(spread, rel=0.15)
        assert statistics.fmean(abs(e) < 2 * s for e, s in zip(error, se)) > 0.85
    assert statistics.fmean(map(abs, errors[0])) > 1e-3


def test_the_error_of_a_drawn_value_counts_samples_and_orders():
    game = random_game(4, 4)
    plan = make_plan(slots(4), pairs=5)
    worth = play(plan, game).shapley["r2c0"]
    d = dict(zip((q for q, _ in plan.quantities), differences(plan, game[list(plan.coalitions)])[:, 0]))
    over_samples = d[Quantity(QuantityKind.SHAPLEY, ("r2c0",))].std().item() / math.sqrt(SAMPLES)
    means = [d[Quantity(QuantityKind.PAIR, ("r2c0",), k)].mean().item() for k in range(5)]
    assert worth.loss.value == pytest.approx(statistics.fmean(means), abs=1e-12)
    assert worth.loss_order_se == pytest.approx(statistics.stdev(means) / math.sqrt(5), rel=1e-9)
    assert worth.loss.se == pytest.approx(math.hypot(over_samples, worth.loss_order_se), rel=1e-9)


def test_orders_are_a_function_of_the_key_alone():
    state = torch.get_rng_state()
    plans = [make_plan(slots(7), pairs=4, key=key) for key in ((1, 2), (1, 2), (1, 3), (12,))]
    assert torch.equal(torch.get_rng_state(), state)
    assert plans[0] == plans[1]
    assert len({plan.quantities for plan in plans}) == 3
    assert len(plans[0].coalitions) <= 2 + 2 * 4 * 6


def test_orders_are_uniform():
    plan = make_plan(slots(3), pairs=3000, key=(8,))
    firsts = [terms[0].without == 0 for quantity, terms in plan.quantities if quantity.kind is QuantityKind.PAIR]
    per_seed = [sum(firsts[i * 3000 : (i + 1) * 3000]) for i in range(3)]
    assert sum(per_seed) == 3000
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9) for count in per_seed)


@pytest.mark.parametrize(
    ("n", "pairs", "text"),
    [(5, 0, "exact Shapley values go to 4 seeds, got 5"), (5, 1, "at least 2"), (2, -3, "pairs = -3: need 0")],
)
def test_a_number_of_pairs_that_gives_no_error_is_refused(n, pairs, text):
    with pytest.raises(ConfigError, match=text):
        make_plan(slots(n), pairs=pairs)

"""Reward on a small world that is known by heart: five ticks, one slot, and what every action is truly worth.

A seed slows training while it is young and helps when it is older; a seed that is born late never pays. So waiting,
growing early and growing late can each be told apart, and the best of all 3^5 courses is known by trying them.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from esper.leyline.errors import ConfigError, EsperError
from esper.leyline.evidence import ABSENT, measured
from esper.leyline.protocols import Ending, Report
from esper.simic.env.reward import Reward, RewardConfig
from tests.support.observations import observe, slot_view

TICKS, HOST, SEED = 5, 1000, 250
ACTIONS = ("wait", "grow", "prune")
CONFIG = RewardConfig(size_price=0.05, birth_price=0.01, prune_price=0.02)
Course = tuple[str, ...]


def twin(flops: int) -> float:
    """Loss without growth: falls with what was spent."""
    return 2.0 * math.exp(-flops / 400)


@functools.cache
def lived(course: Course, gain: float) -> tuple[Report, ...]:
    """Reports of a course: a tick costs 100, with a seed 150; a seed saves ``gain`` for each tick of its age."""
    flops, age, births, prunes = 100, 0, 0, 0
    reports = [_report(0, flops, twin(flops), HOST, 0, 0, Ending.RUNNING)]
    for tick, action in enumerate(course, 1):
        births = int(action == "grow" and age == 0)
        prunes = int(action == "prune" and age > 0)
        age = 1 if births else 0 if prunes else age + 1 if age else 0
        flops += 150 if age else 100
        loss = twin(flops) + (0.1 - gain * age if age else 0.0)
        ending = Ending.SPENT if tick == TICKS else Ending.RUNNING
        reports.append(_report(tick, flops, loss, HOST + SEED * bool(age), births, prunes, ending))
    return tuple(reports)


def _report(tick: int, flops: int, loss: float, size: int, births: int, prunes: int, ending: Ending) -> Report:
    reading = measured(loss, tick=1 + tick, n=100)
    return Report(
        observation=observe(slot_view(), tick=1 + tick, total_steps=10 * (1 + TICKS), validation_loss=reading),
        flops=flops,
        budget=1000,
        parameters=size,
        validation_loss=reading,
        births=births,
        prunes=prunes,
        ending=ending,
    )


def paid(course: Course, gain: float, *, sparse: bool) -> list[float]:
    reports = lived(course, gain)
    reward = Reward(replace(CONFIG, sparse=sparse), twin, reports[0])
    return [reward.pay(report).reward for report in reports[1:]]


def objective(course: Course, gain: float) -> float:
    """What a course is truly worth, from its end and its churn alone."""
    reports = lived(course, gain)
    last = reports[-1]
    value = last.validation_loss.value
    assert value is not None
    births, prunes = (sum(getattr(report, name) for report in reports) for name in ("births", "prunes"))
    phi = -(value - twin(last.flops)) - 0.05 * math.log(last.parameters / HOST)
    return phi - 0.01 * births - 0.02 * prunes


def best_actions(gain: float, *, sparse: bool) -> dict[Course, tuple[set[str], float]]:
    """For each beginning of a course the best next actions and the return from there on, by looking at all ends."""
    returns = {course: paid(course, gain, sparse=sparse) for course in itertools.product(ACTIONS, repeat=TICKS)}
    found: dict[Course, tuple[set[str], float]] = {}
    for length in range(TICKS):
        for begun in itertools.product(ACTIONS, repeat=length):
            ahead = {
                action: max(sum(returns[c][length:]) for c in returns if c[: length + 1] == (*begun, action))
                for action in ACTIONS
            }
            top = max(ahead.values())
            found[begun] = ({action for action, value in ahead.items() if value > top - 1e-9}, top)
    return found


@pytest.mark.parametrize("gain", [0.02, 0.06, 0.2], ids=["never pays", "pays late", "pays at once"])
def test_both_forms_have_the_optimum_that_is_known(gain: float) -> None:
    courses = list(itertools.product(ACTIONS, repeat=TICKS))
    for course in courses:
        assert sum(paid(course, gain, sparse=False)) == pytest.approx(objective(course, gain), abs=1e-12)
        assert sum(paid(course, gain, sparse=True)) == pytest.approx(objective(course, gain), abs=1e-12)
        assert paid(course, gain, sparse=True)[:-1] == [0.0] * (TICKS - 1)
    dense, sparse = (best_actions(gain, sparse=form) for form in (False, True))
    assert {begun: actions for begun, (actions, _) in dense.items()} == {b: a for b, (a, _) in sparse.items()}
    best = max(courses, key=lambda course: objective(course, gain))
    assert dense[()][1] == pytest.approx(objective(best, gain), abs=1e-12)
    if gain == 0.02:
        assert (dense[()][0], dense[()][1]) == ({"wait", "prune"}, 0.0)
    else:
        assert dense[()][0] == {"grow"}
        # A seed younger than two ticks lowers Φ where it pays late: a reader of the next reward alone would not grow.
        assert (paid(("grow",) + ("wait",) * 4, gain, sparse=False)[0] < 0) == (gain == 0.06)


def test_churn_alone_gains_nothing() -> None:
    for course in itertools.product(ACTIONS, repeat=TICKS):
        reports = lived(course, 0.2)
        quiet = [replace(r, validation_loss=measured(twin(r.flops), tick=1, n=9), parameters=HOST) for r in reports]
        reward = Reward(CONFIG, twin, quiet[0])
        rewards = [reward.pay(report).reward for report in quiet[1:]]
        births, prunes = (sum(getattr(report, name) for report in reports) for name in ("births", "prunes"))
        assert sum(rewards) == pytest.approx(-0.01 * births - 0.02 * prunes, abs=1e-12)
        assert max(rewards) <= 1e-12


def apart(course: Course, at: int, gain: float) -> Sequence[Report]:
    reports = list(lived(course, gain)[: at + 1])
    reports[-1] = replace(reports[-1], validation_loss=ABSENT, ending=Ending.DIVERGED)
    return reports


@pytest.mark.parametrize("sparse", [False, True])
def test_coming_apart_is_below_every_finish(sparse: bool) -> None:
    worst = float("inf")
    config = replace(CONFIG, sparse=sparse)
    courses = list(itertools.product(ACTIONS, repeat=TICKS))
    for course in courses:  # every finish, with a loss beyond all measure and the largest net
        reports = list(lived(course, 0.0))
        lost = measured(1e9, tick=6, n=9)
        reports[-1] = replace(reports[-1], validation_loss=lost, parameters=HOST + 900)
        reward = Reward(config, twin, reports[0])
        worst = min(worst, sum(reward.pay(report).reward for report in reports[1:]))
    for at in range(1, TICKS + 1):
        for course in courses:
            reward = Reward(config, twin, lived(course, 0.2)[0])
            terms = [reward.pay(report) for report in apart(course, at, 0.2)[1:]]
            assert sum(one.reward for one in terms) < worst
            assert terms[-1].apart < 0
            assert all(one.apart == 0 for one in terms[:-1])
            assert math.isfinite(sum(one.reward for one in terms))


def test_parts_sum_to_the_reward_and_errors_are_said() -> None:
    reports = lived(("wait", "grow", "wait", "prune", "wait"), 0.2)
    reward = Reward(CONFIG, twin, reports[0])
    for report in reports[1:]:
        terms = reward.pay(report)
        assert terms.reward == pytest.approx(terms.loss + terms.size + terms.births + terms.prunes + terms.apart)
    with pytest.raises(EsperError, match="no validation loss, which the reward needs at every tick"):
        reward.pay(replace(reports[1], validation_loss=ABSENT))
    with pytest.raises(ConfigError, match="most_loss"):
        RewardConfig(most_loss=0.0)

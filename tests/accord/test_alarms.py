"""Alarms counted: on series as healthy runs have them hardly any is a panic, on those of sick runs nearly all are."""

import numpy
import pytest

from esper.accord.course import Course
from esper.accord.governor.config import GovernorConfig
from esper.accord.judge import judge_loss
from esper.accord.verdict import Series, without_past
from esper.leyline.evidence import ABSENT, Reading, measured
from tests.support.loss_series import HEALTHY, SICK, TICKS, Losses, Runs

CONFIG = GovernorConfig()
RUNS = [100, pytest.param(1000, marks=pytest.mark.slow)]


def readings(losses: Losses | None, errors: Losses | None, run: int) -> list[Reading]:
    if losses is None or errors is None:
        return [ABSENT] * TICKS
    pairs = zip(losses[run].tolist(), errors[run].tolist(), strict=True)
    return [measured(loss, tick=tick, n=100, se=error) for tick, (loss, error) in enumerate(pairs)]


def first_panic(runs: Runs, run: int, start: int = 0) -> int | None:
    """Tick of the first panic of one run; the judge's own steps, without the rest of an agreed state."""
    train, validation = Series(), Series()
    trained = readings(runs.train, runs.train_errors, run)
    validated = readings(runs.validation, runs.validation_errors, run)
    for tick in range(start, TICKS):
        if tick in runs.fading:
            train, validation = without_past(train), without_past(validation)
        found = (
            judge_loss(train, trained[tick], tick, runs.chance, CONFIG, training=True),
            judge_loss(validation, validated[tick], tick, runs.chance, CONFIG, training=False),
        )
        courses = {finding.course for finding in found}
        if Course.PANIC in courses:
            return tick
        train, validation = (f.healthy if courses <= {None, Course.SHIFT} else f.sick for f in found)
    return None


@pytest.mark.parametrize("count", RUNS)
@pytest.mark.parametrize("kind", HEALTHY)
def test_of_healthy_runs_of_each_kind_at_most_one_in_a_hundred_panics(kind: str, count: int) -> None:
    rng, sizes = numpy.random.default_rng(list(kind.encode())), HEALTHY[kind]
    counts = []
    for make in sizes:
        runs = make(rng, -(-count // len(sizes)))
        counts.append(sum(first_panic(runs, run) is not None for run in range(len(runs.train))))
    assert sum(counts) <= count // 100, counts


@pytest.mark.parametrize("count", RUNS)
@pytest.mark.parametrize("kind", SICK)
def test_of_sick_runs_of_each_kind_99_in_a_hundred_panic_soon(kind: str, count: int) -> None:
    rng, sizes = numpy.random.default_rng(list(kind.encode())), SICK[kind]
    missed = []
    for make in sizes:
        runs = make(rng, -(-count // len(sizes)))
        panics = [first_panic(runs, run, runs.change - 60) for run in range(len(runs.train))]
        missed.append(sum(p is None or not 0 <= p - runs.change < runs.soon for p in panics))
    assert sum(missed) <= count // 100, missed

"""Trials that are stepped together report what trials by the engine report, whatever mix of tasks they have."""

from dataclasses import replace

import pytest

from esper.leyline.errors import ConfigError, EsperError
from esper.leyline.protocols import Ending, Report
from esper.run.trials.config import trial_config
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.run.trials.recipe import batched_trials
from esper.simic.batched import BatchedTrials
from esper.simic.env.tasks import Family, GrowthTask
from esper.tamiyo.random import RandomConfig, RandomController
from tests.support.many_hosts import differences

DIGITS = GrowthTask(name="a", family=Family.DIGITS, width=4, depth=2, samples=100, noise=0.1, steps=50, every=5)
RECALL = GrowthTask(name="c", family=Family.RECALL, width=8, depth=1, samples=90, noise=0.0, steps=30, every=5)
TASKS = (DIGITS, replace(DIGITS, name="b", samples=75, noise=0.0, steps=35), RECALL)
QUICK = {"gates.evidence": "observe", "slots.embargo_ticks": 1, "trainer.precision": "fp64"}
MAKER = TrialMaker(lambda task, seed: trial_config(task, seed, QUICK))


def reports_of(trials: PlainTrials | BatchedTrials[GrowthTask]) -> list[list[Report]]:
    """The reports of trials of three tasks, by tick, to the end of the last; then one place begins anew."""
    now = [trials.begin(place, task, 4 + place) for place, task in enumerate(TASKS)]
    slots = [tuple(view.slot for view in report.observation.slots) for report in now]
    config = RandomConfig(rate=0.6, max_ticks=2)
    deciders = [RandomController(config, slots=own, seed=place) for place, own in enumerate(slots)]
    reports = [now]
    while any(report.ending is Ending.RUNNING for report in now):
        now = list(trials.advance([d.decide(r.observation) for d, r in zip(deciders, now, strict=True)]))
        reports.append(now)
    return [*reports, [trials.begin(2, DIGITS, 9)], list(trials.advance([[], [], []]))]


def test_a_mix_of_tasks() -> None:
    plain, batched = reports_of(PlainTrials(len(TASKS), maker=MAKER)), reports_of(batched_trials(len(TASKS), MAKER))
    wrong = differences(batched, plain, rel=1e-6, abs_=1e-9)
    assert not wrong
    assert sum(report.births for reports in plain for report in reports) > 2
    assert sum(report.prunes for reports in plain for report in reports) > 0
    assert {report.ending for report in plain[-3]} == {Ending.SPENT}


def test_what_is_asked_wrongly_is_said() -> None:
    trials = batched_trials(2, MAKER)
    trials.begin(0, DIGITS, 1)
    with pytest.raises(EsperError, match=r"trial 1 has not begun; call begin\(1"):
        trials.advance([[], []])
    with pytest.raises(EsperError, match="commands for 1 of 2 trials"):
        trials.advance([[]])


def test_a_host_that_cannot_be_stepped_with_others() -> None:
    maker = TrialMaker(lambda task, seed: trial_config(task, seed, {"slots.incubation": "ste"}))
    with pytest.raises(ConfigError, match=r"slots\.incubation"):
        batched_trials(1, maker).begin(0, DIGITS, 1)

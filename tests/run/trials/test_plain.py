"""A trial is a main job whose controller sits outside: the same bits, tick by tick, until its budget is spent."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline.commands import Command
from esper.leyline.errors import EsperError, LockstepError
from esper.leyline.observation import Observation
from esper.leyline.protocols import Controller, Ending, Report
from esper.leyline.stages import Op, Stage
from esper.run.trials.config import trial_config
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.simic.env.tasks import Family, GrowthTask
from esper.tamiyo.heuristic import HeuristicConfig
from esper.tamiyo.random import RandomConfig
from esper.tamiyo.registry import build_controller
from tests.support.dist import run_distributed
from tests.support.tiny import bits, make_engine

TASK = GrowthTask(name="t", family=Family.DIGITS, width=4, depth=2, samples=300, noise=0.1, steps=80, every=5)
QUICK = {"gates.evidence": "observe", "slots.embargo_ticks": 1}
EAGER = HeuristicConfig(eager=True, warmup_ticks=2, life_ticks=1, blueprints=["norm", "bottleneck"], tempo_ticks=2)


def quick(task: GrowthTask, seed: int) -> Any:
    return trial_config(task, seed, QUICK)


MAKER = TrialMaker(quick)


def germinate(slot: str = "r0c0", blueprint: str = "conv_light") -> Command:
    return Command(slot=slot, op=Op.GERMINATE, blueprint=blueprint)


def seen(observation: Observation) -> Observation:
    """An observation without what a trial counts in FLOPs and a run in steps."""
    return replace(observation, remaining=0.0)


class Watched:
    """A controller, what it saw, what it said, and the FLOPs then."""

    def __init__(self, inner: Controller) -> None:
        self.inner, self.name = inner, inner.name
        self.seen: list[Observation] = []
        self.said: list[list[Command]] = []

    def decide(self, observation: Observation) -> list[Command]:
        self.seen.append(seen(observation))
        self.said.append(self.inner.decide(observation))
        return self.said[-1]

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def live(trials: PlainTrials, report: Report, controller: Controller) -> list[Report]:
    """All reports of the one trial, with a controller that sits outside."""
    reports = [report]
    while reports[-1].ending is Ending.RUNNING:
        reports += trials.advance([controller.decide(reports[-1].observation)])
    return reports


@pytest.mark.parametrize("config", [EAGER, RandomConfig(rate=0.7, max_ticks=2)], ids=lambda c: c.kind)
def test_a_trial_is_the_main_job_bit_for_bit(config: Any, tmp_path: Path) -> None:
    maker, slots = MAKER, ("r0c0", "r0c1", "r1c0")
    trials = PlainTrials(1, maker=maker)
    outside = Watched(build_controller(config, slots=slots, seed=5))
    reports = live(trials, trials.begin(0, TASK, 5), outside)
    assert trials.trials[0] is not None
    engine = trials.trials[0].engine

    _, whole = maker.shared(TASK, 5)
    job = make_engine(whole, tmp_path, controller=Watched(build_controller(config, slots=slots, seed=5)))
    job.begin(None)
    flops = []
    while job.step < engine.step:
        job.train_step()
        if job.tick_due():
            turn = job.open_tick()
            flops.append(turn.state.flops)
            if job.step < engine.step:
                job.close_tick(turn)
    assert isinstance(job.controller, Watched)
    assert job.controller.seen == outside.seen
    assert job.controller.said == outside.said
    assert flops == [report.flops for report in reports]
    assert seen(reports[-1].observation).validation_loss == turn.state.validation_loss
    assert bits(job.grown.model.named_parameters()) == bits(engine.grown.model.named_parameters())
    stages = {view.stage for observation in outside.seen for view in observation.slots}
    assert stages >= {Stage.EMPTY, Stage.BLENDING}  # something lived
    assert sum(report.births for report in reports) >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat"]


def test_trials_share_a_process_and_not_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = replace(TASK, samples=200, noise=0.0)
    alone = PlainTrials(1, maker=MAKER)
    alone.begin(0, TASK, 3)
    expected = [alone.advance([[germinate()] if tick == 1 else []])[0] for tick in range(6)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    both = PlainTrials(2, maker=MAKER)
    both.begin(1, other, 4)
    both.begin(0, TASK, 7)
    both.begin(0, TASK, 3)  # in place of the one before
    found = [both.advance([[germinate()] if tick == 1 else [], [germinate("r1c0")]])[0] for tick in range(6)]
    assert found == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_a_trial_ends_at_the_first_tick_at_which_its_budget_is_spent() -> None:
    trials = PlainTrials(2, maker=MAKER)
    first = trials.begin(0, TASK, 1)
    trials.begin(1, TASK, 1)
    bare = first.flops // first.observation.step // 32
    assert first.budget == TASK.steps * 32 * bare
    reports = []
    while True:
        command = Command(slot="r0c0", op=Op.ADVANCE) if reports else germinate()
        reports.append(trials.advance([[], [command]]))
        if all(report.ending is not Ending.RUNNING for report in reports[-1]):
            break
    for place in range(2):
        series = [pair[place] for pair in reports]
        over = [report for report in series if report.ending is Ending.SPENT]
        assert all(report.flops < report.budget for report in series if report not in over)
        assert over[0].flops >= over[0].budget
        assert over[0].observation.remaining == 0.0
        assert all((report.flops, report.births) == (over[0].flops, 0) for report in over[1:])  # stays as it is
    grown = [pair[1] for pair in reports if pair[1].ending is Ending.RUNNING]
    assert len(grown) < sum(pair[0].ending is Ending.RUNNING for pair in reports)  # growth makes ticks dearer
    assert grown[-1].observation.remaining == pytest.approx(1 - grown[-1].flops / grown[-1].budget)
    assert grown[-1].parameters == first.parameters + 160
    assert sum(report.births for report in grown) == 1


def test_births_and_prunes_are_counted_where_they_happen() -> None:
    trials = PlainTrials(1, maker=MAKER)
    trials.begin(0, TASK, 1)
    script = {1: germinate(), 5: Command(slot="r0c0", op=Op.PRUNE)}
    counts = [(r.births, r.prunes) for t in range(9) for r in trials.advance([[script[t]] if t in script else []])]
    assert counts == [(0, 0), (0, 0), (1, 0), (0, 0), (0, 0), (0, 1), (0, 0), (0, 0), (0, 0)]


def test_a_trial_that_comes_apart_ends_as_diverged() -> None:
    trials = PlainTrials(1, maker=TrialMaker(lambda task, seed: trial_config(task, seed, {"optim.lr": 1e30})))
    report = trials.begin(0, TASK, 1)
    reports = [report]
    while report.ending is Ending.RUNNING:
        (report,) = trials.advance([[]])
        reports.append(report)
    assert report.ending is Ending.DIVERGED
    assert report.flops < report.budget


def test_what_is_asked_wrongly_is_said() -> None:
    trials = PlainTrials(2, maker=MAKER)
    trials.begin(0, TASK, 1)
    with pytest.raises(EsperError, match=r"trial 1 has not begun; call begin\(1"):
        trials.advance([[], []])
    with pytest.raises(EsperError, match="commands for 1 of 2 trials"):
        trials.advance([[]])
    trials.begin(1, TASK, 1)
    with pytest.raises(LockstepError, match="slot r9c9 unknown"):
        trials.advance([[Command(slot="r9c9", op=Op.PRUNE)], []])


def follow_rank_0(rank: int) -> tuple[list[Report], dict[str, str]]:
    """Rank 0 has the commands, the other rank none."""
    trials = PlainTrials(1)
    torch.manual_seed(rank)
    reports = [trials.begin(0, TASK, 2)]
    for tick in range(5):
        reports += trials.advance([[germinate()] if tick == 1 else []] if rank == 0 else [])
    found = bits(trials.trials[0].engine.grown.model.named_parameters())  # type: ignore[union-attr]
    trials.close()
    return reports, found


def test_ranks_train_a_host_together() -> None:
    zero, one = run_distributed(follow_rank_0, 2)
    assert zero == one
    assert sum(report.births for report in zero[0]) == 1
    alone, _ = follow_rank_0(0)
    for together, single in zip(zero[0], alone, strict=True):
        assert together.flops >= single.flops  # both ranks look at a birth
        assert together.validation_loss.value == pytest.approx(single.validation_loss.value, rel=1e-3)

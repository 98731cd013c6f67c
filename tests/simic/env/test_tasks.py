"""Tasks become configs of whole runs; held-out ones lie outside the ranges of training; hosts share shapes."""

from dataclasses import replace

import pytest

from esper.leyline.errors import ConfigError
from esper.run.trials.config import trial_config
from esper.run.trials.environment import GrowthEnvConfig, make_growth_environment
from esper.run.trials.parts import TrialMaker, most_steps
from esper.simic.env.tasks import HELD_OUT, RANGES, TRAINING, Family, GrowthTask, Purpose, draw_task, find_task
from esper.tolaria.data import BatchPlan

SOME = GrowthTask(name="x", family=Family.DIGITS, width=4, depth=2, samples=250, noise=0.2, steps=200)


@pytest.mark.parametrize("purpose", Purpose)
def test_registered_and_drawn_tasks_lie_in_their_ranges(purpose: Purpose) -> None:
    registered = TRAINING if purpose is Purpose.TRAINING else HELD_OUT
    drawn = [draw_task(purpose, 3, number) for number in range(200)]
    assert drawn == [draw_task(purpose, 3, number) for number in range(200)]
    assert len({task.name for task in (*registered, *drawn)}) == 220
    assert {task.family for task in drawn} == {task.family for task in registered} == set(Family)
    for task in (*registered, *drawn):
        ranges = RANGES[purpose][task.family]
        assert (task.width, task.depth) in ranges.hosts
        assert ranges.steps[0] <= task.steps <= ranges.steps[1]
    for family in Family:
        budgets = [task.steps for task in registered if task.family is family]
        assert max(budgets) >= 6 * min(budgets)  # most of a decade


def test_held_out_tasks_have_what_training_lacks() -> None:
    assert len(TRAINING) == len(HELD_OUT) == 20
    for family in Family:
        seen, unseen = ([task for task in tasks if task.family is family] for tasks in (TRAINING, HELD_OUT))
        assert not {task.width for task in seen} & {task.width for task in unseen}
        low = min(task.steps for task in seen)
        assert any(task.steps < low for task in unseen)
        if family is not Family.BYTES:
            assert not {task.noise for task in seen} & {task.noise for task in unseen}


def test_training_tasks_have_few_shapes() -> None:
    """So that of 64 hosts with tasks drawn alike, at least 16 share one."""
    shapes = {task.shape for task in TRAINING}
    assert len(shapes) == 3
    assert min(sum(task.shape == shape for task in TRAINING) for shape in shapes) >= 4


@pytest.mark.parametrize("task", [TRAINING[0], TRAINING[-1], HELD_OUT[-1], *HELD_OUT[::5]], ids=lambda task: task.name)
def test_a_task_is_a_config(task: GrowthTask) -> None:
    config = trial_config(task, 7, {"slots.incubation": "shadow"})
    assert (config.seed, config.trainer.steps, config.control.every) == (7, task.steps, task.every)
    assert config.slots.incubation.value == "shadow"
    assert config.optim.schedule.value == "constant"


def test_a_budget_is_counted_in_steps_of_the_bare_host() -> None:
    maker = TrialMaker()
    shared, config = maker.shared(SOME, 1)
    assert len(shared.bundle.train) == 250
    assert maker.shared(SOME, 2)[0] is shared
    steps = most_steps(200 * 32, 1, BatchPlan(250, 32, 0))  # of a short batch in each epoch it takes more
    assert 200 < config.trainer.steps == shared.terms.total_steps == steps
    wider = TrialMaker(lambda task, seed: trial_config(task, seed, {"slots.planted": {"r0c0": "conv_light"}}))
    planted, _ = wider.shared(SOME, 1)
    assert planted.budget == shared.budget
    assert planted.terms.total_steps < shared.terms.total_steps / 2
    parts = maker.trial(SOME, 3)
    assert parts.task is shared
    assert parts.plan.seed == parts.config.seed == 3
    assert shared.parameters == sum(parameter.numel() for parameter in parts.grown.model.parameters())


def test_what_is_wrong_with_a_task_is_said() -> None:
    assert find_task("d1") is TRAINING[0]
    with pytest.raises(ConfigError, match="task 'd0': unknown; there are d1, "):
        find_task("d0")
    with pytest.raises(ConfigError, match="must be even"):
        replace(SOME, width=3)
    with pytest.raises(ConfigError, match="at least two ticks"):
        replace(SOME, steps=30)
    with pytest.raises(ConfigError, match="must be 0 for bytes"):
        replace(SOME, family=Family.BYTES)


def test_an_environment_is_made_by_settings() -> None:
    env = make_growth_environment(GrowthEnvConfig(tasks=["r5"], seeds=1, sparse=True, most_ticks=4), 2)
    assert (env.num_envs, [task.name for task in env.tasks]) == (2, ["r5"])
    assert env.single_observation_space["slots"].shape[0] == 1
    assert GrowthEnvConfig().tasks == []
    for wrong, text in (({"tasks": ["d0"]}, "task 'd0': unknown"), ({"size_price": -1.0}, "size_price")):
        with pytest.raises(ConfigError, match=text):
            GrowthEnvConfig(**wrong)
    with pytest.raises(ConfigError, match="all seeds below"):
        GrowthEnvConfig(seeds=9, first_seed=2**31 - 9)


def test_most_steps_counts_short_batches() -> None:
    plan = BatchPlan(100, 32, 0)  # 32, 32, 32, 4
    assert [most_steps(samples, 1, plan) for samples in (1, 32, 33, 96, 97, 100, 101, 200)] == [1, 1, 2, 3, 4, 4, 5, 8]
    assert most_steps(1000, 10, plan) == 4

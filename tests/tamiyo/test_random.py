"""The random baseline: legal, seeded, uniform, and nothing to lose in a resume."""

from collections import Counter
from dataclasses import replace

import pytest

from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import measured
from esper.leyline.legality import why_refused
from esper.leyline.observation import Budgets
from esper.leyline.stages import Op, Stage
from esper.tamiyo import build_controller
from esper.tamiyo.random import Draws, RandomConfig
from tests.support.observations import CATALOGUE, GATES, World, observe, slot_view, verdict

SLOTS = ("r0c0", "r0c1", "r1c0")


def build(seed=0, slots=SLOTS, **config):
    return build_controller(RandomConfig(**config), slots=slots, seed=seed)


def test_over_many_ticks_every_op_occurs_and_no_illegal_one_is_proposed():
    seen, stages = Counter(), set()
    for seed in range(12):
        world = World(SLOTS, worth=lambda slot, name: 0.5, total_ticks=1000, enforce=False, seed=seed)
        for _, command in world.run(build(seed, rate=0.8), 300):  # World.apply asserts the legality of each
            seen[command.op] += 1
        stages |= {stage for history in world.history.values() for stage in history}
    assert set(seen) == set(Op) - {Op.WAIT}
    assert stages == set(Stage)
    assert min(seen.values()) >= 3, seen


@pytest.mark.parametrize("stage", [Stage.EMPTY, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.EMBARGOED])
def test_the_choice_is_uniform_over_legal_ops_wait_included(stage):
    legal = {
        Stage.EMPTY: {"WAIT", "GERMINATE"},
        Stage.TRAINING: {"WAIT", "ADVANCE", "PRUNE"},
        Stage.BLENDING: {"WAIT", "ADVANCE", "SET_ALPHA_TARGET", "PRUNE"},
        Stage.HOLDING: {"WAIT", "SET_ALPHA_TARGET", "PRUNE", "FOSSILIZE"},
        Stage.EMBARGOED: {"WAIT"},
    }[stage]
    judged = verdict(GATES[stage], False) if stage in GATES else None
    view = slot_view(stage=stage, dwell=5, alpha=1.0, alpha_target=1.0, verdict=judged)
    controller, counts, n = build(rate=1.0, slots=("r0c0",)), Counter(), 2000
    for tick in range(n):
        commands = controller.decide(observe(view, tick=tick))
        counts[commands[0].op.name if commands else "WAIT"] += 1
    assert set(counts) == legal
    assert all(abs(count - n / len(legal)) < 5 * (n / len(legal)) ** 0.5 for count in counts.values())


def test_arguments_cover_their_ranges():
    controller = build(rate=1.0, slots=("r0c0",), max_ticks=3, targets=[0.25, 1])
    births = [c for tick in range(400) for c in controller.decide(observe(slot_view(), tick=tick))]
    assert {birth.blueprint for birth in births} == {info.name for info in CATALOGUE}
    assert {birth.ticks for birth in births} == {0, 1, 2, 3}
    assert {birth.target for birth in births} == {0.25, 1.0}
    assert len({birth.curve for birth in births}) == 3


def test_operators_are_drawn_alike_among_those_that_are_legal():
    usable = (Operator.ADD, Operator.MULTIPLY, Operator.GATE)
    view = slot_view(operators=usable)
    drawn = Counter()
    for tick in range(1500):
        for command in build(rate=1.0, slots=("r0c0",)).decide(observe(view, tick=tick)):
            drawn[command.operator] += 1
    assert set(drawn) == set(usable)
    assert max(drawn.values()) < 1.3 * min(drawn.values())
    # At a partial alpha a switch needs a ramp; where none is drawn the operator stays.
    resting = slot_view(stage=Stage.BLENDING, operator=Operator.GATE, alpha=0.5, alpha_target=0.5, dwell=4)
    turns = []
    for tick in range(1500):
        seen = observe(resting, tick=tick)
        commands = build(rate=1.0, slots=("r0c0",)).decide(seen)
        assert all(why_refused(seen, command) is None for command in commands)
        turns += [command for command in commands if command.op is Op.SET_ALPHA_TARGET]
    assert {command.operator for command in turns if command.ticks > 0} == set(Operator)
    assert {command.operator for command in turns if command.ticks == 0} == {Operator.GATE}


def test_rate_is_the_share_of_ticks_at_which_a_slot_draws():
    view = slot_view(stage=Stage.TRAINING, verdict=verdict(GATES[Stage.TRAINING], False), dwell=4)
    acted = [len(build(rate=0.3, slots=("r0c0",)).decide(observe(view, tick=tick))) for tick in range(1500)]
    assert abs(sum(acted) / 1500 - 0.3 * 2 / 3) < 0.05
    assert all(build(rate=0.0, slots=("r0c0",)).decide(observe(view, tick=tick)) == [] for tick in range(50))


def test_births_of_one_tick_share_the_budget():
    views = [slot_view(slot) for slot in SLOTS]
    budgets = Budgets(live=2, germinations=None, parameters=100, flops=None)
    most = 0
    for tick in range(200):
        births = build(rate=1.0).decide(observe(*views, tick=tick, budgets=budgets))
        most = max(most, len(births))
        assert len(births) <= 2
        assert sum(next(i.parameters for i in CATALOGUE if i.name == b.blueprint) for b in births) <= 100
    assert most == 2


def test_without_an_affordable_blueprint_it_waits():
    budgets = Budgets(live=None, germinations=None, parameters=5, flops=None)
    view = slot_view(catalogue=tuple(info for info in CATALOGUE if info.parameters > 5))
    ticks = range(100)
    assert not any(build(rate=1.0, slots=("r0c0",)).decide(observe(view, tick=t, budgets=budgets)) for t in ticks)


def test_what_the_host_could_learn_is_drawn_only_where_an_operator_makes_more_of_it():
    catalogue = tuple(replace(info, folds_into="stem") for info in CATALOGUE)
    view = slot_view(catalogue=catalogue, operators=(Operator.ADD, Operator.MULTIPLY))
    drawn = [c for t in range(100) for c in build(rate=1.0, slots=("r0c0",)).decide(observe(view, tick=t))]
    assert {command.operator for command in drawn} == {Operator.MULTIPLY}
    bare = slot_view(catalogue=catalogue, operators=(Operator.ADD, Operator.GATE))
    assert not any(build(rate=1.0, slots=("r0c0",)).decide(observe(bare, tick=t)) for t in range(100))


def test_a_choice_is_a_function_of_seed_tick_and_slot_alone():
    seen = observe(*(slot_view(slot) for slot in SLOTS), tick=9)
    used = build(4)
    for tick in range(9):
        used.decide(observe(*(slot_view(slot) for slot in SLOTS), tick=tick))
    assert used.decide(seen) == build(4).decide(seen)
    noisy = observe(*(slot_view(slot) for slot in SLOTS), tick=9, train_loss=measured(3.0, tick=9, n=5))
    assert used.decide(noisy) == used.decide(seen)
    plans = {str(build(seed).decide(seen)) for seed in range(20)}
    assert len(plans) > 10


def test_draws_are_uniform_and_independent_by_label():
    values = [Draws(0, tick, "r0c0").unit("a") for tick in range(3000)]
    assert abs(sum(values) / 3000 - 0.5) < 0.03
    assert min(values) >= 0.0
    assert max(values) < 1.0
    others = [Draws(0, tick, "r0c0").unit("b") for tick in range(3000)]
    assert abs(sum((a - 0.5) * (b - 0.5) for a, b in zip(values, others)) / 3000) < 0.01


@pytest.mark.parametrize("bad", [{"rate": 1.5}, {"max_ticks": -1}, {"targets": []}, {"targets": [2.0]}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RandomConfig(**bad)


def test_what_needs_a_ramp_or_one_operator_is_drawn_with_it():
    """A copy enters by ADD and a ramp of one tick or more; where none can be drawn it is not born."""
    copy = replace(CATALOGUE[2], name="copy")
    view = slot_view(catalogue=(CATALOGUE[0], copy))
    seen, short = Counter(), Counter()
    for tick in range(400):
        observation = observe(view, tick=tick)
        for counter, most in ((seen, 3), (short, 0)):
            for command in build(rate=1.0, slots=("r0c0",), max_ticks=most).decide(observation):
                assert why_refused(observation, command) is None
                counter[command.blueprint, command.operator, command.ticks] += 1
    copies = {(operator, ticks) for name, operator, ticks in seen if name == "copy"}
    assert copies == {(Operator.ADD, ticks) for ticks in (1, 2, 3)}
    assert {name for name, _, _ in short} == {"heavy"}
    alone = slot_view(catalogue=(copy,))
    waiting = build(rate=1.0, slots=("r0c0",), max_ticks=0)
    assert not any(waiting.decide(observe(alone, tick=tick)) for tick in range(100))

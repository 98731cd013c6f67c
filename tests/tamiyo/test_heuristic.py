"""Whole lives under the rules: growth on evidence, prunes without it, rotation, budgets, and plateaus."""

import copy
import dataclasses
import random
from dataclasses import replace

import pytest

from esper.leyline.alpha import AlphaMode
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import ABSENT, Check, measured
from esper.leyline.observation import BlueprintInfo
from esper.leyline.stages import Gate, Op, Stage
from esper.tamiyo import build_controller
from esper.tamiyo.heuristic_config import HeuristicConfig, PlateauMetric, Undecided
from tests.support.observations import FREE, World, observe, slot_view, verdict

LIFE = [Stage.EMPTY, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]
COOL = [Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.EMPTY]


def build(slots=("r0c0",), **config):
    return build_controller(HeuristicConfig(**config), slots=slots, seed=0)


def ops(log, slot="r0c0"):
    return [command.op.name for _, command in log if command.slot == slot]


def births(log):
    return [(tick, command.slot, command.blueprint) for tick, command in log if command.op is Op.GERMINATE]


@pytest.mark.parametrize("slots", [("r0c0",), ("r0c0", "r0c1", "r1c0"), tuple(f"r{i}c0" for i in range(12))])
def test_a_good_seed_in_every_slot_lives_a_complete_life(slots):
    world = World(slots, worth=lambda slot, name: 0.1)
    log = world.run(build(slots), 60)
    for slot in slots:
        assert world.history[slot] == LIFE
        assert ops(log, slot) == ["GERMINATE", "ADVANCE", "ADVANCE", "ADVANCE", "FOSSILIZE"]


def test_a_life_fits_the_ticks_that_are_kept_for_it():
    world = World(("r0c0",), worth=lambda slot, name: 0.1)
    log = world.run(build(), 40)
    assert log[-1][0] - log[0][0] <= HeuristicConfig().life_ticks


def test_reasons_name_the_evidence():
    world = World(("r0c0",), worth=lambda slot, name: 0.1)
    reasons = [command.reason for _, command in world.run(build(), 40)]
    assert "heavy is untried here" in reasons[0]
    assert reasons[1] == "G1 passed"
    assert reasons[2].startswith("G2 passed: contribution 0.")
    assert reasons[-1].startswith("G5 passed: contribution 0.")
    assert reasons[-1].endswith("over all looks")


def test_a_useless_seed_is_pruned_when_its_looks_are_spent_and_the_next_blueprint_tried():
    world = World(("r0c0",), worth=lambda slot, name: 0.1 if name == "light" else -0.1)
    log = world.run(build(), 90)
    assert [name for _, _, name in births(log)] == ["heavy", "medium", "light"]  # largest first, noop never
    assert world.history["r0c0"] == [*LIFE[:3], *COOL, *LIFE[1:3], *COOL, *LIFE[1:]]
    prune = next(command for _, command in log if command.op is Op.PRUNE)
    assert prune.ticks == 0
    assert "3 of 3 looks spent: contribution -0.1" in prune.reason


def test_no_prune_before_the_evidence_of_the_last_look_had_its_tick():
    controller = build()
    late = {"stage": Stage.TRAINING, "dwell": 8, "blueprint": "light", "max_looks": 3, "looks": 3}
    failing, passing = verdict(Gate.G2, False), verdict(Gate.G2, True)
    assert controller.decide(observe(slot_view(**late, verdict=failing), tick=8)) == []
    good = slot_view(**late, verdict=passing, contribution=measured(0.1, tick=9, n=99, se=0.01))
    assert [c.op for c in copy.deepcopy(controller).decide(observe(good, tick=9))] == [Op.ADVANCE]
    assert [c.op for c in controller.decide(observe(slot_view(**late, verdict=failing), tick=9))] == [Op.PRUNE]


def test_a_passed_verdict_without_fresh_evidence_moves_nothing():
    for stage, gate in ((Stage.TRAINING, Gate.G2), (Stage.HOLDING, Gate.G5)):
        old = measured(0.5, tick=1, n=99, se=0.01).as_of(9, 1)
        seed = {"stage": stage, "dwell": 5, "blueprint": "light", "max_looks": 3, "looks": 1, "alpha_target": 1.0}
        for reading in ({}, {"contribution": old}):
            view = slot_view(**seed, **reading, verdict=verdict(gate, True))
            assert build().decide(observe(view, tick=9)) == []


@pytest.mark.parametrize(("worth", "count"), [(-0.05, 1), (0.05, 0)])
def test_a_blending_seed_is_pruned_by_a_ramp_after_readings_against_it(worth, count):
    world = World(("r0c0",), worth=lambda slot, name: worth if world.stage(slot) is Stage.BLENDING else 0.1)
    log = world.run(controller := build(tempo_ticks=3), 14)
    prunes = [(tick, command) for tick, command in log if command.op is Op.PRUNE]
    assert len(prunes) == count
    if count:
        assert prunes[0][1].ticks == HeuristicConfig().prune_ticks
        assert "2 readings against it: contribution -0.05" in prunes[0][1].reason
        assert Stage.HOLDING not in world.history["r0c0"]
        world.run(controller, 3)
        assert world.stage("r0c0").is_cooling


def blending(tick, **changes):
    seed = {"stage": Stage.BLENDING, "dwell": tick, "blueprint": "light", "alpha": 1.0, "alpha_target": 1.0}
    return observe(slot_view(**(seed | {"verdict": verdict(Gate.G3, False)} | changes)), tick=tick)


def test_a_reading_counts_once_and_integrity_is_not_evidence():
    controller = build(patience=2, stall_ticks=50)
    reading = measured(-0.1, tick=5, n=99, se=0.01)
    for tick in (5, 6, 7):
        assert controller.decide(blending(tick, contribution=reading)) == []
    fresh = [measured(-0.1, tick=tick, n=99, se=0.01) for tick in range(30)]
    unowned = verdict(Gate.G3, False, integrity=True)
    for tick in (8, 9, 10):
        assert controller.decide(blending(tick, contribution=fresh[tick], verdict=unowned)) == []
    for tick in (11, 12):
        found = controller.decide(blending(tick, contribution=fresh[tick]))
    assert [command.op for command in found] == [Op.PRUNE]


def test_readings_at_another_alpha_or_within_a_ramp_do_not_count_against_it():
    controller = build(patience=1, stall_ticks=50)
    reading = {"contribution": measured(-0.1, tick=5, n=99, se=0.01)}
    assert controller.decide(blending(5, **reading, contribution_alpha=0.7)) == []
    assert controller.decide(blending(5, **reading, alpha=0.7, alpha_mode=AlphaMode.UP, ramp_progress=0.7)) == []
    assert [c.op for c in controller.decide(blending(5, **reading))] == [Op.PRUNE]


def test_a_seed_at_rest_on_a_partial_alpha_is_blended_on():
    (command,) = build().decide(blending(5, alpha=0.5, alpha_target=0.5, contribution_alpha=0.5))
    assert (command.op, command.target, command.ticks) == (Op.SET_ALPHA_TARGET, 1.0, HeuristicConfig().tempo_ticks)


@pytest.mark.parametrize(("stage", "gate"), [(Stage.GERMINATED, Gate.G1), (Stage.BLENDING, Gate.G3)])
def test_a_seed_that_waits_for_nothing_is_pruned_in_the_end(stage, gate):
    controller = build(stall_ticks=4)
    seed = {"stage": stage, "blueprint": "light", "alpha_target": 1.0, "verdict": verdict(gate, False)}
    found = [controller.decide(observe(slot_view(**seed, dwell=tick), tick=tick)) for tick in range(1, 5)]
    assert found[:3] == [[], [], []]
    assert [command.op for command in found[3]] == [Op.PRUNE]


def strict(worth, **budgets):
    """A world whose G5 asks for 50 standard errors, 0.05 nats; ``worth`` of seeds by slot."""
    return World(tuple(worth), worth=lambda slot, name: worth[slot], hold_k_se=50.0, **budgets)


def prunes(log):
    return [command for _, command in log if command.op is Op.PRUNE]


def test_a_held_seed_that_never_earns_its_place_is_blended_out():
    log = (world := strict({"r0c0": 0.03})).run(build(undecided=Undecided.PRUNE), 28)
    assert world.history["r0c0"][:7] == [*LIFE[:5], Stage.BLENDING, Stage.PRUNED]
    assert prunes(log)[0].ticks == 2
    assert "3 of 3 looks spent" in prunes(log)[0].reason


def test_a_held_seed_that_its_looks_together_speak_for_stays_undecided():
    log = (world := strict({"r0c0": 0.03})).run(build(), 90)
    assert prunes(log) == []
    assert world.history["r0c0"] == LIFE[:5]


def holding(tick, **changes):
    seed = {
        "stage": Stage.HOLDING,
        "blueprint": "light",
        "alpha": 1.0,
        "alpha_target": 1.0,
        "dwell": tick,
        "looks": 3,
        "max_looks": 3,
        "verdict": verdict(Gate.G5, False),
    }
    return observe(slot_view(**(seed | changes)), tick=tick)


def test_all_looks_together_decide_and_the_newest_alone_does_not():
    def decided(*means, **settings):
        controller = build(**settings)
        for tick, mean in enumerate(means, 1):
            running = ABSENT if mean is None else measured(mean, tick=1, n=99, se=0.1)
            found = controller.decide(holding(tick, running=running, contribution=measured(-9.0, tick=tick, n=9)))
        return [command.op for command in found]

    assert decided(0.17, 0.17) == [], "1.7 standard errors speak for it, whatever the newest look says"
    assert decided(0.16, 0.16) == [Op.PRUNE]
    assert decided(0.16, 0.16, undecided_se=1.5) == []
    assert decided(0.3, 0.3, 0.1) == [Op.PRUNE], "a look from the reserve has changed the mean"
    assert decided(None, None) == [Op.PRUNE], "what is absent speaks for nothing"


def test_a_seed_that_is_shown_to_hurt_goes_before_its_looks_are_spent():
    running = measured(-0.3, tick=5, n=300, se=0.05)
    early = {"looks": 1, "max_looks": 7, "running": running}
    assert build().decide(holding(5, **early, hurts=0.99)) == []
    (command,) = build().decide(holding(5, **early, hurts=1.0))
    assert (command.op, command.ticks) == (Op.PRUNE, HeuristicConfig().prune_ticks)
    assert command.reason == "shown to hurt: contribution -0.3 ± 0.05 over all looks"


def test_an_undecided_seed_that_is_no_longer_sound_is_pruned():
    controller = build()
    good = measured(0.3, tick=1, n=99, se=0.1)
    assert [controller.decide(holding(tick, running=good)) for tick in (1, 2, 3)] == [[], [], []]
    broken = verdict(Gate.G5, False, integrity=True, detail="the seed holds Inf or NaN on some rank")
    assert [command.op for command in controller.decide(holding(4, running=good, verdict=broken))] == [Op.PRUNE]


def test_undecided_seeds_make_way_only_where_they_hold_every_place_and_a_slot_waits():
    worth = {"r0c0": 0.03, "r0c1": 0.02, "r1c0": 0.1}
    log = (world := strict(worth, max_live=2)).run(build(tuple(worth)), 60)
    assert [command.slot for command in prunes(log)] == ["r0c1"]  # the lesser of the two
    assert prunes(log)[0].reason.startswith("undecided at contribution 0.0")
    assert world.stage("r1c0") is Stage.FOSSILIZED
    assert world.stage("r0c0") is Stage.HOLDING


def test_a_seed_whose_last_look_passes_does_not_make_way():
    controller, good = build(("r0c0", "r0c1")), measured(0.3, tick=2, n=99, se=0.1)
    seed = {
        "stage": Stage.HOLDING,
        "blueprint": "light",
        "alpha": 1.0,
        "alpha_target": 1.0,
        "dwell": 9,
        "looks": 3,
        "max_looks": 3,
        "contribution": good,
        "running": good,
    }
    budgets = dataclasses.replace(FREE, live=0)

    def decided(tick, passes):
        held = slot_view(**seed, verdict=verdict(Gate.G5, passes))
        return [c.op for c in controller.decide(observe(held, slot_view("r0c1"), tick=tick, budgets=budgets))]

    assert decided(2, False) == []
    assert decided(3, True) == [Op.FOSSILIZE]
    assert decided(4, False) == [Op.PRUNE]  # the one place is its own, and r0c1 waits


@pytest.mark.parametrize(
    "budgets", [{}, {"max_live": 3}, {"max_live": 2, "germinations": 2}, {"max_live": 2, "parameters": 1800}]
)
def test_undecided_seeds_stay_where_no_birth_waits_for_their_place(budgets):
    worth = dict.fromkeys(("r0c0", "r0c1", "r1c0"), 0.03)
    assert prunes(strict(worth, **budgets).run(build(tuple(worth)), 90)) == []


def test_a_ramp_a_staged_birth_and_a_prune_under_way_are_left_alone():
    spent = {"verdict": verdict(Gate.G3, False), "blueprint": "light", "alpha_target": 1.0, "dwell": 50}
    for still in (
        {"stage": Stage.BLENDING, "ending": True, "alpha_mode": AlphaMode.DOWN, "ramp_progress": 0.5},
        {"stage": Stage.BLENDING, "alpha_mode": AlphaMode.UP, "ramp_progress": 0.5},
        {"stage": Stage.EMPTY, "staged": True},
        {"stage": Stage.FOSSILIZED, "verdict": None},
        {"stage": Stage.FOSSILIZED, "verdict": verdict(Gate.G6, True)},  # remove_fossils is false
        {"stage": Stage.EMBARGOED, "verdict": None, "blueprint": None},
    ):
        controller = build(stall_ticks=1, patience=1)
        for tick in range(20, 30):
            assert controller.decide(observe(slot_view(**(spent | still)), tick=tick)) == []


def test_a_prune_at_the_end_of_its_ramp_is_not_begun_again():
    controller = build(patience=1)
    against = measured(-0.1, tick=5, n=99, se=0.01)
    assert [command.op for command in controller.decide(blending(5, contribution=against))] == [Op.PRUNE]
    assert controller.decide(blending(9, alpha=0.0, alpha_target=0.0, ending=True)) == []


def test_births_respect_budgets_and_come_one_a_tick():
    slots = ("r0c0", "r0c1", "r1c0", "r1c1")
    world = World(slots, worth=lambda slot, name: -0.1, max_live=2, germinations=5, parameters=100)
    controller = build(slots)
    for _ in range(90):
        world.run(controller, 1)
        assert sum(world.stage(slot).is_live for slot in slots) <= 2
    ticks = [tick for tick, _, _ in births(world.log)]
    assert len(ticks) == 5  # the germinations
    assert len(set(ticks)) == 5
    assert {name for _, _, name in births(world.log)} == {"light", "medium"}  # heavy is over the parameters


@pytest.mark.parametrize(("spread", "tried"), [(False, ["heavy"] * 3), (True, ["heavy", "medium", "light"])])
def test_slots_try_the_first_choice_or_different_ones_at_the_same_time(spread, tried):
    slots = ("r0c0", "r0c1", "r1c0")
    log = World(slots, worth=lambda slot, name: 0.1).run(build(slots, spread=spread), 6)
    assert [name for _, _, name in births(log)] == tried


def test_births_go_to_the_slot_with_the_fewest_recent_failures():
    slots = ("r0c0", "r0c1")
    world = World(slots, worth=lambda slot, name: -0.1, max_live=1)
    world.run(build(slots), 60)
    places = [slot for _, slot, _ in births(world.log)]
    assert places == ["r0c0", "r0c1"] * 3
    assert len({(slot, name) for _, slot, name in births(world.log)}) == len(places)


def test_a_pruned_blueprint_comes_back_only_when_its_penalty_has_decayed():
    only = (BlueprintInfo(name="light", parameters=1, flops=1, reach=None),)
    world = World(("r0c0",), worth=lambda slot, name: -0.1, total_ticks=3000, catalogue=only)
    log = world.run(build(penalty_half_life=40.0, max_penalty=0.5), 2000)
    deaths = [tick for tick, command in log if command.op is Op.PRUNE]
    born = [tick for tick, _, _ in births(log)]
    assert born[1] - deaths[0] == pytest.approx(41, abs=1)  # one half-life: 1 -> 0.5
    waits = [birth - death for death, birth in zip(deaths, born[1:], strict=False)]
    assert [wait // 40 for wait in waits[:3]] == [1, 6, 25], "each failure makes the half-life 4 times as long"
    assert len(born) == 4, "a slot where nothing helps is tried ever more seldom"
    assert "again, penalty" in log[ops(log).index("GERMINATE", 1)][1].reason


def test_a_birth_that_is_vetoed_counts_as_a_failure_and_the_next_blueprint_is_tried():
    world = World(("r0c0",), worth=lambda slot, name: 0.1, builds=lambda name: name == "light")
    log = world.run(build(), 40)
    assert [name for _, _, name in births(log)] == ["heavy", "medium", "light"]
    assert world.stage("r0c0") is Stage.FOSSILIZED


def test_a_preferred_order_rules_and_skips_what_does_not_fit():
    world = World(("r0c0",), worth=lambda slot, name: -0.1)
    log = world.run(build(blueprints=["heavy", "noop"]), 60)
    assert [name for _, _, name in births(log)][:3] == ["heavy", "noop", "heavy"]
    vectors = slot_view("r0c1", catalogue=(BlueprintInfo(name="mlp", parameters=3, flops=6, reach=None),))
    seen = observe(slot_view("r0c0"), vectors)
    assert build(("r0c0", "r0c1"), blueprints=["mlp"]).decide(seen)[0].slot == "r0c1"
    with pytest.raises(
        ConfigError, match=r"controller\.blueprints: wrong fits no slot .*heavy, light, medium, mlp, noop"
    ):
        build(("r0c0", "r0c1"), blueprints=["mlp", "wrong"]).decide(seen)


def test_no_birth_in_the_warm_up_nor_when_too_little_of_the_run_is_left():
    world = World(("r0c0",), worth=lambda slot, name: 0.1)
    assert births(world.run(build(warmup_ticks=9), 20))[0][0] == 9
    for total, count in ((31, 0), (32, 1)):
        seen = observe(slot_view(), tick=20, total_steps=total * 10)
        assert len(build(life_ticks=12).decide(seen)) == count


def falling(tick):
    """Falls by 0.2 a tick to a floor at tick 20, with a noise of 0.01."""
    return max(0.0, 4 - 0.2 * tick) + random.Random(tick).gauss(1.0, 0.01)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_without_eagerness_growth_waits_for_the_plateau_whatever_the_unit(scale):
    slots = ("r0c0", "r0c1")
    world = World(slots, worth=lambda slot, name: 0.1, losses=lambda tick: scale * falling(tick))
    log = world.run(build(slots, eager=False), 60)
    first, second = (tick for tick, _, _ in births(log))
    assert 20 < first <= 30
    assert second - first >= 8  # a plateau pays for one birth
    assert "plateau: validation loss fell by" in log[0][1].reason


def test_a_loss_that_falls_steadily_is_no_plateau_and_an_absent_one_neither():
    for losses in (lambda tick: falling(0) - 0.03 * tick, lambda tick: None):
        world = World(("r0c0",), worth=lambda slot, name: 0.1, losses=losses)
        assert world.run(build(eager=False), 80) == []


def test_a_stale_or_repeated_reading_is_not_a_new_one():
    controller = build(eager=False, plateau_metric=PlateauMetric.TRAIN, plateau_window=2)
    once = measured(1.0, tick=1, n=9)
    for tick in range(2, 12):
        reading = once if tick < 6 else once.as_of(tick, 1)
        assert controller.decide(observe(slot_view(), tick=tick, train_loss=reading)) == []
    found = []
    for tick in range(12, 16):
        seen = observe(slot_view(), tick=tick, train_loss=measured(1.0, tick=tick, n=9))
        found += [(tick, command.op) for command in controller.decide(seen)]
    assert found == [(14, Op.GERMINATE)]  # the one reading of tick 1, then three more


def test_bad_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        HeuristicConfig(warmup_ticks=-1, plateau_window=1, patience=0, penalty_half_life=0, blueprints=["a", "a"])
    named = {line.split(" = ")[0] for line in caught.value.problems}
    assert named == {"warmup_ticks", "plateau_window", "patience", "penalty_half_life", "blueprints"}


def test_a_seed_that_lacks_a_continuation_alone_waits_for_it_and_goes_after_the_last():
    lasting = Check("lasting help", False, "not continued in copies yet", False)
    found = replace(verdict(Gate.G5, False), checks=(replace(lasting, name="contribution", passed=True), lasting))

    def decided(continuations, checked=found, undecided=Undecided.PRUNE, **view):
        controller = build(undecided=undecided)
        for tick in (1, 2):
            command = controller.decide(holding(tick, verdict=checked, continuations=continuations, **view))
        return [c.op for c in command]

    assert decided(0) == decided(2) == []
    assert decided(3) == [Op.PRUNE]
    assert decided(3, lasting=measured(0.001, tick=1, n=99)) == [Op.PRUNE]
    missed, told = (
        measured(0.001, tick=1, n=99),
        {"undecided": Undecided.HOLD, "running": measured(0.3, n=99, se=0.1, tick=1)},
    )
    assert decided(3, lasting=missed, **told) == [], "copies that lost it did not make up for it"
    assert decided(3, lasting=measured(-0.001, tick=1, n=99), **told) == [Op.PRUNE]
    short = replace(found, checks=(replace(lasting, name="contribution"), lasting))
    assert decided(0, short) == [Op.PRUNE], "its looks are spent without a contribution"


def test_what_the_host_could_learn_is_never_born_and_alone_it_is_an_error():
    light, medium = (BlueprintInfo(name=name, parameters=9, flops=9, reach=None) for name in ("light", "medium"))
    light = replace(light, folds_into="stem")
    world = World(("r0c0",), worth=lambda slot, name: -0.1, catalogue=(light, medium))
    assert {name for _, _, name in births(world.run(build(), 300))} == {"medium"}
    view, free = slot_view(catalogue=(light, medium)), slot_view("r0c1", catalogue=(replace(light, folds_into=None),))
    asked = build(("r0c0", "r0c1"), blueprints=["light"]).decide(observe(view, free))
    assert [command.slot for command in asked] == ["r0c1"]
    with pytest.raises(ConfigError, match=r"no slot takes light: light folds into stem, which learns itself: it adds"):
        build(("r0c0",), blueprints=["medium", "light"]).decide(observe(view, tick=1))

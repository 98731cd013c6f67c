"""The fixed schedule: due entries are proposed at their tick, bad ones are reported together."""

import pytest
from omegaconf import OmegaConf

from esper.leyline.alpha import Curve, Operator
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Op, Stage
from esper.tamiyo import build_controller
from esper.tamiyo.schedule import ScheduleConfig
from tests.support.observations import World, observe, slot_view

YAML = """
kind: schedule
actions:
  - {tick: 1, slot: r0c0, op: GERMINATE, blueprint: light, ticks: 2, curve: SIGMOID, steepness: 4}
  - {tick: 1, slot: r0c1, op: GERMINATE, blueprint: heavy}
  - {tick: 3, slot: r0c0, op: ADVANCE}
  - {tick: 6, slot: r0c0, op: ADVANCE}
  - {tick: 9, slot: r0c0, op: ADVANCE}
  - {tick: 9, slot: r0c1, op: PRUNE}
  - {tick: 12, slot: r0c0, op: FOSSILIZE}
"""


def build(actions, slots=("r0c0", "r0c1")):
    return build_controller(ScheduleConfig(actions=actions), slots=slots, seed=0)


def test_a_schedule_written_in_yaml_lives_a_whole_life():
    node = OmegaConf.merge(OmegaConf.structured(ScheduleConfig), OmegaConf.create(YAML))
    controller = build_controller(OmegaConf.to_object(node), slots=("r0c0", "r0c1"), seed=0)
    world = World(("r0c0", "r0c1"), worth=lambda slot, name: 0.1)
    log = world.run(controller, 12)
    assert [(tick, command.slot, command.op.name) for tick, command in log] == [
        (1, "r0c0", "GERMINATE"),
        (1, "r0c1", "GERMINATE"),
        (3, "r0c0", "ADVANCE"),
        (6, "r0c0", "ADVANCE"),
        (9, "r0c0", "ADVANCE"),
        (9, "r0c1", "PRUNE"),
        (12, "r0c0", "FOSSILIZE"),
    ]
    assert world.stage("r0c0") is Stage.FOSSILIZED
    assert world.history["r0c1"][:3] == [Stage.EMPTY, Stage.GERMINATED, Stage.PRUNED]
    birth = log[0][1]
    assert (birth.blueprint, birth.ticks, birth.curve, birth.steepness) == ("light", 2, Curve.SIGMOID, 4.0)
    assert birth.reason == "scheduled for tick 1"


def test_an_illegal_entry_is_still_proposed_so_that_its_refusal_is_seen():
    controller = build([{"tick": 5, "slot": "r0c0", "op": "FOSSILIZE"}], slots=("r0c0",))
    assert [command.op for command in controller.decide(observe(slot_view(), tick=5))] == [Op.FOSSILIZE]
    assert controller.decide(observe(slot_view(), tick=6)) == []


def test_an_entry_names_its_operator_and_is_add_without_one():
    birth = {"tick": 5, "slot": "r0c0", "op": "GERMINATE", "blueprint": "light"}
    turn = {"tick": 5, "slot": "r0c1", "op": "SET_ALPHA_TARGET", "target": 1.0, "operator": "CHANNEL"}
    commands = build([{**birth, "operator": "GATE"}, turn]).decide(observe(slot_view(), slot_view("r0c1"), tick=5))
    assert [command.operator for command in commands] == [Operator.GATE, Operator.CHANNEL]
    assert build([birth]).decide(observe(slot_view(), slot_view("r0c1"), tick=5))[0].operator is Operator.ADD


def test_commands_of_one_tick_come_row_major():
    entries = [{"tick": 5, "slot": slot, "op": "PRUNE"} for slot in ("r10c0", "r2c0", "r0c1")]
    slots = ("r0c1", "r2c0", "r10c0")
    commands = build(entries, slots=slots).decide(observe(*map(slot_view, slots)))
    assert tuple(command.slot for command in commands) == slots


def test_every_bad_entry_is_reported_at_once_with_its_place():
    good = {"tick": 1, "slot": "r0c0", "op": "ADVANCE"}
    bad = [
        (["advance"], "actions[1] = ['advance']: must be a mapping"),
        ({"tick": 0, "slot": "r0c0", "op": "PRUNE"}, "actions[2].tick = 0: must be a whole number >= 1"),
        ({"tick": 2, "slot": "R0C0", "op": "PRUNE"}, "actions[3].slot 'R0C0': not a slot id"),
        ({"tick": 2, "slot": "r7c7", "op": "PRUNE"}, "actions[4].slot 'r7c7': no such slot; this host has r0c0, r0c1"),
        ({"tick": 3, "slot": "r0c0", "op": "SPROUT"}, "actions[5].op = 'SPROUT': must be one of WAIT, GERMINATE"),
        ({"tick": 4, "slot": "r0c0", "op": "GERMINATE"}, "actions[6].blueprint: missing, GERMINATE needs it"),
        ({"slot": "r0c0", "op": "ADVANCE"}, "actions[7].tick: missing"),
        ({"tick": 5, "slot": "r0c0", "op": "ADVANCE", "ticks": 3}, "actions[8].ticks: ADVANCE has no such field"),
        ({"tick": 6, "slot": "r0c0", "op": "PRUNE", "ticks": True}, "actions[9].ticks = True: must be a whole number"),
        (
            {"tick": 7, "slot": "r0c0", "op": "SET_ALPHA_TARGET", "target": 1.5, "curve": "ROUND", "steepness": 1e-15},
            "actions[10].target = 1.5: alpha, must be 0 to 1",
        ),
        (dict(good), "actions[11]: slot r0c0 has an entry at tick 1 already"),
        ({"tick": 8, "slot": "r0c0", "op": ["ADVANCE"]}, "actions[12].op = ['ADVANCE']: must be one of"),
        (
            {"tick": 9, "slot": "r0c0", "op": "GERMINATE", "blueprint": "light", "operator": "BLEND"},
            "actions[13].operator = 'BLEND': must be one of ADD, MULTIPLY, GATE, CONFIDENCE, CHANNEL",
        ),
        (
            {"tick": 10, "slot": "r0c0", "op": "PRUNE", "operator": "ADD"},
            "actions[14].operator: PRUNE has no such field",
        ),
    ]
    with pytest.raises(ConfigError) as caught:
        build([good, *(entry for entry, _ in bad)])
    for _, text in bad:
        assert any(f"controller.{text}" in line for line in caught.value.problems), text
    assert any("[10].curve = 'ROUND'" in line for line in caught.value.problems)
    assert any("[10].steepness = 1e-15: must be 0.01 to 50" in line for line in caught.value.problems)
    assert len(caught.value.problems) == len(bad) + 2
    assert not any("actions[0]" in line for line in caught.value.problems)

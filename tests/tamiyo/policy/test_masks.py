"""Masks offer what the controllers' own function of legality allows: all of it, and nothing else."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.legality import legal_ops, why_refused
from esper.leyline.observation import Budgets, Observation
from esper.leyline.plain import from_plain
from esper.leyline.stages import Op, Stage
from esper.tamiyo.policy.masks import Arrays, masks_of
from esper.tamiyo.policy.options import HEADS, OPTIONS, Options, read_options, to_commands
from tests.support.any_observations import any_observation, any_slot
from tests.support.observations import observe, slot_view

BIRTH, RETARGET = OPTIONS.ops.index(Op.GERMINATE), OPTIONS.ops.index(Op.SET_ALPHA_TARGET)


def masks(observation: Observation) -> Arrays:
    return masks_of(observation, OPTIONS, slots=len(observation.slots) + 1, entries=7)


def offered(m: Arrays, op: int, slot: int, draw: random.Random) -> dict[str, int]:
    """A choice whose every option the masks allow."""
    pick = lambda mask: draw.choice(np.flatnonzero(mask).tolist())  # noqa: E731
    choice = dict.fromkeys(HEADS, 0) | {"op": op, "slot": slot}
    if op == BIRTH:
        choice |= {"blueprint": pick(m["mask_blueprint"][slot]), "operator": pick(m["mask_operator"][0, slot])}
    if op == RETARGET:
        choice |= {"operator": pick(m["mask_operator"][1, slot])}
        choice |= {"speed": pick(m["mask_speed"][slot, 1 + choice["operator"]])}
    if OPTIONS.ops[op] is Op.PRUNE:
        choice |= {"speed": pick(m["mask_speed"][slot, 0])}
    free = {"tempo": OPTIONS.tempos, "target": OPTIONS.targets, "curve": OPTIONS.curves}
    return choice | {head: draw.randrange(len(options)) for head, options in free.items()}


def test_every_command_of_legal_options_passes() -> None:
    rng, seen = random.Random(1), set()
    for _ in range(400):
        observation = any_observation(rng)
        m = masks(observation)
        assert m["mask_op"][OPTIONS.ops.index(Op.WAIT)]
        for op, slot in np.argwhere(m["mask_slot"]).tolist():
            (command,) = to_commands(observation, offered(m, op, slot, rng))
            assert why_refused(observation, command) is None, command
            seen.add((command.op, observation.slots[slot].stage, observation.slots[slot].staged))
    assert {op for op, _, _ in seen} == set(Op) - {Op.WAIT}
    assert (Op.PRUNE, Stage.EMPTY, True) in seen  # a staged birth taken back


def every_command(observation: Observation, slot: int) -> list[tuple[dict[str, int], Command]]:
    """Every choice for one slot, with its command."""
    view, found = observation.slots[slot], []
    for op in OPTIONS.ops[1:]:
        born, retarget, prune = op is Op.GERMINATE, op is Op.SET_ALPHA_TARGET, op is Op.PRUNE
        for blueprint, operator, speed in itertools.product(
            range(len(view.catalogue) if born else 1),
            range(len(OPTIONS.operators) if born or retarget else 1),
            range(len(OPTIONS.speeds) if retarget or prune else 1),
        ):
            choice = dict.fromkeys(HEADS, 0) | {"op": OPTIONS.ops.index(op), "slot": slot}
            choice |= {"blueprint": blueprint, "operator": operator, "speed": speed}
            found += [(choice, command) for command in to_commands(observation, choice)]
    return found


def test_every_legal_command_is_offered_and_no_other() -> None:
    rng = random.Random(2)
    for _ in range(60):
        observation = any_observation(rng)
        m = masks(observation)
        for slot in range(len(observation.slots)):
            any_legal = set()
            for choice, command in every_command(observation, slot):
                op, operator = choice["op"], choice["operator"]
                offers = bool(m["mask_slot"][op, slot] and m["mask_op"][op])
                if command.op is Op.GERMINATE:
                    offers &= bool(
                        m["mask_blueprint"][slot, choice["blueprint"]] & m["mask_operator"][0, slot, operator]
                    )
                elif command.op is Op.SET_ALPHA_TARGET:
                    offers &= bool(m["mask_operator"][1, slot, operator])
                    offers &= bool(m["mask_speed"][slot, 1 + operator, choice["speed"]])
                elif command.op is Op.PRUNE:
                    offers &= bool(m["mask_speed"][slot, 0, choice["speed"]])
                legal = why_refused(observation, command) is None
                assert offers is legal, command
                any_legal |= {command.op} if legal else set()
            for number, op in enumerate(OPTIONS.ops[1:], 1):
                assert bool(m["mask_slot"][number, slot]) is (op in any_legal)
                assert op not in any_legal or op in legal_ops(observation, observation.slots[slot])


def test_germinate_is_offered_only_where_a_blueprint_can_be_paid() -> None:
    budgets = Budgets(live=None, germinations=None, parameters=50, flops=None)
    rich, poor = slot_view("r0c0"), slot_view("r0c1", catalogue=slot_view().catalogue[:1])  # heavy alone
    m = masks(observe(rich, poor, budgets=budgets))
    assert Op.GERMINATE in legal_ops(observe(rich, poor, budgets=budgets), poor)
    assert m["mask_slot"][BIRTH].tolist() == [True, False, False]
    assert m["mask_blueprint"][0].tolist() == [False, True, True, False, False, False, False]  # noop, light
    assert not masks(observe(poor, budgets=budgets))["mask_op"][BIRTH]


def test_padding_is_never_legal() -> None:
    rng = random.Random(3)
    for _ in range(50):
        observation = any_observation(rng, slots=2)
        m = masks(observation)
        assert not m["mask_slot"][:, 2:].any()
        assert not m["mask_blueprint"][2:].any()
        assert not any(m["mask_blueprint"][s, len(view.catalogue) :].any() for s, view in enumerate(observation.slots))


def test_a_choice_that_waits_is_no_command() -> None:
    observation = observe(any_slot(random.Random(4), "r0c0"))
    assert to_commands(observation, dict.fromkeys(HEADS, 0)) == []


def test_options_survive_as_plain_data_and_bad_ones_are_refused() -> None:
    assert read_options(OPTIONS.plain(), "x") == from_plain(Options, OPTIONS.plain()) == OPTIONS
    with pytest.raises(Exception, match=r"p\.pt: options.operators\[0\]: 'SUBTRACT' is none of ADD"):
        read_options(OPTIONS.plain() | {"operators": ["SUBTRACT"]}, "p.pt")
    with pytest.raises(ValueError, match="0 and one above"):
        Options(**{name: getattr(OPTIONS, name) for name in Options.__slots__} | {"speeds": (1, 2)})


def test_what_the_host_could_learn_is_not_offered() -> None:
    view = slot_view("r0c0")
    folds = tuple(replace(info, folds_into="stem") if info.name == "light" else info for info in view.catalogue)
    names = [info.name for info in folds]
    for operators in ((Operator.ADD,), (Operator.MULTIPLY, Operator.ADD)):
        m = masks(observe(replace(view, catalogue=folds, operators=operators)))
        offers = m["mask_blueprint"][0, : len(folds)].tolist()
        assert offers == [name != "light" for name in names], "an entry goes with every operator of the slot"

"""Who owns each parameter, why it is not trained, and what contradicts that: over a whole life, and with a teacher."""

import gc
import weakref
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.accord.lifecycle import SlotState, learns
from esper.accord.state import RunState
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.errors import OwnershipError
from esper.leyline.stages import Stage
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.parameters import ParameterChecker, why_frozen
from esper.tolaria.training.engine import Engine
from tests.support.parameter_owners import ADAMW, STEPS, birth, give_gradients, grown_host
from tests.support.parameters import records_of, teacher_names
from tests.support.tiny import act, make_engine, schedule, tiny_config

SEED = f"{CONTAINER}.r0c0.seed."


def registered(*slots: str) -> ParameterChecker:
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    for slot in slots:
        birth(grown, owner, slot)
    found = ParameterChecker(grown, owner)
    entries = tuple(SlotState(slot=s, stage=Stage.TRAINING if s in slots else Stage.EMPTY) for s in grown.slots)
    found.follow(RunState(slots=entries), train_fossils=True)
    return found


@pytest.mark.parametrize(("stage", "ending", "fossils"), list(product(Stage, (False, True), (False, True))))
def test_there_is_a_reason_exactly_where_a_seed_does_not_learn(stage: Stage, ending: bool, fossils: bool) -> None:
    entry = SlotState(slot="r0c0", stage=stage, ending=ending)
    why = why_frozen(entry, train_fossils=fossils)
    assert (why == "") == learns(stage, ending=ending, train_fossils=fossils)


def test_every_parameter_has_one_record_and_one_group() -> None:
    found = registered("r0c0", "r1c0")
    found.check()
    records = records_of(found)
    names = [name for name, _ in found.grown.model.named_parameters()]
    assert sorted(records) == sorted(names)
    assert {record.owner for record in records.values()} == {"host", "r0c0", "r1c0"}
    assert records["scale"].kind == "host"
    assert records[f"{SEED}weight"].kind == "seed"
    assert not [record for record in records.values() if record.refusal]
    found.grown.model.scale.requires_grad_(False)
    assert "host's own code" in records_of(found)["scale"].refusal
    found.check()


def test_a_parameter_in_two_groups_in_none_or_in_anothers_is_named() -> None:
    found = registered("r0c0")
    host, seed = found.owner._groups["host"], found.owner._groups["r0c0"]
    weight = seed[0]["params"][0]
    host[0]["params"].append(weight)
    with pytest.raises(OwnershipError, match=f"{SEED}weight of r0c0 stands in 2 optimizer groups, of host and r0c0"):
        found.check()
    seed[0]["params"].remove(weight)
    with pytest.raises(OwnershipError, match=f"{SEED}weight of r0c0 stands in an optimizer group of host"):
        found.check()
    host[0]["params"].pop()
    with pytest.raises(OwnershipError, match=f"^{SEED}weight of r0c0 stands in no optimizer group$"):
        found.check()
    seed[0]["params"].append(weight)
    found.check()
    seed[0]["params"].append(nn.Parameter(torch.ones(2, 5)))
    with pytest.raises(OwnershipError, match=r"a parameter of shape \(2, 5\) that is not in the model"):
        found.check()
    seed[0]["params"].pop()
    entries = tuple(
        replace(SlotState(slot=s), stage=Stage.GERMINATED if s == "r0c0" else Stage.EMPTY) for s in found.grown.slots
    )
    found.follow(RunState(slots=entries), train_fossils=True)
    with pytest.raises(OwnershipError, match=r"may not be trained \(GERMINATED: .*\), but requires_grad is True"):
        found.check()


# a whole life ------------------------------------------------------------------------------------------------------


def life(train_fossils: bool) -> list[dict[str, str]]:
    return [
        act(1, "r0c0", "GERMINATE", blueprint="conv_light", operator="GATE", ticks=2),
        act(1, "r0c1", "GERMINATE", blueprint="attention", ticks=1),
        act(3, "r0c0", "ADVANCE"),
        act(3, "r0c1", "ADVANCE"),
        act(4, "r0c0", "ADVANCE"),
        act(4, "r0c1", "ADVANCE"),
        act(6, "r0c0", "ADVANCE"),
        act(6, "r0c1", "PRUNE", ticks=2),
        act(7, "r0c0", "FOSSILIZE"),
    ]


def states(engine: Engine) -> dict[str, tuple[str, set[str], set[str]]]:
    """Per slot with something in it: stage, kinds, reasons."""
    found = {}
    for entry in engine.state.slots:
        records = [r for r in records_of(engine.growth.parameters).values() if r.owner == entry.slot]
        if records:
            found[entry.slot] = entry.stage.name, {r.kind for r in records}, {r.refusal for r in records}
    return found


@pytest.mark.parametrize("train_fossils", [False, True])
def test_membership_follows_each_transition(train_fossils: bool, tmp_path: Path) -> None:
    config = tiny_config(
        "cnn", trainer__steps=22, slots__train_fossils=train_fossils, controller=schedule(*life(train_fossils))
    )
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    seen: list[dict[str, tuple[str, set[str], set[str]]]] = [states(engine)]
    while engine.step < 22:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
            engine.growth.parameters.check()
            seen.append(states(engine))
            for record in records_of(engine.growth.parameters).values():
                parameter = engine.grown.model.get_parameter(record.name)
                assert parameter.requires_grad == (record.refusal == ""), record
    assert seen[0] == seen[1] == {}, "what is staged belongs to nobody yet"
    first = [tick["r0c0"] for tick in seen if "r0c0" in tick]
    waiting = "GERMINATED: it learns from TRAINING on, once it has passed G1"
    assert first[:2] == [("GERMINATED", {"seed"}, {waiting}), ("TRAINING", {"seed"}, {""})]
    assert ("BLENDING", {"seed", "gate"}, {""}) in first
    fossil = "" if train_fossils else "a fossil, and slots.train_fossils = false"
    assert first[-1] == ("FOSSILIZED", {"seed"}, {fossil}), "the gate has gone"
    second = [tick.get("r0c1") for tick in seen]
    ending = "its prune ramp is running: what is blended out does not learn"
    assert ("BLENDING", {"seed"}, {ending}) in second
    assert second[-1] is None


# a teacher ---------------------------------------------------------------------------------------------------------


def test_a_teacher_is_frozen_answered_for_and_released() -> None:
    found = registered("r0c0")
    teacher = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
    found.adopt_teacher(teacher)
    assert not teacher.training
    assert not teacher[1].training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert "teacher.2.weight" in teacher_names(found)
    found.check()
    with pytest.raises(OwnershipError, match="there is a teacher already"):
        found.adopt_teacher(nn.Linear(3, 3))
    gone = [weakref.ref(thing) for thing in (teacher, *teacher.parameters())]
    found.release_teacher()
    del teacher
    gc.collect()
    assert [ref() for ref in gone] == [None] * 5
    assert not teacher_names(found)
    give_gradients(found.grown, 0)
    found.owner.step()
    found.adopt_teacher(nn.Linear(3, 3))
    found.release_teacher()
    found.adopt_teacher(nn.Linear(3, 3))


def test_a_seed_may_not_be_trained_before_its_stage_is_agreed() -> None:
    found = registered("r0c0")
    anew = ParameterChecker(found.grown, found.owner)
    assert {record.refusal for record in records_of(anew).values() if record.owner == "r0c0"} == {
        "planted since the last tick: its stage is not agreed yet"
    }


@pytest.mark.parametrize("how", ["group", "requires_grad", "gradient"])
def test_to_train_a_teacher_is_an_error_that_says_which_parameter(how: str) -> None:
    found = registered()
    teacher = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    found.adopt_teacher(teacher)
    give_gradients(found.grown, 0)
    found.owner.step()
    before = {name: p.detach().clone() for name, p in found.grown.model.named_parameters()}
    said = {"group": "stands in an optimizer group", "requires_grad": "requires a gradient", "gradient": "gradient"}
    if how == "group":
        found.owner.optimizer.add_param_group({"params": [teacher[1].bias]})
    elif how == "requires_grad":
        teacher[1].bias.requires_grad_()
    else:
        teacher[1].bias.grad = torch.ones(3)
    give_gradients(found.grown, 1)
    with pytest.raises(OwnershipError, match=f"teacher.1.bias .*{said[how]}.*: a teacher is not trained"):
        found.owner.step()
    with pytest.raises(OwnershipError, match=r"teacher\.1\.bias"):
        found.check()
    for name, parameter in found.grown.model.named_parameters():
        assert torch.equal(parameter, before[name]), "and no step was taken"


def test_a_teacher_that_is_the_student_is_refused() -> None:
    found = registered()
    with pytest.raises(OwnershipError, match=r"weight of the teacher is layers.1.weight of the model"):
        found.adopt_teacher(found.grown.model.layers[1])
    assert found.grown.model.layers[1].weight.requires_grad

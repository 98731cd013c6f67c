"""Legality: one function, from the edge table, dwell, ramps, budgets and embargo."""

import math
from dataclasses import replace

import pytest

from esper.leyline.alpha import AlphaMode, Operator
from esper.leyline.commands import Command, wait
from esper.leyline.legality import (
    legal_ops,
    spent_budget,
    why_illegal,
    why_redundant_everywhere,
    why_refused,
)
from esper.leyline.observation import BlueprintInfo, Budgets
from esper.leyline.stages import Op, Stage, edges_from
from tests.support.observations import FREE, observe, slot_view

AT_REST = {"dwell": 3, "alpha": 1.0, "alpha_target": 1.0}
INFO = BlueprintInfo(name="medium", parameters=90, flops=800, reach=None)


def budgets(**left):
    return Budgets(**({"live": None, "germinations": None, "parameters": None, "flops": None} | left))


def names(view, **changes):
    return {op.name for op in legal_ops(observe(view, **changes), view)}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Stage.EMPTY, {"GERMINATE"}),
        (Stage.GERMINATED, {"ADVANCE", "PRUNE"}),
        (Stage.TRAINING, {"ADVANCE", "PRUNE"}),
        (Stage.BLENDING, {"ADVANCE", "SET_ALPHA_TARGET", "PRUNE"}),
        (Stage.HOLDING, {"FOSSILIZE", "SET_ALPHA_TARGET", "PRUNE"}),
        (Stage.FOSSILIZED, {"PRUNE"}),
        (Stage.PRUNED, set()),
        (Stage.EMBARGOED, set()),
        (Stage.RESETTING, set()),
    ],
)
def test_ops_of_a_slot_at_rest_follow_the_edges_and_wait_is_always_among_them(stage, expected):
    assert names(slot_view(stage=stage, **AT_REST)) == expected | {"WAIT"}


def test_a_staged_slot_can_only_wait_or_be_pruned():
    assert names(slot_view(staged=True)) == {"WAIT", "PRUNE"}


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.HOLDING])
@pytest.mark.parametrize("mode", [AlphaMode.UP, AlphaMode.DOWN])
def test_a_ramp_is_interrupted_only_by_prune_now(stage, mode):
    view = slot_view(stage=stage, **AT_REST | {"alpha": 0.4}, alpha_mode=mode, ramp_progress=0.4)
    assert names(view) == {"WAIT", "PRUNE"}
    assert "40%" in why_illegal(observe(view), view, Op.SET_ALPHA_TARGET)
    assert why_refused(observe(view), Command(slot="r0c0", op=Op.PRUNE)) is None
    assert "only PRUNE now" in why_refused(observe(view), Command(slot="r0c0", op=Op.PRUNE, ticks=2))


def test_a_prune_under_way_is_only_hastened():
    assert names(slot_view(stage=Stage.BLENDING, ending=True, **AT_REST)) == {"WAIT", "PRUNE"}


@pytest.mark.parametrize(("stage", "op"), [(Stage.TRAINING, Op.ADVANCE), (Stage.HOLDING, Op.FOSSILIZE)])
def test_dwell_holds_back_what_goes_forward_and_not_a_prune(stage, op):
    young = slot_view(stage=stage, **AT_REST | {"dwell": 2}, min_dwell=3)
    assert why_illegal(observe(young), young, op) == "dwell is 2 of 3 ticks"
    assert "PRUNE" in names(young)
    ripe = slot_view(stage=stage, **AT_REST, min_dwell=3)
    assert op.name in names(ripe)


def test_a_partial_alpha_rests_in_blending():
    view = slot_view(stage=Stage.BLENDING, dwell=3, alpha=0.5, alpha_target=0.5)
    assert names(view) == {"WAIT", "SET_ALPHA_TARGET", "PRUNE"}
    assert why_illegal(observe(view), view, Op.ADVANCE) == "alpha target is 0.5, HOLDING needs 1"


@pytest.mark.parametrize(
    ("left", "word"),
    [
        ({"live": 0}, "live seeds"),
        ({"germinations": 0}, "germinations"),
        ({"parameters": 89}, "parameters: medium needs 90, 89 left"),
        ({"flops": 799}, "FLOPs: medium needs 800, 799 left"),
    ],
)
def test_the_spent_budget_is_named(left, word):
    assert word in spent_budget(budgets(**left), INFO)
    command = Command(slot="r0c0", op=Op.GERMINATE, blueprint="medium")
    assert word in why_refused(observe(slot_view(), budgets=budgets(**left)), command)


def test_exactly_enough_is_enough_and_none_is_unlimited():
    assert spent_budget(budgets(live=1, germinations=1, parameters=90, flops=800), INFO) is None
    assert spent_budget(FREE, INFO) is None
    assert spent_budget(budgets(parameters=0)) is None  # without a blueprint only counts are asked


def test_a_spent_count_makes_germinate_illegal_and_leaves_the_rest():
    spent = budgets(live=0)
    assert names(slot_view(), budgets=spent) == {"WAIT"}
    assert "ADVANCE" in names(slot_view(stage=Stage.TRAINING, **AT_REST), budgets=spent)


def test_no_birth_where_no_blueprint_fits_or_of_an_unknown_one():
    bare = slot_view(catalogue=())
    assert names(bare) == {"WAIT"}
    assert why_illegal(observe(bare), bare, Op.GERMINATE) == "no blueprint fits this slot"
    for name in (None, "oak"):
        reason = why_refused(observe(slot_view()), Command(slot="r0c0", op=Op.GERMINATE, blueprint=name))
        assert reason == f"unknown blueprint {name!r} for this slot; it takes heavy, noop, light, medium"


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_a_degraded_seed_can_only_be_pruned(stage):
    view = slot_view(stage=stage, degraded=1, **AT_REST)
    assert names(view) == {"WAIT", "PRUNE"}
    for op in (Op.ADVANCE, Op.SET_ALPHA_TARGET, Op.FOSSILIZE):
        if op in {edge.cause for edge in edges_from(stage)}:
            assert "runs by a fallback on 1 ranks; only PRUNE" in why_illegal(observe(view), view, op)


def test_an_op_without_an_edge_is_told_the_legal_ones():
    view = slot_view(stage=Stage.TRAINING, **AT_REST)
    assert why_illegal(observe(view), view, Op.FOSSILIZE) == "no edge from TRAINING (legal: ADVANCE, PRUNE)"
    fossil = slot_view(stage=Stage.FOSSILIZED)
    refusal = why_illegal(observe(fossil), fossil, Op.ADVANCE)
    assert refusal == "no edge from FOSSILIZED (legal: PRUNE, SET_ALPHA_TARGET)"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"ticks": -1}, "ramp of -1 ticks"),
        ({"ticks": 10_001}, "ramp of 10001 ticks"),
        ({"target": 1.1}, "alpha target 1.1"),
        ({"target": math.nan}, "alpha target nan"),
        ({"steepness": 0.0}, "steepness 0.0"),
        ({"steepness": 1e-15}, "steepness 1e-15: need 0.01 to 50"),
        ({"steepness": math.nan}, "steepness nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, word):
    view = slot_view(stage=Stage.HOLDING, **AT_REST)
    assert word in why_refused(observe(view), Command(slot="r0c0", op=Op.SET_ALPHA_TARGET, **arguments))
    birth = Command(slot="r0c0", op=Op.GERMINATE, blueprint="light", **arguments)
    assert word in why_refused(observe(slot_view()), birth)


def test_a_prune_by_ramp_needs_something_blended():
    ramped = Command(slot="r0c0", op=Op.PRUNE, ticks=3)
    for stage in (Stage.GERMINATED, Stage.TRAINING):
        assert f"slot is {stage.name}" in why_refused(observe(slot_view(stage=stage, **AT_REST)), ramped)
    assert why_refused(observe(slot_view(stage=Stage.HOLDING, **AT_REST)), ramped) is None


def test_waiting_is_legal_everywhere():
    for stage in Stage:
        assert why_refused(observe(slot_view(stage=stage)), wait("r0c0")) is None


def test_a_slot_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError, match="r9c9"):
        why_refused(observe(slot_view()), wait("r9c9"))


def test_a_copy_is_joined_by_add_alone_and_enters_by_a_ramp():
    offered = (BlueprintInfo(name="copy", parameters=5, flops=5, reach=None),)
    empty = slot_view(catalogue=offered)
    asked = {"slot": empty.slot, "op": Op.GERMINATE, "blueprint": "copy"}
    assert why_refused(observe(empty), Command(**asked, ticks=1)) is None
    assert "a ramp of at least 1 tick" in why_refused(observe(empty), Command(**asked, ticks=0))
    assert "by ADD alone" in why_refused(observe(empty), Command(**asked, ticks=1, operator=Operator.MULTIPLY))
    living = slot_view(stage=Stage.HOLDING, blueprint="copy", operator=Operator.ADD, catalogue=offered, **AT_REST)
    switch = Command(slot=living.slot, op=Op.SET_ALPHA_TARGET, target=0.5, ticks=2, operator=Operator.GATE)
    assert "by ADD alone" in why_refused(observe(living), switch)


def test_a_seed_that_the_host_could_learn_by_itself_is_not_born():
    info = BlueprintInfo(name="lora", parameters=5, flops=5, reach=None, folds_into="stem.0")
    why = (
        "lora folds into stem.0, which learns itself: it adds nothing that stem.0 cannot learn "
        "(gates.allow_foldable=true allows it)"
    )
    empty = slot_view(catalogue=(info,), operators=tuple(Operator))
    for operator in Operator:
        asked = Command(slot=empty.slot, op=Op.GERMINATE, blueprint="lora", ticks=1, operator=operator)
        assert why_refused(observe(empty), asked) == (None if operator is Operator.MULTIPLY else why)
    living = slot_view(stage=Stage.HOLDING, blueprint="lora", operator=Operator.MULTIPLY, catalogue=(info,), **AT_REST)
    switch = Command(slot=living.slot, op=Op.SET_ALPHA_TARGET, target=0.5, ticks=2, operator=Operator.ADD)
    assert why_refused(observe(living), switch) == why
    added = replace(living, operator=Operator.ADD)  # born while the layer was frozen: alpha may move
    assert why_refused(observe(added), switch) is None
    free = replace(info, folds_into=None)
    assert why_redundant_everywhere("lora", [(info,), (info,)]) == why
    assert why_redundant_everywhere("lora", [(info,), (free,)]) is None
    assert why_redundant_everywhere("mlp", [(info,)]) is None

"""The one door: stages change along the table's edges only, and what belonged to a stage stays in it."""

from dataclasses import replace

import pytest

from esper.accord.evidence.lasting import LastingHelp
from esper.accord.evidence.record import Evidence
from esper.accord.evidence.sums import ClusterSums
from esper.accord.lifecycle import HistoryLine, ProbeRequest, SlotState, move
from esper.leyline.alpha import AlphaMode, Curve, Operator, Ramp
from esper.leyline.commands import Command
from esper.leyline.errors import IllegalTransition
from esper.leyline.evidence import ABSENT, GradientHealth, SeedWorth, measured
from esper.leyline.plain import digest62, from_plain, to_plain
from esper.leyline.stages import EDGES, Mechanical, Op, Stage

RAMP = Ramp(
    start=0.25, target=0.75, first_step=10, last_step=30, curve=Curve.LINEAR, steepness=6.0, operator=Operator.ADD
)
FULL = SlotState(
    slot="r1c0",
    stage=Stage.TRAINING,
    since_tick=4,
    generation=3,
    blueprint="lora",
    operator=Operator.ADD,
    curve=Curve.SIGMOID,
    steepness=4.0,
    tempo=7,
    target=0.5,
    ramp=RAMP,
    ending=True,
    learn_step=12,
    birth=5,
    level=0.003,
    drawn=2,
    starts=1,
    evidence=Evidence(sums=ClusterSums(clusters=64, count=64, total=32.0), looks=2, tick=6),
    request=ProbeRequest(look=3, shares=8, alpha=1.0, aim="G2", draw="5"),
    looked_tick=6,
    contribution=measured(0.5, tick=6, n=64, se=0.1),
    contribution_alpha=1.0,
    gradient_norm=measured(2.0, tick=6, n=5),
    nonfinite_steps=0,
    finite=True,
    owned=True,
    proposal=9,
)


def go(state, cause, target, *, tick=8, proposal=0, history=64):
    return move(state, cause, target, tick=tick, proposal=proposal, history=history)


@pytest.mark.parametrize("edge", EDGES, ids=lambda e: f"{e.source.name}-{e.cause.name}-{e.target.name}")
def test_every_edge_of_the_table_opens_the_door(edge):
    before = replace(FULL, stage=edge.source)
    after, happened = go(before, edge.cause, edge.target, proposal=11)
    assert (after.stage, after.slot, after.generation) == (edge.target, "r1c0", 3)
    assert (happened.source, happened.target, happened.cause) == (edge.source, edge.target, edge.cause.name)
    assert (happened.slot, happened.generation, happened.blueprint, happened.proposal) == ("r1c0", 3, "lora", 11)


TRIPLES = {(edge.source, edge.cause, edge.target) for edge in EDGES}


@pytest.mark.parametrize("source", list(Stage))
def test_every_other_change_raises_and_names_the_legal_ones(source):
    legal = [(edge.cause.name, edge.target.name) for edge in EDGES if edge.source is source]
    tried = 0
    for cause in (*Op, *Mechanical):
        for target in Stage:
            if (source, cause, target) in TRIPLES:
                continue
            tried += 1
            with pytest.raises(IllegalTransition) as caught:
                go(replace(FULL, stage=source), cause, target)
            text = str(caught.value)
            assert text.startswith(f"{source.name} -{cause.name}-> {target.name} is no edge")
            assert all(f"{one}->{other}" in text for one, other in legal)
            assert "none" not in text
    assert tried == (len(Op) + len(Mechanical)) * len(Stage) - len(legal)


def test_evidence_belongs_to_the_stage_that_is_left():
    after, _ = go(FULL, Op.ADVANCE, Stage.BLENDING, tick=8, proposal=11)
    assert (after.request, after.contribution, after.contribution_alpha, after.looked_tick) == (None, ABSENT, 0.0, None)
    # what adds up stays until alpha moves, and what a life may still draw stays for good
    assert (after.evidence, after.drawn, after.starts) == (FULL.evidence, 2, 1)
    assert (after.birth, after.level) == (5, 0.003)
    assert (after.since_tick, after.proposal) == (8, 11)
    # health and birth command are the seed's own and go on
    assert (after.gradient_norm, after.finite, after.owned) == (FULL.gradient_norm, True, True)
    assert (after.blueprint, after.tempo, after.target, after.learn_step) == ("lora", 7, 0.5, 12)


def test_an_edge_back_to_its_own_stage_keeps_dwell_and_evidence_but_not_the_open_request():
    before = replace(FULL, stage=Stage.BLENDING)
    after, _ = go(before, Op.SET_ALPHA_TARGET, Stage.BLENDING, tick=8, proposal=0)
    assert (after.since_tick, after.contribution, after.drawn) == (4, FULL.contribution, 2)
    assert after.request is None
    assert after.history == before.history
    assert after.proposal == 9  # a change that nobody proposed does not take credit


@pytest.mark.parametrize("cause", [Op.PRUNE, Mechanical.QUARANTINE, Mechanical.DEGRADED, Mechanical.ROLLBACK])
def test_nothing_of_a_pruned_seed_stays_but_the_count_of_births_and_the_history(cause):
    after, _ = go(FULL, cause, Stage.PRUNED, tick=8, proposal=11)
    line = HistoryLine(tick=8, source=Stage.TRAINING, target=Stage.PRUNED, cause=cause.name, blueprint="lora")
    expected = SlotState(slot="r1c0", stage=Stage.PRUNED, since_tick=8, generation=3, proposal=11, history=(line,))
    assert after == expected


def test_history_is_bounded_and_keeps_the_latest_in_order():
    state = SlotState(slot="r0c0")
    circle = [
        (Op.GERMINATE, Stage.GERMINATED),
        (Op.PRUNE, Stage.PRUNED),
        (Mechanical.COOLDOWN, Stage.EMBARGOED),
        (Mechanical.COOLDOWN, Stage.RESETTING),
        (Mechanical.COOLDOWN, Stage.EMPTY),
    ]
    for tick in range(23):
        cause, target = circle[tick % 5]
        state, _ = go(state, cause, target, tick=tick, history=7)
        assert len(state.history) == min(tick + 1, 7)
    assert [line.tick for line in state.history] == list(range(16, 23))
    assert [line.target for line in state.history] == [circle[tick % 5][1] for tick in range(16, 23)]


def test_a_slot_survives_plain_data_with_nothing_lost():
    staged = SlotState(
        slot="r0c0", staged=Command(slot="r0c0", op=Op.GERMINATE, blueprint="norm", ticks=3), staged_tick=2
    )
    lived, _ = go(FULL, Op.ADVANCE, Stage.BLENDING)
    for state in (FULL, staged, lived, SlotState(slot="r0c0")):
        plain = to_plain(state)
        assert from_plain(SlotState, plain) == state
        assert digest62(from_plain(SlotState, plain)) == digest62(state)
    assert to_plain(lived)["history"][-1]["source"] == "TRAINING"
    with pytest.raises(ValueError, match="missing drawn; unknown glances"):
        from_plain(SlotState, {("glances" if key == "drawn" else key): v for key, v in to_plain(FULL).items()})


def test_every_field_of_a_slot_enters_its_digest():
    line = HistoryLine(tick=0, source=Stage.EMPTY, target=Stage.GERMINATED, cause="GERMINATE", blueprint=None)
    changes = {
        "slot": "r0c0",
        "stage": Stage.HOLDING,
        "since_tick": 5,
        "generation": 4,
        "staged": Command(slot="r1c0", op=Op.GERMINATE),
        "staged_tick": 1,
        "blueprint": "norm",
        "operator": None,
        "curve": Curve.LINEAR,
        "steepness": 5.0,
        "tempo": 8,
        "target": 0.25,
        "ramp": replace(RAMP, last_step=31),
        "ending": False,
        "learn_step": 13,
        "birth": 6,
        "level": 0.002,
        "drawn": 3,
        "refilled": 3,
        "starts": 2,
        "retold": 1,
        "evidence": None,
        "lasting": LastingHelp(
            tick=5, first=0.1, last=0.09, expected=0.04, lower=0.03, rest=0.05, retry_step=300, clusters=9, ahead=60
        ),
        "continued": 2,
        "looked_tick": 7,
        "request": None,
        "left_out": 3,
        "void_looks": 1,
        "contribution": ABSENT,
        "contribution_alpha": 0.5,
        "worth": SeedWorth(solo=measured(0.5, tick=1, n=2)),
        "gate_mean": measured(0.5, tick=1, n=2),
        "gate_std": measured(0.5, tick=1, n=2),
        "gradient_norm": ABSENT,
        "health": GradientHealth(nans=1),
        "nonfinite_steps": 1,
        "finite": False,
        "owned": False,
        "degraded": 1,
        "degraded_tick": 3,
        "frozen_step": 4,
        "changed_tick": 6,
        "proposal": 8,
        "history": (line,),
    }
    assert set(changes) == set(SlotState.__dataclass_fields__)
    digests = {digest62(FULL), *(digest62(replace(FULL, **{name: value})) for name, value in changes.items())}
    assert len(digests) == len(changes) + 1


def test_alpha_is_the_ramps_in_blended_stages_and_zero_in_all_others():
    for stage in Stage:
        state = replace(FULL, stage=stage)
        blended = stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
        assert state.alpha(20) == (0.5 if blended else 0.0)
        assert state.alpha_mode(20) is (AlphaMode.UP if blended else AlphaMode.HOLD)
    blending = replace(FULL, stage=Stage.BLENDING)
    assert [blending.ramp_done(step) for step in (29, 30, 31)] == [False, True, True]
    assert not replace(blending, ramp=None).ramp_done(31)


def test_a_slot_is_taken_from_the_staging_to_the_end_of_the_cool_down():
    assert not SlotState(slot="r0c0").taken
    assert SlotState(slot="r0c0", staged=Command(slot="r0c0", op=Op.GERMINATE)).taken
    assert all(SlotState(slot="r0c0", stage=stage).taken for stage in Stage if stage is not Stage.EMPTY)

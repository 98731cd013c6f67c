"""The edge table: what it holds, what it refuses, and that no walk over it gets lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.errors import GateError, IllegalTransition
from esper.leyline.stages import EDGES, Edge, Gate, Mechanical, Op, Stage, edges_from, find_edge

COMMANDED = {
    ("EMPTY", "GERMINATE", "GERMINATED", "G0"),
    ("GERMINATED", "ADVANCE", "TRAINING", "G1"),
    ("GERMINATED", "ADVANCE", "BLENDING", "G1"),
    ("TRAINING", "ADVANCE", "BLENDING", "G2"),
    ("BLENDING", "ADVANCE", "HOLDING", "G3"),
    ("HOLDING", "FOSSILIZE", "FOSSILIZED", "G5"),
    ("FOSSILIZED", "PRUNE", "FOSSILIZED", "G6"),
}
LIVE = {Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING}
NEXT_COOLING = {Stage.PRUNED: Stage.EMBARGOED, Stage.EMBARGOED: Stage.RESETTING, Stage.RESETTING: Stage.EMPTY}


def test_gated_edges_are_those_of_the_life_of_a_seed():
    gated = {(e.source.name, e.cause.name, e.target.name, e.gate.name) for e in EDGES if e.gate is not None}
    assert gated == COMMANDED


def test_the_table_holds_each_edge_once():
    keys = [(edge.source, edge.cause, edge.target) for edge in EDGES]
    assert len(set(keys)) == len(keys)


def test_every_pair_of_stages_and_cause_is_an_edge_or_an_error_that_names_the_legal_ones():
    table = {(edge.source, edge.cause, edge.target): edge for edge in EDGES}
    for source in Stage:
        for cause in (*Op, *Mechanical):
            for target in Stage:
                if (source, cause, target) in table:
                    assert find_edge(source, cause, target) is table[source, cause, target]
                    continue
                with pytest.raises(IllegalTransition) as caught:
                    find_edge(source, cause, target)
                for edge in edges_from(source):
                    assert f"{edge.cause.name}->{edge.target.name}" in str(caught.value)


def test_a_fossil_goes_by_a_gated_ramp_alone():
    ends = {(edge.cause, edge.target) for edge in edges_from(Stage.FOSSILIZED)}
    back = (Op.SET_ALPHA_TARGET, Stage.FOSSILIZED)
    assert ends == {(Op.PRUNE, Stage.FOSSILIZED), back, (Mechanical.RAMP_END, Stage.PRUNED)}
    with pytest.raises(IllegalTransition, match="FOSSILIZED -PRUNE-> PRUNED is no edge"):
        find_edge(Stage.FOSSILIZED, Op.PRUNE, Stage.PRUNED)


def test_traits_partition_the_stages():
    assert {stage for stage in Stage if stage.is_live} == LIVE
    assert {stage for stage in Stage if stage.has_seed} == LIVE | {Stage.FOSSILIZED}
    assert {stage for stage in Stage if stage.is_cooling} == set(NEXT_COOLING)
    for stage in Stage:
        assert stage.has_seed == (stage.is_incubating or stage.is_blended)
        assert not (stage.is_incubating and stage.is_blended)
        assert stage is Stage.EMPTY or stage.has_seed != stage.is_cooling


def test_codes_are_unique_and_dense():
    assert sorted(stage.code for stage in Stage) == list(range(len(Stage)))


@given(st.lists(st.integers(min_value=0, max_value=1000), max_size=80))
def test_a_walk_along_any_edges_keeps_the_laws(choices):
    stage, germinated, seen_full = Stage.EMPTY, 0, False
    for choice in choices:
        leaving = edges_from(stage)
        edge: Edge = leaving[choice % len(leaving)]
        assert find_edge(stage, edge.cause, edge.target) is edge
        if edge.cause is Op.GERMINATE:
            germinated, seen_full = germinated + 1, False
        if edge.target is Stage.HOLDING:
            seen_full = True
        if edge.target.has_seed:
            assert germinated > 0
        if edge.target is Stage.FOSSILIZED and stage is not Stage.FOSSILIZED:
            assert seen_full  # nothing becomes a fossil that was not held at full alpha
            assert edge.cause is Op.FOSSILIZE  # nor by itself
        if edge.target is Stage.EMPTY:
            assert edge.source is Stage.RESETTING  # a slot is empty again only after its whole rest
        if stage.is_cooling:
            assert edge.cause is Mechanical.COOLDOWN
            assert edge.target is NEXT_COOLING[stage]
        if stage.has_seed and not edge.target.has_seed:
            assert edge.target is Stage.PRUNED
        if stage.is_blended:
            assert not edge.target.is_incubating  # what has joined the host does not go back to incubation
        stage = edge.target


@given(st.sampled_from([stage for stage in Stage if stage is not Stage.FOSSILIZED]))
def test_every_other_stage_reaches_a_fossil_and_every_living_one_can_be_ended(start):
    reached, frontier = {start}, [start]
    while frontier:
        for edge in edges_from(frontier.pop()):
            if edge.target not in reached:
                reached.add(edge.target)
                frontier.append(edge.target)
    assert Stage.FOSSILIZED in reached
    if start.is_live:
        assert find_edge(start, Op.PRUNE, Stage.PRUNED).gate is None
        assert find_edge(start, Mechanical.QUARANTINE, Stage.PRUNED).gate is None


@pytest.mark.parametrize("value", [0, 1, 2, 3, 5, "G0", "G5", Gate.G3])
def test_known_gates_are_found_by_number_and_name(value):
    gate = Gate.of(value)
    assert gate in (value, Gate[value] if isinstance(value, str) else gate)


@pytest.mark.parametrize("value", [7, -1, "G7", "g1", ""])
def test_an_unknown_gate_raises(value):
    with pytest.raises(GateError, match=r"unknown gate .* gates are G0, G1, G2, G3, G5"):
        Gate.of(value)


@pytest.mark.parametrize("value", [4, "G4", Gate.G4])
def test_the_retired_gate_raises(value):
    with pytest.raises(GateError, match="G4 is retired"):
        Gate.of(value)

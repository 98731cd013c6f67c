"""The two vectors of a tick: what goes in on each rank comes out of the reduction, and what differs is seen."""

import math
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from esper.accord.effects import Veto
from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command, wait
from esper.leyline.stages import Op
from esper.tolaria.growth.health import OwnerHealth
from esper.tolaria.lockstep.collectives import RUN_DIGESTS, SLOT_DIGESTS
from esper.tolaria.lockstep.wire import (
    NOTHING,
    CommitLayout,
    Failure,
    ObserveLayout,
    RankWord,
    SaveWord,
)
from esper.tolaria.lockstep.words import WORDS, decode_command, encode_command

SLOTS = ("r0c0", "r0c1", "r2c0")
NAMES = ("conv_light", "lora", "noop")
DIGESTS = ("tick", "slot r0c0 record")
NAN, INF = math.nan, math.inf
FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)
INT64 = st.integers(-(2**63), 2**63 - 1)
DIGEST62 = st.integers(0, 2**62 - 1)


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def same(one: Command, other: Command) -> bool:
    """Equal, floats by their bits, and the reason left behind."""
    floats = all(bits(getattr(one, name)) == bits(getattr(other, name)) for name in ("target", "steepness"))
    rest = ("slot", "op", "blueprint", "operator", "curve", "ticks", "proposal")
    return floats and all(getattr(one, name) == getattr(other, name) for name in rest)


def commands(slot: str):
    return st.builds(
        Command,
        slot=st.just(slot),
        op=st.sampled_from(Op),
        blueprint=st.sampled_from([None, *NAMES]),
        operator=st.sampled_from(Operator),
        curve=st.sampled_from(Curve),
        steepness=FLOATS,
        ticks=st.integers(0, 2**31),
        target=FLOATS,
        reason=st.just("because"),
        proposal=st.integers(0, 2**62),
    )


def reduce_sum(vectors):
    return torch.stack(vectors).sum(0)


def reduce_max(vectors):
    return torch.stack(vectors).amax(0)


# observe ----------------------------------------------------------------------------------------------------------


def test_additive_terms_are_summed_and_replicated_ones_come_from_rank_0_alone():
    layout = ObserveLayout(SLOTS)
    own = [{name: float((index + 1) * 10**rank) for index, name in enumerate(layout.names)} for rank in range(3)]
    agreed = layout.decode(reduce_sum([layout.encode(values, rank) for rank, values in enumerate(own)]))
    assert list(agreed) == layout.names == [*layout.additive, *layout.replicated]
    assert len(set(layout.names)) == len(layout.names)
    for index, name in enumerate(layout.names):
        assert agreed[name] == (index + 1) * (111 if name in layout.additive else 1), name


def test_which_terms_are_replicated():
    layout = ObserveLayout(["r0c0"])
    assert set(layout.replicated) == {
        "host_norm",
        "host_norm_steps",
        "skipped",
        "skipped_in_row",
        "longest_row",
        "r0c0.norm",
        "r0c0.norm_steps",
        "r0c0.nonfinite",
        *(f"{whose}{name}" for whose in ("host_", "r0c0.") for name in OwnerHealth.__slots__),
    }
    assert "r0c0.degraded" in layout.additive
    assert {"train_loss", "validation_loss_sq", "stop", "r0c0.probe_total", "r0c0.finite"} <= set(layout.additive)


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=4))
def test_what_is_not_finite_is_counted_and_hides_nothing(rows):
    layout = ObserveLayout(SLOTS)
    names = ("train_loss", "validation_loss", "r0c1.probe_total")
    sent = [layout.encode(dict(zip(names, row)), rank) for rank, row in enumerate(rows)]
    assert all(vector.isfinite().all() for vector in sent)
    agreed = layout.decode(reduce_sum(sent))
    for column, name in enumerate(names):
        expected = sum((row[column] for row in rows if math.isfinite(row[column])), 0.0)
        assert agreed[name] == expected or math.isinf(expected)
    broken = [sum(not math.isfinite(row[column]) for row in rows) for column in range(3)]
    assert agreed["nonfinite_terms"] == sum(broken)
    assert (agreed["validation_nonfinite"], agreed["r0c1.probe_nonfinite"]) == (broken[1], broken[2])
    assert agreed["r0c0.probe_nonfinite"] == agreed["r2c0.probe_nonfinite"] == 0.0


def test_a_replicated_term_that_is_not_finite_is_counted_once_for_all_ranks():
    layout = ObserveLayout(SLOTS)
    agreed = layout.decode(reduce_sum([layout.encode({"host_norm": NAN}, rank) for rank in range(3)]))
    assert (agreed["host_norm"], agreed["nonfinite_terms"]) == (0.0, 1.0)


def test_names_that_were_not_measured_are_zero_and_unknown_ones_are_an_error():
    layout = ObserveLayout(SLOTS)
    assert not layout.encode({}, 0).any()
    with pytest.raises(KeyError, match=r"not in the observe layout: r9c9\.norm, trian_loss"):
        layout.encode({"trian_loss": 1.0, "r9c9.norm": 1.0, "train_loss": 2.0}, 0)


# commands ---------------------------------------------------------------------------------------------------------


@given(commands("r0c0"))
@example(Command(slot="r0c0", op=Op.SET_ALPHA_TARGET, target=-0.0, steepness=5e-324))
@example(Command(slot="r0c0", op=Op.SET_ALPHA_TARGET, target=1.7976931348623157e308, steepness=-INF))
@example(Command(slot="r0c0", op=Op.SET_ALPHA_TARGET, target=NAN, steepness=-NAN))
@example(Command(slot="r0c0", op=Op.GERMINATE, blueprint="noop", proposal=2**63 - 1))
def test_a_command_survives_eight_int64_words(command):
    words = encode_command(command, NAMES)
    assert len(words) == WORDS == 8
    travelled = torch.tensor(words, dtype=torch.int64).tolist()
    received = decode_command(travelled, "r0c0", NAMES)
    assert same(received, command)
    assert received.reason == ""


def test_a_blueprint_outside_the_catalogue_does_not_travel():
    with pytest.raises(ValueError, match="is not in list"):
        encode_command(Command(slot="r0c0", op=Op.GERMINATE, blueprint="missing"), NAMES)


# commit -----------------------------------------------------------------------------------------------------------


def row(layout, rank, *, digests=None, vetoes=None, word=None, asked=None):
    decided = {slot: wait(slot) for slot in layout.slots} | (asked or {})
    return layout.encode(
        rank,
        decided if rank == 0 else None,
        digests or dict.fromkeys(layout.digests, 5),
        vetoes or {},
        word or RankWord(),
    )


@given(st.tuples(*map(commands, SLOTS)), st.integers(1, 5), st.lists(DIGEST62, min_size=2, max_size=2))
def test_every_rank_reads_rank_0s_commands_out_of_the_maximum(asked, world, values):
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, world)
    digests = dict(zip(DIGESTS, values))
    decided = {command.slot: command for command in asked}
    agreed = layout.decode(
        reduce_max([row(layout, rank, digests=digests, asked=decided if rank == 0 else None) for rank in range(world)])
    )
    assert agreed.differing == ()
    assert list(agreed.commands) == list(SLOTS)
    assert all(same(agreed.commands[slot], decided[slot]) for slot in SLOTS)
    assert agreed.vetoes == {}
    assert agreed.ranks == (RankWord(),) * world


def test_followers_send_the_smallest_number_in_every_word_of_a_command():
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, 2)
    assert torch.iinfo(torch.int64).min == NOTHING
    assert row(layout, 1)[: len(SLOTS) * WORDS].eq(NOTHING).all()


@given(st.lists(st.tuples(DIGEST62, DIGEST62), min_size=1, max_size=5))
@example([(0, 1), (0, 1), (0, 0)])
@example([(2**62 - 1, 0), (2**62 - 2, 0)])
def test_a_digest_that_differs_on_any_rank_is_named_and_no_command_is_read(rows):
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, len(rows))
    vectors = [row(layout, rank, digests=dict(zip(DIGESTS, values))) for rank, values in enumerate(rows)]
    agreed = layout.decode(reduce_max(vectors))
    expected = tuple(name for column, name in enumerate(DIGESTS) if len({values[column] for values in rows}) > 1)
    assert agreed.differing == expected
    assert bool(agreed.commands) == (not expected)


def test_differing_layouts_do_not_decode_rubbish_into_commands():
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, 2)
    forged = row(layout, 1, digests=dict.fromkeys(DIGESTS, 6))
    forged[: len(SLOTS) * WORDS] = 2**40
    assert layout.decode(reduce_max([row(layout, 0), forged])).commands == {}


def test_the_gravest_veto_of_a_slot_wins_and_then_the_highest_rank():
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, 4)
    said = [
        {"r0c0": Veto.NOT_READY},
        {"r0c0": Veto.OUT_OF_MEMORY, "r2c0": Veto.BUILD_FAILED},
        {"r0c0": Veto.BUILD_FAILED},
        {"r2c0": Veto.BUILD_FAILED, "r0c1": Veto.NONE},
    ]
    agreed = layout.decode(reduce_max([row(layout, rank, vetoes=vetoes) for rank, vetoes in enumerate(said)]))
    assert agreed.vetoes == {"r0c0": (Veto.OUT_OF_MEMORY, 1), "r2c0": (Veto.BUILD_FAILED, 3)}


def test_a_veto_by_rank_0_is_a_veto():
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, 2)
    agreed = layout.decode(reduce_max([row(layout, 0, vetoes={"r0c1": Veto.NOT_READY}), row(layout, 1)]))
    assert agreed.vetoes == {"r0c1": (Veto.NOT_READY, 0)}


RANK_WORDS = st.builds(RankWord, st.sampled_from(Failure), st.sampled_from(SaveWord), st.integers(0, 2**31))


@given(st.lists(RANK_WORDS, min_size=1, max_size=6))
def test_each_rank_has_a_word_of_its_own(words):
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, len(words))
    agreed = layout.decode(reduce_max([row(layout, rank, word=word) for rank, word in enumerate(words)]))
    assert agreed.ranks == tuple(words)
    assert all(word.encode() >= 0 for word in words)


def test_a_count_of_losses_never_spills_into_a_failure():
    word = RankWord(Failure.NONE, SaveWord.WRITTEN, 2**40)
    assert RankWord.decode(word.encode()) == RankWord(Failure.NONE, SaveWord.WRITTEN, 2**31)


# layout -----------------------------------------------------------------------------------------------------------


def test_layouts_follow_from_slots_digests_and_world_size_only():
    loud = {"r0c1": Command(slot="r0c1", op=Op.GERMINATE, blueprint="lora", ticks=9, proposal=77, reason="x" * 999)}
    layout = CommitLayout(SLOTS, DIGESTS, NAMES, 3)
    lengths = {
        len(row(layout, 0)),
        len(row(layout, 0, asked=loud)),
        len(row(layout, 2, vetoes={"r0c0": Veto.NOT_READY})),
    }
    assert lengths == {layout.length} == {3 * 8 + 2 * 2 + 3 + 3 + 4}
    assert layout.length == CommitLayout(SLOTS, DIGESTS, (), 3).length
    assert ObserveLayout(SLOTS).names == ObserveLayout(list(SLOTS)).names
    per_slot = len(ObserveLayout(SLOTS).names) - len(ObserveLayout(SLOTS[:2]).names)
    assert len(ObserveLayout(SLOTS).names) == len(ObserveLayout([]).names) + 3 * per_slot


def test_a_tick_at_1024_ranks_and_12_slots_is_below_16_kib():
    slots = [f"r{row}c{col}" for row in range(4) for col in range(3)]
    digests = [*RUN_DIGESTS, *(f"slot {slot} {field}" for slot in slots for field in SLOT_DIGESTS)]
    layout = CommitLayout(slots, digests, NAMES, 1024)
    commit = row(layout, 0)
    observe = ObserveLayout(slots).encode({}, 0)
    total = commit.numel() * commit.element_size() + observe.numel() * observe.element_size()
    assert (commit.dtype, observe.dtype) == (torch.int64, torch.float64)
    assert 1024 * 8 < total < 16 * 1024

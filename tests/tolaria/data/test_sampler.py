from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.tolaria.data import BatchPlan, draw, eval_shards, microbatches, shard

sizes, batches, worlds, passes = st.integers(1, 70), st.integers(1, 40), st.integers(1, 9), st.integers(1, 6)
quick = settings(max_examples=60, deadline=None)


@given(sizes, batches, st.integers(0, 5), st.integers(0, 3))
@quick
def test_each_epoch_holds_every_sample_once(size, batch, seed, epoch):
    plan = BatchPlan(size, batch, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    pieces = [plan.indices(step) for step in steps]
    assert sorted(torch.cat(pieces).tolist()) == list(range(size))
    assert all(len(piece) == batch for piece in pieces[:-1])
    assert 1 <= len(pieces[-1]) <= batch
    assert [plan.locate(step) for step in steps] == [(epoch, place) for place in range(plan.steps_per_epoch)]


@given(sizes, batches, st.integers(0, 5), st.integers(0, 3))
@quick
def test_an_epoch_without_its_short_batch_is_the_epoch_with_it_but_for_that(size, batch, seed, epoch):
    batch = min(batch, size)
    plan, whole = BatchPlan(size, batch, seed, drop_last=True), BatchPlan(size, batch, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    pieces = [plan.indices(step).tolist() for step in steps]
    first = epoch * whole.steps_per_epoch
    assert pieces == [whole.indices(first + place).tolist() for place in range(size // batch)]
    assert {len(piece) for piece in pieces} == {batch}
    assert plan.samples_per_epoch == sum(map(len, pieces)) == size - size % batch
    assert whole.samples_per_epoch == size
    assert plan.epoch_ends(steps[-1], steps[-1] + 1)


def test_indices_are_a_function_of_seed_and_step_alone():
    straight, jumping = BatchPlan(50, 8, 3), BatchPlan(50, 8, 3)
    expected = [straight.indices(step).tolist() for step in range(30)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for step in (29, 3, 14, 0, 28, 7):
        assert jumping.indices(step).tolist() == expected[step]
    assert torch.equal(torch.get_rng_state(), state)
    assert BatchPlan(50, 8, 4).indices(0).tolist() != expected[0]
    assert expected[0] != expected[7]  # the second epoch has another order


@given(sizes, batches, worlds, passes, st.integers(0, 200))
@quick
def test_every_rank_does_the_same_passes_and_each_sample_counts_once(size, batch, world, accumulate, step):
    plan = BatchPlan(size, batch, 1)
    counted: Counter[int] = Counter()
    total = 0.0
    for rank in range(world):
        pieces = plan.pieces(step, rank, world, accumulate)
        assert len(pieces) == accumulate
        for indices, weights in pieces:
            assert indices.dtype == torch.int64
            assert indices.shape == weights.shape
            assert len(indices) >= 1
            assert bool(((indices >= 0) & (indices < size)).all())
            total += float(weights.sum())
            counted.update(index for index, weight in zip(indices.tolist(), weights.tolist()) if weight == 1.0)
            assert set(weights.tolist()) <= {0.0, 1.0}
    batch_indices = plan.indices(step).tolist()
    assert total == len(batch_indices)
    assert counted == Counter(batch_indices)


@given(sizes, worlds)
@quick
def test_shards_are_contiguous_and_differ_by_at_most_one(size, world):
    indices = torch.arange(100, 100 + size)
    shards = [shard(indices, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(shards), indices)
    lengths = [len(piece) for piece in shards]
    assert max(lengths) - min(lengths) <= 1


def test_an_empty_piece_is_one_sample_of_weight_zero():
    pieces = microbatches(torch.tensor([7, 9]), 3, spare=4)
    assert [(indices.tolist(), weights.tolist()) for indices, weights in pieces] == [
        ([7], [1.0]),
        ([9], [1.0]),
        ([7], [0.0]),
    ]
    [(indices, weights)] = microbatches(torch.empty(0, dtype=torch.int64), 1, spare=4)
    assert (indices.tolist(), weights.tolist()) == ([4], [0.0])


@given(sizes, worlds, batches)
@quick
def test_evaluation_counts_every_sample_exactly_once(size, world, batch):
    pieces = [piece for rank in range(world) for piece in eval_shards(size, rank, world, batch)]
    assert torch.cat(pieces).tolist() == list(range(size))
    assert all(1 <= len(piece) <= batch for piece in pieces)


@given(sizes, st.data())
@quick
def test_draws_are_without_replacement_and_follow_their_key(size, data):
    count = data.draw(st.integers(0, size))
    drawn = draw(size, count, "r0c0", 1, 2).tolist()
    assert len(set(drawn)) == len(drawn) == count
    assert set(drawn) <= set(range(size))
    assert draw(size, count, "r0c0", 1, 2).tolist() == drawn


def test_each_look_draws_other_samples():
    keys = [(slot, generation, look) for slot in ("r0c0", "r0c1") for generation in (0, 1) for look in (0, 1)]
    drawn = {key: frozenset(draw(1000, 50, *key).tolist()) for key in keys}
    assert len(set(drawn.values())) == len(keys)


def test_impossible_requests_are_errors():
    with pytest.raises(ValueError, match="cannot draw 11 different samples out of 10"):
        draw(10, 11, "x")
    with pytest.raises(ValueError, match="size=0 batch=4"):
        BatchPlan(0, 4, 0)
    with pytest.raises(ValueError, match="drop_last=True"):
        BatchPlan(3, 4, 0, drop_last=True)
    with pytest.raises(ValueError, match="step = -1"):
        BatchPlan(4, 4, 0).locate(-1)
    with pytest.raises(ValueError, match="piece 2 of 2"):
        shard(torch.arange(4), 2, 2)

"""Training samples that refill the reserve: whole clusters, each sample in one share, untrained when it is drawn."""

import pytest
import torch

from esper.tolaria.data.parts import PART_NAMES, BytePart, make_bundle
from esper.tolaria.data.refills import Refills
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.data.task import Task

SIZE = 203


def bundle(labels: torch.Tensor | None = None, **changes):
    rows = {name: torch.zeros(SIZE if name == "train" else 4, 8, dtype=torch.uint8) for name in PART_NAMES}
    parts = {name: BytePart(row) for name, row in rows.items()}
    fixed = {"name": "own", "task": Task.LANGUAGE, "input_shape": (7,), "classes": 256, "parts": parts, "record": {}}
    return make_bundle(**fixed, train_clusters=labels, **changes)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("clustered", [False, True])
def test_no_sample_of_a_share_is_trained_on_before_its_time_and_none_comes_twice(clustered, drop_last):
    labels = torch.arange(SIZE) // 3 if clustered else None
    data, plan = bundle(labels), BatchPlan(SIZE, 10, seed=5, drop_last=drop_last)
    refills = Refills(data, plan, 16)
    trained = {int(i): step for step in reversed(range(plan.steps_per_epoch)) for i in plan.indices(step).tolist()}
    assert len(refills.shares) == len(refills.until) >= 10
    assert list(refills.until) == sorted(refills.until, reverse=True)
    seen: set[int] = set()
    for clusters, until in zip(refills.shares, refills.until, strict=True):
        members = data.train_clusters.members(clusters)[0].tolist()
        assert len(members) >= 14
        assert not seen & set(members)
        seen |= set(members)
        first = min(trained.get(i, plan.steps_per_epoch) for i in members)
        assert first == until, "a batch before this place holds none of them, and the batch at it does"
    assert refills.until[0] >= plan.steps_per_epoch // (4 if clustered else 2)
    if clustered:
        whole = [set(range(3 * c, min(3 * c + 3, SIZE))) for c in range(-(-SIZE // 3))]
        assert all(one <= seen or not one & seen for one in whole)
    again = Refills(data, BatchPlan(SIZE, 10, seed=5, drop_last=drop_last), 16)
    assert again.until == refills.until
    assert all(torch.equal(one, other) for one, other in zip(again.shares, refills.shares, strict=True))


def test_there_are_none_where_training_labels_are_of_another_kind():
    assert Refills(bundle(refills=False), BatchPlan(SIZE, 10, seed=5), 16).until == ()

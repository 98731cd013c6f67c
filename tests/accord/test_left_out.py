"""Looks with samples whose loss is not finite: a few are left out, and beyond a share the look is void."""

import numpy
import pytest
import torch

from esper.kasmina.attribution.probe import difference_sums
from esper.leyline.stages import Stage
from tests.support.agreed_states import Run, at, sums_of_singles


def test_the_sums_are_those_of_the_finite_differences() -> None:
    rng = numpy.random.default_rng(0)
    batches = [torch.from_numpy(rng.normal(0, 1, size)) for size in (5, 7, 1)]
    batches[0][2], batches[1][0], batches[2][0] = torch.nan, torch.inf, -torch.inf
    d = numpy.concatenate([batch.numpy() for batch in batches])
    finite = d[numpy.isfinite(d)]
    found = difference_sums(batches)
    assert (found["count"], found["left_out"]) == (len(finite), 3)
    assert [found[name] for name in ("total", "total_sq", "total_cube")] == pytest.approx(
        [(finite**power).sum() for power in (1, 2, 3)], rel=1e-12
    )


def looked(left_out: int, count: int = 198, **more: float) -> Run:
    run = at(Stage.TRAINING)
    while run.slot().request is None:
        run.tick()
    sums = {**sums_of_singles(count, 19.8, 10.0, 1.0), "left_out": left_out, **more}
    run.tick(**{f"r0c0__probe_{name}": float(value) for name, value in sums.items()})
    return run


@pytest.mark.parametrize(("left_out", "measured"), [(0, True), (2, True), (3, False), (198, False)])
def test_more_than_a_hundredth_makes_a_look_void(left_out: int, measured: bool) -> None:
    slot = looked(left_out).slot()
    assert slot.contribution.is_measured is measured
    assert (slot.left_out, slot.void_looks) == (left_out, int(not measured))
    assert slot.drawn == 1, "a look is spent in any case"
    assert (slot.evidence.looks, slot.evidence.void) == (int(measured), int(not measured))


def test_a_sum_that_cannot_be_sent_makes_it_void_as_well() -> None:
    slot = looked(0, nonfinite=1).slot()
    assert (slot.contribution.is_measured, slot.left_out, slot.void_looks) == (False, 0, 1)

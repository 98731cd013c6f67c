"""Curves read at equal FLOPs, FLOPs read at equal loss; a run directory of a real run read back."""

import pytest

from esper.karn.runs import read_run
from esper.leyline.errors import RunDirError
from tests.karn.records import record

RUN = record([(10, 2.0), (20, 1.0), (30, 1.5), (40, 0.5)])


@pytest.mark.parametrize(
    ("flops", "loss"), [(10, 2.0), (15, 1.5), (20, 1.0), (25, 1.0), (30, 1.0), (35, 1.0), (38, 0.7), (40, 0.5)]
)
def test_loss_at_equal_flops_is_the_best_so_far(flops, loss):
    assert RUN.loss_at(flops) == pytest.approx(loss)


def test_beyond_its_ends_a_run_says_nothing():
    assert RUN.loss_at(9) is None
    assert RUN.loss_at(41) is None


@pytest.mark.parametrize(("loss", "flops"), [(2.5, 10), (2.0, 10), (1.5, 15), (1.0, 20), (0.75, 37.5), (0.5, 40)])
def test_flops_to_a_loss_is_the_first_crossing(loss, flops):
    assert RUN.flops_to(loss) == pytest.approx(flops)


def test_a_loss_never_reached_costs_nothing_that_can_be_named():
    assert RUN.flops_to(0.4) is None


def test_an_unfinished_run_is_refused_by_name(tmp_path):
    with pytest.raises(RunDirError, match=r"result\.json"):
        read_run(tmp_path)

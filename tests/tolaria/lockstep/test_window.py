"""Sums between two ticks: what is not finite is counted, norms come from reports, a row of skips outlives a tick."""

import math

import pytest
import torch

from esper.tolaria.growth.guard import Judgement, StepReport
from esper.tolaria.lockstep.window import Window
from esper.tolaria.lockstep.wire import ObserveLayout

NAN, INF = math.nan, math.inf


def window(**fields) -> Window:
    return Window(torch.device("cpu"), **fields)


def samples(into: Window, loss, correct, weights) -> None:
    into.add_samples(*(torch.tensor(values, requires_grad=values is loss) for values in (loss, correct, weights)))


def report(norms=None, broken=(), skipped=False) -> StepReport:
    return StepReport(norms or {}, broken, skipped)


def test_sums_over_several_forwards_with_weights():
    own = window()
    samples(own, [0.5, 1.5, 2.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0])
    samples(own, [4.0], [0.25], [1.0])
    values, nonfinite = own.values([])
    assert (values["train_loss"], values["train_correct"], values["train_count"], nonfinite) == (6.0, 1.25, 3.0, 0)


def test_losses_that_are_not_finite_are_counted_not_summed_and_hide_no_other():
    own = window()
    samples(own, [0.5, NAN, INF, -INF, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], [1.0] * 5)
    values, nonfinite = own.values([])
    assert (values["train_loss"], values["train_correct"], values["train_count"], nonfinite) == (2.5, 2.0, 2.0, 3)


def test_a_stand_in_of_weight_zero_never_counts_even_when_it_is_not_finite():
    own = window()
    samples(own, [NAN], [0.0], [0.0])
    assert own.values([]) == (window().values([])[0], 0)


def test_sums_are_kept_in_float64():
    own = window()
    for _ in range(3):
        samples(own, [2.0**24, 1.0], [0.0, 0.0], [1.0, 1.0])
    assert own.values([])[0]["train_loss"] == 3 * (2.0**24 + 1)


def test_norms_are_summed_by_owner_over_the_steps_that_had_one():
    own = window()
    own.add_step(report({"host": 2.0, "r0c0": 0.5}), 10)
    own.add_step(report({"host": 3.0}, broken=("r0c0",)), 11)
    own.add_step(report({"host": 4.0, "r0c0": 0.25}), 12)
    values, _ = own.values(["r0c0", "r0c1"])
    assert (values["host_norm"], values["host_norm_steps"]) == (9.0, 3)
    assert (values["r0c0.norm"], values["r0c0.norm_steps"], values["r0c0.nonfinite"]) == (0.75, 2, 1)
    assert (values["r0c1.norm"], values["r0c1.norm_steps"], values["r0c1.nonfinite"]) == (0.0, 0, 0)


def test_skipped_steps_in_a_row_go_on_over_a_tick_and_end_with_a_good_step():
    own = window(skipped_in_row=2)
    for step in (7, 8):
        own.add_step(report(broken=("host",), skipped=True), step)
    assert (own.skipped, own.skipped_in_row, own.first_skipped) == (2, 4, 7)
    own.reset()
    assert (own.skipped, own.skipped_in_row, own.first_skipped) == (0, 4, -1)
    assert own.values([])[0]["skipped_in_row"] == 4
    own.add_step(report(broken=("host",), skipped=True), 9)
    assert (own.skipped, own.skipped_in_row, own.first_skipped) == (1, 5, 9)
    own.add_step(report({"host": 1.0}), 10)
    assert (own.skipped, own.skipped_in_row, own.first_skipped) == (1, 0, 9)


def late(norm: float) -> Judgement:
    return Judgement(("host",), torch.tensor([norm], dtype=torch.float64))


def test_a_step_judged_on_the_device_is_read_after_the_next_one_and_all_by_the_tick():
    own, read = window(), []
    judgements = [late(norm) for norm in (1.0, NAN, INF)]
    for number, judgement in enumerate(judgements):
        own_read = judgement.read
        judgement.read = lambda number=number, own_read=own_read: read.append(number) or own_read()
    for step, judgement in enumerate(judgements):
        own.add_step(judgement, step)
        assert read == list(range(step))
    assert (own.skipped, own.row) == (1, 1)
    assert own.values([])[0]["skipped_in_row"] == 2
    assert read == [0, 1, 2]
    assert (own.skipped, own.first_skipped, own.row) == (2, 1, 2)


def test_a_row_that_the_last_tick_knew_of_is_no_news():
    """Else every step after it would bring a tick, until the next judgement is read."""
    own = window()
    own.add_step(late(NAN), 4)
    assert own.row == 0
    own.values([])
    own.reset()
    assert (own.row, own.skipped_in_row) == (0, 1)
    own.add_step(late(NAN), 5)
    assert (own.row, own.skipped_in_row) == (0, 1)
    own.add_step(late(1.0), 6)
    assert (own.row, own.skipped_in_row) == (2, 2)
    own.add_step(late(1.0), 7)
    assert (own.row, own.skipped_in_row) == (0, 0)


def test_a_full_row_that_ends_before_the_tick_that_it_brings_is_told_all_the_same():
    own = window(skipped_in_row=3)
    for step, norm in enumerate((NAN, NAN, 1.0)):
        own.add_step(late(norm), step)
    assert own.row == 5, "a tick comes now; that the last step was finite is not known yet"
    values, _ = own.values([])
    assert (values["skipped_in_row"], values["longest_row"]) == (0, 5)
    own.reset()
    assert own.values([])[0]["longest_row"] == 0


def test_a_reset_forgets_all_sums():
    own = window()
    samples(own, [1.0, NAN], [1.0, 0.0], [1.0, 1.0])
    own.add_step(report({"host": 1.0}, broken=("r0c0",)), 1)
    own.reset()
    assert own.values(["r0c0"]) == window().values(["r0c0"])


@pytest.mark.parametrize("slots", [[], ["r0c0", "r3c1"]])
def test_its_values_fit_the_observe_vector(slots):
    own = window()
    own.add_step(report({"host": 1.0, "r0c0": 2.0}), 0)
    values, _ = own.values(slots)
    assert ObserveLayout(slots).encode(values, 0).shape == (len(ObserveLayout(slots).names),)

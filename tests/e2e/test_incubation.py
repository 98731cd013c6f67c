"""Incubations compared: what a shadowed seed has learnt helps at alpha 1, what a straight-through one has does not.

The figures of five seeds at equal FLOPs, all arms beside each other, stand in docs/incubation.md.
"""

import importlib.util
import sys
from dataclasses import replace

import pytest

from tests.support.dist import ROOT


@pytest.fixture(scope="module")
def incubation():
    spec = importlib.util.spec_from_file_location("incubation_script", ROOT / "launch" / "incubation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up by module
    spec.loader.exec_module(module)
    return module


def gain(outcome) -> float:
    return outcome.with_seed - outcome.without_seed


def test_arms_are_compared_at_equal_flops_and_the_open_loop_shows(incubation):
    short = replace(incubation.TASKS["digits"], after=100)  # the rest is for a question that is not asked here
    shadow, ste = (incubation.run(short, arm, 1) for arm in ("shadow", "ste"))
    assert abs(shadow.flops - ste.flops) < 0.03 * shadow.flops
    assert ste.steps > shadow.steps  # who pays less a step takes more of them
    assert gain(shadow) < 0 < gain(ste)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "noisy"])
def test_a_shadowed_seed_at_alpha_1_is_better_than_the_host_on_five_of_five_seeds(incubation, task):
    gains = [gain(incubation.run(incubation.TASKS[task], "shadow", seed)) for seed in (1, 2, 3, 4, 5)]
    assert max(gains) < 0, gains

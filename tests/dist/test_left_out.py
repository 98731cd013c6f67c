"""Probe samples whose loss is not finite: counted and told, and no end of growth unless they are many."""

from typing import Any

import pytest
import torch
from torch import Tensor

from esper.leyline.events import ContributionMeasured, Fault
from tests.support.dist import run_distributed
from tests.support.sessions import GATES, LIFE_STEPS, A, B, batch, make, of, train

BATCHES, DRAWN = 32, 16  # of 8 samples each; a look draws half of them
Looks = list[tuple[float | None, float | None, int]]


def probe(first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches without their first samples."""
    return [(x[first:], y[first:]) for x, y in (batch(-1 - index, 8) for index in range(BATCHES))]


def spoiled() -> list[tuple[Tensor, Tensor]]:
    """Batches for whose first sample no network has a finite loss."""
    batches = probe()
    for x, _ in batches:
        x[0] = torch.nan
    return batches


def lived(rank: int, most: float) -> tuple[list[tuple[str, str]], Looks, list[int]]:
    session = make(probe=spoiled(), gates={**GATES, "probe_samples": 8 * DRAWN, "max_left_out": most})
    train(session, range(LIFE_STEPS))
    faults = [(event.where, event.what) for event in of(session, Fault)]
    looks, left_out = looks_of(session), [slot.left_out for slot in session.state.slots]
    session.close()
    return faults, looks, left_out


def looks_of(session: Any) -> Looks:
    found = [event.contribution for event in of(session, ContributionMeasured)]
    return [(look.value, look.se, look.n) for look in found]


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_left_is_the_evidence_of_the_finite_samples_and_is_told_once_a_life(world: int) -> None:
    """The truth: a probe without those samples, looked at by the same seeds, on one rank."""
    session = make(probe=probe(first=1), gates={**GATES, "probe_samples": 7 * DRAWN})
    train(session, range(LIFE_STEPS))
    wanted = looks_of(session)
    session.close()
    assert len(wanted) > 2
    for faults, looks, left_out in run_distributed(lived, world, 0.2):
        assert [where for where, _ in faults] == [A, B], "not again at the looks to come"
        assert all(f"of {DRAWN} of {8 * DRAWN} probe samples is not finite" in what for _, what in faults)
        assert all("they are left out" in what for _, what in faults)
        assert [n for _, _, n in looks] == [7 * DRAWN] * len(wanted)
        for mine, theirs in zip(looks, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        assert left_out[0] >= DRAWN, "the agreed record counts them over the looks of a life"


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_cost_the_look_its_evidence_and_that_is_told(world: int) -> None:
    for faults, looks, _ in run_distributed(lived, world, 0.01):
        assert [where for where, _ in faults] == [A, B]
        assert all(f"of {DRAWN} of {8 * DRAWN} probe samples is not finite" in what for _, what in faults)
        assert all("gives no evidence (gates.max_left_out)" in what for _, what in faults)
        assert len(looks) > 2
        assert {value for value, _, _ in looks} == {None}

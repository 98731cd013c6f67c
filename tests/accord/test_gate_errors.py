"""How often luck passes the gates, counted: whole lives of seeds that do not help, through the real absorb, reducer,
looks and gates. No network trains; a probe's answer is drawn.

A seed's paired differences on the samples of a probe part are drawn once, with true mean 0, and stay the seed's for
its life; a look sees those samples that `draw` gives it. So looks share samples, as in a run, and a seed that was lucky
at G2 meets much of the same luck at G5.

    python -m pytest -q -s -m slow tests/accord/test_gate_errors.py        prints the table of docs/gates.md
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from esper.accord import gates
from esper.accord.config import EvidencePolicy
from esper.leyline.stages import Stage
from esper.tolaria.data.sampler import draw
from tests.support.agreed_states import Run, ask, at, make_terms

Draws = Callable[[np.random.Generator, int], np.ndarray]

# Differences of one seed, in nats: true mean 0 each; the unit does not matter to a ratio of mean and error.
SHAPES: dict[str, Draws] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails (Student, 3 degrees)": lambda rng, n: rng.standard_t(3, n),
    "helps most, hurts few (exponential, skew -2)": lambda rng, n: 1.0 - rng.standard_exponential(n),
    "helps most, hurts few (lognormal, skew -6)": lambda rng, n: math.exp(0.5) - rng.lognormal(0.0, 1.0, n),
    "hurts most, helps few (lognormal, skew +6)": lambda rng, n: rng.lognormal(0.0, 1.0, n) - math.exp(0.5),
}
FEW = "helps most, hurts few (lognormal, skew -6)"
POOL = 384  # data=digits; the smallest probe part of the shipped data


@dataclass
class Tally:
    """Lives, how many of them G2 let pass, and how many G5."""

    lives: int = 0
    g2: int = 0
    g5: int = 0


def enforcing(**thresholds) -> Run:
    """A seed that has just come to TRAINING under the default thresholds; looks come as fast as they may."""
    terms = make_terms(1, gates={"evidence": EvidencePolicy.OBSERVE, **thresholds}, embargo_ticks=0)
    run = at(Stage.TRAINING, run=Run(terms), ticks=0)
    run.terms = replace(terms, gates=replace(terms.gates, evidence=EvidencePolicy.ENFORCE))
    return run


def answer(run: Run, differences: np.ndarray) -> dict[str, float]:
    """The agreed probe sums of the open request."""
    request = run.slot().request
    if request is None:
        return {}
    count = min(run.terms.gates.probe_samples, len(differences))
    seen = differences[draw(len(differences), count, "probe", 1, "r0c0", request.draw).numpy()]
    return {
        "r0c0__probe_count": count,
        "r0c0__probe_sum": seen.sum(),
        "r0c0__probe_sum_sq": (seen**2).sum(),
        "r0c0__probe_sum_cube": (seen**3).sum(),
    }


def live(start: Run, differences: np.ndarray, generation: int) -> Stage:
    """One life under a controller that asks at every tick for whatever the gate ahead may grant; how far it came."""
    run = Run(start.terms)
    run.state = start.state.with_slots({"r0c0": replace(start.slot(), generation=generation)})
    reached, idle = Stage.TRAINING, 0
    while idle < 4:  # looks are spent, and stale
        idle = 0 if run.slot().request is not None or run.slot().stage is not reached else idle + 1
        reached = run.slot().stage
        if reached is Stage.FOSSILIZED:
            break
        op = "FOSSILIZE" if reached is Stage.HOLDING else "ADVANCE"
        # The probe answers at the beginning of a tick; a command that its verdict refuses would change nothing.
        run.tick(ask("r0c0", op), **answer(run, differences))
    return reached


def tally(shape: str, lives: int, *, pool: int = POOL, **thresholds) -> Tally:
    rng, found = np.random.default_rng([7, *shape.encode()]), Tally()
    start = enforcing(**thresholds)
    for life in range(lives):
        reached = live(start, SHAPES[shape](rng, pool), life + 1)
        found.lives += 1
        found.g2 += reached is not Stage.TRAINING
        found.g5 += reached is Stage.FOSSILIZED
    return found


@pytest.mark.parametrize("shape", ["normal", FEW])
def test_of_a_thousand_seeds_that_do_not_help_fewer_than_five_percent_pass_g2_and_one_percent_g5(shape):
    found = tally(shape, 1000)
    assert found.lives == 1000
    assert 0 < found.g2 < 50
    assert found.g5 < 10


def test_a_seed_that_helps_lives_to_the_end_in_most_lives():
    start, rng = enforcing(), np.random.default_rng(5)
    ends = [live(start, 0.3 + SHAPES["normal"](rng, POOL), life + 1) for life in range(100)]
    assert sum(end is Stage.FOSSILIZED for end in ends) > 90


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_table_of_the_docs(monkeypatch):
    lives = 2000
    print(f"\nshare of {lives} seeds that do not help which pass (percent)")
    for pool in (POOL, 2000):
        for shape in SHAPES:
            found = tally(shape, lives, pool=pool)
            with monkeypatch.context() as patched:
                patched.setattr(gates, "standard_errors_above_zero", lambda reading: reading.value / reading.se)
                plain = tally(shape, lives // 2, pool=pool, k_se=2.32, hold_k_se=2.32)
            shares = [100 * found.g2 / found.lives, 100 * found.g5 / found.lives]
            shares += [100 * plain.g2 / plain.lives, 100 * plain.g5 / plain.lives]
            print(f"| {shape} | {pool} | {' | '.join(f'{share:.1f}' for share in shares)} |")
            assert shares[0] < 5.0
            assert shares[1] < 1.0
    start, rng = enforcing(), np.random.default_rng(5)
    for worth in (0.15, 0.2, 0.25, 0.3, 0.4):
        ends = [live(start, worth + SHAPES["normal"](rng, POOL), life + 1) for life in range(200)]
        passed = [
            np.mean([end is not Stage.TRAINING for end in ends]),
            np.mean([end is Stage.FOSSILIZED for end in ends]),
        ]
        print(f"| helps by {worth} deviations | {POOL} | {100 * passed[0]:.0f} | {100 * passed[1]:.0f} |")

"""How often luck passes the gates, counted: whole lives of seeds through the real absorb, reducer, looks and gates.

No network trains; a probe's answers are drawn. A seed's differences on the samples of its probe are drawn once, with a
stated true mean, and stay the seed's for its life; a look sees the share of them that the reducer asks for.

    live     a life from its first look beside the host (or in TRAINING) to its end, by the reducer
    weighed  the same evidence without the reducer, which is much faster: what G5 would say look by look
    run_of   births one after the other, each at the level that the run has left for it

`python launch/bench.py gates` prints the tables of docs/gates.md.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.accord.absorb import absorb
from esper.accord.config import EvidencePolicy, GateConfig, SlotsConfig
from esper.accord.evidence.levels import level_of_birth, share_of_start
from esper.accord.evidence.plan import NO_PROBE, ProbePlan, plan_probe
from esper.accord.evidence.record import Evidence, weigh_help
from esper.accord.evidence.sums import ClusterSums
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.drill.replica import build_chain, terms_for
from esper.kasmina.slots.sites import Site
from esper.leyline.commands import Command, wait
from esper.leyline.stages import Incubation, Op, Stage

Rng = np.random.Generator
Draws = Callable[[Rng, int], npt.NDArray[np.float64]]
Looks = list[ClusterSums]

SLOT = "r0c0"
BLUEPRINT = "norm"


def _rarely(share: float) -> Draws:
    """Helps all but ``share`` of the samples by 1, and hurts those so much that the mean is 0."""
    worst = -(1.0 - share) / share
    return lambda rng, n: np.where(rng.random(n) < share, worst, 1.0) + 0.05 * rng.standard_normal(n)


# Differences of a seed that does not help, in nats: true mean 0. Their deviation is about 1, beside which
# gates.min_contribution is nothing, so that these are the hardest nulls.
NULLS: dict[str, Draws] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails (Student, 3 degrees)": lambda rng, n: rng.standard_t(3, n),
    "helps most, hurts few (exponential, skew -2)": lambda rng, n: 1.0 - rng.standard_exponential(n),
    "helps most, hurts few (lognormal, skew -6)": lambda rng, n: math.exp(0.5) - rng.lognormal(0.0, 1.0, n),
    "hurts most, helps few (lognormal, skew +6)": lambda rng, n: rng.lognormal(0.0, 1.0, n) - math.exp(0.5),
    "hurts 1 in 30, helps the others": _rarely(1 / 30),
    "hurts 1 in 100, helps the others": _rarely(1 / 100),
}
CLUSTERED = "normal, clusters of 1 to 15, correlation 0.36 within"


@dataclass(frozen=True, slots=True)
class Sample:
    """Differences of one seed on the samples of its probe, and the cluster of each."""

    differences: npt.NDArray[np.float64]
    clusters: npt.NDArray[np.int64]


def draw_sample(kind: str, rng: Rng, size: int, mean: float = 0.0) -> Sample:
    """Draws the differences of a seed of one of `NULLS`, or of `CLUSTERED`, shifted to ``mean``."""
    if kind != CLUSTERED:
        return Sample(NULLS[kind](rng, size) + mean, np.arange(size))
    sizes = rng.integers(1, 16, size)
    labels = np.repeat(np.arange(size), sizes)[:size]
    shared = rng.standard_normal(size)[labels]
    return Sample(math.sqrt(0.36) * shared + math.sqrt(0.64) * rng.standard_normal(size) + mean, labels)


def plan_for(sample: Sample, gates: GateConfig) -> ProbePlan:
    """The looks that a probe of such samples affords."""
    clusters = len(np.unique(sample.clusters))
    return plan_probe(len(sample.differences), clusters, per_look=gates.probe_samples, reserve=gates.reserve)


def cut_looks(sample: Sample, plan: ProbePlan, rng: Rng) -> Looks:
    """Sums of each look of a life: whole clusters, in a permutation of the life's own."""
    labels = np.unique(sample.clusters, return_inverse=True)[1]
    n = np.bincount(labels).astype(float)
    s = np.bincount(labels, sample.differences)
    powers = np.stack(
        [np.ones_like(n), n, s, s * s, s**3, n * n, n**3, s * n, s * s * n, s * n * n]
    )  # in the order of ClusterSums
    parts = np.array_split(rng.permutation(plan.clusters), plan.shares)
    return [ClusterSums.of(powers[:, part].sum(1).tolist()) for part in parts]


def weighed(looks: Looks, plan: ProbePlan, gates: GateConfig, level: float) -> bool:
    """Whether G5 would pass at some look beside the host, all else being well, under immediate incubation."""
    evidence, null = Evidence(), gates.min_contribution
    for tick, look in enumerate(looks):
        evidence = evidence.add(look, tick)
        helps = weigh_help(evidence, plan, null=null, level=level * share_of_start(0), last=plan.looks, rare=True)
        if helps.passed and look.total > 0.0:
            return True
    return False


@functools.cache
def _sites() -> dict[str, Site]:
    return dict(build_chain(1).sites)


def terms_of(plan: ProbePlan, gates: GateConfig, incubation: Incubation) -> Terms:
    """Terms of a run of one slot."""
    slots = SlotsConfig(incubation=incubation, max_live=None, embargo_ticks=0)
    return terms_for(_sites(), 1, slots, gates, probe=plan, names=(BLUEPRINT,))


def _tick(state: RunState, terms: Terms, command: Command, look: ClusterSums | None) -> RunState:
    sums: dict[str, float] = QuietSums()
    sums |= dict.fromkeys((f"{SLOT}.finite", f"{SLOT}.owned", f"{SLOT}.norm", f"{SLOT}.norm_steps"), 1.0)
    sums[f"{SLOT}.health_steps"] = 1.0
    if look is not None:
        sums |= {f"{SLOT}.probe_{name}": value for name, value in look.named().items()}
    absorbed = absorb(state, sums, terms, step=state.step + terms.tick_steps, epoch=1)
    return reduce_tick(absorbed, {SLOT: command}, {}, terms, stage_ticks=3).state


class QuietSums(dict[str, float]):
    """Sums of a tick in which nothing else was measured."""

    def __missing__(self, name: str) -> float:
        return 0.0


def begin(terms: Terms) -> RunState:
    """A newborn that has come to its first stage with looks: at full alpha beside the host, or in TRAINING."""
    told = replace(terms, gates=replace(terms.gates, evidence=EvidencePolicy.OBSERVE), probe=NO_PROBE)
    state = RunState(slots=terms.first_slots())
    state = _tick(state, told, Command(slot=SLOT, op=Op.GERMINATE, blueprint=BLUEPRINT, ticks=0), None)
    state = _tick(state, told, wait(SLOT), None)
    return _tick(state, told, Command(slot=SLOT, op=Op.ADVANCE), None)


def live(begun: RunState, terms: Terms, looks: Looks) -> Stage:
    """One life under a controller that asks at every tick for whatever the gate ahead may grant; how far it came."""
    state, idle = begun, 0
    while idle <= terms.gates.relook_every + 1:
        slot = state.slot(SLOT)
        if slot.stage is Stage.FOSSILIZED:
            break
        request = slot.request
        look = None if request is None else looks[request.look - 1]
        idle = 0 if request is not None and request.counts else idle + 1
        op = Op.FOSSILIZE if slot.stage is Stage.HOLDING else Op.ADVANCE
        state = _tick(state, terms, Command(slot=SLOT, op=op), look)
        if state.slot(SLOT).stage is not slot.stage:
            idle = 0
    return state.slot(SLOT).stage


@dataclass(frozen=True, slots=True)
class Share:
    """Lives of one kind, and how many of them passed each gate."""

    lives: int
    g2: int
    g5: int


def count_lives(
    kind: str, lives: int, *, probe: int, incubation: Incubation, mean: float = 0.0, birth: int = 1, **settings: Any
) -> Share:
    """Counts the lives of one kind of seed that pass, by the reducer.

    Args:
        kind: of `NULLS`, or `CLUSTERED`.
        lives: number of lives.
        probe: samples of the probe.
        incubation: without one there is no G2.
        mean: true mean difference in nats.
        birth: number of the birth in its run, no fossil standing; it decides the level.
        settings: of `GateConfig`.
    """
    gates, rng = GateConfig(**settings), np.random.default_rng([7, *kind.encode(), probe])
    g2 = g5 = 0
    for _ in range(lives):
        sample = draw_sample(kind, rng, probe, mean)
        plan = plan_for(sample, gates)
        terms = terms_of(plan, gates, incubation)
        begun = begin(terms)
        level = level_of_birth(gates.false_share, birth, 0)
        begun = begun.with_slots({SLOT: replace(begun.slot(SLOT), level=level)})
        reached = live(begun, terms, cut_looks(sample, plan, rng))
        g2 += reached is not Stage.TRAINING
        g5 += reached is Stage.FOSSILIZED
    return Share(lives, g2, g5)


@dataclass(frozen=True, slots=True)
class RunShare:
    """Runs of many births: mean share of false fossils, share of runs with one, mean number of true fossils."""

    false_share: float
    any_false: float
    true_fossils: float


def count_runs(kind: str, runs: int, *, births: int, probe: int, helping: float = 0.0, worth: float = 0.2) -> RunShare:
    """Counts false fossils over runs of births that follow one another and share the samples of one probe.

    Args:
        kind: of the seeds that do not help; those that do are normal.
        runs: number of runs.
        births: births of a run.
        probe: samples of the probe.
        helping: share of seeds that help.
        worth: by how much, in deviations of a difference.
    """
    gates, rng = GateConfig(), np.random.default_rng([11, *kind.encode(), births])
    shares, any_false, true_fossils = 0.0, 0, 0
    for _ in range(runs):
        false = true = 0
        for birth in range(1, births + 1):
            helps = rng.random() < helping
            sample = draw_sample("normal" if helps else kind, rng, probe, worth if helps else 0.0)
            plan = plan_for(sample, gates)
            level = level_of_birth(gates.false_share, birth, false + true)
            if weighed(cut_looks(sample, plan, rng), plan, gates, level):
                true, false = true + helps, false + (not helps)
        shares += false / max(1, false + true)
        any_false += false > 0
        true_fossils += true
    return RunShare(shares / runs, any_false / runs, true_fossils / runs)

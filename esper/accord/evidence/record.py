"""The running evidence of one life at one alpha, and how it weighs for a gate."""

import math
from dataclasses import dataclass, field, replace

from esper.accord.evidence.bound import log_evidence
from esper.accord.evidence.levels import least_clusters
from esper.accord.evidence.plan import ProbePlan
from esper.accord.evidence.sums import ClusterSums, Earlier


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Sums over the looks since alpha last moved; in TRAINING, over the stay there.

    Fields:
        sums: over the clusters of these looks, which are all different.
        starts: what the first 1, 2, 4, 8, ... looks added up to; from each of them the mean is weighed anew.
        looks: looks that were added up.
        tick: control tick at which the latest of them was measured; None before the first one.
        void: looks that gave no evidence, since too many samples were left out; with one of them nothing is shown.
        begun: looks of the life that were drawn before.
        start: how often evidence beside the host had begun in this life before; decides its share of the level.
    """

    sums: ClusterSums = field(default_factory=ClusterSums)
    starts: tuple[Earlier, ...] = ()
    looks: int = 0
    tick: int | None = None
    void: int = 0
    begun: int = 0
    start: int = 0

    def add(self, sums: ClusterSums, tick: int) -> "Evidence":
        """Returns the evidence with one more look, measured at ``tick``."""
        after, looks, starts = self.sums + sums, self.looks + 1, self.starts
        if looks & (looks - 1) == 0:
            starts = (*starts, Earlier(clusters=after.clusters, count=after.count, total=after.total))
        return replace(self, sums=after, starts=starts, looks=looks, tick=tick)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """What running evidence says to one question.

    Fields:
        log_e: log of the e-value; None where too few clusters were seen, or a look was void.
        level: chance of a false alarm that the question allows.
        clusters: clusters seen.
        least: clusters that must be seen; 0 where all that the life has were.
        void: void looks among them.
    """

    log_e: float | None
    level: float
    clusters: int
    least: int
    void: int

    @property
    def needed(self) -> float:
        """The log e-value that is enough."""
        return math.log(1.0 / self.level)

    @property
    def passed(self) -> bool:
        """Whether the evidence is enough."""
        return self.log_e is not None and self.clusters >= self.least and self.log_e >= self.needed

    @property
    def support(self) -> float | None:
        """Share of the needed log e-value; 1 is enough. None where there is none."""
        return None if self.log_e is None else self.log_e / self.needed


def weigh_help(evidence: Evidence, plan: ProbePlan, *, null: float, level: float, last: int, rare: bool) -> Weighing:
    """Weighs the running evidence against "the mean difference is at most ``null``".

    Args:
        evidence: the running evidence.
        plan: of the probe.
        null: nats per sample. A host that goes on learning without the seed would be a term of it.
        level: chance of a false alarm.
        last: looks of the life up to which this evidence may go on; beyond it there is a reserve or nothing.
        rare: whether so many clusters are asked for that harm to 1 in 100 cannot go unseen.
    """
    horizon = plan.clusters_in(max(plan.shares if rare else last, 1) - evidence.begun)
    log_e = None
    if not evidence.void:
        log_e = log_evidence(evidence.sums, evidence.starts, null=null, horizon=horizon, level=level)
    all_seen = evidence.looks >= last - evidence.begun
    least = least_clusters(level) if rare and not all_seen else 0
    return Weighing(log_e=log_e, level=level, clusters=evidence.sums.clusters, least=least, void=evidence.void)


def weigh_harm(evidence: Evidence, plan: ProbePlan, *, level: float) -> Weighing:
    """Weighs the running evidence against "the mean difference is at least 0": the seed does not hurt.

    Bets are tuned down to a single look, since a seed that hurts much should go soon. Where all of the probe was drawn
    when the evidence began, they are tuned up to as much again.
    """
    log_e = None
    if not evidence.void:
        left = plan.shares - evidence.begun
        horizon = plan.clusters_in(left if left > 0 else plan.shares)
        log_e = log_evidence(
            -evidence.sums,
            [-one for one in evidence.starts],
            null=0.0,
            horizon=horizon,
            level=level,
            shortest=max(1, plan.clusters_in(1)),
        )
    return Weighing(log_e=log_e, level=level, clusters=evidence.sums.clusters, least=0, void=evidence.void)

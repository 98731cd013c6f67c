"""The looks that a probe affords.

A look is an equal share of the probe: each life permutes the probe's clusters by a seed of its own, and its k-th look
takes the k-th of K shares, whatever its aim. So no two looks of a life share a sample. The last shares are a reserve
for seeds that are held after all others are spent, and for fossils. Once it is spent too, training samples that have
not been trained on refill it, as long as there are any (`esper.tolaria.data.refills`).
"""

from dataclasses import dataclass

from esper.accord.config import EvidencePolicy, GateConfig
from esper.accord.evidence.sums import MIN_CLUSTERS
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Incubation

_TRAINING = 0.5  # share of the looks open to G2, so that enough is left for G5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbePlan:
    """How the probe is shared out, equal on all ranks.

    Fields:
        samples: samples of the probe.
        clusters: clusters of the probe.
        looks: looks of a life, without those of the reserve.
        reserve: further looks, for a seed that is held.
        refills: looks beyond the probe, at training samples: for each the place in the plan of batches (a step) at
            which one of them is first trained on; descending.
    """

    samples: int
    clusters: int
    looks: int
    reserve: int
    refills: tuple[int, ...] = ()

    @property
    def per_look(self) -> int:
        """Samples of a look, about."""
        return self.samples // self.shares if self.shares else 0

    @property
    def shares(self) -> int:
        """Equal shares into which the probe is cut."""
        return self.looks + self.reserve

    @property
    def training_looks(self) -> int:
        """Looks of a life that G2 may spend."""
        return max(min(self.looks, 1), int(self.looks * _TRAINING))

    def clusters_in(self, looks: int) -> int:
        """Returns the clusters in so many looks."""
        return self.clusters * looks // self.shares if self.shares else 0

    def __str__(self) -> str:
        per_look = self.clusters_in(1)
        text = (
            f"{self.samples} samples in {self.clusters} clusters: {self.looks} looks of {per_look} a life, "
            f"{self.reserve} in reserve"
        )
        return f"{text}, {len(self.refills)} of samples not trained on yet" if self.refills else text


NO_PROBE = ProbePlan(samples=0, clusters=0, looks=0, reserve=0)


def plan_probe(samples: int, clusters: int, *, per_look: int, reserve: float, units: int | None = None) -> ProbePlan:
    """Returns the plan of a probe.

    Args:
        samples: samples of the probe.
        clusters: clusters of the probe.
        per_look: samples that a look draws at least.
        reserve: share of the looks that is kept for held seeds, in [0, 1).
        units: things that are drawn whole; None if these are the clusters.
    """
    shares = min(clusters if units is None else units, max(min(samples, 1), samples // per_look))
    kept = int(shares * reserve)
    return ProbePlan(samples=samples, clusters=clusters, looks=shares - kept, reserve=kept)


def check_plan(plan: ProbePlan, gates: GateConfig, incubation: Incubation, source: str) -> None:
    """Refuses a probe on which no seed could ever pass G5.

    Args:
        plan: of the probe.
        gates: thresholds; where evidence is only observed, any probe will do.
        incubation: under shadow and straight-through, G2 needs looks of its own.
        source: name of the probe's setting, for the error.

    Raises:
        ConfigError: it has too few clusters, samples or looks; the text says how many it needs.
    """
    if gates.evidence != EvidencePolicy.ENFORCE or not plan.shares:
        return
    if plan.clusters < MIN_CLUSTERS or plan.samples < gates.min_samples:
        raise ConfigError(
            f"{source}: {plan.samples} samples in {plan.clusters} clusters are too few for any seed ever to pass G5; "
            f"it needs {MIN_CLUSTERS} clusters and gates.min_samples = {gates.min_samples} samples: give it more, or "
            "set gates.evidence=observe"
        )
    if incubation != Incubation.IMMEDIATE and plan.looks < 2:
        raise ConfigError(
            f"gates.probe_samples = {gates.probe_samples}: the {plan.samples} samples of {source} are a single look, "
            f"and G2 would leave none for G5; set gates.probe_samples={plan.samples // 4}, or give it more samples"
        )

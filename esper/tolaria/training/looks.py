"""The looks that the probe part of a run's data affords."""

from esper.accord.config import GateConfig
from esper.accord.evidence.plan import ProbePlan, check_plan, plan_probe
from esper.leyline.stages import Incubation
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import bounds
from esper.tolaria.ranks.world import World


def plan_of(gates: GateConfig, incubation: Incubation, bundle: Bundle) -> ProbePlan:
    """The plan of the probe part.

    Raises:
        ConfigError: no seed could ever fossilise on it.
    """
    size, clusters = len(bundle.probe), len(bundle.probe_clusters)
    plan = plan_probe(size, clusters, per_look=gates.probe_samples, reserve=gates.reserve)
    check_plan(plan, gates, incubation, "data.probe")
    return plan


def look_sizes(plan: ProbePlan, world: World) -> set[int]:
    """Samples that this rank measures in one look, for the compiler; exact where each sample is its own cluster."""
    sizes = set()
    for look in range(plan.shares):
        first, last = bounds(plan.clusters, look, plan.shares)
        mine, beyond = bounds(last - first, world.rank, world.size)
        sizes.add(beyond - mine)
    return sizes - {0}

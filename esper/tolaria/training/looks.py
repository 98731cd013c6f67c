"""The looks that the probe part of a run's data affords, and whether attributions have samples enough."""

from dataclasses import replace

from esper.accord.config import GateConfig
from esper.accord.evidence.plan import ProbePlan, check_plan, plan_probe
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Incubation
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.refills import Refills
from esper.tolaria.data.sampler import BatchPlan, bounds
from esper.tolaria.ranks.config import ControlConfig


def plan_of(gates: GateConfig, incubation: Incubation, bundle: Bundle, batches: BatchPlan) -> ProbePlan:
    """The plan of the probe part, and of the training samples that refill its reserve.

    Raises:
        ConfigError: no seed could ever fossilise on it.
    """
    size, clusters = len(bundle.probe), len(bundle.probe_clusters)
    plan = plan_probe(size, clusters, per_look=gates.probe_samples, reserve=gates.reserve)
    check_plan(plan, gates, incubation, "data.probe")
    return replace(plan, refills=refills_of(plan, bundle, batches).until)


def refills_of(plan: ProbePlan, bundle: Bundle, batches: BatchPlan) -> Refills:
    """The shares of training samples by which the reserve is refilled, each about as large as a look."""
    return Refills(bundle, batches, max(1, plan.per_look))


def look_sizes(plan: ProbePlan, rank: int, ranks: int) -> set[int]:
    """Samples that a rank measures in one look, for the compiler; exact where each sample is its own cluster."""
    sizes = set()
    for look in range(plan.shares):
        first, last = bounds(plan.clusters, look, plan.shares)
        mine, beyond = bounds(last - first, rank, ranks)
        sizes.add(beyond - mine)
    if plan.refills:
        mine, beyond = bounds(plan.per_look, rank, ranks)
        sizes.add(beyond - mine)
    return sizes - {0}


def check_attribution(control: ControlConfig, gates: GateConfig, validation: int) -> None:
    """Checks that attributions, if there are any, have samples enough for an error.

    Raises:
        ConfigError: the validation part, of so many samples, is too small.
    """
    held_out, least = min(gates.probe_samples, validation), gates.min_samples
    if control.attribute_every and held_out < least:
        raise ConfigError(
            f"control.attribute_every = {control.attribute_every}: the {held_out} validation samples of a measurement "
            f"are fewer than gates.min_samples = {least}; set data.validation={least} or higher"
        )

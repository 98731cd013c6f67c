"""The run's account of training FLOPs: what a step costs under the agreed state, by formula. Pure, same on all ranks.

    host                    forward + full backward
    blended seed            forward + full backward while it learns; once frozen, the pass-through of the activations
    STE seed                forward + backward of its weights; the host's own pass is unchanged
    TRAINING seed, shadow   a whole forward of its own with the seeds in blend, the activations' backward from the end
                            down to its slot through the seeds in blend behind it, its own backward
    probe                   two forwards per sample, the second with the seed; what comes before its slot only once on
                            hosts that can resume from a slot

Validation and test are left out: every run has them alike, grown or not. So are a teacher's forward and what GATE and
CONFIDENCE add. Seeds that are pruned later have been paid for like any other. Costs per sample come from
`esper.kasmina.flops`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from esper.accord.config import SlotsConfig
from esper.accord.lifecycle import SlotState, learns
from esper.leyline.costs import HostCost, SeedCost
from esper.leyline.stages import Incubation, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """FLOPs per sample of one run's parts; equal on all ranks, since shapes alone decide.

    Fields:
        host: the bare host. seeds: per slot, per blueprint that fits it.
    """

    host: HostCost
    seeds: Mapping[str, Mapping[str, SeedCost]]

    def seed(self, slot: SlotState) -> SeedCost:
        """Of the seed that lives in ``slot``."""
        return self.seeds[slot.slot][str(slot.blueprint)]


def step_flops(slots: tuple[SlotState, ...], costs: Costs, config: SlotsConfig) -> int:
    """Training FLOPs per sample in a step taken under these records.

    Args:
        slots: agreed at the last tick. config: says how TRAINING seeds learn and whether fossils do.
    """
    host = costs.host
    blended = [slot for slot in slots if slot.stage.is_blended]
    total = host.forward + host.backward
    for slot in blended:
        cost = costs.seed(slot)
        learning = learns(slot.stage, ending=slot.ending, train_fossils=config.train_fossils)
        total += cost.forward + (cost.full if learning else cost.passing)
    place = {slot: index for index, slot in enumerate(host.order)}
    for slot in slots:
        if slot.stage is not Stage.TRAINING:
            continue
        cost = costs.seed(slot)
        total += cost.forward + cost.weights
        if config.incubation == Incubation.SHADOW:
            total += host.forward + host.down_to[slot.slot]
            for other in blended:
                behind = place[other.slot] > place[slot.slot]
                total += costs.seed(other).forward + (costs.seed(other).passing if behind else 0)
    return total


def probe_flops(slots: tuple[SlotState, ...], costs: Costs, counts: Mapping[str, int]) -> int:
    """FLOPs of the paired probes of one tick.

    Args:
        slots: agreed when the probes were asked for. counts: samples probed per slot, over all ranks.
    """
    base = costs.host.forward + sum(costs.seed(slot).forward for slot in slots if slot.stage.is_blended)
    place = {slot: index for index, slot in enumerate(costs.host.order)}
    total = 0
    for slot in slots:
        samples = counts.get(slot.slot, 0)
        if samples:
            own = costs.seed(slot).forward
            once = 0
            if costs.host.shared is not None:
                before = [s for s in slots if s.stage.is_blended and place[s.slot] < place[slot.slot]]
                once = costs.host.shared[slot.slot] + sum(costs.seed(other).forward for other in before)
            total += samples * (2 * base - once + (-own if slot.stage.is_blended else own))
    return total

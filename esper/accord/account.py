"""The run's account of training FLOPs: the cost of a step under the agreed state. Pure, the same on all ranks.

    host                    forward + full backward
    blended seed            forward + full backward while it learns; once frozen, the pass-through of the activations
    STE seed                forward + backward of its weights; the host's own pass is unchanged
    TRAINING seed, shadow   a whole forward of its own with the blended seeds, the activations' backward from the end
                            down to its slot through the blended seeds behind it, its own backward
    continuation            steps of copies with and without a seed (on every rank the same), and forwards of the probe
    probe                   two forwards per sample, the second with the seed; on hosts that can resume from a slot the
                            part before the slot is computed only once
    a birth                 two forwards per probe sample, the second with the seed, on every rank; of a seed that is
                            refused neither is counted
    running statistics      a forward per sample and arm on every rank, where the host has BatchNorm: two arms of a
                            probe, one of a validation soon after a seed's alpha has moved (`moved_lately`)

Validation and test are left out, since every run has the same, grown or not. So are a teacher's forward and the cost of
GATE and CONFIDENCE. Seeds that are pruned later count like any other, and a frozen host like one in training. Costs per
sample come from `esper.kasmina.flops`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from esper.accord.config import SlotsConfig
from esper.accord.lifecycle import SlotState, learns
from esper.leyline.costs import HostCost, SeedCost
from esper.leyline.legality import COPY
from esper.leyline.stages import Incubation, Stage

LAG_STEPS = 50  # of torch's momentum of 0.1: 0.9 to the 50th is half a percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """FLOPs per sample of one run's parts; equal on all ranks, since they depend on shapes alone.

    Fields:
        host: cost of the bare host.
        seeds: for each slot, the cost of each blueprint that fits it.
        statistics: samples from which all ranks together take one arm's running statistics; 0 for a host without any.
    """

    host: HostCost
    seeds: Mapping[str, Mapping[str, SeedCost]]
    statistics: int = 0

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operators that no formula counts, each with the parts that call it."""
        parts = {"the host": self.host.uncounted}
        for by_name in self.seeds.values():
            parts |= {f"blueprint {name}": cost.uncounted for name, cost in by_name.items()}
        callers: dict[str, list[str]] = {}
        for part, operators in parts.items():
            for operator in operators:
                callers.setdefault(operator, []).append(part)
        return tuple(f"{operator} ({', '.join(of)})" for operator, of in sorted(callers.items()))

    def seed(self, slot: SlotState) -> SeedCost:
        """Returns the cost of the seed that lives in ``slot``."""
        return self.seeds[slot.slot][str(slot.blueprint)]


def step_flops(slots: tuple[SlotState, ...], costs: Costs, config: SlotsConfig) -> int:
    """Returns the training FLOPs per sample of a step under these records.

    Args:
        slots: the records agreed at the last tick.
        costs: FLOPs per sample of the run's parts.
        config: says how TRAINING seeds learn and whether fossils do.
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


def continuation_costs(
    slots: tuple[SlotState, ...], continued: SlotState, costs: Costs, config: SlotsConfig
) -> tuple[int, int, int, int]:
    """Returns FLOPs per sample of continued copies: of a step and of a forward with the seed, and of both without it.

    Args:
        slots: the records agreed when the continuation was asked for.
        continued: the record of the seed that is judged.
        costs: FLOPs per sample of the run's parts.
        config: says whether fossils learn.
    """
    active = tuple(slot for slot in slots if slot.stage.is_blended)
    without = tuple(slot for slot in active if slot.slot != continued.slot)
    kept, other = (costs.host.forward + sum(costs.seed(slot).forward for slot in part) for part in (active, without))
    return step_flops(active, costs, config), kept, step_flops(without, costs, config), other


def probe_flops(slots: tuple[SlotState, ...], costs: Costs, counts: Mapping[str, int]) -> int:
    """Returns the FLOPs of the paired probes of one tick.

    Args:
        slots: the records agreed when the probes were requested.
        costs: FLOPs per sample of the run's parts.
        counts: samples probed per slot, over all ranks.
    """
    base = costs.host.forward + sum(costs.seed(slot).forward for slot in slots if slot.stage.is_blended)
    place = {slot: index for index, slot in enumerate(costs.host.order)}
    total = 0
    for slot in slots:
        samples = counts.get(slot.slot, 0)
        if samples:
            seed = costs.seed(slot).forward
            shared = 0
            if costs.host.shared is not None:
                before = [s for s in slots if s.stage.is_blended and place[s.slot] < place[slot.slot]]
                shared = costs.host.shared[slot.slot] + sum(costs.seed(other).forward for other in before)
            other = -seed if slot.stage.is_blended else seed
            total += samples * (2 * base - shared + other) + costs.statistics * (2 * base + other)
    return total


def birth_flops(slots: tuple[SlotState, ...], costs: Costs, samples: int, tick: int) -> int:
    """Returns the FLOPs of looking at the loss with and without the seeds that were born at the latest tick.

    Args:
        slots: the records agreed at that tick.
        costs: FLOPs per sample of the run's parts.
        samples: samples of one look, over all ranks.
        tick: the latest tick.
    """
    known = [s for s in slots if s.history]
    born = [s for s in known if any(x.tick == tick and x.target is Stage.GERMINATED for x in s.history)]
    base = costs.host.forward + sum(costs.seed(slot).forward for slot in slots if slot.stage.is_blended)
    looked = [slot for slot in born if slot.stage.has_seed and slot.blueprint != COPY]  # whose size is its host's
    return samples * sum(2 * base + costs.seed(slot).forward for slot in looked)


def validation_flops(slots: tuple[SlotState, ...], costs: Costs) -> int:
    """Returns the FLOPs of taking running statistics anew for a validation; see `moved_lately`."""
    blended = sum(costs.seed(slot).forward for slot in slots if slot.stage.is_blended)
    return costs.statistics * (costs.host.forward + blended)


def _joined(slot: SlotState, step: int) -> tuple[float, float]:
    return slot.alpha(step), slot.fade(step)


def moved_lately(slots: tuple[SlotState, ...], tick: int, step: int, tick_steps: int) -> bool:
    """Whether some seed's alpha moved so lately that running statistics have not followed yet.

    Args:
        slots: the records agreed at the latest tick.
        tick: the latest tick.
        step: optimizer steps done.
        tick_steps: optimizer steps between ticks.
    """
    since = tick - -(-LAG_STEPS // tick_steps)
    for slot in slots:
        if slot.stage.is_blended and slot.ramp is not None and _joined(slot, step) != _joined(slot, step - LAG_STEPS):
            return True
        if [x for x in slot.history if x.tick > since and x.target is Stage.PRUNED and x.source.is_blended]:
            return True
    return False

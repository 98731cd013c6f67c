"""What blended seeds are worth at a tick: plans the attribution, and turns its sums into entries of the observe vector.

Measured on samples of the validation part that the tick's number names: no gate reads that part, and no gate reads the
attribution. Sums of all ranks are added up in the tick's one all-reduce, so that N ranks equal one.
"""

from collections.abc import Mapping

from esper.accord.account import Costs
from esper.kasmina.attribution.coalitions import ASKED, Plan, Quantity, QuantityKind, make_plan
from esper.kasmina.attribution.prefixes import How, account
from esper.kasmina.attribution.worth import Sums
from esper.leyline.evidence import EXACT_SEEDS, WORTH_PAIRS

KINDS = {
    "solo": QuantityKind.COALITION,
    "without": QuantityKind.LEAVE_ONE_OUT,
    "shapley": QuantityKind.SHAPLEY,
}


def plan_worth(levels: Mapping[str, float], tick: int) -> Plan:
    """Plans solo, leave-one-out, all-off and Shapley values of these seeds; the same on all ranks.

    Args:
        levels: alpha of each blended seed, by slot; at least one.
        tick: decides the orders drawn for more than four seeds.
    """
    return make_plan(levels, pairs=WORTH_PAIRS if len(levels) > EXACT_SEEDS else 0, key=(tick,), ask=ASKED)


def worth_flops(sums: Sums, costs: Costs, blueprints: Mapping[str, str], rank: int) -> int:
    """FLOPs of this rank's share; running statistics, which every rank takes from the same samples, count once."""

    def host(place: str | None) -> int:
        if place is None:
            return 0
        assert costs.host.shared is not None, "a forward ended at a slot of a host that cannot stop there"
        return costs.host.shared[place]

    def total(order: tuple[str, ...] | None, how: How) -> int:
        flops = 0
        for entry, times in account(sums.plan, order, how, sums.asking).items():
            until = costs.host.forward if entry.until is None else host(entry.until)
            seeds = sum(costs.seeds[slot][blueprints[slot]].forward for slot in entry.seeds)
            flops += times * (until - host(entry.start) + seeds)
        return flops

    own = total(sums.order, sums.how) * sums.samples
    return own + (total(None, How.FULL) * sums.statistics if rank == 0 else 0)


def worth_values(sums: Sums, flops: int) -> dict[str, float]:
    """Entries of the observe vector."""
    table = {quantity: row[:2] for quantity, row in sums.table().items()}
    slots = tuple(slot for slot, _ in sums.plan.levels)
    together = table[Quantity(QuantityKind.COALITION, slots)]
    values = {
        "worth_count": float(sums.samples),
        "worth_flops": float(flops),
        "worth_together": together[0],
        "worth_together_sq": together[1],
    }
    for slot in slots:
        for name, kind in KINDS.items():
            total, squares = table[Quantity(kind, (slot,))]
            values |= {f"{slot}.worth_{name}": total, f"{slot}.worth_{name}_sq": squares}
        for k in range(sums.plan.pairs):
            values[f"{slot}.worth_pair{k}"] = table[Quantity(QuantityKind.PAIR, (slot,), k)][0]
    return values

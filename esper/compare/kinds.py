"""When growing pays in a task, as the cells of a comparison say: at once, late, or never.

    lead     what an arm saves against the host without growth when both have spent as many FLOPs: validation loss, the
             mean of three ticks, minus size price * log(size)
    pays     the best lead of all fixed sizes and plans is above two standard errors over seeds, and above `LEAST`
    at once  a seed of that blueprint, born at the first tick, leads already when two fifths of the budget are spent
    late     it does not yet, so evidence speaks against it before it pays

Every seed of which there are cells counts, the oracle's and those that are scored: what a task is like is no claim
about an arm. The best of several leads is a little too good, so a task at the edge counts as one where growing pays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esper.compare.cells import CellStore
from esper.compare.growth import BARE
from esper.karn.stats import Estimate, mean
from esper.run.trials.cells import Point
from esper.simic.env.tasks import find_task

EARLY = 0.4  # share of the budget at which a lead counts as early
TICKS = 3  # over which losses are averaged
LEAST = 0.005  # nats: a lead below it does not pay
AT_ONCE, LATE, NEVER, UNKNOWN = "at once", "late", "never", "?"
KINDS = (AT_ONCE, LATE, NEVER, UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """Whether growing pays in a task, and when.

    Fields:
        kind: one of `KINDS`; unknown as long as there is one seed alone, or if nothing of the best blueprint is born at
            the first tick.
        arm: with the best lead; None if nothing has been measured.
        lead: of that arm, nats, over seeds.
        early: mean lead at `EARLY` of the same blueprint born at the first tick, nats.
    """

    kind: str
    arm: str | None = None
    lead: Estimate | None = None
    early: float | None = None


def name_kind(lead: float, error: float | None, early: float | None, least: float = LEAST) -> str:
    """The kind that follows from the best lead, its standard error (None from one seed), and the early lead."""
    if error is None or not math.isfinite(error):
        return UNKNOWN
    if lead <= max(2 * error, least):
        return NEVER
    if early is None:
        return UNKNOWN
    return AT_ONCE if early > 0 else LATE


def kind_of(store: CellStore, task: str) -> TaskKind:
    """The kind of a task, from all cells that there are."""
    config = store.config
    family = find_task(task).family.value
    grown = {name: arm.seeds.get(family) for name, arm in config.arms.items() if arm.is_size or arm.is_plan}
    leads = {arm: found for arm, seeds in grown.items() if seeds and (found := _lead(store, arm, task, 1.0))}
    if not leads:
        return TaskKind(kind=UNKNOWN)
    best = max(leads, key=lambda arm: leads[arm].value)
    first = [arm for arm in leads if grown[arm] == grown[best] and config.arms[arm].after == 0]
    early = _lead(store, first[0], task, EARLY) if first else None
    value = None if early is None else early.value
    kind = name_kind(leads[best].value, leads[best].se, value)
    return TaskKind(kind=kind, arm=best, lead=leads[best], early=value)


def _lead(store: CellStore, arm: str, task: str, share: float) -> Estimate | None:
    """An arm's lead at a share of the budget, over seeds; None if none has been run."""
    leads = []
    for seed in (*store.config.oracle_seeds, *store.config.seeds):
        curve, bare = store.curve(arm, task, seed), store.curve(BARE, task, seed)
        if curve is not None and bare is not None:
            size = next((point.size for point in curve if point.spent >= share), curve[-1].size)
            leads.append(_read(bare, share) - _read(curve, share) - store.config.reward.size_price * math.log(size))
    return mean(leads) if leads else None


def _read(curve: Sequence[Point], share: float) -> float:
    """Loss at a share of the budget, nats: the mean of that tick and of those before it, each interpolated."""
    spent = [point.spent for point in curve]
    every = (spent[-1] - spent[0]) / max(1, len(spent) - 1)
    shares = [share - back * every for back in range(TICKS)]
    return float(np.interp(shares, spent, [min(point.loss, 1e6) for point in curve]).mean())

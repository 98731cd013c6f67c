"""Every arm searches its own rate, by the same number of trials, on seeds that the comparison does not use.

A trial is a run to the main mark. An arm's rate is the one of the least mean loss there. Where the best rate of any arm
lies at an edge, all arms get one value more at that edge, by the ratio of the two values next to it: an arm whose
search was cut short would lose for want of trials.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from esper.compare.arms import Arm, CompareConfig
from esper.karn.marks import Marks
from esper.karn.rows import Runs
from esper.leyline.errors import EsperError

_UNREAD: dict[str, Any] = {"search": None, "marks": None, "flops_share": 1.0, "margin": 1.0}  # by who runs trials
Losses = Mapping[str, Mapping[float, float]]  # arm -> rate -> mean loss at the main mark


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Fields:
        rates: of each arm that searched.
        losses: mean loss at the main mark of each trial, arm -> rate -> loss.
        edges: arms whose best rate still lies at an edge.
    """

    rates: dict[str, float]
    losses: dict[str, dict[float, float]]
    edges: tuple[str, ...]


def trial_name(arm: str, rate: float) -> str:
    """Name of an arm with one rate."""
    return f"{arm}@{rate:g}"


def trials_of(config: CompareConfig, values: Sequence[float]) -> CompareConfig:
    """The comparison of all trials: an arm for each rate of each arm that searches, and those that they wait for."""
    assert config.search is not None
    assert config.marks is not None
    arms: dict[str, Arm] = {}
    for name, arm in config.arms.items():
        if not arm.search:
            arms[name] = arm
            continue
        waits = [other for other in arm.waits_for if config.arms[other].search]
        if waits:
            raise EsperError(f"compare: arm {name} searches and waits for {waits[0]}, which searches too")
        share = arm.share if arm.flops is None else min(arm.share, config.marks.main)
        for rate in values:
            own = [*arm.overrides, f"{config.search.key}={rate:g}"]
            arms[trial_name(name, rate)] = replace(arm, overrides=own, share=share)
    return replace(config, arms=arms, seeds=list(config.search.seeds), subject=next(iter(arms)), **_UNREAD)


def with_rates(config: CompareConfig, rates: Mapping[str, float]) -> CompareConfig:
    """The comparison with the rate that each arm found."""
    assert config.search is not None
    key = config.search.key
    arms = {
        name: replace(arm, overrides=[*arm.overrides, f"{key}={rates[name]:g}"]) if name in rates else arm
        for name, arm in config.arms.items()
    }
    return replace(config, arms=arms)


def losses_of(config: CompareConfig, values: Sequence[float], runs: Runs) -> dict[str, dict[float, float]]:
    """Mean loss of each trial at the main mark; infinite for one that diverged or is missing on a seed."""
    assert config.search is not None
    assert config.marks is not None
    marks, seeds = Marks(runs, config.marks.of), set(config.search.seeds)
    found: dict[str, dict[float, float]] = {}
    for name, arm in config.arms.items():
        if arm.search:
            read = {rate: marks.at(trial_name(name, rate), config.marks.main) for rate in values}
            found[name] = {
                rate: float(np.mean(list(at.values()))) if set(at) == seeds else float("inf")
                for rate, at in read.items()
            }
    return found


def widened(values: Sequence[float], losses: Losses) -> list[float]:
    """The values with one more at each edge at which the best of some arm lies; the same values if there is none."""
    best = [min(of, key=of.__getitem__) for of in losses.values()]
    low = [values[0] ** 2 / values[1]] if values[0] in best else []
    high = [values[-1] ** 2 / values[-2]] if values[-1] in best else []
    return [*(float(f"{value:.3g}") for value in low), *values, *(float(f"{value:.3g}") for value in high)]


def search_rates(
    config: CompareConfig, out: Path, run: Callable[[CompareConfig, Path], Runs], say: Callable[[str], None]
) -> Found:
    """Runs all trials, widens, and chooses.

    Args:
        config: with a search.
        out: folder of the comparison.
        run: runs a comparison of trials, or reads it, and returns its finished runs.
        say: takes a line of progress.

    Raises:
        EsperError: an arm has no trial that reached the mark on all seeds.
    """
    assert config.search is not None
    values = list(config.search.values)
    for left in range(config.search.widen, -1, -1):
        losses = losses_of(config, values, run(trials_of(config, values), out))
        lost = [name for name, of in losses.items() if min(of.values()) == float("inf")]
        if lost:
            raise EsperError(f"compare: no rate of arm {lost[0]} reached the main mark on all seeds of the search")
        more = widened(values, losses)
        if more == values or left == 0:
            break
        say(f"search: a best rate lies at an edge, all arms get {len(more) - len(values)} more: {more}")
        values = more
    rates = {name: min(of, key=of.__getitem__) for name, of in losses.items()}
    edges = tuple(name for name, rate in rates.items() if rate in (values[0], values[-1]))
    say("search: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    return Found(rates, losses, edges)

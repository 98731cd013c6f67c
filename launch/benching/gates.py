"""The tables of docs/gates.md: how often luck passes the gates, and how often help does. See `esper.drill.luck`."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benching.corpora import corpora
from esper.accord.config import GateConfig
from esper.accord.evidence.levels import level_of_birth
from esper.drill.births import run_without_help
from esper.drill.luck import CLUSTERED, NULLS, count_lives, count_runs, cut_looks, draw_sample, plan_for, weighed
from esper.leyline.stages import Incubation
from esper.tamiyo.heuristic_config import HeuristicConfig

PROBES = (384, 1024, 2000)
SKEWED = "helps most, hurts few (lognormal, skew -6)"


def _share(kind: str, lives: int, probe: int, mean: float = 0.0, birth: int = 1) -> str:
    """Percent of lives in which G5 would pass, of a birth of that number with no fossil standing."""
    gates = GateConfig()
    rng, passed = np.random.default_rng([5, *kind.encode(), probe]), 0
    level = level_of_birth(gates.false_share, birth, 0)
    for _ in range(lives):
        sample = draw_sample(kind, rng, probe, mean)
        plan = plan_for(sample, gates)
        passed += weighed(cut_looks(sample, plan, rng), plan, gates, level)
    return f"{100 * passed / lives:.2f}" if mean == 0.0 else f"{100 * passed / lives:.0f}"


def _print(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    head = list(head)
    print("|", " | ".join(head), "|\n|", " | ".join("---" for _ in head), "|", flush=True)
    for row in rows:
        print("|", " | ".join(row), "|", flush=True)
    print(flush=True)


def luck(lives: int) -> None:
    """Seeds that do not help, G5 under immediate incubation: the default path."""
    kinds = (*NULLS, CLUSTERED)
    _print(
        ("differences of a seed that does not help", *(f"probe {probe}, %" for probe in PROBES)),
        ((kind, *(_share(kind, lives, probe) for probe in PROBES)) for kind in kinds),
    )


def shadow(lives: int) -> None:
    """The same under shadow incubation, where G2 comes first: whole lives by the reducer, probe 1024."""

    def row(kind: str) -> list[str]:
        found = count_lives(kind, lives // 4, probe=1024, incubation=Incubation.SHADOW)
        return [kind, f"{100 * found.g2 / found.lives:.1f}", f"{100 * found.g5 / found.lives:.1f}"]

    _print(("shadow, probe 1024", "pass G2, %", "pass G5, %"), (row(kind) for kind in (*NULLS, CLUSTERED)))


def power(lives: int) -> None:
    """Seeds that help: normal differences, by birth and probe."""
    worths = (0.05, 0.1, 0.15, 0.2, 0.3)
    _print(
        ("helps by, in deviations of a difference", *(f"{worth:g}" for worth in worths)),
        (
            (
                f"probe {probe}, birth {birth}, %",
                *(_share("normal", lives // 4, probe, worth, birth) for worth in worths),
            )
            for probe in PROBES
            for birth in (1, 50)
        ),
    )


def runs(lives: int) -> None:
    """Runs of 50 births: expected share of false fossils."""

    def row(kind: str, helping: float) -> list[str]:
        found = count_runs(kind, max(1, 12 * lives // 1000), births=50, probe=1024, helping=helping)
        shares = [f"{100 * found.false_share:.1f}", f"{100 * found.any_false:.1f}", f"{found.true_fossils:.1f}"]
        return [kind, f"{100 * helping:.0f}", *shares]

    _print(
        (
            "seeds that do not help",
            "of all births help, %",
            "false fossils of all, %",
            "runs with one, %",
            "true fossils a run",
        ),
        (row(kind, helping) for kind in ("normal", SKEWED) for helping in (0.0, 0.1, 0.5)),
    )


def births(lives: int) -> None:
    """The heuristic where nothing helps: how often it tries again, and what it holds. ``lives`` / 100 runs a row."""

    def row(incubation: Incubation, slots: int, growth: float) -> list[str]:
        count = max(1, lives // 100)
        settings: dict[str, Any] = {"incubation": incubation, "slots": slots, "penalty_growth": growth}
        found = [run_without_help(2000, seed=seed, **settings) for seed in range(count)]
        total = sum(len(run.births) for run in found)
        first = sum(tick <= 1000 for run in found for tick in run.births)
        held = sum(run.held for run in found)
        per_run = [f"{first / count:.1f}", f"{(total - first) / count:.1f}", f"{held / count:.2f}"]
        name = f"{incubation.value}, {slots} slot{'s' * (slots > 1)}"
        return [name, f"{growth:g}", *per_run, f"{100 * held / total:.1f}"]

    _print(
        (
            "where nothing helps",
            "penalty_growth",
            "births in 1,000 ticks",
            "in the next 1,000",
            "held at the end",
            "of all births, %",
        ),
        (
            row(incubation, slots, growth)
            for incubation in (Incubation.SHADOW, Incubation.IMMEDIATE)
            for slots in (1, 3)
            for growth in (1.0, HeuristicConfig().penalty_growth)
        ),
    )


PARTS: dict[str, Callable[[int], None]] = {
    "luck": luck,
    "shadow": shadow,
    "power": power,
    "runs": runs,
    "births": births,
    "corpora": corpora,
}

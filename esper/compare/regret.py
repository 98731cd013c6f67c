"""Regrets of arms over tasks, with their statistics: the table of a comparison over tasks.

Statistics are over the seeds for which every arm has every task. A regret of 0 is as good as the best fixed size or
plan of the task, 1 as bad as the worse of chance and the worst fixed size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from esper.compare.cells import CellStore
from esper.compare.growth import BARE, RANDOM, GrowthCompareConfig
from esper.compare.kinds import KINDS, LATE, TaskKind, kind_of
from esper.karn.stats import Array, Estimate, bootstrap, improvements, interquartile_means, mean, paired_difference
from esper.leyline.errors import EsperError
from esper.run.trials.cells import Point
from esper.simic.env.reward import RewardConfig

LEAST_SCALE = 0.005  # nats: below it no choice matters in a task
HALVING, EACH_SIZE = "halving", "every size in full"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScale:
    """What regret in a task is measured by, from the seeds of the oracle.

    Fields:
        oracle: the best mean score of all fixed sizes and plans.
        best: the arm that has it.
        scale: nats that are a regret of 1.
    """

    oracle: float
    best: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRegret:
    """An arm over all tasks.

    Fields:
        regrets: [N, E], N seeds, E tasks.
        over_seeds: mean regret, with its spread over the seeds' means.
        middle: interquartile mean over all cells, bootstrapped within tasks.
        against: how much larger the subject's regret is, seed by seed; None for the subject.
        better: chance that the subject has less regret in a task; None for the subject.
    """

    regrets: Array
    over_seeds: Estimate
    middle: Estimate
    against: Estimate | None
    better: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegretReport:
    """A comparison over tasks.

    Fields:
        arms: by name.
        scales: by task.
        kinds: by task.
        seeds: that count.
        missing: seeds of which cells are missing.
    """

    arms: dict[str, ArmRegret]
    scales: dict[str, TaskScale]
    kinds: dict[str, TaskKind]
    seeds: tuple[int, ...]
    missing: tuple[int, ...]


def score_of(curve: Sequence[Point], bare: Sequence[Point], reward: RewardConfig) -> float:
    """Score of a cell against the host without growth of the same task and seed."""
    end = curve[-1]
    return score_at(end.loss, end.size, end.births, end.prunes, bare[-1].loss, reward)


def score_at(loss: float, size: float, births: int, prunes: int, bare: float, reward: RewardConfig) -> float:
    """Score of a loss and a size, nats; a host that has come apart counts as the greatest loss there is."""
    excess = min(loss - bare, reward.most_loss)
    prices = reward.birth_price * births + reward.prune_price * prunes
    return -excess - reward.size_price * math.log(size) - prices


def loss_at(curve: Sequence[Point], spent: float) -> float:
    """Loss at a share of the budget, interpolated; that of the first or last tick outside."""
    shares = [point.spent for point in curve]
    return float(np.interp(spent, shares, [min(point.loss, 1e6) for point in curve]))


def halve(curves: Sequence[Sequence[Point]], bare: float, reward: RewardConfig) -> float:
    """Score of successive halving over fixed sizes, with the budget of one run for all of them together.

    In each round those that are left go on for equal shares of the round's budget, and the better half of them stays.
    """
    left, spent = list(curves), 0.0
    rounds = max(1, math.ceil(math.log2(len(left))))
    for _ in range(rounds):
        spent += 1 / (rounds * len(left))
        here = spent
        ranked = sorted(left, key=lambda c: loss_at(c, here) + reward.size_price * math.log(c[0].size))
        left = ranked[: max(1, math.ceil(len(ranked) / 2))]
    return score_at(loss_at(left[0], spent), left[0][0].size, 0, 0, bare, reward)


def scale_of(store: CellStore, task: str) -> TaskScale:
    """Measures the oracle of a task and the scale of regret on the oracle's seeds.

    Raises:
        EsperError: a cell is missing.
    """
    config = store.config
    means: dict[str, float] = {}
    for arm in filter(config.measured, config.arms):
        scores = []
        for seed in config.oracle_seeds:
            curve, bare = store.curve(arm, task, seed), store.curve(BARE, task, seed)
            if curve is None or bare is None:
                raise EsperError(f"arm {arm}, task {task}, seed {seed}: not run yet, and the oracle needs it")
            scores.append(score_of(curve, bare, config.reward))
        means[arm] = math.fsum(scores) / len(scores)
    random = means.pop(RANDOM)
    best = max(means, key=lambda arm: means[arm])
    worst = min(means[arm] for arm in means if config.arms[arm].is_size)
    scale = max(means[best] - random, means[best] - worst, LEAST_SCALE)
    return TaskScale(oracle=means[best], best=best, scale=scale)


def report_regrets(store: CellStore) -> RegretReport:
    """Puts all arms side by side.

    Raises:
        EsperError: no seed is whole, or the oracle is not measured.
    """
    config = store.config
    scales = {task: scale_of(store, task) for task in config.tasks}
    whole = [
        seed
        for seed in config.seeds
        if all(store.curve(arm, task, seed) is not None for arm in config.scored for task in config.tasks)
    ]
    if not whole:
        raise EsperError("no seed has all arms in all tasks yet; run the same command without --report")
    scores = {arm: np.array([[_score(store, arm, t, s) for t in config.tasks] for s in whole]) for arm in config.scored}
    scores[HALVING] = _over_sizes(store, whole, lambda curves, bare: halve(curves, bare, config.reward))
    scores[EACH_SIZE] = _over_sizes(store, whole, lambda curves, bare: _best_end(curves, bare, config.reward))
    oracle = np.array([scales[task].oracle for task in config.tasks])
    scale = np.array([scales[task].scale for task in config.tasks])
    regrets = {arm: (oracle - table) / scale for arm, table in scores.items()}
    arms = {arm: _statistics(table, regrets[config.subject], arm == config.subject) for arm, table in regrets.items()}
    missing = tuple(seed for seed in config.seeds if seed not in whole)
    kinds = {task: kind_of(store, task) for task in config.tasks}
    return RegretReport(arms=arms, scales=scales, kinds=kinds, seeds=tuple(whole), missing=missing)


def _score(store: CellStore, arm: str, task: str, seed: int) -> float:
    curve, bare = store.curve(arm, task, seed), store.curve(BARE, task, seed)
    assert curve is not None
    assert bare is not None
    return score_of(curve, bare, store.config.reward)


def _over_sizes(store: CellStore, seeds: Sequence[int], score: Callable[[list[list[Point]], float], float]) -> Array:
    """Scores [N, E] of a choice among fixed sizes; equal ones in a family count once."""
    config = store.config
    table = np.zeros((len(seeds), len(config.tasks)))
    for row, seed in enumerate(seeds):
        for column, task in enumerate(config.tasks):
            sizes = [store.curve(arm, task, seed) for arm in config.scored if config.arms[arm].is_size]
            curves = list({id(curve): curve for curve in sizes if curve is not None}.values())
            bare = store.curve(BARE, task, seed)
            assert bare is not None
            table[row, column] = score(curves, bare[-1].loss)
    return table


def _best_end(curves: Sequence[Sequence[Point]], bare: float, reward: RewardConfig) -> float:
    return max(score_at(curve[-1].loss, curve[-1].size, 0, 0, bare, reward) for curve in curves)


def _statistics(regrets: Array, subject: Array, is_subject: bool) -> ArmRegret:
    means, others = list(map(float, regrets.mean(1))), list(map(float, subject.mean(1)))
    return ArmRegret(
        regrets=regrets,
        over_seeds=mean(means),
        middle=bootstrap(interquartile_means, regrets),
        against=None if is_subject else paired_difference(others, means),
        better=None if is_subject else bootstrap(lambda a, b: improvements(-a, -b), subject, regrets),
    )


def claims(config: GrowthCompareConfig, report: RegretReport) -> list[tuple[str, str]]:
    """What is claimed of the subject, each with yes, NO or open, by two standard errors of paired differences."""
    found = []
    for text, arm, bound in (
        (f"less regret than {RANDOM}", RANDOM, 0.0),
        (f"at most {config.margin:g} more regret than {config.reference}", config.reference, config.margin),
        (f"less regret than {config.reference}", config.reference, 0.0),
        (f"less regret than {BARE}", BARE, 0.0),
    ):
        gap = report.arms[arm].against
        if gap is not None:
            found.append((text, _verdict(gap, bound)))
    if config.subject != config.reference and any(found.kind == LATE for found in report.kinds.values()):
        late, other = (list(_of_kind(report, arm, LATE)) for arm in (config.subject, config.reference))
        gap = paired_difference(late, other)
        found.append((f"less regret than {config.reference} where growing pays late", _verdict(gap, 0.0)))
    return found


def _of_kind(report: RegretReport, arm: str, kind: str) -> Array:
    """Mean regrets [N], by seed, of an arm over the tasks of a kind, of which there are some."""
    columns = [column for column, found in enumerate(report.kinds.values()) if found.kind == kind]
    return report.arms[arm].regrets[:, columns].mean(1)


def _verdict(gap: Estimate, bound: float) -> str:
    if gap.se is None:
        return "open"
    if gap.value + 2 * gap.se < bound:
        return "yes"
    return "NO" if gap.value - 2 * gap.se > bound else "open"


def markdown(config: GrowthCompareConfig, report: RegretReport) -> str:
    """The tables as Markdown."""
    names = f"{config.subject} less regretful in"
    lines = [
        f"{len(config.tasks)} tasks, {len(report.seeds)} seeds; regret: mean over seeds ± standard error; IQM and "
        f"P with 95 % bootstrap intervals",
        "",
        f"| arm | regret | IQM | {config.subject} minus it | {names} |",
        "|---|---|---|---|---|",
    ]
    for name, arm in report.arms.items():
        lines.append(
            f"| {name} | {_with_se(arm.over_seeds)} | {_within(arm.middle)} | {_with_se(arm.against)} | "
            f"{_within(arm.better)} |"
        )
    lines += ["", "| claim | |", "|---|---|", *(f"| {text} | {verdict} |" for text, verdict in claims(config, report))]
    shown = list(report.arms)
    counts = {kind: sum(found.kind == kind for found in report.kinds.values()) for kind in KINDS}
    counts = {kind: count for kind, count in counts.items() if count}
    lines += ["", f"| growing pays | tasks | {' | '.join(shown)} |", "|---" * (2 + len(shown)) + "|"]
    for kind, count in counts.items():
        over = [_with_se(mean(list(_of_kind(report, name, kind)))) for name in shown]
        lines.append(f"| {kind} | {count} | {' | '.join(over)} |")
    lines += ["", f"| task | growing pays | lead, nats | oracle, nats | best | scale, nats | {' | '.join(shown)} |"]
    lines.append("|---" * (6 + len(shown)) + "|")
    for column, task in enumerate(config.tasks):
        scale, told = report.scales[task], report.kinds[task]
        cells = " | ".join(f"{report.arms[name].regrets[:, column].mean():.2f}" for name in shown)
        known = f"{told.kind} | {_with_se(told.lead)}"
        lines.append(f"| {task} | {known} | {scale.oracle:+.3f} | {scale.best} | {scale.scale:.3f} | {cells} |")
    if report.missing:
        lines += ["", f"Not whole yet: seeds {', '.join(map(str, report.missing))}."]
    return "\n".join(lines)


def _with_se(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:.3f}" + ("" if found.se is None else f" ± {found.se:.3f}")


def _within(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:.3f}" + ("" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]")

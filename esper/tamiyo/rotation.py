"""The choice of the next blueprint: rotation with penalties, from what was observed in each slot.

A failed birth adds 1 to its blueprint's penalty in that slot. A penalty halves every ``half_life`` ticks after the
first failure, and each further one makes that ``growth`` times as long, so that a slot where nothing helps is tried
ever more seldom: in T ticks some log(T) times, not T times. Untried blueprints come first, then those with the smallest
penalty, then (``spread``) the one least alive elsewhere, so that slots try different things, then the preferred or
largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from esper.leyline.alpha import AlphaMode
from esper.leyline.errors import ConfigError
from esper.leyline.legality import spent_budget, why_redundant, why_redundant_everywhere
from esper.leyline.observation import BlueprintInfo, Observation, SlotObservation
from esper.leyline.stages import Stage

DO_NOTHING = "noop"  # the blueprint for controls; never chosen unless preferred by name


class Rotation(NamedTuple):
    """Settings of the rotation.

    Fields:
        preference: preferred names in order; empty takes all, the one with most parameters first.
        half_life: ticks in which a penalty halves after a first failure.
        growth: factor by which each further failure of a blueprint in a slot lengthens that.
        max_penalty: highest penalty at which a blueprint is still tried.
        spread: whether slots are to try different blueprints.
    """

    preference: tuple[str, ...]
    half_life: float
    growth: float
    max_penalty: float
    spread: bool


@dataclass(slots=True, kw_only=True)
class Failures:
    """Failures of one blueprint in one slot: ``count`` of them, and a decaying ``penalty``, its value at ``tick``."""

    penalty: float
    tick: int
    count: int = 0


@dataclass(slots=True, kw_only=True)
class SlotRecord:
    """History of one slot, as observed.

    Fields:
        stage: stage at the last tick.
        living: blueprint of the seed that lives there, or None.
        proposed: blueprint of a birth that was proposed and not yet observed, or None.
        tried: every blueprint that was born or proposed here, with its failures.
        spent_tick: tick since which all looks of this stage are spent; None while some are left.
        against: readings in a row that speak against a blending seed.
        against_tick: tick at which the last weighed reading was measured, or None.
        stalled: ticks at rest in this stage without a passing verdict.
    """

    stage: Stage = Stage.EMPTY
    living: str | None = None
    proposed: str | None = None
    tried: dict[str, Failures] = field(default_factory=dict)
    spent_tick: int | None = None
    against: int = 0
    against_tick: int | None = None
    stalled: int = 0


def _decay(failed: Failures, tick: int, rotation: Rotation) -> float:
    half_life = rotation.half_life * rotation.growth ** min(max(0, failed.count - 1), 100)
    return failed.penalty * 0.5 ** ((tick - failed.tick) / half_life)


def count_failures(record: SlotRecord, tick: int, rotation: Rotation) -> float:
    """Returns the decayed count of failed births in a slot."""
    return sum(_decay(failed, tick, rotation) for failed in record.tried.values())


def _add_failure(record: SlotRecord, name: str, tick: int, rotation: Rotation) -> None:
    before = record.tried.get(name, Failures(penalty=0.0, tick=tick))
    penalty = 1.0 + _decay(before, tick, rotation)
    record.tried[name] = Failures(penalty=penalty, tick=tick, count=before.count + 1)


def update_record(record: SlotRecord, view: SlotObservation, tick: int, rotation: Rotation) -> None:
    """Brings a slot's record up to this tick's observation."""
    if view.stage is not record.stage:
        record.stage, record.spent_tick = view.stage, None
        record.against, record.against_tick, record.stalled = 0, None, 0
    if view.stage.has_seed:
        record.living, record.proposed = view.blueprint, None
        if view.blueprint is not None:
            record.tried.setdefault(view.blueprint, Failures(penalty=0.0, tick=tick))
    elif not view.staged:
        failed = record.living or record.proposed  # pruned for any reason, or refused, or vetoed
        if failed is not None:
            _add_failure(record, failed, tick, rotation)
        record.living = record.proposed = None
    if view.looks < view.max_looks:
        record.spent_tick = None
    elif record.spent_tick is None:
        record.spent_tick = tick  # the evidence of the last look may only arrive at the next tick
    if view.alpha_mode is AlphaMode.HOLD and not view.ending:
        record.stalled = 0 if view.verdict is not None and view.verdict.passed else record.stalled + 1
        _weigh(record, view)


def _weigh(record: SlotRecord, view: SlotObservation) -> None:
    """Counts the fresh readings in a row, at the present full alpha, that a gate's evidence checks refused."""
    fresh = view.contribution.is_measured and view.contribution.tick != record.against_tick
    if view.verdict is None or not fresh or view.alpha_target < 1.0 or view.contribution_alpha != view.alpha:
        return
    refused = any(not check.passed and not check.integrity for check in view.verdict.checks)
    record.against = record.against + 1 if refused else 0
    record.against_tick = view.contribution.tick


def check_preference(rotation: Rotation, observation: Observation) -> None:
    """Checks, before anything has grown, that every preferred blueprint fits some slot and, at first, adds to it.

    Raises:
        ConfigError: some do not; the text names them and lists those that fit, or says what one would fold into.
    """
    if any(view.stage is not Stage.EMPTY or view.staged for view in observation.slots):
        return
    known = {info.name for view in observation.slots for info in view.catalogue}
    unknown = [name for name in rotation.preference if name not in known]
    if unknown:
        names = ", ".join(sorted(known))
        raise ConfigError(f"controller.blueprints: {', '.join(unknown)} fits no slot of this host; it takes {names}")
    if observation.tick > 1:  # a session may unfreeze layers, also before its first birth
        return
    for name in rotation.preference:
        if (why := why_redundant_everywhere(name, [view.catalogue for view in observation.slots])) is not None:
            raise ConfigError(f"controller.blueprints: no slot takes {name}: {why}")


def _sort_by_preference(rotation: Rotation, catalogue: tuple[BlueprintInfo, ...]) -> list[BlueprintInfo]:
    if rotation.preference:
        fitting = {info.name: info for info in catalogue}
        return [fitting[name] for name in rotation.preference if name in fitting]
    useful = [info for info in catalogue if info.name != DO_NOTHING]
    return sorted(useful, key=lambda info: (-info.parameters, -info.flops, info.name))


def choose_blueprint(
    rotation: Rotation, records: Mapping[str, SlotRecord], observation: Observation, view: SlotObservation
) -> tuple[str, str] | None:
    """Returns the name of the blueprint to try next in a slot and the reason; None if none is legal and due.

    It is joined by ADD.
    """
    record, tick = records[view.slot], observation.tick
    alive = [other.living if other.stage.is_live else other.proposed for other in records.values()]
    ranked: list[tuple[tuple[bool, float, int], BlueprintInfo]] = []
    for info in _sort_by_preference(rotation, view.catalogue):
        failed = record.tried.get(info.name)
        penalty = 0.0 if failed is None else _decay(failed, tick, rotation)
        legal = why_redundant(info) is None and spent_budget(observation.budgets, info) is None
        if penalty <= rotation.max_penalty and legal:
            elsewhere = alive.count(info.name) if rotation.spread else 0
            ranked.append(((failed is not None, penalty, elsewhere), info))
    if not ranked:
        return None
    (tried, penalty, _), info = min(ranked, key=lambda entry: entry[0])  # min() keeps the first of equals
    return info.name, f"{info.name} again, penalty {penalty:.2g}" if tried else f"{info.name} is untried here"

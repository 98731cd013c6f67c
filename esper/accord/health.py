"""The agreed record of a run's health. Plain, frozen data inside `RunState`; a checkpoint holds it."""

from collections.abc import Set
from dataclasses import dataclass, field, replace

from esper.accord.breaker import BreakerState
from esper.accord.verdict import Series, Symptom, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """From optimizer step ``first_step`` on, samples are taken ``count`` steps further along in the plan of batches."""

    first_step: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHealth:
    """The governor's part of the agreed record.

    Fields:
        verdict: the governor's verdict on the latest tick.
        symptom: what is wrong with the latest tick.
        words: what was measured, for people; empty if the latest tick was healthy and no shift was accepted.
        train: training losses of healthy ticks, and those out of line since.
        validation: validation losses likewise.
        strikes: ticks in a row that were not healthy.
        healthy_tick: the latest healthy tick; whatever failed came after it.
        healthy_step: optimizer step of the latest healthy tick.
        replays: rollbacks since the last recovery.
        trouble_tick: the latest tick that panicked since the last recovery.
        skips: windows of samples that were skipped, oldest first.
        barred: for each barred slot, the tick until which no seed may germinate there.
        breaker: state of the circuit breaker of growth.
    """

    verdict: Verdict = Verdict.HEALTHY
    symptom: Symptom = Symptom.NONE
    words: str = ""
    train: Series = field(default_factory=Series)
    validation: Series = field(default_factory=Series)
    strikes: int = 0
    healthy_tick: int = 0
    healthy_step: int = 0
    replays: int = 0
    trouble_tick: int = 0
    skips: tuple[Skip, ...] = ()
    barred: dict[str, int] = field(default_factory=dict)
    breaker: BreakerState = field(default_factory=BreakerState)

    def cursor(self, step: int) -> int:
        """Position in the plan of batches at optimizer step ``step``."""
        return step + sum(skip.count for skip in self.skips if skip.first_step <= step)


def take_up(health: RunHealth, changed: Set[str], *, judged: bool) -> RunHealth:
    """Returns the record with which a run goes on.

    Without a governor nobody would lift a bar or turn the breaker, so neither stays; the windows of samples that were
    left out do, since the plan of batches goes on behind them. Under other settings the replays are counted anew: a run
    that had used them up would end at its next panic.

    Args:
        health: the record of the checkpoint.
        changed: settings that are others than when the checkpoint was saved, by dotted path.
        judged: whether the run has a governor from here on.
    """
    if not judged:
        return RunHealth(skips=health.skips, breaker=BreakerState(obeyed=health.breaker.obeyed))
    governed = any(key.startswith("governor.") for key in changed)
    return replace(health, replays=0) if governed else health

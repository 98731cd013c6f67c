"""What all ranks agree on about the health of a run. Plain, frozen data inside `RunState`; a checkpoint holds it."""

from dataclasses import dataclass, field

from esper.accord.breaker import BreakerState
from esper.accord.verdict import Series, Symptom, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """From optimizer step ``first_step`` on, samples come from ``count`` steps further down the plan of batches."""

    first_step: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Governed:
    """The governor's part of the agreed record.

    Fields:
        verdict, symptom, words: of the latest tick; ``words`` say what was measured, empty of a healthy one.
        train, validation: losses of healthy ticks.
        strikes: ticks in a row that were not healthy.
        healthy_tick, healthy_step: latest healthy tick, and its optimizer step; what failed came after it.
        replays: rollbacks since the last recovery. trouble_tick: the latest tick of a panic since then.
        skips: windows of samples that were skipped, oldest first.
        barred: per slot, the tick until which no seed germinates there.
        breaker: of growth.
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
        """Place in the plan of batches of optimizer step ``step``."""
        return step + sum(skip.count for skip in self.skips if skip.first_step <= step)

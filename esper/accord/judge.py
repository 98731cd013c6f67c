"""The governor's judgement of a tick: a pure function of what all ranks agree on, so that every rank reaches the same.

It turns the state with this tick's sums absorbed into the same state with a verdict. `esper.accord.replay` is what
follows a panic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from esper.accord.breaker import after_tick
from esper.accord.course import Course, course_of
from esper.accord.governor.config import GovernorConfig
from esper.accord.state import RunState, Terms
from esper.accord.verdict import (
    Series,
    Symptom,
    Verdict,
    accept_row,
    append_loss,
    append_outlier,
    bare_limit,
    ceiling,
    symptom_of,
    without_past,
)
from esper.leyline.alpha import AlphaMode
from esper.leyline.evidence import Reading
from esper.leyline.stages import Stage

_BY_GRAVITY = (None, Course.SHIFT, Course.WAIT, Course.PANIC)


def _will_quarantine(state: RunState) -> bool:
    """Checks whether the reducer removes a broken seed at this tick, or at the tick that a row of skipped steps is
    about to bring (see `esper.accord.reducer`). That costs less than a rollback, since skipped steps do not change the
    weights."""
    if any(entry.stage.is_live and entry.nonfinite_steps > 0 for entry in state.slots):
        return True
    reaching = any(entry.stage in (Stage.BLENDING, Stage.HOLDING) for entry in state.slots)
    return state.judged_row > 0 and reaching


def has_lost_seed(state: RunState, since: int) -> bool:
    """Checks whether a blended seed was removed or faded since the last tick; then a higher loss is no sign of trouble.

    Args:
        state: the state at this tick.
        since: optimizer step of the tick before.
    """
    for entry in state.slots:
        last = entry.history[-1] if entry.history else None
        if last is not None and last.tick == state.tick - 1 and last.target is Stage.PRUNED and last.source.is_blended:
            return True
        if entry.ramp is not None and entry.alpha_mode(since) is AlphaMode.DOWN:
            return True
    return False


def _nonfinite(state: RunState, sums: Mapping[str, float], terms: Terms) -> tuple[str, bool]:
    """Describes what is not finite (empty if nothing is) and says whether that alone is a panic.

    A short row of skipped steps does no harm, but no step since its start has been seen to be healthy.
    """
    if sums["validation_nonfinite"] > 0:
        return "the validation loss is not finite", True
    if state.judged_row > 0:
        words = f"{state.judged_row} optimizer steps in a row had a non-finite host gradient"
        return words, state.judged_row >= terms.max_skips
    return "", False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One loss, judged.

    Fields:
        healthy: the series from now on if the tick is healthy.
        sick: the series from now on if it is not; a median takes up healthy ticks alone.
        symptom: what is wrong with the loss.
        words: what was measured, for people.
        course: what to do about it; None if nothing is wrong.
    """

    healthy: Series
    sick: Series
    symptom: Symptom = Symptom.NONE
    words: str = ""
    course: Course | None = None


def judge_loss(
    series: Series, reading: Reading, tick: int, chance: float, config: GovernorConfig, *, training: bool
) -> Finding:
    """Judges one loss; without a fresh one the series stays as it is."""
    if reading.value is None or reading.tick != tick:
        return Finding(healthy=series, sick=series)
    loss, error = reading.value, reading.se or 0.0
    symptom = symptom_of(series, loss, chance, config, training=training, error=error)
    if symptom is Symptom.NONE:
        after = append_loss(series, loss, config, error=error)
        return Finding(healthy=after, sick=replace(series, row=(), row_errors=()))
    row = append_outlier(series, loss, config, error=error)
    course = course_of(row, chance, config, training=training)
    name = "training" if training else "validation"
    if course is Course.SHIFT:
        middle, count = median(series.losses), len(row.row)
        words = f"{name} loss {loss:.4g}, out of line for {count} ticks and at rest; it had been {middle:.4g}"
        return Finding(healthy=accept_row(row, config), sick=row, symptom=Symptom.SHIFT, words=words, course=course)
    if not series.losses:
        bare = bare_limit(series, chance, config)
        words = f"{name} loss {loss:.4g}, at most {bare:.4g} where a seed has gone; chance is {chance:.4g}"
    elif symptom is Symptom.COLLAPSE:
        words = f"training loss {loss:.4g}, chance is {chance:.4g}, it had been {series.best:.4g}"
    else:
        most, count = ceiling(series, chance, config, training=training, error=error), len(series.losses)
        ticks = "1 healthy tick" if count == 1 else f"{count} healthy ticks"
        words = f"{name} loss {loss:.4g}, at most {most:.4g} after the last {ticks}"
    return Finding(healthy=row, sick=row, symptom=symptom, words=words, course=course)


def judge_tick(
    state: RunState, sums: Mapping[str, float], terms: Terms, config: GovernorConfig, *, chance: float, since: int
) -> RunState:
    """Returns the state with this tick's verdict.

    Args:
        state: the state with this tick's sums absorbed.
        sums: the reduced observe vector by name.
        terms: terms of the run.
        config: settings of the governor.
        chance: loss at chance level, see `esper.accord.verdict.chance_level`.
        since: optimizer step of the tick before.
    """
    governor = state.governor
    if has_lost_seed(state, since):
        # What was out of line before the seed went was no fault of its going.
        train, validation = without_past(governor.train), without_past(governor.validation)
        governor = replace(governor, train=train, validation=validation)
        state = replace(state, governor=governor)
    words, at_once = _nonfinite(state, sums, terms)
    symptom = Symptom.NONFINITE
    course: Course | None = Course.PANIC if at_once else Course.WAIT
    train, validation = governor.train, governor.validation
    if not words:
        findings = (
            judge_loss(train, state.train_loss, state.tick, chance, config, training=True),
            judge_loss(validation, state.validation_loss, state.tick, chance, config, training=False),
        )
        worst = max(findings, key=lambda finding: _BY_GRAVITY.index(finding.course))  # the first of equals
        symptom, words, course = worst.symptom, worst.words, worst.course
        well = course in (None, Course.SHIFT)
        train, validation = (finding.healthy if well else finding.sick for finding in findings)
    healthy = course in (None, Course.SHIFT)
    governor = replace(
        governor,
        symptom=symptom,
        words=words,
        barred={slot: tick for slot, tick in governor.barred.items() if tick > state.tick},
        breaker=after_tick(
            governor.breaker,
            state.tick,
            config,
            healthy=healthy,
            taken=frozenset(e.slot for e in state.slots if e.stage.has_seed or e.staged is not None),
            blended=frozenset(e.slot for e in state.slots if e.stage.is_blended),
        ),
        train=train,
        validation=validation,
    )
    if healthy:
        recovered = state.tick >= governor.trouble_tick + config.recover_ticks
        governor = replace(
            governor,
            verdict=Verdict.HEALTHY,
            strikes=0,
            healthy_tick=state.tick,
            healthy_step=state.step,
            replays=0 if recovered else governor.replays,
        )
        return replace(state, governor=governor)
    verdict = Verdict.PANIC if course is Course.PANIC and not _will_quarantine(state) else Verdict.SUSPECT
    return replace(state, governor=replace(governor, verdict=verdict, strikes=governor.strikes + 1))

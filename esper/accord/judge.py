"""The governor's judgement of a tick: a pure function of what all ranks agree on, so that every rank reaches the same.

It turns the state with this tick's sums absorbed into the same state with a verdict. `esper.accord.replay` is what
follows a panic.
"""

from collections.abc import Mapping
from dataclasses import replace

from esper.accord.breaker import after_tick
from esper.accord.config import GovernorConfig
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Series, Symptom, Verdict, append_loss, ceiling, symptom_of
from esper.leyline.alpha import AlphaMode
from esper.leyline.stages import Stage


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


def _find_outlier(state: RunState, chance: float, config: GovernorConfig) -> tuple[Symptom, str]:
    governor = state.governor
    for name, reading, series in (
        ("training", state.train_loss, governor.train),
        ("validation", state.validation_loss, governor.validation),
    ):
        if reading.value is None or reading.tick != state.tick:
            continue
        training = name == "training"
        symptom = symptom_of(series, reading.value, chance, config, training=training)
        if symptom is Symptom.DIVERGENCE:
            most, count = ceiling(series, chance, config, training=training), len(series.losses)
            ticks = "1 healthy tick" if count == 1 else f"{count} healthy ticks"
            return symptom, f"{name} loss {reading.value:.4g}, at most {most:.4g} after the last {ticks}"
        if symptom is Symptom.COLLAPSE:
            return symptom, f"training loss {reading.value:.4g}, chance is {chance:.4g}, it had been {series.best:.4g}"
    return Symptom.NONE, ""


def _append_if_fresh(series: Series, value: float | None, fresh: bool, config: GovernorConfig) -> Series:
    return series if value is None or not fresh else append_loss(series, value, config)


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
        governor = replace(governor, train=Series(), validation=Series())
        state = replace(state, governor=governor)
    words, at_once = _nonfinite(state, sums, terms)
    symptom = Symptom.NONFINITE if words else Symptom.NONE
    if symptom is Symptom.NONE:
        symptom, words = _find_outlier(state, chance, config)
    healthy = symptom is Symptom.NONE
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
    )
    if healthy:
        fresh = state.validation_loss.tick == state.tick
        recovered = state.tick >= governor.trouble_tick + config.recover_ticks
        governor = replace(
            governor,
            verdict=Verdict.HEALTHY,
            strikes=0,
            healthy_tick=state.tick,
            healthy_step=state.step,
            replays=0 if recovered else governor.replays,
            train=_append_if_fresh(governor.train, state.train_loss.value, state.train_loss.tick == state.tick, config),
            validation=_append_if_fresh(governor.validation, state.validation_loss.value, fresh, config),
        )
        return replace(state, governor=governor)
    strikes = governor.strikes + 1
    sick = at_once if symptom is Symptom.NONFINITE else strikes >= config.patience
    verdict = Verdict.PANIC if sick and not _will_quarantine(state) else Verdict.SUSPECT
    return replace(state, governor=replace(governor, verdict=verdict, strikes=strikes))

"""The governor's judgement of a tick, and what a replay does otherwise: pure functions of what all ranks agree on.

    judge    the state with this tick's sums taken in -> the same with a verdict; every rank reaches the same one
    replay   (state that panicked, cleared state gone back to) -> the state to go on from, which differs from the latter

A replay must differ, or it would end where the first run did. Blamed is the newest change (birth, stage, ramp) among
the seeds that reach the host: its seed is pruned and its slot barred. A seed that incubates cannot have done it, since
the host computes and learns as without it, bit for bit. With nothing to blame the window of samples between the last
healthy tick and the panic is skipped. Each further replay without a recovery goes wider: one more change is blamed,
twice as many samples are skipped besides, and the generation gone back to is one older.
"""

from collections.abc import Mapping
from dataclasses import replace

from esper.accord.breaker import after_tick
from esper.accord.config import GovernorConfig
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Series, Symptom, Verdict, append_loss, ceiling, symptom_of
from esper.leyline.alpha import AlphaMode
from esper.leyline.stages import Stage


def _quarantined(state: RunState) -> bool:
    """The reducer takes out a broken seed at this tick, or at the one that a row of skipped steps is about to bring
    (see `esper.accord.reducer`); that costs less than a rollback, since skipped steps have left the weights alone."""
    if any(entry.stage.is_live and entry.nonfinite_steps > 0 for entry in state.slots):
        return True
    reaching = any(entry.stage in (Stage.BLENDING, Stage.HOLDING) for entry in state.slots)
    return state.judged_row > 0 and reaching


def unsettled(state: RunState, since: int) -> bool:
    """The network was made to do without a seed since the last tick, so that a higher loss is no sign of sickness.

    Args:
        state: of this tick. since: optimizer step of the tick before.
    """
    for entry in state.slots:
        last = entry.history[-1] if entry.history else None
        if last is not None and last.tick == state.tick - 1 and last.target is Stage.PRUNED and last.source.is_blended:
            return True
        if entry.ramp is not None and entry.alpha_mode(since) is AlphaMode.DOWN:
            return True
    return False


def _nonfinite(state: RunState, sums: Mapping[str, float], terms: Terms) -> tuple[str, bool]:
    """What is not finite, in words, and whether that alone is a panic: a row of skipped steps does no harm while it is
    short, but nothing since its beginning has been seen to be healthy."""
    if sums["validation_nonfinite"] > 0:
        return "the validation loss is not finite", True
    if state.judged_row > 0:
        words = f"{state.judged_row} optimizer steps in a row had a non-finite host gradient"
        return words, state.judged_row >= terms.max_skips
    return "", False


def _out_of_line(state: RunState, chance: float, config: GovernorConfig) -> tuple[Symptom, str]:
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


def _taken_in(series: Series, value: float | None, fresh: bool, config: GovernorConfig) -> Series:
    return series if value is None or not fresh else append_loss(series, value, config)


def judge_tick(
    state: RunState, sums: Mapping[str, float], terms: Terms, config: GovernorConfig, *, chance: float, since: int
) -> RunState:
    """The state with this tick's verdict.

    Args:
        state: with this tick's sums taken in. sums: the reduced observe vector by name. terms, config: of the run.
        chance: see `esper.accord.verdict.chance_level`. since: optimizer step of the tick before.
    """
    governor = state.governor
    if unsettled(state, since):
        governor = replace(governor, train=Series(), validation=Series())
        state = replace(state, governor=governor)
    words, at_once = _nonfinite(state, sums, terms)
    symptom = Symptom.NONFINITE if words else Symptom.NONE
    if symptom is Symptom.NONE:
        symptom, words = _out_of_line(state, chance, config)
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
            train=_taken_in(governor.train, state.train_loss.value, state.train_loss.tick == state.tick, config),
            validation=_taken_in(governor.validation, state.validation_loss.value, fresh, config),
        )
        return replace(state, governor=governor)
    strikes = governor.strikes + 1
    sick = at_once if symptom is Symptom.NONFINITE else strikes >= config.patience
    verdict = Verdict.PANIC if sick and not _quarantined(state) else Verdict.SUSPECT
    return replace(state, governor=replace(governor, verdict=verdict, strikes=strikes))


# replay -----------------------------------------------------------------------------------------------------------

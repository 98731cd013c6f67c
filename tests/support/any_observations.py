"""Observations of every sort, drawn: well-formed, whether or not a run could come to them."""

import random
from typing import Any

from esper.leyline.alpha import AlphaMode, Curve, Operator
from esper.leyline.breaker import BreakerPhase, BreakerView
from esper.leyline.evidence import ABSENT, GradientHealth, Reading, SeedWorth, Status
from esper.leyline.observation import BlueprintInfo, Budgets, ChannelInfo, HostInfo, Observation, SlotObservation
from esper.leyline.stages import Gate, Stage
from esper.leyline.topology import Reach
from tests.support.observations import observe, slot_view, verdict

TICK = 40


def any_reading(rng: random.Random, scale: float = 1.0, *, least: float | None = None) -> Reading:
    """Absent, stale or measured, with or without an error."""
    status = rng.choice(list(Status))
    if status is Status.ABSENT:
        return ABSENT
    value = scale * rng.gauss(0, 1)
    return Reading(
        status=status,
        value=value if least is None else max(least, abs(value)),
        se=rng.choice([None, 0.0, 0.1 * scale]),
        skew=rng.choice([None, 0.5]),
        n=rng.randrange(1, 1000),
        tick=rng.randrange(TICK + 1),
    )


def any_share(rng: random.Random) -> Reading:
    reading = any_reading(rng, least=0.0)
    return reading if reading.value is None else Reading(status=reading.status, value=rng.random(), n=9, tick=TICK)


def any_catalogue(rng: random.Random, most: int = 6) -> tuple[BlueprintInfo, ...]:
    names = rng.sample([f"kind_{letter}" for letter in "abcdefghij"], rng.randrange(most + 1))
    return tuple(
        BlueprintInfo(
            name=name,
            parameters=rng.choice([0, 10, 900, 10**9]),
            flops=rng.choice([0, 100, 10**12]),
            reach=rng.choice([None, *Reach]),
        )
        for name in names
    )


def any_health(rng: random.Random) -> GradientHealth:
    return GradientHealth(
        vanishing=any_share(rng), exploding=any_share(rng), nans=rng.randrange(3), infs=rng.randrange(3)
    )


def any_slot(rng: random.Random, slot: str, **changes: Any) -> SlotObservation:
    """A slot of any stage, with arguments that need not fit it."""
    catalogue = any_catalogue(rng)
    stage = rng.choice(list(Stage))
    seed = stage.has_seed
    names = [info.name for info in catalogue] + ["gone_from_the_catalogue"]
    values: dict[str, Any] = {
        "row": rng.random(),
        "col": rng.random(),
        "stage": stage,
        "staged": stage is Stage.EMPTY and rng.random() < 0.3,
        "dwell": rng.randrange(6),
        "min_dwell": rng.randrange(4),
        "generation": rng.randrange(9),
        "blueprint": rng.choice(names) if seed else None,
        "operator": rng.choice(list(Operator)) if seed else None,
        "operators": tuple(rng.sample(list(Operator), rng.randrange(1, 6))),
        "channel": rng.choice([None, ChannelInfo(mean=0.5, p95=0.9, sparsity=0.1)]),
        "curve": rng.choice(list(Curve)) if seed else None,
        "alpha": rng.choice([0.0, 0.3, 1.0]),
        "alpha_target": rng.choice([0.0, 0.5, 1.0]),
        "alpha_velocity": rng.gauss(0, 0.1),
        "ramp_progress": rng.random(),
        "alpha_mode": rng.choice([AlphaMode.HOLD, AlphaMode.HOLD, *AlphaMode]),
        "ending": rng.random() < 0.15,
        "parameters": rng.choice([0, 500]) if seed else 0,
        "contribution": any_reading(rng, 0.1),
        "contribution_alpha": rng.random(),
        "running": any_reading(rng, 0.1),
        "helps": rng.choice([None, rng.gauss(0, 2)]),
        "hurts": rng.choice([None, rng.gauss(0, 2)]),
        "level": rng.choice([None, 0.01]),
        "looks": rng.randrange(5),
        "max_looks": rng.randrange(9),
        "lasting": any_reading(rng, 0.1),
        "continuations": rng.randrange(3),
        "gate_mean": any_share(rng),
        "gate_std": any_share(rng),
        "effective_alpha": any_share(rng),
        "gradient_norm": any_reading(rng, least=0.0),
        "gradient_ratio": any_reading(rng, least=0.0),
        "health": any_health(rng),
        "degraded": rng.choice([0, 0, 0, 2]),
        "nonfinite_steps": rng.randrange(2),
        "verdict": rng.choice([None, verdict(Gate.G2, rng.random() < 0.5, integrity=rng.random() < 0.5)]),
        "embargo_left": rng.choice([0, 0, 0, 3]),
        "catalogue": catalogue,
        "worth": SeedWorth(solo=any_reading(rng, 0.1), leave_one_out=any_reading(rng), shapley=any_reading(rng)),
    }
    return slot_view(slot, **(values | changes))


def any_observation(rng: random.Random, slots: int | None = None, **changes: Any) -> Observation:
    """A run of up to five slots, or of ``slots``, with any budgets and breaker."""
    ids = [f"r{row}c0" for row in range(rng.randrange(1, 6) if slots is None else slots)]
    phase = rng.choice([BreakerPhase.ALLOWED, BreakerPhase.ALLOWED, *BreakerPhase])
    values: dict[str, Any] = {
        "tick": TICK,
        "remaining": rng.random(),
        "train_loss": any_reading(rng, 2.0, least=0.01),
        "train_accuracy": any_share(rng),
        "validation_loss": any_reading(rng, 2.0, least=0.01),
        "validation_accuracy": any_share(rng),
        "together": any_reading(rng, 0.1),
        "host_gradient_norm": any_reading(rng, least=0.0),
        "host_health": any_health(rng),
        "host": HostInfo(parameters=rng.choice([1, 5000]), flops=rng.choice([None, 90_000])),
        "skipped_steps": rng.randrange(3),
        "budgets": Budgets(
            live=rng.choice([None, 0, 2]),
            germinations=rng.choice([None, None, 0, 5]),
            parameters=rng.choice([None, None, 0, 50]),
            flops=rng.choice([None, None, 0, 500]),
        ),
        "breaker": BreakerView(
            phase=phase,
            ticks_left=3 if phase is BreakerPhase.COOLING else 0,
            on_trial=rng.choice([None, ids[0]]) if phase is BreakerPhase.TRIAL else None,
        ),
    }
    return observe(*(any_slot(rng, slot) for slot in ids), **(values | changes))

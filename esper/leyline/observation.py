"""What a controller sees: agreed by all ranks, the same for people, rules and policies.

Every field is measured, stale or absent; no field is filled with a default because its source was missing.
"""

from dataclasses import dataclass

from esper.leyline.alpha import AlphaMode, Curve, Operator
from esper.leyline.breaker import BreakerView
from esper.leyline.evidence import GateResult, GradientHealth, Reading
from esper.leyline.stages import Stage

OBSERVATION_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BlueprintInfo:
    """One entry of the catalogue for one slot: its name and what it would add there.

    Fields:
        name: registered name.
        parameters: exact count of added parameters.
        flops: multiply-adds times two of one forward over one sample.
    """

    name: str
    parameters: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelInfo:
    """CHANNEL's vector v in one slot: mean, 95th percentile (between values: linear), and share of exact zeros."""

    mean: float
    p95: float
    sparsity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What may still be spent; None is unlimited.

    Fields:
        live: seeds that may still be alive at the same time.
        germinations: births left in this run.
        parameters: parameters that may still be added.
        flops: forward FLOPs per sample that may still be added.
    """

    live: int | None
    germinations: int | None
    parameters: int | None
    flops: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotObservation:
    """One slot at one tick.

    Fields:
        slot, row, col: id, and place normalised to [0, 1] over the host's rows and columns.
        stage, staged: where it is; ``staged`` while a germination waits for its second tick.
        dwell: ticks in this stage. min_dwell: ticks before the next ADVANCE or FOSSILIZE is legal.
        generation: births in this slot so far.
        blueprint, operator, curve: of the living seed, None without one; the operator that is in force, or to come.
        operators: those that this slot may use. channel: CHANNEL's vector here, None without one.
        alpha, alpha_target, alpha_velocity: present value, committed target, change per tick.
        ramp_progress, alpha_mode: share of the present ramp done; HOLD at rest.
        ending: a prune by ramp is under way.
        parameters: of the seed.
        contribution: mean paired loss without minus with the seed (nats; positive helps) at ``contribution_alpha``.
        contribution_alpha: the alpha it was measured at.
        looks, max_looks: scheduled looks that this life has spent on what is looked for now, and how many it has.
        gate_mean, gate_std: g_eff over the training samples since the last tick, under GATE and CONFIDENCE.
        effective_alpha: ``alpha`` times ``gate_mean``.
        gradient_norm: mean L2 norm of the seed's reduced gradient since the last tick.
        gradient_ratio: that norm over the host's. health: see `GradientHealth`.
        nonfinite_steps: steps since the last tick whose gradient for this slot was not finite.
        degraded: ranks on which the seed runs by a fallback taken at run time.
        verdict: the gate on the way forward, judged on present evidence; None where no gate leads on.
        embargo_left: ticks until a seed may germinate here: the slot cools down, or is barred after a rollback.
        catalogue: blueprints that fit this slot.
    """

    slot: str
    row: float
    col: float
    stage: Stage
    staged: bool
    dwell: int
    min_dwell: int
    generation: int
    blueprint: str | None
    operator: Operator | None
    operators: tuple[Operator, ...]
    channel: ChannelInfo | None
    curve: Curve | None
    alpha: float
    alpha_target: float
    alpha_velocity: float
    ramp_progress: float
    alpha_mode: AlphaMode
    ending: bool
    parameters: int
    contribution: Reading
    contribution_alpha: float
    looks: int
    max_looks: int
    gate_mean: Reading
    gate_std: Reading
    effective_alpha: Reading
    gradient_norm: Reading
    gradient_ratio: Reading
    health: GradientHealth
    nonfinite_steps: int
    degraded: int
    verdict: GateResult | None
    embargo_left: int
    catalogue: tuple[BlueprintInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The agreed state of a run at one tick.

    Fields:
        tick, step, total_steps, remaining: clocks; ``remaining`` is the share of optimizer steps still to come.
        train_loss: mean per-sample training loss since the last tick (nats).
        train_accuracy: share of correct training predictions since the last tick.
        validation_loss, validation_accuracy: on the validation part; the standard error is over samples.
        host_gradient_norm, host_health: of the host's reduced gradient since the last tick.
        skipped_steps: optimizer steps skipped since the last tick for a non-finite host gradient.
        budgets: what may still be spent. breaker: whether seeds may be born at all.
        slots: row-major.
    """

    tick: int
    step: int
    total_steps: int
    remaining: float
    train_loss: Reading
    train_accuracy: Reading
    validation_loss: Reading
    validation_accuracy: Reading
    host_gradient_norm: Reading
    host_health: GradientHealth
    skipped_steps: int
    budgets: Budgets
    breaker: BreakerView
    slots: tuple[SlotObservation, ...]
    version: int = OBSERVATION_VERSION

    def slot(self, slot: str) -> SlotObservation:
        """The observation of one slot; KeyError if there is none of that id."""
        for entry in self.slots:
            if entry.slot == slot:
                return entry
        raise KeyError(slot)

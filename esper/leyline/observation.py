"""Observations: what a controller sees. All ranks agree on them; people, rules and policies see the same.

Every reading is measured, stale or absent; a field is never filled with a default because its source was missing.
"""

from dataclasses import dataclass

from esper.leyline.alpha import AlphaMode, Curve, Operator
from esper.leyline.breaker import BreakerView
from esper.leyline.evidence import ABSENT, NO_WORTH, GateResult, GradientHealth, Reading, SeedWorth
from esper.leyline.stages import Stage
from esper.leyline.topology import Reach

OBSERVATION_VERSION = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class BlueprintInfo:
    """One entry of the catalogue for one slot: a blueprint's name and what it would add there.

    Fields:
        name: registered name.
        parameters: exact count of added parameters.
        flops: FLOPs of one forward pass over one sample (a multiply-add counts as two).
        reach: which positions it mixes; None if the blueprint does not say.
        memory: bytes that it is forecast to take on a rank while it learns; None where nobody forecast it.
        shadow: bytes of these that a shadow forward takes, so until it is blended.
        folds_into: layer of the host that learns, and into which export would fold the seed: it adds nothing that this
            layer cannot learn, and is refused. None if there is none, or the settings allow such seeds.
    """

    name: str
    parameters: int
    flops: int
    reach: Reach | None
    memory: int | None = None
    shadow: int = 0
    folds_into: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """Size of the bare host: the yardstick for whatever grows in it.

    Fields:
        parameters: exact count, those of seeds left out.
        flops: FLOPs of one forward pass over one sample; None where the run keeps no account.
    """

    parameters: int
    flops: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelInfo:
    """Summary of CHANNEL's vector v in one slot.

    Fields:
        mean: mean of the values.
        p95: 95th percentile, interpolated linearly.
        sparsity: share of exact zeros, 0 to 1.
    """

    mean: float
    p95: float
    sparsity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What may still be spent; None is unlimited.

    Fields:
        live: further seeds that may be alive at the same time.
        germinations: births left in this run.
        parameters: parameters that may still be added.
        flops: forward FLOPs per sample that may still be added.
        memory: bytes on a rank, as forecast, that may still be added.
    """

    live: int | None
    germinations: int | None
    parameters: int | None
    flops: int | None
    memory: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotObservation:
    """One slot at one tick.

    Fields:
        slot: slot id.
        row: row of the slot, normalised to [0, 1] over the host's rows.
        col: column of the slot, normalised to [0, 1] over the host's columns.
        stage: present stage.
        staged: whether a germination waits for its second tick.
        dwell: ticks in this stage.
        min_dwell: ticks in a stage before the next ADVANCE or FOSSILIZE is legal.
        generation: births in this slot so far.
        blueprint: blueprint of the living seed; None without a seed.
        operator: the operator in force, or before blending the one to come; None without a seed.
        operators: operators that this slot may use.
        channel: summary of CHANNEL's vector in this slot; None without one.
        curve: curve of the living seed's birth command; None without a seed.
        alpha: present alpha.
        alpha_target: alpha that the committed ramp leads to.
        alpha_velocity: change of alpha per tick.
        ramp_progress: share of the present ramp that is done.
        alpha_mode: HOLD at rest, else the direction of the ramp.
        ending: whether a prune by ramp is under way.
        parameters: parameters of the seed.
        contribution: mean paired loss without minus with the seed (nats; positive helps) at ``contribution_alpha``, of
            the latest look alone.
        contribution_alpha: alpha at which ``contribution`` was measured.
        worth: what the seed saves on the validation part, alone, left out and shared (``control.attribute_every``).
        running: contribution over all looks since alpha last moved, of a fossil since it became one; its error is over
            clusters.
        helps: share of the evidence that the gate ahead needs to see that the seed helps; 1 is enough. None before
            enough clusters are seen.
        hurts: share of the evidence needed to see that the seed hurts; 1 is enough.
        level: chance of luck at which G5 may let this seed pass, fixed at its birth; None without a seed.
        looks: looks that this life has drawn.
        max_looks: looks that a life may have drawn by the end of this stage; 0 in stages without looks.
        lasting: least help to be expected at the end of the time looked ahead, beside a host that goes on training
            (nats; lower end of an interval), from the latest continuation in copies.
        continuations: continuations in copies that this life has had.
        max_continuations: how many a life has.
        gate_mean: mean of g_eff over the training samples since the last tick, under GATE and CONFIDENCE.
        gate_std: standard deviation of g_eff over the same samples.
        effective_alpha: ``alpha`` times ``gate_mean``.
        gradient_norm: mean L2 norm of the seed's reduced gradient since the last tick.
        gradient_ratio: ``gradient_norm`` over the host's.
        gradient_parity: root mean square of the seed's gradient over the host's; near 1 both learn at one pace.
        update_parity: the same of what an optimizer step changed.
        health: health of the seed's gradient, see `GradientHealth`.
        nonfinite_steps: steps since the last tick whose gradient for this slot was not finite.
        degraded: number of ranks on which the seed runs by a fallback taken at run time.
        verdict: verdict of the gate ahead on present evidence; of a fossil, of the gate that lets it be pruned. None if
            there is no gate.
        embargo_left: ticks until a seed may germinate here, while the slot cools down or is barred after a rollback.
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
    running: Reading
    helps: float | None
    hurts: float | None
    level: float | None
    looks: int
    max_looks: int
    lasting: Reading
    continuations: int
    max_continuations: int
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
    worth: SeedWorth = NO_WORTH
    gradient_parity: Reading = ABSENT
    update_parity: Reading = ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The agreed state of a run at one tick.

    Fields:
        tick: control ticks done.
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        remaining: share of optimizer steps still to come, 0 to 1.
        train_loss: mean per-sample training loss since the last tick (nats).
        train_accuracy: share of correct training predictions since the last tick.
        validation_loss: mean per-sample loss on the validation part (nats); the standard error is over samples.
        validation_accuracy: share of correct predictions on the validation part.
        together: loss that all blended seeds save on the validation part, against none (nats per sample).
        host_gradient_norm: mean L2 norm of the host's reduced gradient since the last tick.
        host_health: health of the host's gradient since the last tick.
        host: size of the bare host.
        skipped_steps: optimizer steps skipped since the last tick because the host's gradient was not finite.
        budgets: what may still be spent.
        breaker: the breaker, which says whether seeds may be born at all.
        slots: one observation per slot, row-major.
        version: version of this format.
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
    host: HostInfo
    skipped_steps: int
    budgets: Budgets
    breaker: BreakerView
    slots: tuple[SlotObservation, ...]
    together: Reading = ABSENT
    version: int = OBSERVATION_VERSION

    def slot(self, slot: str) -> SlotObservation:
        """Returns the observation of one slot.

        Raises:
            KeyError: there is no slot of that id.
        """
        for entry in self.slots:
            if entry.slot == slot:
                return entry
        raise KeyError(slot)

"""The agreed record of a slot, and the one door through which its stage changes.

`SlotState` is plain, frozen data, the same on every rank; a checkpoint stores it and a digest compares it. Nothing here
touches a tensor: what a stage means for the model is read off the state by whoever owns the model.
"""

from dataclasses import dataclass, field, replace

from esper.leyline.alpha import AlphaMode, Curve, Operator, Ramp
from esper.leyline.commands import Command
from esper.leyline.evidence import ABSENT, NO_HEALTH, GradientHealth, Reading
from esper.leyline.stages import Mechanical, Op, Stage, find_edge

REST = "REST"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """Paired evidence asked for at one tick and measured for the next.

    Fields:
        look: number of this look in the seed's life among those of its aim, from 1.
        alpha: loss at this alpha is compared with loss at 0.
        aim: what it is for: the gate that asks (G2, G3, G5), or REST for one at a partial alpha, where no gate asks.
        draw: key of the samples, unique to (generation, aim, look) in the slot.
    """

    look: int
    alpha: float
    aim: str
    draw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryLine:
    """One stage change, in integer ticks."""

    tick: int
    source: Stage
    target: Stage
    cause: str
    blueprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What all ranks agree on about one slot.

    Fields:
        slot, stage, since_tick: where it is, and the tick at which it came there.
        generation: births so far.
        staged, staged_tick: a germination waiting for its second tick, and when it was committed.
        blueprint, curve, steepness, tempo, target: of the living seed's birth command (tempo in ticks).
        operator: of the present ramp, before blending of the one to come. ADD from HOLDING on where it was gated.
        ramp: committed path of alpha, None before blending.
        ending: a prune by ramp is under way; the seed is frozen.
        learn_step: first optimizer step in which the seed learns; its warm-up counts from there.
        spent: looks spent in this life by their aim (see `ProbeRequest`); no retarget gives one back.
        request: evidence being measured for the next tick.
        contribution, contribution_alpha: latest paired evidence.
        gate_mean, gate_std: latest g_eff over training samples, where the operator is gated.
        gradient_norm, health, nonfinite_steps, finite, owned: latest agreed health of the seed.
        degraded, degraded_tick: ranks on which the seed runs by a fallback, and since which tick without a break.
        frozen_step: the ramp stands still at this optimizer step while the seed is degraded; None while it moves.
        changed_tick: tick of the seed's latest stage change or committed ramp, 0 without a seed.
        proposal: id of the command that last changed this slot.
        history: latest stage changes, bounded.
    """

    slot: str
    stage: Stage = Stage.EMPTY
    since_tick: int = 0
    generation: int = 0
    staged: Command | None = None
    staged_tick: int = 0
    blueprint: str | None = None
    operator: Operator | None = None
    curve: Curve | None = None
    steepness: float = 6.0
    tempo: int = 0
    target: float = 1.0
    ramp: Ramp | None = None
    ending: bool = False
    learn_step: int | None = None
    spent: dict[str, int] = field(default_factory=dict)
    request: ProbeRequest | None = None
    contribution: Reading = ABSENT
    contribution_alpha: float = 0.0
    gate_mean: Reading = ABSENT
    gate_std: Reading = ABSENT
    gradient_norm: Reading = ABSENT
    health: GradientHealth = NO_HEALTH
    nonfinite_steps: int = 0
    finite: bool = False
    owned: bool = False
    degraded: int = 0
    degraded_tick: int | None = None
    frozen_step: int | None = None
    changed_tick: int = 0
    proposal: int = 0
    history: tuple[HistoryLine, ...] = ()

    def _clock(self, step: int) -> int:
        return step if self.frozen_step is None else min(step, self.frozen_step)

    def ramp_progress(self, step: int) -> float:
        """Share of the present ramp done at an optimizer step, 0 without one."""
        return self.ramp.progress(self._clock(step)) if self.ramp is not None and self.stage.is_blended else 0.0

    def frozen(self, step: int) -> "SlotState":
        """The same with alpha and operators standing still from this optimizer step on."""
        return self if self.frozen_step is not None else replace(self, frozen_step=step)

    def thawed(self, step: int) -> "SlotState":
        """The same with a ramp that was interrupted going on from where it stands, as if no time had passed."""
        if self.frozen_step is None:
            return self
        ramp, waited = self.ramp, step - self.frozen_step
        if ramp is not None and self.frozen_step < ramp.last_step:
            ramp = replace(ramp, first_step=ramp.first_step + waited, last_step=ramp.last_step + waited)
        return replace(self, ramp=ramp, frozen_step=None)

    def alpha(self, step: int) -> float:
        """Agreed alpha at an optimizer step."""
        return self.ramp.value(self._clock(step)) if self.ramp is not None and self.stage.is_blended else 0.0

    def alpha_mode(self, step: int) -> AlphaMode:
        """HOLD at rest, else the ramp's direction."""
        return self.ramp.mode(self._clock(step)) if self.ramp is not None and self.stage.is_blended else AlphaMode.HOLD

    def ramp_done(self, step: int) -> bool:
        """The committed ramp has reached its target."""
        return self.ramp is not None and self.alpha_mode(step) is AlphaMode.HOLD

    def fade(self, step: int) -> float:
        """Share of the operator in force at an optimizer step, the rest being that of the one that is faded out."""
        return self.ramp.fade(self._clock(step)) if self.ramp is not None and self.stage.is_blended else 1.0

    def operators(self, step: int) -> tuple[Operator, Operator | None]:
        """The operator in force, and the one that is being faded out (None: none).

        Before blending a seed learns for full alpha, where a gated operator is ADD.
        """
        if self.ramp is not None and self.stage.is_blended:
            return self.ramp.operators(self._clock(step))
        return (Operator.ADD if self.operator is None or self.operator.is_gated else self.operator), None

    def wants_gate(self, step: int) -> bool:
        """The slot has a gate exactly while this holds."""
        return self.stage is Stage.BLENDING and Operator.GATE in self.operators(step)

    @property
    def aim(self) -> str | None:
        """What a look would be for now; None where nothing is measured."""
        if self.stage is Stage.BLENDING:
            return "G3" if self.ramp is not None and self.ramp.target == 1.0 else REST
        return {Stage.TRAINING: "G2", Stage.HOLDING: "G5"}.get(self.stage)

    @property
    def looks(self) -> int:
        """Looks spent in this life on the present aim."""
        return self.spent.get(self.aim, 0) if self.aim is not None else 0

    @property
    def taken(self) -> bool:
        """The slot holds a seed, waits for one, or cools down."""
        return self.staged is not None or self.stage is not Stage.EMPTY


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A stage change that happened."""

    slot: str
    source: Stage
    target: Stage
    cause: str
    generation: int
    blueprint: str | None
    proposal: int


def move(
    state: SlotState,
    cause: Op | Mechanical,
    target: Stage,
    *,
    tick: int,
    proposal: int,
    history: int,
) -> tuple[SlotState, Transition]:
    """The one door: takes the slot along an edge of the table.

    Requests and contribution belong to the stage that is left; they are cleared, so that evidence of one stage is never
    mistaken for that of the next. Looks stay spent for the whole life. Leaving for PRUNED clears all of the seed. From
    HOLDING on a gated operator is on record as what it has become, ADD.

    Args:
        state: before. cause, target: the edge. tick: now. proposal: id of the command behind it, 0 if mechanical.
        history: stage changes to remember.

    Raises:
        IllegalTransition: no such edge.
    """
    edge = find_edge(state.stage, cause, target)
    line = HistoryLine(tick=tick, source=edge.source, target=target, cause=cause.name, blueprint=state.blueprint)
    happened = Transition(
        slot=state.slot,
        source=edge.source,
        target=target,
        cause=cause.name,
        generation=state.generation,
        blueprint=state.blueprint,
        proposal=proposal,
    )
    lines = (*state.history, line)[-history:]
    if target is Stage.PRUNED:
        blank = SlotState(slot=state.slot, generation=state.generation)
        return replace(blank, stage=target, since_tick=tick, proposal=proposal, history=lines), happened
    changed = target is not edge.source
    if target is Stage.HOLDING and state.ramp is not None and state.ramp.operator.is_gated:
        state = replace(state, operator=Operator.ADD, ramp=replace(state.ramp, operator=Operator.ADD, fades_from=None))
    after = replace(
        state,
        stage=target,
        since_tick=tick if changed else state.since_tick,
        changed_tick=tick if changed and target.has_seed else state.changed_tick,
        request=None,
        contribution=ABSENT if changed else state.contribution,
        contribution_alpha=0.0 if changed else state.contribution_alpha,
        gate_mean=ABSENT if changed else state.gate_mean,
        gate_std=ABSENT if changed else state.gate_std,
        proposal=proposal or state.proposal,
        history=lines if changed else state.history,
    )
    return after, happened


def learns(stage: Stage, *, ending: bool, train_fossils: bool) -> bool:
    """Whether a seed's parameters get a gradient in every step of this stage."""
    if stage is Stage.FOSSILIZED:
        return train_fossils
    return stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING) and not ending

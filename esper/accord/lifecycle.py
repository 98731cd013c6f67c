"""The agreed record of a slot, and the one function through which its stage changes.

`SlotState` is plain, frozen data, the same on every rank; a checkpoint stores it and a digest compares it. Nothing here
touches a tensor: the owner of the model reads from the state what a stage means for the model.
"""

from dataclasses import dataclass, replace

from esper.accord.evidence.lasting import LastingHelp
from esper.accord.evidence.record import Evidence
from esper.leyline.alpha import AlphaMode, Curve, Operator, Ramp
from esper.leyline.commands import Command
from esper.leyline.evidence import ABSENT, NO_HEALTH, NO_WORTH, GradientHealth, Reading, SeedWorth
from esper.leyline.stages import Mechanical, Op, Stage, find_edge

REST = "REST"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRequest:
    """A request for paired evidence, made at one tick and measured for the next.

    Fields:
        look: number of this look in the seed's life, from 1; its share of the probe (see `esper.accord.evidence.plan`).
        shares: equal shares into which the probe is cut.
        alpha: the loss at this alpha is compared with the loss at 0.
        aim: purpose of the look: the gate that needs it (G2, G3, G5, G6), or REST at a partial alpha, where none does.
        draw: key of the life's permutation of the probe.
        counts: whether it is added to the running evidence; if not, its share was drawn before, and it is told only.
        refill: whether the share is of training samples that have not been trained on, instead of the probe's.
    """

    look: int
    shares: int
    alpha: float
    aim: str
    draw: str
    counts: bool = True
    refill: bool = False


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
    """The agreed record of one slot.

    Fields:
        slot: slot id.
        stage: present stage.
        since_tick: tick at which the slot entered this stage.
        generation: births so far.
        staged: command of a germination that waits for its second tick, or None.
        staged_tick: tick at which that germination was committed.
        blueprint: blueprint of the living seed, or None.
        operator: operator of the present ramp, or before blending of the coming one; a gated operator becomes ADD from
            HOLDING on.
        curve: curve of the seed's birth command.
        steepness: steepness of the seed's birth command.
        tempo: length of the ramp that the birth command asked for, in ticks.
        target: alpha that the birth command asked for.
        ramp: committed path of alpha; None before blending.
        ending: whether a prune by ramp is under way; then the seed is frozen. A fossil can be taken back till it ends.
        learn_step: first optimizer step in which the seed learns; its warm-up counts from there.
        birth: number of this seed's birth in the run, from 1; 0 before the first one.
        level: chance of luck at which G5 may let this seed pass, fixed at its birth; 1 before the first one.
        drawn: looks of this life so far, each a share of the probe of its own; a new target gives none back.
        refilled: looks of this life at training samples that had not been trained on, once the probe was spent.
        starts: how often evidence beside the host has begun in this life.
        retold: looks of this life that went over shares drawn before.
        evidence: running evidence since alpha last moved; None before the first look.
        lasting: what the latest continuation of this life said (see `esper.accord.evidence.lasting`), or None.
        continued: continuations of this life.
        request: evidence that is being measured for the next tick, or None.
        left_out: probe samples of this life that were left out of looks, since their loss was not finite.
        void_looks: looks of this life that give no evidence, since too many samples were left out.
        looked_tick: tick at which the latest look of this stage was measured; None before the first one.
        contribution: reading of the latest look alone.
        contribution_alpha: alpha at which ``contribution`` was measured.
        worth: latest attribution of the living seed.
        gate_mean: latest mean of g_eff over training samples, if the operator is gated.
        gate_std: standard deviation of g_eff over the same samples.
        gradient_norm: latest mean L2 norm of the seed's gradient.
        health: latest health of the seed's gradient.
        nonfinite_steps: steps since the last tick with a non-finite gradient.
        finite: whether the seed's parameters are finite on every rank.
        owned: whether each of the seed's parameters is in exactly one optimizer group on every rank.
        degraded: number of ranks on which the seed runs by a fallback.
        degraded_tick: tick since which some rank has run it by a fallback without a break, or None.
        frozen_step: optimizer step at which the ramp was stopped because the seed is degraded; None while it moves.
        changed_tick: tick of the seed's latest stage change or committed ramp; 0 without a seed.
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
    birth: int = 0
    level: float = 1.0
    drawn: int = 0
    refilled: int = 0
    starts: int = 0
    retold: int = 0
    evidence: Evidence | None = None
    lasting: LastingHelp | None = None
    continued: int = 0
    request: ProbeRequest | None = None
    left_out: int = 0
    void_looks: int = 0
    looked_tick: int | None = None
    contribution: Reading = ABSENT
    contribution_alpha: float = 0.0
    worth: SeedWorth = NO_WORTH
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
        """Share of the present ramp that is done at an optimizer step; 0 without a ramp."""
        return self.ramp.progress(self._clock(step)) if self.ramp is not None and self.stage.is_blended else 0.0

    def freeze(self, step: int) -> "SlotState":
        """Returns the record with alpha and operators stopped from this optimizer step on."""
        return self if self.frozen_step is not None else replace(self, frozen_step=step)

    def thaw(self, step: int) -> "SlotState":
        """Returns the record with a stopped ramp moving again from where it stopped, as if no time had passed."""
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
        """HOLD at rest, else the direction of the ramp."""
        return self.ramp.mode(self._clock(step)) if self.ramp is not None and self.stage.is_blended else AlphaMode.HOLD

    def ramp_done(self, step: int) -> bool:
        """True if the committed ramp has reached its target."""
        return self.ramp is not None and self.alpha_mode(step) is AlphaMode.HOLD

    def fade(self, step: int) -> float:
        """Share of the operator in force at an optimizer step; the rest belongs to the one that is faded out."""
        return self.ramp.fade(self._clock(step)) if self.ramp is not None and self.stage.is_blended else 1.0

    def operators(self, step: int) -> tuple[Operator, Operator | None]:
        """The operator in force, and the one that is being faded out, or None.

        Before blending a seed learns for full alpha, where a gated operator is ADD.
        """
        if self.ramp is not None and self.stage.is_blended:
            return self.ramp.operators(self._clock(step))
        return (Operator.ADD if self.operator is None or self.operator.is_gated else self.operator), None

    def wants_gate(self, step: int) -> bool:
        """True if and only if the slot must have a gate."""
        return self.stage is Stage.BLENDING and Operator.GATE in self.operators(step)

    @property
    def aim(self) -> str | None:
        """Purpose of a look taken now (see `ProbeRequest`); None in stages without looks."""
        if self.stage is Stage.BLENDING:
            return "G3" if self.ramp is not None and self.ramp.target == 1.0 else REST
        return {Stage.TRAINING: "G2", Stage.HOLDING: "G5", Stage.FOSSILIZED: "G6"}.get(self.stage)

    @property
    def taken(self) -> bool:
        """True if the slot holds a seed, waits for one, or cools down."""
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
    """Moves the slot along an edge of the table; no stage changes in any other way.

    Request and contribution belong to the old stage. They are cleared, so that a reading of one stage is never mistaken
    for one of the next. The running evidence stays until alpha moves. Looks stay spent for the whole life. Entering
    PRUNED clears everything of the seed. From HOLDING on a gated operator is recorded as ADD, which it has become.

    Args:
        state: the record before the move.
        cause: cause of the edge.
        target: stage that the edge leads to.
        tick: present tick.
        proposal: id of the command that asked for it; 0 if mechanical.
        history: number of stage changes to remember.

    Returns:
        The record after the move, and the transition.

    Raises:
        IllegalTransition: there is no such edge.
    """
    edge = find_edge(state.stage, cause, target)
    line = HistoryLine(tick=tick, source=edge.source, target=target, cause=cause.name, blueprint=state.blueprint)
    transition = Transition(
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
        return replace(blank, stage=target, since_tick=tick, proposal=proposal, history=lines), transition
    changed = target is not edge.source
    if target is Stage.HOLDING and state.ramp is not None and state.ramp.operator.is_gated:
        state = replace(state, operator=Operator.ADD, ramp=replace(state.ramp, operator=Operator.ADD, fades_from=None))
    after = replace(
        state,
        stage=target,
        since_tick=tick if changed else state.since_tick,
        changed_tick=tick if changed and target.has_seed else state.changed_tick,
        request=None,
        looked_tick=None if changed else state.looked_tick,
        contribution=ABSENT if changed else state.contribution,
        contribution_alpha=0.0 if changed else state.contribution_alpha,
        gate_mean=ABSENT if changed else state.gate_mean,
        gate_std=ABSENT if changed else state.gate_std,
        proposal=proposal or state.proposal,
        history=lines if changed else state.history,
    )
    return after, transition


def learns(stage: Stage, *, ending: bool, train_fossils: bool) -> bool:
    """Returns whether a seed's parameters get a gradient in every step of this stage."""
    if stage is Stage.FOSSILIZED:
        return train_fossils and not ending
    return stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING) and not ending

"""The pure reducer: (state, commands, vetoes) -> (state', effects, events), the same on every rank.

The order within a tick, the same everywhere:

    1. staged births   registered, kept waiting, or discarded, by the vetoes of this commit
    2. quarantine      slots whose gradient was not finite; the newest blending seed if the host's steps keep failing;
                       seeds that run by a fallback are frozen, and pruned if it lasts
    3. orders          the order to the whole run, if this commit carries one
       commands        row-major; each is judged (legality, then its gate) before any part of it takes effect; before
                       them, fossils that the network is better without are told
    4. auto-advance    slots without a command whose gate ahead passes, if gates.auto_advance lists that gate
    5. mechanics       ends of prune ramps, cool-down
    6. looks           evidence to measure for the next tick

Only the reducer acts on a gate's verdict. Effects are what the owner of the model must do; everything else about the
model (alpha, phase, what learns) follows from the state.
"""

from collections.abc import Mapping
from dataclasses import replace

from esper.accord.breaker import after_birth
from esper.accord.changes import Changes
from esper.accord.effects import Outcome, Prepare, Register, Veto
from esper.accord.evidence.levels import level_of_birth
from esper.accord.facts import GATE_AHEAD, conditions_of, facts_of, next_continuation, next_look, verdict_ahead
from esper.accord.gates import judge_gate
from esper.accord.lifecycle import SlotState
from esper.accord.orders.obeying import obey
from esper.accord.state import RunState, Terms
from esper.leyline.commands import Command
from esper.leyline.events import BirthVetoed, CommandJudged, CommandRefused
from esper.leyline.legality import find_refusal
from esper.leyline.orders.verbs import NO_ORDER, RunOrder
from esper.leyline.stages import Gate, Incubation, Mechanical, Op, Stage


class _Reduction(Changes):
    def __init__(self, state: RunState, terms: Terms, stage_ticks: int) -> None:
        super().__init__(state, terms)
        self.stage_ticks = stage_ticks

    # 1 ------------------------------------------------------------------------------------------------------------

    def settle_births(self, vetoes: Mapping[str, tuple[Veto, int]], commands: Mapping[str, Command]) -> None:
        for slot in self.state.slots:
            command = slot.staged
            if command is None:
                continue
            veto, rank = vetoes.get(slot.slot, (Veto.NONE, -1))
            if veto is Veto.NONE and self.is_pruned(slot, commands[slot.slot]):
                continue  # never born: see `prune`
            waited = self.state.tick - slot.staged_tick
            if veto is Veto.NOT_READY and waited < self.stage_ticks:
                continue
            if veto is not Veto.NONE:
                self.put(replace(slot, staged=None))
                self.discard(slot)
                reason = f"{veto.name} after {waited} ticks" if veto is Veto.NOT_READY else veto.name
                self.outcome.events.append(
                    BirthVetoed(
                        **self.axes,
                        slot=slot.slot,
                        blueprint=str(command.blueprint),
                        rank=rank,
                        reason=reason,
                        proposal=command.proposal,
                    )
                )
                continue
            birth = self.state.births + 1
            self.outcome.state = replace(self.state, births=birth)
            born = replace(
                slot,
                staged=None,
                generation=slot.generation + 1,
                birth=birth,
                level=level_of_birth(self.terms.gates.false_share, birth, self.terms.fossils(self.state)),
                blueprint=command.blueprint,
                operator=command.operator,
                curve=command.curve,
                steepness=command.steepness,
                tempo=command.ticks,
                target=command.target,
            )
            self.move(born, Op.GERMINATE, Stage.GERMINATED, command.proposal)
            self.outcome.effects.append(Register(slot.slot))

    def is_pruned(self, slot: SlotState, command: Command) -> bool:
        """Whether this tick's command takes a staged seed back."""
        conditions = conditions_of(self.state, slot, self.terms)
        return command.op is Op.PRUNE and find_refusal(self, conditions, command) is None

    # 2 ------------------------------------------------------------------------------------------------------------

    def quarantine(self) -> None:
        for slot in self.state.slots:
            if slot.stage.is_live and slot.nonfinite_steps > 0 and slot.slot not in self.moved:
                self.move(slot, Mechanical.QUARANTINE, Stage.PRUNED)
        if self.state.judged_row >= self.terms.max_skips:
            blending = [s for s in self.state.slots if s.stage in (Stage.BLENDING, Stage.HOLDING)]
            if blending:
                newest = max(blending, key=lambda s: (s.ramp.first_step if s.ramp else -1, s.slot))
                self.move(newest, Mechanical.QUARANTINE, Stage.PRUNED)

    def freeze_degraded(self) -> None:
        """Stops the ramps of seeds that run by a fallback, except of those that are on their way out."""
        for slot in self.state.slots:
            if not slot.stage.is_live or slot.slot in self.moved:
                continue
            if slot.degraded_tick is None:
                if slot.frozen_step is not None:
                    self.put(slot.thaw(self.state.step))
            elif self.state.tick - slot.degraded_tick >= self.terms.gates.degraded_ticks:
                self.move(slot, Mechanical.DEGRADED, Stage.PRUNED)
            elif not slot.ending:
                self.put(slot.freeze(self.state.step))

    # 3 ------------------------------------------------------------------------------------------------------------

    def judge_command(self, command: Command) -> None:
        if command.op is Op.WAIT:
            return
        slot = self.state.slot(command.slot)
        reason = "the slot changed in this tick" if slot.slot in self.moved else None
        reason = reason or self.state.steering.why_not(command.op)
        reason = reason or find_refusal(self, conditions_of(self.state, slot, self.terms), command)
        gate = {Op.GERMINATE: Gate.G0, Op.FOSSILIZE: Gate.G5}.get(command.op)
        if command.op is Op.ADVANCE or (command.op is Op.PRUNE and slot.stage is Stage.FOSSILIZED):
            gate = GATE_AHEAD.get(slot.stage)
        if gate is not None and (reason is None or gate is Gate.G0):
            result = judge_gate(gate, facts_of(self.state, slot, self.terms, reason), self.terms.gates)
            self.report_verdict(slot.slot, result)
            if reason is None and not result.passed:
                reason = f"{gate.name}: {result.reason}"
        if reason is not None:
            self.outcome.events.append(CommandRefused(**self.axes, command=command, applied=False, reason=reason))
            return
        self.outcome.events.append(CommandJudged(**self.axes, command=command, applied=True, reason=command.reason))
        _APPLY[command.op](self, slot, command)

    def germinate(self, slot: SlotState, command: Command) -> None:
        staged = replace(command, reason="")
        self.put(replace(slot, staged=staged, staged_tick=self.state.tick, proposal=command.proposal))
        governor = replace(self.state.governor, breaker=after_birth(self.state.governor.breaker, slot.slot))
        self.outcome.state = replace(self.state, germinations=self.state.germinations + 1, governor=governor)
        self.outcome.effects.append(Prepare(slot.slot, staged, slot.generation + 1))
        self.moved.add(slot.slot)

    def advance(self, slot: SlotState, command: Command) -> None:
        immediate = self.terms.slots_config.incubation == Incubation.IMMEDIATE
        target = {
            Stage.GERMINATED: Stage.BLENDING if immediate else Stage.TRAINING,
            Stage.TRAINING: Stage.BLENDING,
            Stage.BLENDING: Stage.HOLDING,
        }[slot.stage]
        if slot.learn_step is None:
            slot = replace(slot, learn_step=self.state.step)
        after = self.move(slot, Op.ADVANCE, target, command.proposal)
        if target is Stage.BLENDING:
            self.blend(after)

    def set_alpha_target(self, slot: SlotState, command: Command) -> None:
        full = slot.stage is Stage.HOLDING and command.target == 1.0
        target = Stage.HOLDING if full else Stage.BLENDING
        if slot.stage is Stage.FOSSILIZED:  # its prune is taken back
            slot, target = replace(slot, ending=False), Stage.FOSSILIZED
        after = self.move(slot, Op.SET_ALPHA_TARGET, target, command.proposal)
        self.ramp(
            after,
            target=command.target,
            ticks=command.ticks,
            curve=command.curve,
            steepness=command.steepness,
            op=command.operator,
        )

    def prune(self, slot: SlotState, command: Command) -> None:
        if slot.staged is not None:
            self.put(replace(slot, staged=None, proposal=command.proposal))
            self.discard(slot)
            self.moved.add(slot.slot)
        elif command.ticks == 0:
            self.move(slot, Op.PRUNE, Stage.PRUNED, command.proposal)
        else:
            stage = Stage.FOSSILIZED if slot.stage is Stage.FOSSILIZED else Stage.BLENDING
            after = self.move(slot, Op.PRUNE, stage, command.proposal).thaw(self.state.step)
            self.ramp(
                replace(after, ending=True),
                target=0.0,
                ticks=command.ticks,
                curve=command.curve,
                steepness=command.steepness,
                op=after.operators(self.state.step)[0],
            )

    def fossilize(self, slot: SlotState, command: Command) -> None:
        # The contribution at the moment of fossilising stays on record until it is looked at again.
        after = self.move(slot, Op.FOSSILIZE, Stage.FOSSILIZED, command.proposal)
        newest, alpha = slot.contribution, slot.contribution_alpha
        self.put(replace(after, evidence=None, contribution=newest, contribution_alpha=alpha))

    # 4, 5, 6 ------------------------------------------------------------------------------------------------------

    def auto_advance(self) -> None:
        for slot in self.state.slots:
            if not slot.stage.has_seed:
                continue
            gate = GATE_AHEAD.get(slot.stage)
            if slot.slot in self.moved or gate is None or gate.name not in self.terms.gates.auto_advance:
                continue
            if self.state.steering.paused:
                continue
            command = Command(slot=slot.slot, op=Op.ADVANCE, reason=f"{gate.name} advances by itself")
            verdict = verdict_ahead(self.state, slot, self.terms)
            if verdict is None or not verdict.passed:
                continue
            if find_refusal(self, conditions_of(self.state, slot, self.terms), command) is None:
                self.judge_command(command)

    def run_mechanics(self) -> None:
        rest = {Stage.PRUNED: 1, Stage.EMBARGOED: self.terms.slots_config.embargo_ticks, Stage.RESETTING: 1}
        onward = {Stage.PRUNED: Stage.EMBARGOED, Stage.EMBARGOED: Stage.RESETTING, Stage.RESETTING: Stage.EMPTY}
        for slot in self.state.slots:
            if slot.stage is Stage.EMPTY or slot.slot in self.moved:
                continue
            if slot.ending and slot.ramp_done(self.state.step):
                self.move(slot, Mechanical.RAMP_END, Stage.PRUNED)
                continue
            while slot.stage in rest and self.state.tick - slot.since_tick >= rest[slot.stage]:
                # The loop goes through two stages at once if the embargo is 0 ticks.
                slot = self.move(slot, Mechanical.COOLDOWN, onward[slot.stage])

    def request_looks(self) -> None:
        if self.state.steering.paused:
            return
        for slot in self.state.slots:
            if not slot.stage.has_seed:
                continue
            looking = next_look(self.state, slot, self.terms)
            if looking is not None:
                self.put(looking)
        self.outcome.state = replace(self.state, continuing=next_continuation(self.state, self.terms))


_APPLY = {
    Op.GERMINATE: _Reduction.germinate,
    Op.ADVANCE: _Reduction.advance,
    Op.SET_ALPHA_TARGET: _Reduction.set_alpha_target,
    Op.PRUNE: _Reduction.prune,
    Op.FOSSILIZE: _Reduction.fossilize,
}
if set(_APPLY) != set(Op) - {Op.WAIT}:
    raise AssertionError(f"ops without a row: {set(Op) - {Op.WAIT} - set(_APPLY)}")


def reduce_tick(
    state: RunState,
    commands: Mapping[str, Command],
    vetoes: Mapping[str, tuple[Veto, int]],
    terms: Terms,
    *,
    stage_ticks: int,
    order: RunOrder = NO_ORDER,
) -> Outcome:
    """Applies one commit.

    Args:
        state: the agreed state with this tick's evidence absorbed (see `absorb`).
        commands: one command per slot.
        vetoes: (code, rank) for each vetoed slot.
        terms: terms of the run.
        stage_ticks: ticks for which a staged seed may stay not ready.
        order: order to the whole run.

    Returns:
        New state, effects in canonical order, events.
    """
    reduction = _Reduction(state, terms, stage_ticks)
    reduction.settle_births(vetoes, commands)
    reduction.quarantine()
    reduction.freeze_degraded()
    reduction.report_fossils()
    obey(reduction, order)
    for slot in state.slots:
        if commands[slot.slot].op is not Op.WAIT:
            reduction.judge_command(commands[slot.slot])
    reduction.auto_advance()
    reduction.run_mechanics()
    reduction.request_looks()
    proposals = [command.proposal for command in commands.values()]
    reduction.outcome.state = replace(reduction.state, proposals=max([state.proposals, *proposals]))
    return reduction.outcome

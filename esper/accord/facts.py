"""What gates and the law ask of one slot, read off its record: facts for a gate, conditions for legality, and the look
that is due.

Conditions need no gate's verdict and no other slot, so judging one command costs one slot. Evidence is requested at one
tick and measured for the next:

    TRAINING   at dwell first_look, first_look + look_every, ...: loss at alpha 1 against loss at 0
    BLENDING   if the ramp will be at rest by then, every look_every ticks: at the alpha at which it rests
    HOLDING    as in BLENDING; once the looks are spent, from the reserve every relook_every ticks
    FOSSILIZED every fossil_every ticks, of what the life has left of the probe

Each look of a life is a share of the probe of its own, whatever its aim, and is added to the running evidence of the
present alpha. Neither a new ramp nor a second visit to a stage gives a look back. Once all shares are drawn, a look
goes over one that was drawn before: it is told, and adds nothing. Looks at a partial alpha, for which no gate asks, do
that from the second one on. Evidence on a fossil begins when it has become one. Before looks of HOLDING and of fossils
are only told, training samples that have not been trained on are drawn, as long as there are any.
"""

from dataclasses import dataclass, replace

from esper.accord.config import Baseline, EvidencePolicy
from esper.accord.evidence.continuing import begin
from esper.accord.evidence.levels import share_of_start
from esper.accord.evidence.record import Evidence, Weighing, weigh_harm, weigh_help
from esper.accord.evidence.sums import reading_of
from esper.accord.gates import GateFacts, judge_gate
from esper.accord.lifecycle import REST, ProbeRequest, SlotState
from esper.accord.state import Continuing, RunState, Terms
from esper.leyline.alpha import AlphaMode, Operator
from esper.leyline.evidence import ABSENT, GateResult, Reading
from esper.leyline.legality import why_redundant
from esper.leyline.observation import BlueprintInfo
from esper.leyline.stages import Gate, Stage

GATE_AHEAD: dict[Stage, Gate] = {
    Stage.GERMINATED: Gate.G1,
    Stage.TRAINING: Gate.G2,
    Stage.BLENDING: Gate.G3,
    Stage.HOLDING: Gate.G5,
    Stage.FOSSILIZED: Gate.G6,
}


def facts_of(state: RunState, slot: SlotState, terms: Terms, refusal: str | None = None) -> GateFacts:
    """Returns the facts of a slot that a gate may judge."""
    fresh = terms.gates.fresh_ticks
    info = None if slot.blueprint is None else terms.info(slot.slot, slot.blueprint)
    return GateFacts(
        stage=slot.stage,
        dwell=state.tick - slot.since_tick,
        finite=slot.finite,
        owned=slot.owned,
        degraded=slot.degraded,
        refusal=refusal,
        redundant=None if info is None or slot.operator is None else why_redundant(info, slot.operator),
        gradient_norm=slot.gradient_norm.as_of(state.tick, fresh),
        health=slot.health.as_of(state.tick, fresh),
        nonfinite_steps=slot.nonfinite_steps,
        trainable=info is not None and info.parameters > 0,
        contribution=slot.contribution.as_of(state.tick, fresh),
        contribution_alpha=slot.contribution_alpha,
        running=running_of(slot, terms),
        helps=help_of(slot, terms),
        hurts=harm_of(slot, terms),
        looks=slot.drawn,
        max_looks=max_looks(slot.stage, terms),
        lasting=slot.lasting,
        continuations=slot.continued,
        continuing=_continuing_of(state, slot),
        alpha=slot.alpha(state.step),
        ramp_done=slot.ramp_done(state.step),
    )


def _continuing_of(state: RunState, slot: SlotState) -> int | None:
    under_way = state.continued_slot()
    if state.continuing is None or under_way is None or under_way.slot != slot.slot:
        return None
    return state.continuing.done


def verdict_ahead(state: RunState, slot: SlotState, terms: Terms) -> GateResult | None:
    """Returns the verdict of the gate ahead of this slot on present evidence; None if there is no gate ahead."""
    gate = GATE_AHEAD.get(slot.stage)
    if gate is None or slot.ending:
        return None
    return judge_gate(gate, facts_of(state, slot, terms), terms.gates)


def max_looks(stage: Stage, terms: Terms) -> int:
    """Returns how many looks a life may have drawn by the end of this stage, 0 if it has none; without the reserve, but
    for fossils."""
    if stage is Stage.TRAINING:
        return terms.probe.training_looks
    if stage is Stage.FOSSILIZED:
        return terms.probe.shares
    return terms.probe.looks if stage in (Stage.BLENDING, Stage.HOLDING) else 0


def running_of(slot: SlotState, terms: Terms) -> Reading:
    """Returns the mean over all looks of the running evidence, with its cluster-robust error."""
    evidence = slot.evidence
    if evidence is None or evidence.tick is None:
        return ABSENT
    return reading_of(evidence.sums, tick=evidence.tick, min_samples=terms.gates.min_samples)


def help_of(slot: SlotState, terms: Terms) -> Weighing | None:
    """Weighs the running evidence for the gate that asks for help, G2 in TRAINING and G5 beside the host; no gate asks
    a fossil.

    G2 asks whether the mean difference is above 0, at ``help_level`` a life. G5 asks whether it is above
    ``min_contribution``, at the share of the birth's level that this start of evidence has.
    """
    evidence, gates = slot.evidence, terms.gates
    if evidence is None or slot.stage is Stage.FOSSILIZED:
        return None
    if slot.stage is Stage.TRAINING:
        last = terms.probe.training_looks
        return weigh_help(evidence, terms.probe, null=0.0, level=gates.help_level, last=last, rare=False)
    level = slot.level * share_of_start(evidence.start)
    last = terms.probe.looks if evidence.begun < terms.probe.looks else terms.probe.shares
    return weigh_help(evidence, terms.probe, null=gates.min_contribution, level=level, last=last, rare=True)


def harm_of(slot: SlotState, terms: Terms) -> Weighing | None:
    """Weighs the running evidence for "the seed hurts"; of a fossil, all since it became one."""
    if slot.evidence is None:
        return None
    return weigh_harm(slot.evidence, terms.probe, level=terms.gates.harm_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """`esper.leyline.legality.SlotConditions` of one slot; fields as in `SlotObservation`."""

    stage: Stage
    staged: bool
    dwell: int
    min_dwell: int
    blueprint: str | None
    operator: Operator | None
    operators: tuple[Operator, ...]
    alpha: float
    alpha_target: float
    ramp_progress: float
    alpha_mode: AlphaMode
    ending: bool
    degraded: int
    embargo_left: int
    catalogue: tuple[BlueprintInfo, ...]


def embargo_left(slot: SlotState, tick: int, terms: Terms) -> int:
    """Returns the ticks until a cooling slot is empty again; 0 if it is not cooling."""
    rest = {
        Stage.PRUNED: 1 + terms.slots_config.embargo_ticks + 1,
        Stage.EMBARGOED: terms.slots_config.embargo_ticks + 1,
        Stage.RESETTING: 1,
    }
    return max(0, rest.get(slot.stage, 0) - (tick - slot.since_tick))


def conditions_of(state: RunState, slot: SlotState, terms: Terms) -> Conditions:
    """Returns the present conditions of one slot that legality depends on."""
    step = state.step
    ramp = slot.ramp if slot.stage.is_blended else None
    return Conditions(
        stage=slot.stage,
        staged=slot.staged is not None,
        dwell=state.tick - slot.since_tick,
        min_dwell=terms.gates.min_dwell,
        blueprint=slot.blueprint,
        operator=slot.operators(step)[0] if ramp is not None else slot.operator,
        operators=terms.operators[slot.slot],
        alpha=slot.alpha(step),
        alpha_target=0.0 if ramp is None else ramp.target,
        ramp_progress=slot.ramp_progress(step),
        alpha_mode=slot.alpha_mode(step),
        ending=slot.ending,
        degraded=slot.degraded,
        embargo_left=max(embargo_left(slot, state.tick, terms), state.governor.barred.get(slot.slot, 0) - state.tick),
        catalogue=terms.catalogue[slot.slot],
    )


def next_look(state: RunState, slot: SlotState, terms: Terms) -> SlotState | None:
    """Returns the slot with a request for the look to measure for the next tick, or None if none is due.

    Args:
        state: the agreed state after this tick's changes.
        slot: one of its records.
        terms: terms of the run.
    """
    aim, plan = slot.aim, terms.probe
    if aim is None or slot.ending or slot.degraded or not plan.shares:
        return None
    if slot.stage is Stage.FOSSILIZED and not is_looked_at(slot, terms):
        return None
    spent = slot.drawn >= max_looks(slot.stage, terms)
    from_reserve = spent and slot.stage is Stage.HOLDING and slot.drawn < plan.shares
    if slot.drawn >= plan.shares and slot.stage in (Stage.HOLDING, Stage.FOSSILIZED):
        refilled = _refill(state, slot, terms)
        if refilled is not None:
            return refilled
    counts = aim != REST and (from_reserve or not spent)
    again = slot.drawn > 0 and not counts
    if spent and slot.stage is Stage.TRAINING:
        return None
    alpha = _alpha_due(state, slot, terms, seldom=spent or again)
    if alpha is None:
        return None
    share = slot.retold % slot.drawn if again else slot.drawn
    request = ProbeRequest(
        look=share + 1, shares=plan.shares, alpha=alpha, aim=aim, draw=str(slot.birth), counts=counts
    )
    return _asking(slot, request)


def _refill(state: RunState, slot: SlotState, terms: Terms) -> SlotState | None:
    """Returns the slot with a request for training samples that will not have been trained on by the next tick; None if
    none are left, or no look is due."""
    plan, alpha = terms.probe, _alpha_due(state, slot, terms, seldom=True)
    place = state.governor.cursor(state.step + terms.tick_steps)
    if alpha is None or slot.aim is None or slot.refilled >= len(plan.refills):
        return None
    if plan.refills[slot.refilled] < place:
        return None
    request = ProbeRequest(
        look=slot.refilled + 1,
        shares=len(plan.refills),
        alpha=alpha,
        aim=slot.aim,
        draw=str(slot.birth),
        refill=True,
    )
    return _asking(slot, request)


def _asking(slot: SlotState, request: ProbeRequest) -> SlotState:
    """Returns the slot with a request, and with evidence begun if it is the first that counts."""
    if not request.counts or slot.evidence is not None:
        return replace(slot, request=request)
    beside = slot.stage is not Stage.TRAINING
    evidence = Evidence(begun=slot.drawn, start=slot.starts if beside else 0)
    return replace(slot, request=request, evidence=evidence, starts=slot.starts + int(beside))


def is_looked_at(slot: SlotState, terms: Terms) -> bool:
    """Returns whether a fossil is looked at: it came of a birth in this run, and the settings ask for it."""
    return terms.gates.fossil_every is not None and slot.birth > 0


def next_continuation(state: RunState, terms: Terms) -> Continuing | None:
    """Returns the continuation in copies that goes on or begins at the next tick; None if none is due.

    That is of a seed in HOLDING whose looks suffice for G5, once, and after a refusal again every ``relook_every``
    ticks. One at a time, so that a tick takes no more than one piece; the one that was continued least comes first.
    """
    gates, due = terms.gates, []
    if state.continued_slot() is not None:
        return state.continuing
    if gates.baseline is not Baseline.CONTINUED or gates.evidence is not EvidencePolicy.ENFORCE:
        return None
    for slot in state.slots:
        if slot.stage is not Stage.HOLDING or slot.ending or slot.degraded or not slot.ramp_done(state.step):
            continue
        helps, last = help_of(slot, terms), slot.lasting
        if slot.continued >= gates.continuations or helps is None or not helps.passed:
            continue
        if last is None and slot.continued and state.tick % gates.relook_every:
            continue  # its copies failed
        if last is not None:
            enough = last.lower >= gates.min_contribution
            soon = state.tick - last.tick < gates.relook_every or state.step < last.retry_step
            if soon or (enough and not last.is_early):
                continue
        due.append(slot)
    return begin(state, min(due, key=lambda slot: slot.continued).slot, terms) if due else None


def _alpha_due(state: RunState, slot: SlotState, terms: Terms, *, seldom: bool) -> float | None:
    gates = terms.gates
    if slot.stage is Stage.TRAINING:
        since = state.tick + 1 - slot.since_tick - gates.first_look
        return 1.0 if since >= 0 and since % gates.look_every == 0 else None
    if slot.ramp is None or not slot.ramp_done(state.step + terms.tick_steps):
        return None
    last, every = slot.looked_tick, gates.relook_every if seldom else gates.look_every
    if slot.stage is Stage.FOSSILIZED:
        assert gates.fossil_every is not None
        last, every = slot.since_tick if last is None else last, gates.fossil_every
    if last is not None and state.tick + 1 - last < every:
        return None
    return slot.ramp.target

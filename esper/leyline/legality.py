"""Legality of commands for one slot; the same functions serve every controller and the reducer, which decides.

Legality follows from the edge table, dwell, ramps, budgets, embargo and the breaker. Evidence plays no part in it; the
gates judge evidence. So legality needs the conditions of one slot and of the run, but no whole observation, and judging
the commands of S slots costs S. An `Observation` and its slots satisfy both protocols.
"""

from collections.abc import Iterable
from typing import Protocol

from esper.leyline.alpha import STEEPNESS, AlphaMode, Operator, steepness_fits
from esper.leyline.breaker import BreakerView, why_no_birth
from esper.leyline.commands import Command
from esper.leyline.observation import BlueprintInfo, Budgets, Observation
from esper.leyline.stages import Op, Stage, edges_from

COPY = "copy"  # the blueprint that is no network of its own: a copy of the host's block at the site


class RunConditions(Protocol):
    """The conditions of a run that legality depends on."""

    @property
    def budgets(self) -> Budgets:
        """What may still be spent."""

    @property
    def breaker(self) -> BreakerView:
        """The breaker, which says whether seeds may be born at all."""


class SlotConditions(Protocol):
    """The conditions of a slot that legality depends on; fields as in `SlotObservation`."""

    @property
    def stage(self) -> Stage: ...  # noqa: D102
    @property
    def staged(self) -> bool: ...  # noqa: D102
    @property
    def dwell(self) -> int: ...  # noqa: D102
    @property
    def min_dwell(self) -> int: ...  # noqa: D102
    @property
    def blueprint(self) -> str | None: ...  # noqa: D102
    @property
    def operator(self) -> Operator | None: ...  # noqa: D102
    @property
    def operators(self) -> tuple[Operator, ...]: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def alpha_target(self) -> float: ...  # noqa: D102
    @property
    def ramp_progress(self) -> float: ...  # noqa: D102
    @property
    def alpha_mode(self) -> AlphaMode: ...  # noqa: D102
    @property
    def ending(self) -> bool: ...  # noqa: D102
    @property
    def degraded(self) -> int: ...  # noqa: D102
    @property
    def embargo_left(self) -> int: ...  # noqa: D102
    @property
    def catalogue(self) -> tuple[BlueprintInfo, ...]: ...  # noqa: D102


def spent_budget(budgets: Budgets, info: BlueprintInfo | None = None) -> str | None:
    """Names the budget that a germination would overdraw, or returns None. Without ``info`` only counts are checked."""
    if budgets.live is not None and budgets.live < 1:
        return "budget of live seeds is spent"
    if budgets.germinations is not None and budgets.germinations < 1:
        return "budget of germinations is spent"
    if info is not None and budgets.parameters is not None and info.parameters > budgets.parameters:
        return f"budget of parameters: {info.name} needs {info.parameters}, {budgets.parameters} left"
    if info is not None and budgets.flops is not None and info.flops > budgets.flops:
        return f"budget of FLOPs: {info.name} needs {info.flops}, {budgets.flops} left"
    if info is not None and budgets.memory is not None and (info.memory or 0) > budgets.memory:
        return f"budget of memory: {info.name} is forecast to need {info.memory} bytes, {budgets.memory} left"
    return None


def why_redundant(info: BlueprintInfo, operator: Operator = Operator.ADD) -> str | None:
    """Says why a seed would add nothing to the host when it is joined by this operator, or returns None."""
    layer = info.folds_into
    if layer is None or not operator.is_additive:
        return None
    return (
        f"{info.name} folds into {layer}, which learns itself: it adds nothing that {layer} cannot learn "
        "(gates.allow_foldable=true allows it)"
    )


def why_redundant_everywhere(name: str, catalogues: Iterable[Iterable[BlueprintInfo]]) -> str | None:
    """Says why a blueprint, joined by ADD, would add nothing in any of the slots that it fits, or returns None."""
    reasons = [why_redundant(info) for catalogue in catalogues for info in catalogue if info.name == name]
    return reasons[0] if reasons and None not in reasons else None


def why_illegal(run: RunConditions, view: SlotConditions, op: Op) -> str | None:
    """Returns None when ``op`` is legal for the slot now, else the reason in a few words."""
    if op is Op.WAIT:
        return None
    if view.staged:
        return None if op is Op.PRUNE else "a germination is staged"
    if op not in {edge.cause for edge in edges_from(view.stage)}:
        legal = sorted({edge.cause.name for edge in edges_from(view.stage) if isinstance(edge.cause, Op)})
        return f"no edge from {view.stage.name} (legal: {', '.join(legal) or 'none'})"
    if op is Op.GERMINATE:
        if not view.catalogue:
            return "no blueprint fits this slot"
        if view.embargo_left > 0:
            return f"barred after a rollback, {view.embargo_left} ticks left"
        return why_no_birth(run.breaker) or spent_budget(run.budgets)
    if view.stage is Stage.FOSSILIZED:
        return _why_fossil_stays(view, op)
    if op is Op.PRUNE:
        return None
    if view.ending:
        return "a prune by ramp is under way"
    if view.degraded:
        return f"runs by a fallback on {view.degraded} ranks; only PRUNE is legal until it runs as it was built"
    if view.stage in (Stage.BLENDING, Stage.HOLDING) and view.alpha_mode is not AlphaMode.HOLD:
        return f"a ramp is under way ({view.ramp_progress:.0%})"
    if op in (Op.ADVANCE, Op.FOSSILIZE) and view.dwell < view.min_dwell:
        return f"dwell is {view.dwell} of {view.min_dwell} ticks"
    if op is Op.ADVANCE and view.stage is Stage.BLENDING and view.alpha_target < 1.0:
        return f"alpha target is {view.alpha_target:g}, HOLDING needs 1"
    return None


def _why_fossil_stays(view: SlotConditions, op: Op) -> str | None:
    """A fossil is pruned by a ramp, while which it may be taken back."""
    if op is Op.SET_ALPHA_TARGET:
        return None if view.ending else "a fossil rests at full alpha; only a prune that is under way is taken back"
    if view.ending:
        return "a prune by ramp is under way"
    if view.alpha_mode is not AlphaMode.HOLD:
        return f"a ramp is under way ({view.ramp_progress:.0%})"
    return None


def _why_now_redundant(view: SlotConditions, operator: Operator) -> str | None:
    """Says why a switch of the operator would make the living seed redundant, or returns None."""
    living = next((entry for entry in view.catalogue if entry.name == view.blueprint), None)
    if living is None or view.operator is None or view.operator.is_additive:
        return None
    return why_redundant(living, operator)


def legal_ops(run: RunConditions, view: SlotConditions) -> tuple[Op, ...]:
    """Returns the ops that are legal for the slot now; WAIT always is."""
    return tuple(op for op in Op if why_illegal(run, view, op) is None)


def why_refused(observation: Observation, command: Command) -> str | None:
    """Returns the reason why a command is not legal, arguments included, or None if it is; for controllers."""
    return find_refusal(observation, observation.slot(command.slot), command)


def find_refusal(run: RunConditions, view: SlotConditions, command: Command) -> str | None:
    """Returns the reason why a command is not legal, arguments included, or None if it is.

    Args:
        run: budgets and breaker.
        view: conditions of the slot that the command names.
        command: the command as proposed.
    """
    reason = why_illegal(run, view, command.op)
    if reason is not None:
        return reason
    if command.op in (Op.GERMINATE, Op.SET_ALPHA_TARGET, Op.PRUNE) and not 0 <= command.ticks <= 10_000:
        return f"ramp of {command.ticks} ticks: need 0 to 10000"
    if command.op in (Op.GERMINATE, Op.SET_ALPHA_TARGET) and not 0.0 <= command.target <= 1.0:
        return f"alpha target {command.target!r}: need 0 to 1"
    if command.op in (Op.GERMINATE, Op.SET_ALPHA_TARGET, Op.PRUNE) and not steepness_fits(command.steepness):
        return f"steepness {command.steepness!r}: need {STEEPNESS[0]:g} to {STEEPNESS[1]:g}"
    if command.op in (Op.GERMINATE, Op.SET_ALPHA_TARGET) and command.operator not in view.operators:
        usable = ", ".join(operator.name for operator in view.operators)
        return f"operator {command.operator.name} needs {command.operator.needs}; this slot may use {usable}"
    if COPY in (command.blueprint, view.blueprint) and command.op in (Op.GERMINATE, Op.SET_ALPHA_TARGET):
        if command.operator is not Operator.ADD:
            return f"a {COPY} is joined by ADD alone, which at full alpha returns the block itself"
        if command.op is Op.GERMINATE and command.ticks == 0:
            return f"a {COPY} enters by a ramp of at least 1 tick"
    if command.op is Op.SET_ALPHA_TARGET and (redundant := _why_now_redundant(view, command.operator)) is not None:
        return redundant
    switched = command.op is Op.SET_ALPHA_TARGET and view.alpha > 0 and view.operator not in (None, command.operator)
    if switched and command.ticks == 0:
        return f"a switch of the operator at alpha {view.alpha:g} would jump: it needs a ramp of at least 1 tick"
    if view.stage is Stage.FOSSILIZED and command.op is Op.PRUNE and command.ticks == 0:
        return "a fossil is pruned by a ramp of at least 1 tick, so that it can be taken back"
    if view.stage is Stage.FOSSILIZED and command.op is Op.SET_ALPHA_TARGET:
        if command.target != 1.0 or command.operator is not view.operator:
            kept = "" if view.operator is None else f" by {view.operator.name}"
            return f"a fossil goes back to alpha 1{kept}, and to nothing else"
        return None
    blended = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    if command.op is Op.PRUNE and command.ticks > 0 and view.stage not in blended:
        return f"prune by ramp needs BLENDING or HOLDING, slot is {view.stage.name}"
    if command.op is Op.PRUNE and command.ticks > 0 and (view.ending or view.alpha_mode is not AlphaMode.HOLD):
        return "a ramp is under way; only PRUNE now interrupts it"
    if command.op is Op.GERMINATE:
        info = next((entry for entry in view.catalogue if entry.name == command.blueprint), None)
        if info is None:
            names = ", ".join(entry.name for entry in view.catalogue)
            return f"unknown blueprint {command.blueprint!r} for this slot; it takes {names}"
        return why_redundant(info, command.operator) or spent_budget(run.budgets, info)
    return None

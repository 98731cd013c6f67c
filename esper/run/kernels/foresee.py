"""What may be born next, in the order in which it is likely: a pure function of what all ranks have agreed on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState
from esper.leyline.alpha import Operator
from esper.leyline.legality import why_redundant
from esper.leyline.observation import BlueprintInfo
from esper.leyline.stages import Op, Stage
from esper.tamiyo.rotation import DO_NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """A seed in a slot, and how it joins the host.

    Fields:
        slot: slot id.
        blueprint: registered name.
        operator: its operator.
        fades_from: the operator that fades out; None if there is none.
    """

    slot: str
    blueprint: str
    operator: Operator = Operator.ADD
    fades_from: Operator | None = None


def foresee(
    controller: Any,
    catalogue: Mapping[str, Sequence[BlueprintInfo]],
    operators: Mapping[str, Sequence[Operator]],
    state: RunState,
) -> list[Foreseen]:
    """Lists what a run may ask for from a state on, the likely first, without what is refused because it adds nothing.

    A schedule says so itself; what its ticks so far have asked for is left out. Rules take their blueprints in
    rotation, slot by slot, joined by ADD: a slot's births so far say how far its rotation has come; empty slots come
    first, those that would have to be pruned before next, fossils last. Any other controller may also take every
    operator that a slot has; these come last.

    Args:
        controller: its section of the settings.
        catalogue: blueprints that fit each slot.
        operators: operators that each slot can use.
        state: the agreed record.
    """
    if controller.kind == "none":
        return []
    infos = {(slot, info.name): info for slot, row in catalogue.items() for info in row}
    asked = _list_asked(controller, catalogue, operators, state)
    return [seed for seed in asked if why_redundant(infos[seed.slot, seed.blueprint], seed.operator) is None]


def _list_asked(
    controller: Any,
    catalogue: Mapping[str, Sequence[BlueprintInfo]],
    operators: Mapping[str, Sequence[Operator]],
    state: RunState,
) -> list[Foreseen]:
    if controller.kind == "schedule":
        return list(dict.fromkeys(_in_schedule(controller.actions, catalogue, state)))
    spread, turns = bool(getattr(controller, "spread", False)), []
    for place, entry in enumerate(state.slots):
        names = _in_rotation(getattr(controller, "blueprints", ()), catalogue[entry.slot])
        born = entry.generation + (entry.staged is not None)
        for turn in range(born, born + len(names)):
            at = (turn + place if spread else turn) % len(names)
            turns.append((_distance(entry), turn, place, Foreseen(slot=entry.slot, blueprint=names[at])))
    found = [seed for _, _, _, seed in sorted(turns, key=lambda turn: turn[:3])]
    if controller.kind == "heuristic":
        return found
    others = [(seed, operator) for seed in found for operator in operators[seed.slot] if operator is not Operator.ADD]
    return found + [Foreseen(slot=seed.slot, blueprint=seed.blueprint, operator=operator) for seed, operator in others]


def _distance(entry: SlotState) -> int:
    """How far a slot is from its next birth."""
    if entry.stage is Stage.FOSSILIZED:
        return 2
    return int(entry.stage.has_seed or entry.staged is not None)


def _in_rotation(preferred: Sequence[str], infos: Sequence[BlueprintInfo]) -> list[str]:
    fitting = {info.name: info for info in infos}
    if preferred:
        return [name for name in preferred if name in fitting]
    return sorted(fitting.keys() - {DO_NOTHING}, key=lambda name: (-fitting[name].parameters, name))


def _in_schedule(
    actions: Sequence[Mapping[str, Any]], catalogue: Mapping[str, Sequence[BlueprintInfo]], state: RunState
) -> list[Foreseen]:
    """Follows the actions still to come in the order of their ticks; those that fit nothing are refused then."""
    living = {entry.slot: seed for entry in state.slots if (seed := _living_seed(entry)) is not None}
    found = []
    coming = [action for action in actions if action["tick"] > state.tick]
    for action in sorted(coming, key=lambda action: action["tick"]):
        slot, op = action["slot"], action["op"]
        operator = Operator[action.get("operator", Operator.ADD.name)]
        if op == Op.GERMINATE.name and action["blueprint"] in {info.name for info in catalogue.get(slot, ())}:
            living[slot] = Foreseen(slot=slot, blueprint=action["blueprint"], operator=operator)
        elif op == Op.SET_ALPHA_TARGET.name and "operator" in action and slot in living:
            before = living[slot]
            if before.operator is operator:
                continue
            found.append(Foreseen(slot=slot, blueprint=before.blueprint, operator=operator, fades_from=before.operator))
            living[slot] = Foreseen(slot=slot, blueprint=before.blueprint, operator=operator)
        else:
            continue
        found.append(living[slot])
    return found


def _living_seed(entry: SlotState) -> Foreseen | None:
    """The seed that a slot has, or that waits for its second tick."""
    blueprint, operator = entry.blueprint, entry.operator
    if entry.staged is not None:
        blueprint, operator = entry.staged.blueprint, entry.staged.operator
    elif not entry.stage.has_seed:
        return None
    return Foreseen(slot=entry.slot, blueprint=str(blueprint), operator=operator or Operator.ADD)

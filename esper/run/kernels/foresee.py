"""What may be born next, in the order in which it is likely: a pure function of what all ranks have agreed on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.leyline.alpha import Operator
from esper.leyline.legality import why_redundant
from esper.leyline.observation import BlueprintInfo
from esper.leyline.stages import Op
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
) -> list[Foreseen]:
    """Lists what a run may ask for, the likely first, without what is refused since it would add nothing.

    A schedule says so itself. Rules take their blueprints in rotation, slot by slot, joined by ADD. Any other
    controller may also take every operator that a slot has; these come last.

    Args:
        controller: its section of the settings.
        catalogue: blueprints that fit each slot.
        operators: operators that each slot can use.
    """
    if controller.kind == "none":
        return []
    infos = {(slot, info.name): info for slot, row in catalogue.items() for info in row}
    asked = _list_asked(controller, catalogue, operators)
    return [seed for seed in asked if why_redundant(infos[seed.slot, seed.blueprint], seed.operator) is None]


def _list_asked(
    controller: Any, catalogue: Mapping[str, Sequence[BlueprintInfo]], operators: Mapping[str, Sequence[Operator]]
) -> list[Foreseen]:
    if controller.kind == "schedule":
        return list(dict.fromkeys(_in_schedule(controller.actions, catalogue)))
    rows = {slot: _in_rotation(getattr(controller, "blueprints", ()), infos) for slot, infos in catalogue.items()}
    spread = bool(getattr(controller, "spread", False))
    found = []
    for turn in range(max(map(len, rows.values()), default=0)):
        for place, (slot, names) in enumerate(rows.items()):
            if turn < len(names):
                at = (turn + place) % len(names) if spread else turn
                found.append(Foreseen(slot=slot, blueprint=names[at]))
    if controller.kind == "heuristic":
        return found
    others = [(seed, operator) for seed in found for operator in operators[seed.slot] if operator is not Operator.ADD]
    return found + [Foreseen(slot=seed.slot, blueprint=seed.blueprint, operator=operator) for seed, operator in others]


def _in_rotation(preferred: Sequence[str], infos: Sequence[BlueprintInfo]) -> list[str]:
    fitting = {info.name: info for info in infos}
    if preferred:
        return [name for name in preferred if name in fitting]
    return sorted(fitting.keys() - {DO_NOTHING}, key=lambda name: (-fitting[name].parameters, name))


def _in_schedule(
    actions: Sequence[Mapping[str, Any]], catalogue: Mapping[str, Sequence[BlueprintInfo]]
) -> list[Foreseen]:
    """Follows the actions in the order of their ticks; those that fit nothing are refused at their tick."""
    living: dict[str, Foreseen] = {}
    found = []
    for action in sorted(actions, key=lambda action: action["tick"]):
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

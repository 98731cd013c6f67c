"""Which options are legal: asked of the controllers' own functions in `esper.leyline.legality`, and of nothing else.

    mask_op         [O]           an op that is legal, arguments included, in some slot; WAIT always
    mask_slot       [O, S]        slots where an op is legal and has arguments: a GERMINATE one that can be paid
    mask_blueprint  [S, B]        entries that a GERMINATE there may name, budgets included, by any operator of the slot
    mask_operator   [2, S, P]     operators of a GERMINATE (0) and of a SET_ALPHA_TARGET (1)
    mask_speed      [S, 1 + P, V] speeds of a PRUNE (0), and of a SET_ALPHA_TARGET to operator p (1 + p)

O ops, S slots, B entries, P operators, V speeds. Every tempo, target and curve of `Options` is legal wherever it
matters: none of them has to do with the state of a slot.
"""

import functools

import numpy as np

from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.legality import find_refusal, why_illegal, why_redundant
from esper.leyline.observation import Observation, SlotObservation
from esper.leyline.stages import Op, Stage
from esper.tamiyo.policy.options import Options

Arrays = dict[str, np.ndarray]


@functools.lru_cache(maxsize=4096)
def _ask(op: Op, ticks: int = 0, operator: Operator = Operator.ADD, blueprint: str | None = None) -> Command:
    return Command(slot="", op=op, ticks=ticks, operator=operator, blueprint=blueprint)


def mask_shapes(slots: int, entries: int, options: Options) -> dict[str, tuple[int, ...]]:
    """Shapes of the masks of one observation, padded to so many slots and entries."""
    ops, operators, speeds = len(options.ops), len(options.operators), len(options.speeds)
    return {
        "mask_op": (ops,),
        "mask_slot": (ops, slots),
        "mask_blueprint": (slots, entries),
        "mask_operator": (2, slots, operators),
        "mask_speed": (slots, 1 + operators, speeds),
    }


def masks_of(run: Observation, options: Options, *, slots: int, entries: int) -> Arrays:
    """Returns the masks of an observation, bool, true where legal; padding is false.

    Args:
        run: the observation.
        options: what the heads choose from.
        slots: S, at least those of the observation.
        entries: B, at least those of the longest catalogue.
    """
    arrays = {name: np.zeros(shape, bool) for name, shape in mask_shapes(slots, entries, options).items()}
    for at, view in enumerate(run.slots):
        for number, op in enumerate(options.ops):
            if op is not Op.WAIT and why_illegal(run, view, op) is None:
                arrays["mask_slot"][number, at] = _fill(arrays, at, run, view, op, options)
    arrays["mask_op"][:] = arrays["mask_slot"].any(1)
    arrays["mask_op"][options.ops.index(Op.WAIT)] = True
    return arrays


def _fill(arrays: Arrays, at: int, run: Observation, view: SlotObservation, op: Op, options: Options) -> bool:
    """Fills in the arguments of an op in slot ``at``; returns whether it has any that are legal."""
    if op is Op.GERMINATE:
        return _fill_birth(arrays, at, run, view, options)
    if op is Op.PRUNE:
        legal = [find_refusal(run, view, _ask(op, ticks)) is None for ticks in options.speeds]
        arrays["mask_speed"][at, 0] = legal
        return any(legal)
    if op is Op.SET_ALPHA_TARGET and view.stage is Stage.FOSSILIZED:
        return False  # it only takes a prune back, to the one target 1, which the target head does not know
    if op is Op.SET_ALPHA_TARGET:
        speeds = arrays["mask_speed"][at, 1:]
        for number, operator in enumerate(options.operators):
            if operator in view.operators:
                speeds[number] = [find_refusal(run, view, _ask(op, t, operator)) is None for t in options.speeds]
        arrays["mask_operator"][1, at] = speeds.any(1)
        return bool(speeds.any())
    return find_refusal(run, view, _ask(op)) is None


def _fill_birth(arrays: Arrays, at: int, run: Observation, view: SlotObservation, options: Options) -> bool:
    operators = [operator for operator in options.operators if operator in view.operators]
    if not operators:
        return False
    ticks = options.tempos[0]
    asked = [_ask(Op.GERMINATE, ticks, operators[0], info.name) for info in view.catalogue]
    legal = [
        find_refusal(run, view, command) is None and all(why_redundant(info, each) is None for each in operators)
        for command, info in zip(asked, view.catalogue, strict=True)
    ]
    if not any(legal):
        return False
    arrays["mask_blueprint"][at, : len(legal)] = legal
    name = view.catalogue[legal.index(True)].name
    arrays["mask_operator"][0, at] = [
        find_refusal(run, view, _ask(Op.GERMINATE, ticks, operator, name)) is None for operator in options.operators
    ]
    return True

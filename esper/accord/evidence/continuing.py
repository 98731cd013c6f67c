"""The course over ticks of a continuation in copies. Pure, the same on all ranks.

Four copies are trained one after another, with the seed and without it, on two orders of the same batches:

    steps taken   0 ............ n ............ 2n ............ 3n ............ 4n        n = gates.continue_steps
    copy          with, order 1   without, 1     with, order 2   without, 2

At the first tick after it was asked for, the network of that moment is put aside as the base of all copies; at each
tick ``gates.continue_piece`` further steps are taken. What becomes of it:

    done                    the verdict stands in the slot's record: ``lasting``, ``continued``
    an error on some rank   no evidence; counted as one of ``continuations``
    the seed leaves HOLDING (pruned, a new alpha), a rollback: dropped without a verdict, not counted
    births and stage changes in other slots: none of its business, the base stays as it was
    the run ends            it is not begun if it cannot end before the run does
    a resume                the base is in the checkpoint; finished steps are taken again, to the same bits
    a session's save        begun anew, in that session and in a restored one; pieces are then twice as large, so that
                            it ends however often there are saves
"""

from dataclasses import replace

from esper.accord.account import continuation_costs
from esper.accord.config import GateConfig
from esper.accord.evidence.lasting import COPIES
from esper.accord.state import Continuing, RunState, Terms


def steps_due(asked: Continuing, gates: GateConfig) -> int:
    """Returns how many steps all copies together have taken after the next piece."""
    return min(COPIES * gates.continue_steps, asked.done + (gates.continue_piece << asked.restarts))


def begin(state: RunState, slot: str, terms: Terms) -> Continuing | None:
    """Returns the record of a continuation that begins at the next tick; None if the run ends before it would."""
    entry = state.slot(slot)
    ticks = -(-COPIES * terms.gates.continue_steps // terms.gates.continue_piece)
    if state.step + ticks * terms.tick_steps > terms.total_steps:
        return None
    costs = None
    if terms.costs is not None:
        costs = continuation_costs(state.slots, entry, terms.costs, terms.slots_config)
    return Continuing(slot=slot, generation=entry.generation, tick=state.tick, costs=costs)


def begin_anew(state: RunState) -> RunState:
    """Returns the state with the continuation that is under way, if there is one, to be begun anew."""
    asked = state.continuing
    if asked is None or not asked.done:
        return state
    return replace(state, continuing=replace(asked, step=None, done=0, restarts=min(asked.restarts + 1, 30)))

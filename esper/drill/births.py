"""How often the heuristic tries again where nothing helps: whole runs, with the real absorb, reducer, looks and gates.

No network trains. Each newborn draws its differences on the probe with a stated true mean; whatever it is, it is as
useless as the one before. Penalties that grow with the failures of a blueprint in a slot must bring such a run to rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.accord.absorb import absorb
from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.lifecycle import SlotState
from esper.accord.observation import observation_of
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.drill.luck import Looks, QuietSums, cut_looks, draw_sample, plan_for
from esper.drill.replica import build_chain, terms_for
from esper.leyline.stages import Incubation, Stage
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tolaria.lockstep.propose import propose


@dataclass(frozen=True, slots=True)
class NullRun:
    """What became of a run in which nothing helps.

    Fields:
        births: their ticks.
        held: seeds in HOLDING at the end.
        fossils: seeds that luck let pass.
    """

    births: tuple[int, ...]
    held: int
    fossils: int


def run_without_help(
    ticks: int,
    *,
    incubation: Incubation,
    slots: int = 1,
    kind: str = "normal",
    probe: int = 1024,
    seed: int = 0,
    **settings: Any,
) -> NullRun:
    """Runs the heuristic on seeds of true mean 0.

    Args:
        ticks: length of the run.
        incubation: of the seeds.
        slots: number of slots, each of which offers all that fits vectors of features.
        kind: of `esper.drill.luck.NULLS`.
        probe: samples of the probe.
        seed: decides what is drawn.
        settings: of the heuristic.
    """
    gates, rng = GateConfig(), np.random.default_rng([13, *kind.encode(), seed])
    plan = plan_for(draw_sample(kind, rng, probe), gates)
    terms = terms_for(build_chain(slots).sites, 1, SlotsConfig(incubation=incubation), gates, probe=plan)
    controller = HeuristicController(HeuristicConfig(**settings), slots=tuple(terms.places), seed=seed)
    state, born, looks = RunState(slots=terms.first_slots()), list[int](), dict[int, Looks]()
    for _ in range(ticks):
        sums = QuietSums({name: value for slot in state.slots for name, value in _measured(slot, looks)})
        before = state.births
        state = absorb(state, sums, terms, step=state.step + terms.tick_steps, epoch=1)
        state = _decided(state, terms, controller)
        for birth in range(before + 1, state.births + 1):
            born.append(state.tick)
            looks[birth] = cut_looks(draw_sample(kind, rng, probe), plan, rng)
    ends = [entry.stage for entry in state.slots]
    return NullRun(tuple(born), ends.count(Stage.HOLDING), ends.count(Stage.FOSSILIZED))


def _measured(slot: SlotState, looks: dict[int, Looks]) -> Iterator[tuple[str, float]]:
    """What a tick measures of one slot, by name."""
    for name in ("finite", "owned", "norm", "norm_steps", "health_steps"):
        yield f"{slot.slot}.{name}", 1.0
    if slot.request is not None:
        for name, value in looks[slot.birth][slot.request.look - 1].named().items():
            yield f"{slot.slot}.probe_{name}", value


def _decided(state: RunState, terms: Terms, controller: HeuristicController) -> RunState:
    commands = propose(controller, observation_of(state, terms), state.proposals, terms.names)
    return reduce_tick(state, commands, {}, terms, stage_ticks=3).state

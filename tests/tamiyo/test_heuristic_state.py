"""The heuristic's memory: saved, restored as a twin, strict, bounded."""

import copy
import json
import random

import pytest

from esper.tamiyo import build_controller
from esper.tamiyo.heuristic_config import HeuristicConfig
from tests.support.observations import World


def build(slots=("r0c0",), **config):
    return build_controller(HeuristicConfig(**config), slots=slots, seed=0)


def falling(tick):
    """Falls by 0.2 a tick to a floor at tick 20, with a noise of 0.01."""
    return max(0.0, 4 - 0.2 * tick) + random.Random(tick).gauss(1.0, 0.01)


@pytest.mark.parametrize("cut", [0, 1, 4, 9, 17, 25, 33, 60])
@pytest.mark.parametrize("eager", [True, False])
def test_a_resumed_controller_is_the_twin_of_one_that_was_never_stopped(cut, eager):
    slots = ("r0c0", "r0c1", "r1c0")

    def world():
        return World(
            slots,
            worth=lambda slot, name: {"light": -0.1, "medium": 0.004}.get(name, 0.1),
            noise=0.003,
            max_live=2,
            losses=falling,
        )

    whole, parted = world(), world()
    straight, first = build(slots, eager=eager), build(slots, eager=eager)
    whole.run(straight, 90)
    parted.run(first, cut)
    saved = json.loads(json.dumps(first.state_dict()))
    second = build(slots, eager=eager)
    second.load_state_dict(saved)
    parted.run(second, 90 - cut)
    assert parted.log == whole.log
    assert len(whole.log) > 10
    assert second.state_dict() == straight.state_dict()


def test_a_saved_state_does_not_change_with_the_controller():
    world = World(("r0c0",), worth=lambda slot, name: -0.1)
    controller = build()
    world.run(controller, 12)
    saved = controller.state_dict()
    before = copy.deepcopy(saved)
    world.run(controller, 30)
    assert saved == before != controller.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("losses"), "missing losses"),
        (lambda state: state["slots"]["r0c0"].pop("tried"), r"slots\.r0c0: missing tried"),
        (lambda state: state["slots"]["r0c0"].update(mood=1), r"slots\.r0c0: unknown mood"),
        (lambda state: state["slots"].update(r0c1=state["slots"].pop("r0c0")), "r0c1; expected r0c0"),
        (lambda state: state["slots"]["r0c0"].update(stage="SPROUT"), "'SPROUT' is none of EMPTY"),
        (lambda state: state.update(losses=["low"]), r"losses\[0\]: expected float"),
    ],
)
def test_a_damaged_state_is_an_error_that_names_the_place(change, message):
    controller = build()
    state = controller.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict(state)


def test_the_remembered_losses_are_bounded():
    world = World(("r0c0",), worth=lambda slot, name: 0.1, losses=lambda tick: 10.0 - 0.1 * tick)
    controller = build(eager=False, plateau_window=3)
    world.run(controller, 50)
    assert len(controller.state_dict()["losses"]) == 6

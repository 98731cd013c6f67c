"""Seeds that a layer of the host could learn by itself: not born where it learns, and no fossil once it does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.leyline.errors import ConfigError
from esper.leyline.events import CommandRefused, Event
from esper.leyline.stages import Stage
from tests.support.sessions import EVERY, GATES, scheduled
from tests.support.tiny import act

A, B = "r0c0", "r1c0"
WHY = "which learns itself: it adds nothing that"


class Events:
    """Keeps the reasons of refused commands."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, CommandRefused):
            self.refused.append((event.command.slot, event.reason))

    def close(self) -> None:
        """Keeps nothing open."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return x, (x.sum(1) > 0).long()


def loss(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1], reduction="none")


def begin(*actions: dict[str, Any], controller: Any = None, **gates: Any) -> tuple[nn.Module, esper.Session, Events]:
    """A network whose second Linear is frozen."""
    torch.manual_seed(0)
    model, events = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), Events()
    model[2].requires_grad_(False)
    session = esper.Session(
        esper.attach(model, {A: "0", B: "2"}, batch(0)[0]),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        controller=scheduled(actions) if controller is None else controller,
        loss=loss,
        probe=[batch(100 + index) for index in range(8)],
        every=EVERY,
        gates={**GATES, **gates},
        slots={"incubation": "immediate"},
        sink=events,
    )
    return model, session, events


def train(session: esper.Session, first: int, last: int) -> None:
    for tick in range(first, last):
        for step in range(EVERY * tick, EVERY * (tick + 1)):
            session.loss(batch(step)).backward()
            session.step()


def life(slot: str) -> list[dict[str, Any]]:
    later = [act(3, slot, "ADVANCE"), act(6, slot, "ADVANCE"), act(8, slot, "FOSSILIZE")]
    return [act(1, slot, "GERMINATE", blueprint="lora", ticks=1), *later]


def test_low_rank_is_born_behind_a_frozen_layer_alone() -> None:
    _, session, events = begin(*life(A), *life(B))
    train(session, 0, 9)
    assert session.state.slot(A).generation == 0
    assert session.state.slot(B).stage is Stage.FOSSILIZED
    assert events.refused[0] == (A, f"lora folds into 0, {WHY} 0 cannot learn (gates.allow_foldable=true allows it)")
    session.close()


def test_who_asks_for_it_gets_it() -> None:
    _, session, events = begin(*life(A), allow_foldable=True)
    train(session, 0, 9)
    assert session.state.slot(A).stage is Stage.FOSSILIZED
    assert events.refused == []
    session.close()


@pytest.mark.parametrize("thawed", [True, False])
def test_a_layer_that_begins_to_learn_takes_back_what_its_seed_was_for(thawed: bool, tmp_path: Any) -> None:
    model, session, events = begin(*life(B))
    train(session, 0, 7)
    assert session.state.slot(B).stage is Stage.HOLDING
    if thawed:
        model[2].requires_grad_(True)
        session.discard()
    train(session, 7, 9)
    assert session.state.slot(B).stage is (Stage.HOLDING if thawed else Stage.FOSSILIZED)
    assert [slot for slot, reason in events.refused if f"G5: function: lora folds into 2, {WHY}" in reason] == (
        [B] if thawed else []
    )
    session.close()


def test_layers_thawed_before_the_first_birth_leave_a_controller_nothing_to_do() -> None:
    model, session, _ = begin(controller={"kind": "heuristic", "blueprints": ["lora"], "warmup_ticks": 50})
    train(session, 0, 2)
    model[2].requires_grad_(True)
    session.discard()
    train(session, 2, 4)
    assert [entry.generation for entry in session.state.slots] == [0, 0]
    session.close()


@pytest.mark.parametrize("name", ["lora", "conv_light"])
def test_a_session_whose_controller_prefers_what_no_slot_takes_does_not_begin(name: str) -> None:
    def prefer(**gates: Any) -> esper.Session:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        return esper.Session(
            esper.attach(model, {A: "0"}, batch(0)[0]),
            torch.optim.AdamW(model.parameters()),
            controller={"kind": "heuristic", "blueprints": [name]},
            loss=loss,
            probe=[batch(100 + index) for index in range(8)],
            gates={**GATES, **gates},
        )

    why = "no slot takes lora: lora folds into 0" if name == "lora" else "conv_light fits no slot of this host"
    with pytest.raises(ConfigError, match=rf"^controller\.blueprints: {why}"):
        prefer()
    if name == "lora":
        prefer(allow_foldable=True).close()

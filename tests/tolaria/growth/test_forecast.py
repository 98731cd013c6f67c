"""A cap of forecast memory refuses a birth by legality, like the cap of parameters, in trainer and session."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esper
from esper.accord.state import RunState, SlotState
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.events import CommandRefused, GateJudged
from esper.leyline.legality import COPY, spent_budget
from esper.leyline.stages import Op, Stage
from tests.support.small_runs import Commands, train_on
from tests.support.tiny import events, make_engine, tiny_config


def test_every_entry_of_the_trainers_catalogue_has_its_forecast(tmp_path: Path) -> None:
    small, large = (
        make_engine(tiny_config("cnn", trainer__batch=batch), tmp_path / str(batch)).terms.info("r0c0", "conv_light")
        for batch in (8, 16)
    )
    assert small.memory is not None
    assert large.memory is not None
    weights = 4 * 4 * small.parameters  # weight, gradient and two moments in float32
    assert large.memory - weights == pytest.approx(2 * (small.memory - weights), rel=0.05)


def test_a_birth_beyond_the_cap_is_refused_and_the_gate_says_so(tmp_path: Path) -> None:
    engine = make_engine(tiny_config("cnn", trainer__steps=6, control__every=1, slots__max_memory_mib=0), tmp_path)
    engine.controller = Commands({1: [Command(slot="r0c0", op=Op.GERMINATE, blueprint="conv_light", ticks=1)]})
    engine.begin(None)
    train_on(engine)
    told = events(engine).events
    (refused,) = [event for event in told if isinstance(event, CommandRefused)]
    assert "budget of memory: conv_light is forecast to need" in refused.reason
    (gate,) = [event for event in told if isinstance(event, GateJudged)]
    assert not gate.result.passed


def test_what_lives_is_taken_off_the_cap(tmp_path: Path) -> None:
    engine = make_engine(tiny_config("cnn", trainer__steps=6, control__every=1, slots__max_memory_mib=1), tmp_path)
    engine.controller = Commands({1: [Command(slot="r0c0", op=Op.GERMINATE, blueprint="conv_light", ticks=1)]})
    engine.begin(None)
    whole = engine.terms.budgets(engine.state).memory
    train_on(engine)
    info = engine.terms.info("r0c0", "conv_light")
    left = engine.terms.budgets(engine.state)
    assert whole == 1 << 20
    assert left.memory == whole - (info.memory or 0)
    assert spent_budget(left, info) is None
    assert isinstance(engine.state, RunState)


def test_a_shadow_forward_counts_until_the_seed_is_blended(tmp_path: Path) -> None:
    shadow, immediate = (
        make_engine(tiny_config("cnn", slots__incubation=way, slots__max_memory_mib=8), tmp_path / way).terms
        for way in ("shadow", "immediate")
    )
    one, other = (terms.info("r0c0", "conv_light") for terms in (shadow, immediate))
    assert other.shadow == 0
    assert other.memory is not None
    assert one.shadow > 0
    assert one.memory == other.memory + one.shadow
    spent = {
        stage: shadow.spent_by(SlotState(slot="r0c0", stage=stage, blueprint="conv_light", generation=1)).memory
        for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED)
    }
    assert list(spent.values()) == [one.memory, one.memory, other.memory, other.memory]


def test_a_restored_session_forecasts_as_the_saved_one(tmp_path: Path) -> None:
    def host() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), Residual(), nn.Linear(8, 3))

    settings = {"max_memory_mib": 8, "memory_batch": 32, "incubation": "shadow", "blocks": ["copy"]}
    saved = session(host, **settings)
    offered = saved.parts.terms.catalogue
    assert COPY in {info.name for info in offered["r0c0"]}
    assert all(info.memory is not None and info.memory > info.shadow > 0 for info in offered["r0c0"] if info.parameters)
    saved.save(tmp_path / "s.pt")
    again = esper.Session.restore(tmp_path / "s.pt", host, loss=LOSS, probe=PROBE)
    try:
        assert again.parts.terms.catalogue == offered
    finally:
        saved.close()
        again.close()


class Residual(nn.Module):
    """A block of the host's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


LOSS = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
PROBE = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(64)]


def plain_host() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def session(host: Callable[[], nn.Module] = plain_host, **slots: Any) -> Any:
    model = host()
    grown = esper.attach(model, {"r0c0": "1"}, torch.zeros(2, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return esper.Session(grown, optimizer, loss=LOSS, probe=PROBE, every=2, slots={"max_live": None, **slots})


def test_a_session_forecasts_by_the_batch_that_it_is_told() -> None:
    with pytest.raises(ConfigError, match="a session does not know its batch"):
        session(max_memory_mib=8)
    told = session(max_memory_mib=8, memory_batch=32)
    try:
        info = next(i for i in told.parts.terms.catalogue["r0c0"] if i.parameters > 0)
        assert info.memory is not None
        assert info.memory >= 2 * 4 * info.parameters
        assert told.parts.terms.budgets(told.state).memory == 8 << 20
    finally:
        told.close()

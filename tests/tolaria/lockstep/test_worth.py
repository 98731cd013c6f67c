"""What seeds are worth in a run: the sums, the account, the events, and that nothing else moves by it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.accord.observation import observation_of
from esper.kasmina.attribution import blended
from esper.kasmina.hosts import GPTConfig, ResNet20Config
from esper.leyline.errors import ConfigError
from esper.leyline.events import TickDone, WorthMeasured
from esper.nissa.wandb_rows import tick_row
from esper.run.closing import summarise
from esper.tolaria.data import DigitsConfig
from esper.tolaria.data.sampler import draw
from esper.tolaria.lockstep.worth import plan_worth
from esper.tolaria.training.engine import Engine
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config

LIFE = [
    act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=1),
    act(1, "r1c0", "GERMINATE", blueprint="bottleneck", ticks=1),
    act(4, "r0c0", "ADVANCE"),
    act(4, "r1c0", "ADVANCE"),
]
SIX = dict.fromkeys(("r0c0", "r0c1", "r0c2", "r1c0", "r1c1", "r1c2"), "norm")


def engine_of(folder: Path, task: str = "cnn", **settings: Any) -> Engine:
    rest: dict[str, Any] = {"trainer__steps": 20, "slots__incubation": "immediate", "telemetry__level": "full"}
    return make_engine(tiny_config(task, **{**rest, **settings}), folder)


def losses(engine: Engine, key: int, **alphas: float) -> torch.Tensor:
    """Loss of each sample that tick ``key`` names, at these alphas; float64."""
    part, gates = engine.bundle.validation, engine.terms.gates
    chosen = draw(len(part), min(gates.probe_samples, len(part)), "worth", engine.settings.seed, key)
    x, y = part.fetch(chosen)
    with torch.no_grad(), engine.grown.override(alphas):
        return engine.bundle.task.per_sample(engine.grown.model.eval()(x), y)[0].double()


def test_readings_are_differences_of_the_validation_loss(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, controller=schedule(*LIFE), control__attribute_every=1)
    engine.begin(None)
    while engine.step < 14:
        engine.train_step()
        if engine.tick_due() and engine.step < 14:
            engine.tick()
    state = engine.state
    assert [slot.stage.is_blended for slot in state.slots] == [True, False, True]
    a, b = (engine.grown.slots[slot].level for slot in ("r0c0", "r1c0"))
    none, one, two, both = (losses(engine, state.tick, r0c0=x, r1c0=y) for x, y in ((0, 0), (a, 0), (0, b), (a, b)))
    engine.grown.model.train()
    engine.tick()
    found, n = {slot.slot: slot.worth for slot in engine.state.slots}, len(none)

    def same(reading: Any, d: torch.Tensor) -> None:
        assert (reading.tick, reading.n) == (state.tick + 1, n)
        assert reading.value == pytest.approx(float(d.mean()), abs=1e-7)
        assert reading.se == pytest.approx(float(d.std()) / n**0.5, rel=1e-3)

    same(found["r0c0"].solo, none - one)
    same(found["r1c0"].solo, none - two)
    same(found["r0c0"].leave_one_out, two - both)
    same(found["r1c0"].leave_one_out, one - both)
    same(found["r0c0"].shapley, ((none - one) + (two - both)) / 2)
    same(engine.state.together, none - both)
    seen = observation_of(engine.state, engine.terms)
    assert (seen.slot("r0c0").worth, seen.together) == (found["r0c0"], engine.state.together)
    told = [event for event in events(engine).of(WorthMeasured) if event.tick == engine.state.tick]
    assert [(event.slot, event.worth) for event in told] == [("r0c0", found["r0c0"]), ("r1c0", found["r1c0"])]
    row = tick_row(events(engine).of(TickDone)[-1])
    assert row["slots/r0c0/shapley"] == found["r0c0"].shapley.value
    assert row["slots/r1c0/leave_one_out_se"] == found["r1c0"].leave_one_out.se
    assert row["all_seeds"] == engine.state.together.value
    closing = summarise(tmp_path, engine.state, engine.grown, status="done", world_size=1, wall_s=1.0, start={})
    assert [seed.shapley for seed in closing.grown] == [found["r0c0"].shapley, found["r1c0"].shapley]


def test_nothing_that_trains_or_decides_moves_by_it(tmp_path: Path) -> None:
    ends = []
    for every in (0, 1):
        engine = engine_of(tmp_path / str(every), controller=schedule(*LIFE), control__attribute_every=every)
        engine.begin(None)
        engine.run()
        ends.append(replica(engine))
    for end in ends:
        end["state"]["flops"], end["state"]["together"] = 0, None
        for slot in end["state"]["slots"]:
            slot["worth"] = None
    assert ends[0] == ends[1]


def test_a_tick_without_it_has_no_place_for_it_and_ages_what_was_measured(tmp_path: Path) -> None:
    off = engine_of(tmp_path / "off")
    assert not any("worth" in name for name in off.lockstep.observe_layout.names)
    engine = engine_of(tmp_path / "on", controller=schedule(*LIFE), control__attribute_every=6, gates__fresh_ticks=1)
    engine.begin(None)
    engine.run()
    assert {event.tick for event in events(engine).of(WorthMeasured)} == {6, 10}, "the last tick has one, too"
    rows = [tick_row(event) for event in events(engine).of(TickDone)]
    assert [index + 1 for index, row in enumerate(rows) if "slots/r0c0/shapley" in row] == [6, 10]


@pytest.mark.parametrize("task", ["cnn", "gpt", "resnet20"])
def test_the_account_has_what_the_counter_counts(task: str, tmp_path: Path) -> None:
    host = {"host": ResNet20Config(width=4)} if task == "resnet20" else {}
    kind = task.replace("resnet20", "cnn")
    planted = {"r0c0": "mlp", "r1c0": "attention"} if kind == "gpt" else {"r0c0": "conv_light", "r1c0": "bottleneck"}
    spent = []
    for every in (0, 3):
        engine = engine_of(tmp_path / str(every), kind, slots__planted=planted, control__attribute_every=every, **host)
        engine.begin(None)
        counted = 0
        while engine.step < 6:
            engine.train_step()
            if engine.tick_due():
                if every and engine.state.tick == 2:
                    sums = engine.evaluator.worth_sums
                    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
                        sums(plan_worth(blended(engine.grown), 2), engine.terms.gates, 2)
                    counted = counter.get_total_flops()
                engine.tick()
        assert engine.state.flops is not None
        spent.append(engine.state.flops)
    assert counted > 0
    assert spent[1] - spent[0] == counted


def test_more_than_four_seeds_are_shared_out_by_drawn_orders_with_their_error(tmp_path: Path) -> None:
    host = GPTConfig(layers=2, heads=2, dim=16, block=16, sites=["block", "attention", "mlp"])
    engine = engine_of(tmp_path, "gpt", host=host, slots__planted=SIX, control__attribute_every=1)
    engine.begin(None)
    while engine.state.tick < 2:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    worth = [slot.worth for slot in engine.state.slots]
    assert len(worth) == 6
    together = engine.state.together
    assert sum(entry.shapley.value for entry in worth) == pytest.approx(together.value, abs=1e-9)
    assert all(entry.shapley.se >= 0.0 and entry.shapley.n == together.n for entry in worth)


def test_a_validation_part_too_small_to_measure_on_is_refused_at_the_start(tmp_path: Path) -> None:
    data = DigitsConfig(validation=20, probe=64, test=40)
    with pytest.raises(ConfigError, match=r"attribute_every = 1: the 20 validation samples .* gates.min_samples = 24"):
        engine_of(tmp_path, data=data, gates__min_samples=24, control__attribute_every=1)

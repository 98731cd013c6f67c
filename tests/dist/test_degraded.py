"""A seed that runs by a fallback on one rank only: both ranks hold it still, let it through no gate, and prune it."""

from pathlib import Path
from typing import Any

from esper.leyline.events import CommandRefused, SlotDegraded, StageChanged
from tests.support.dist import run_distributed
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config

FALLBACK = "compiled region hit its recompile limit; runs eagerly"


def degrade(rank: int, config: Any, run_dir: Path) -> dict[str, Any]:
    """Trains to the end; rank 1 takes a fallback in r0c0 while it blends, which lasts."""
    engine = make_engine(config, run_dir)
    engine.begin(None)
    alphas, degraded = [], []
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        alphas.append(engine.grown.slots["r0c0"].level)
        if engine.tick_due():
            engine.tick()
            slot = engine.state.slot("r0c0")
            degraded.append((slot.degraded, slot.degraded_tick))
            if engine.state.tick == 5 and rank == 1:
                engine.grown.slots["r0c0"].degraded = FALLBACK
    sink = events(engine)
    return {
        "replica": replica(engine),
        "alphas": alphas,
        "degraded": degraded,
        "moves": [(e.tick, e.cause, e.target.name) for e in sink.of(StageChanged) if e.slot == "r0c0"],
        "refusals": [e.reason for e in sink.of(CommandRefused)],
        "told": [(e.tick, e.slot, e.blueprint, e.ranks, e.reason, e.pruned) for e in sink.of(SlotDegraded)],
        "own": engine.grown.slots["r0c0"].degraded,
    }


def test_a_fallback_on_one_rank_is_one_outcome_on_all(tmp_path: Path) -> None:
    actions = [act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=8), act(3, "r0c0", "ADVANCE")]
    actions += [act(4, "r0c0", "ADVANCE"), act(7, "r0c0", "ADVANCE")]
    config = tiny_config("cnn", controller=schedule(*actions), gates__degraded_ticks=2, slots__embargo_ticks=50)
    one, two = run_distributed(degrade, 2, config, tmp_path)
    assert one["replica"] == two["replica"]
    for key in ("alphas", "degraded", "moves", "refusals"):
        assert one[key] == two[key], key
    assert one["degraded"][4:9] == [(0, None), (1, 6), (1, 6), (0, None), (0, None)]
    # Ticks every 2 steps: blending began at tick 4, the fallback is agreed at tick 6, after step 12.
    assert 0 < one["alphas"][9] < one["alphas"][11]
    assert len(set(one["alphas"][11:16])) <= 2, "still from step 12 on"
    assert len(set(one["alphas"][12:16])) == 1
    assert set(one["alphas"][16:]) == {0.0}
    assert one["moves"][-1][:2] == (9, "COOLDOWN")
    assert (8, "DEGRADED", "PRUNED") in one["moves"]
    assert "runs by a fallback on 1 ranks" in one["refusals"][0]
    elsewhere = "a fallback on another rank, whose own event file says why"
    for found, reason in ((one, elsewhere), (two, FALLBACK)):
        assert found["told"] == [
            (6, "r0c0", "conv_light", 1, reason, False),
            (8, "r0c0", "conv_light", 1, reason, True),
        ]
        assert found["own"] is None

"""Compiled runs on real ranks: the uncompiled run's numbers, one network after every tick, no compile in a step."""

from pathlib import Path
from typing import Any

import pytest

from esper.config.tree import EsperConfig
from esper.leyline.events import CommandRefused, StageChanged
from tests.dist.test_equality import same_tensors
from tests.dist.test_operators import config_of as all_operators
from tests.support.dist import run_distributed
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config

A = "r0c0"
LIFE = schedule(
    act(1, A, "GERMINATE", blueprint="norm", ticks=2, target=0.5),
    act(3, A, "ADVANCE"),
    act(4, A, "ADVANCE"),
    act(7, A, "SET_ALPHA_TARGET", target=1.0, ticks=2, operator="MULTIPLY"),
    act(10, A, "ADVANCE"),
)
TICKS = 11


def config_of(compile_: bool, **settings: Any) -> EsperConfig:
    return tiny_config(
        "cnn",
        controller=LIFE,
        trainer__steps=2 * TICKS,
        trainer__precision="fp64",
        trainer__compile=compile_,
        trainer__compile_backend="eager",
        slots__ids=[A],
        **settings,
    )


def live(rank: int, config: EsperConfig, run_dir: Path, breaks_at: int) -> dict[str, Any]:
    """Lives it through; from tick ``breaks_at`` on rank 1's seed has no compiled graph any more."""
    engine = make_engine(config, run_dir)
    engine.begin(None)
    ticks, in_steps, holder = [], [], engine.grown.slots[A]
    while engine.step < engine.terms.total_steps:
        compiler = engine.growth.compiler
        regions = [] if compiler is None else [*compiler.regions.values(), *([holder.region] if holder.region else [])]
        before = sum(region.graphs for region in regions)
        engine.train_step()
        in_steps.append(sum(region.graphs for region in regions) - before)
        if engine.tick_due():
            engine.tick()
            ticks.append(replica(engine))
            if engine.state.tick == breaks_at and rank == 1:
                assert holder.region is not None
                holder.region.failure = "for the test"
    return {
        "ticks": ticks,
        "in_steps": in_steps,
        "degraded": (holder.degraded, engine.state.slots[0].degraded),
        "stages": [(e.tick, e.target.name, e.cause) for e in events(engine).of(StageChanged)],
        "refused": len(events(engine).of(CommandRefused)),
        "weights": {name: p.detach().clone() for name, p in engine.grown.model.named_parameters()},
    }


def test_two_compiled_ranks_are_one_network_and_the_uncompiled_one(tmp_path: Path) -> None:
    mine, theirs = run_distributed(live, 2, config_of(True), tmp_path / "compiled", 0)
    assert mine["ticks"] == theirs["ticks"]
    assert [stage for _, stage, _ in mine["stages"]] == ["GERMINATED", "TRAINING", "BLENDING", "HOLDING"]
    assert mine["refused"] == 0
    assert set(mine["in_steps"]) == set(theirs["in_steps"]) == {0}, "all was compiled at the start and at ticks"
    plain, _ = run_distributed(live, 2, config_of(False), tmp_path / "plain", 0)
    assert plain["stages"] == mine["stages"]
    same_tensors(mine["weights"], plain["weights"])


def test_a_rank_that_loses_its_graph_degrades_the_slot_on_all_ranks(tmp_path: Path) -> None:
    config = config_of(True, gates__degraded_ticks=2)
    mine, theirs = run_distributed(live, 2, config, tmp_path, 4)
    assert mine["ticks"] == theirs["ticks"]
    assert mine["stages"] == theirs["stages"]
    assert "PRUNED" in [stage for _, stage, _ in mine["stages"]]


@pytest.mark.slow
def test_every_operator_compiled_on_two_ranks(tmp_path: Path) -> None:
    config = all_operators()
    config.trainer.compile, config.trainer.compile_backend = True, "eager"
    mine, theirs = run_distributed(live, 2, config, tmp_path / "compiled", 0)
    assert mine["ticks"] == theirs["ticks"]
    assert mine["refused"] == 0
    assert set(mine["in_steps"]) == {0}
    plain, _ = run_distributed(live, 2, all_operators(), tmp_path / "plain", 0)
    assert plain["stages"] == mine["stages"]
    same_tensors(mine["weights"], plain["weights"])

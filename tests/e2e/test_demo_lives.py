"""The demo as shipped completes lives: on each of two seeds, of five with `--all`, something fossilises on evidence,
and some seeds go. A third one is in tests/e2e/test_run.py."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from esper.accord.config import GateConfig
from esper.config.tree import build_config
from esper.launcher.compose import conf_folder
from esper.leyline.events import CommandJudged, GateJudged, StageChanged
from esper.leyline.stages import Gate, Op, Stage
from tests.support.dist import run_distributed, use_group
from tests.support.tiny import events, make_engine

SEEDS = (1, 2, 3, 4, 5)


def shipped(seed: int) -> dict[str, Any]:
    """Plain data of ``experiment=demo`` as the launcher composes it."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        composed = compose("config", ["experiment=demo", f"seed={seed}", "run.dir=unused"])
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    del plain["launch"]
    return plain


def live(rank: int, configs: list[dict[str, Any]], folder: Path, whole: bool) -> list[list[Any]]:
    """One run after another; returns each one's events. A run whose fossil stands is cut short once one has pruned."""
    found: list[list[Any]] = []
    pruned = False
    for index, plain in enumerate(configs):
        use_group(index)
        engine = make_engine(build_config(plain), folder / str(index))
        engine.begin(None)
        while engine.step < engine.terms.total_steps:
            engine.train_step()
            if engine.tick_due():
                engine.tick()
                stages = {entry.stage for entry in engine.state.slots}
                pruned = pruned or Stage.PRUNED in stages
                if pruned and Stage.FOSSILIZED in stages and not whole:
                    break  # agreed: every rank leaves at the same tick
        found.append([e for e in events(engine).events if isinstance(e, GateJudged | StageChanged | CommandJudged)])
        engine.world.close()
    return found


@pytest.mark.parametrize(("seeds", "whole"), [(SEEDS[3:], False), pytest.param(SEEDS, True, marks=pytest.mark.slow)])
def test_the_demo_completes_lives_on_every_seed(tmp_path: Path, seeds: tuple[int, ...], whole: bool) -> None:
    configs = [shipped(seed) for seed in seeds]
    for plain in configs:
        config = build_config(plain)
        assert config.gates == GateConfig(probe_samples=96), "default thresholds"
        assert config.controller.kind == "heuristic"
        assert "noop" not in config.controller.blueprints, "no blueprint is listed in order to fail"
    runs, other = run_distributed(live, 2, configs, tmp_path, whole, groups=len(configs))
    assert len(runs) == len(seeds)
    unhelpful = 0
    for run, same in zip(runs, other, strict=True):
        assert [e for e in run if isinstance(e, StageChanged)] == [e for e in same if isinstance(e, StageChanged)]
        fossils = [e for e in run if isinstance(e, StageChanged) and e.target is Stage.FOSSILIZED]
        assert fossils
        for fossil in fossils:
            (verdict,) = [
                e
                for e in run
                if isinstance(e, GateJudged) and (e.tick, e.slot, e.result.gate) == (fossil.tick, fossil.slot, Gate.G5)
            ]
            assert verdict.enforced
            assert verdict.result.passed
            (worth,) = [check for check in verdict.result.checks if check.name == "contribution"]
            assert worth.passed
            assert "±" in worth.detail
            assert "stale" not in worth.detail
        asked = [e.reason for e in run if isinstance(e, CommandJudged) and e.applied and e.command.op is Op.PRUNE]
        unhelpful += sum("looks spent" in reason or "readings against it" in reason for reason in asked)
    assert unhelpful >= 1, "over the seeds some seed is pruned for lack of evidence"

"""The end of a fossil on two ranks: doubted by looks at refilled samples, pruned, taken back, pruned for good.

Probe and reserve are spent when it becomes one, so the looks draw training samples that have not been trained on. Each
of the samples that a rank measures then speaks against it by a nat.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.accord.config import GateConfig
from esper.accord.lifecycle import ProbeRequest
from esper.config.tree import EsperConfig
from esper.drill.answers import sums_of
from esper.kasmina.export.exporter import export
from esper.leyline.events import CommandRefused, ContributionMeasured, FossilHurts, RampCommitted, StageChanged
from esper.leyline.stages import Stage
from tests.support.dist import run_distributed
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config

A, B = "r0c0", "r1c0"
TICKS, EVERY, BORN = 17, 2, 7
LIVES = schedule(
    act(1, A, "GERMINATE", blueprint="conv_light", ticks=1),
    act(1, B, "GERMINATE", blueprint="norm", ticks=1),
    *(act(tick, slot, "ADVANCE") for tick in (3, 4, 6) for slot in (A, B)),
    act(7, A, "FOSSILIZE"),
    act(8, A, "PRUNE", ticks=2),  # no look yet
    act(9, A, "PRUNE", ticks=4),
    act(11, A, "SET_ALPHA_TARGET", target=1.0, ticks=2),
    act(13, A, "PRUNE", ticks=2),
)


def config_of() -> EsperConfig:
    return tiny_config(
        "cnn",
        controller=LIVES,
        trainer__steps=EVERY * TICKS,
        trainer__precision="fp64",
        trainer__ema=0.9,
        control__every=EVERY,
        control__digest_every=1,
        optim__kind="adamw",
        gates__fossil_every=2,
        governor__enabled=False,
        checkpoint__every_ticks=1,
        checkpoint__keep=100,
    )


def doubting(measure: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """A fossil's look, where each sample that was measured has lost a nat by it."""

    def look(slot: str, request: ProbeRequest, gates: GateConfig) -> dict[str, float]:
        found = measure(slot, request, gates)
        return found | sums_of([-1] * int(found["count"])) if request.aim == "G6" else found

    return look


def live(rank: int, config: EsperConfig, run_dir: Path, resume: int | None) -> dict[str, Any]:
    engine = make_engine(config, run_dir, attempt=1 if resume is None else 2)
    engine.begin(resume)
    ticks: dict[int, Any] = {}
    engine.evaluator.probe_sums = doubting(engine.evaluator.probe_sums)  # type: ignore[method-assign]
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
            ticks[engine.state.tick] = replica(engine)
    engine.finish()
    sink = events(engine)
    assert engine.average is not None
    names = [*engine.grown.model.state_dict(), *engine.owner.state_by_name(), *engine.average.averages]
    return {
        "ticks": ticks,
        "refused": [(event.tick, event.reason) for event in sink.of(CommandRefused)],
        "ramps": [(e.tick, e.start, e.target) for e in sink.of(RampCommitted) if e.slot == A and e.tick > BORN],
        "told": [event.tick for event in sink.of(FossilHurts)],
        "looks": [
            (e.tick, e.refill, e.counts, e.contribution.n)
            for e in sink.of(ContributionMeasured)
            if e.slot == A and e.stage is Stage.FOSSILIZED
        ],
        "stages": [(e.tick, e.target.name) for e in sink.of(StageChanged) if e.slot == A and e.tick > BORN],
        "left": [name for name in names if A in name],
        "exported": [slot.slot for slot in export(engine.grown, partial=True).slots],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_dir.mkdir()
    return run_dir, run_distributed(live, 2, config_of(), run_dir, None)


def test_a_fossil_ends_alike_on_both_ranks_and_leaves_nothing(whole: tuple[Path, list[Any]]) -> None:
    first, second = whole[1]
    for tick in first["ticks"]:
        for what, mine in first["ticks"][tick].items():
            assert mine == second["ticks"][tick][what], f"tick {tick}: {what} differs"
    assert len(first["ticks"]) == TICKS
    assert len(first["refused"]) == 1, first["refused"]
    ((tick, reason),) = first["refused"]
    assert (tick, reason.split(":")[0]) == (8, "G6")
    assert [(tick, target) for tick, _, target in first["ramps"]] == [(9, 0.0), (11, 1.0), (13, 0.0)]
    assert 0.0 < first["ramps"][1][1] < 1.0
    assert first["told"] == [9, 13]
    assert first["looks"] == [(9, True, True, 32), (13, True, True, 32)], "over both ranks each sample once"
    assert first["stages"][0] == (15, "PRUNED")
    assert first["left"] == []
    assert A not in first["exported"]


# While it is told; in the ramp down; in the ramp back; in the last ramp; when it is gone.
@pytest.mark.parametrize("tick", [8, 10, *(pytest.param(tick, marks=pytest.mark.slow) for tick in (12, 14, 15))])
def test_resumed_it_ends_as_it_would_have(tick: int, whole: tuple[Path, list[Any]], tmp_path: Path) -> None:
    run_dir, wanted = whole
    shutil.copytree(run_dir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2].partition(".")[0]) > EVERY * tick:
            shutil.rmtree(path)
    found = run_distributed(live, 2, config_of(), tmp_path / "run", EVERY * tick)
    for rank in range(2):
        assert list(found[rank]["ticks"]) == list(range(tick + 1, TICKS + 1))
        for later, seen in found[rank]["ticks"].items():
            for what, value in seen.items():
                assert value == wanted[rank]["ticks"][later][what], f"tick {later}: {what} differs on rank {rank}"
        assert found[rank]["left"] == []

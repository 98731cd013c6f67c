"""Kernels compiled ahead by the helper: found by every birth that was foreseen, and the same bits with and without."""

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.utils import counters

from esper.config.tree import EsperConfig
from esper.kasmina.kernels.config import CompileConfig
from esper.leyline.events import CommandRefused, KernelsCompiled
from esper.run.kernels import start
from esper.run.kernels.helper import Helper
from tests.dist.test_equality import same_tensors
from tests.support.dist import run_distributed
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config

A = "r1c0"
LIFE = schedule(
    act(1, A, "GERMINATE", blueprint="norm", ticks=1),
    act(3, A, "ADVANCE"),
    act(4, A, "ADVANCE"),
    act(6, A, "SET_ALPHA_TARGET", target=0.5, ticks=1, operator="MULTIPLY"),
)
TICKS = 9


def config_of(cache: Path, prepare: str, **more: Any) -> EsperConfig:
    settings = {"controller": LIFE, "slots__ids": [A], "trainer__steps": 2 * TICKS, "trainer__drop_last": True, **more}
    return tiny_config(
        "cnn",
        compile__prepare=prepare,
        compile__cache=str(cache),
        control__timeout_s=300.0,
        control__startup_timeout_s=1800.0,
        **{"trainer__compile": True, **settings},
    )


def libraries(cache: Path) -> set[str]:
    """What a C++ compiler has made."""
    return {path.name for path in cache.rglob("*.so")}


class KilledHelper(Helper):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        os.kill(self.process.pid, signal.SIGKILL)


def live(rank: int, config: EsperConfig, run_dir: Path, kill: bool) -> dict[str, Any]:
    if kill:
        start.Helper = KilledHelper  # type: ignore[misc]
    multiprocessing.current_process().daemon = False  # a rank of a run may have children, which fetch data
    engine = make_engine(config, run_dir)
    compiler = engine.growth.compiler
    ahead: Any = None if compiler is None else compiler.ahead
    helper: Any = None if ahead is None else ahead.helper
    engine.begin(None)
    before = counters["inductor"]["fxgraph_cache_miss"]
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    engine.growth.close()
    engine.feed.close()
    bits = hashlib.sha256()
    for name, tensor in engine.grown.model.state_dict().items():
        bits.update(name.encode() + tensor.numpy().tobytes())
    return {
        "bits": bits.hexdigest(),
        "replica": replica(engine),
        "weights": {name: weight.detach().clone() for name, weight in engine.grown.model.named_parameters()},
        "misses": counters["inductor"]["fxgraph_cache_miss"] - before,
        "host": [event for event in events(engine).of(KernelsCompiled) if event.where == "host"],
        "births": [event for event in events(engine).of(KernelsCompiled) if event.where == A],
        "refused": [event.reason for event in events(engine).of(CommandRefused)],
        "helper": None if helper is None else (helper.told, helper.process.poll()),
    }


@pytest.mark.slow
def test_what_was_foreseen_misses_nothing_and_the_bits_are_those_without_cold_warm_or_killed(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    [ahead] = run_distributed(live, 1, config_of(mine, "start"), tmp_path / "ahead", False)
    told, code = ahead["helper"]
    assert (told["compiled"], told["failed"], told["why"], code) == (3, 0, "", -signal.SIGKILL)
    assert 100 < told["memory_mib"] < CompileConfig().memory_mib
    assert ahead["refused"] == []
    assert ahead["misses"] == 0
    assert ahead["host"][0].misses > 0
    assert all(birth.hits > 0 and birth.misses == 0 for birth in ahead["births"])
    assert len(ahead["births"]) >= 3, "staged, one operator fading into another, and that one alone"
    [cold] = run_distributed(live, 1, config_of(theirs, "ahead"), tmp_path / "cold", True)
    assert cold["misses"] > 0
    [warm] = run_distributed(live, 1, config_of(theirs, "off"), tmp_path / "warm", False)
    assert warm["helper"] is None
    assert warm["misses"] == warm["host"][0].misses == 0, "a second start finds the host, too"
    assert ahead["bits"] == cold["bits"] == warm["bits"]
    assert ahead["replica"] == cold["replica"] == warm["replica"]
    other = tmp_path / "of another machine"
    shutil.copytree(theirs, other)
    before = libraries(other)
    [carried] = run_distributed(live, 1, config_of(other, "off"), tmp_path / "carried", False)
    assert carried["misses"] == 0, "a second machine of this kind, with what the first had"
    assert libraries(other) == before, "and its compiler had nothing to do"
    assert carried["bits"] == ahead["bits"]


class Recorder(Helper):
    """Starts nothing, and keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def tell(self, what: Any) -> None:
        self.lines.append([(seed["operator"], seed["fades_from"]) for seed in what])

    def watched(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        pass


def go_on(rank: int, config: EsperConfig, run_dir: Path, resume_step: int | None, ticks: int) -> list[Any]:
    engine, recorder = make_engine(config, run_dir), Recorder()
    assert engine.growth.compiler is not None
    engine.growth.compiler.ahead = start.Ahead(recorder, config, engine.terms)
    engine.begin(resume_step)
    while engine.state.tick < ticks:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    engine.saves.finish(engine.state)
    engine.growth.close()
    return recorder.lines


def test_what_is_foreseen_follows_from_the_agreed_record_at_a_resume(tmp_path: Path) -> None:
    """On each rank alike, since each machine has a helper of its own."""
    more = {"trainer__compile_backend": "eager", "checkpoint__every_ticks": 5}
    config, fading = config_of(tmp_path / "cache", "off", **more), [("MULTIPLY", "ADD"), ("MULTIPLY", None)]
    assert run_distributed(go_on, 2, config, tmp_path, None, 5) == [[[("ADD", None), *fading]]] * 2
    assert run_distributed(go_on, 2, config, tmp_path, 10, 6) == [[fading]] * 2


@pytest.mark.slow
def test_two_ranks_have_one_helper_and_the_bits_of_two_without(tmp_path: Path) -> None:
    ahead = run_distributed(live, 2, config_of(tmp_path / "cache", "start"), tmp_path / "ahead", False)
    assert [found["helper"] is None for found in ahead] == [False, True]
    told, _ = ahead[0]["helper"]
    assert (told["compiled"], told["failed"], told["why"]) == (3, 0, "")
    without = run_distributed(live, 2, config_of(tmp_path / "cache", "off"), tmp_path / "without", False)
    for mine, theirs in zip(ahead, without, strict=True):
        assert mine["misses"] == theirs["misses"] == 0
        assert mine["bits"] == theirs["bits"] == ahead[0]["bits"]
        assert mine["replica"] == theirs["replica"] == ahead[0]["replica"]


@pytest.mark.slow
def test_two_ranks_with_all_of_it_on_train_what_one_trains_without(tmp_path: Path) -> None:
    """Kernels compiled ahead, workers that fetch data, the seed library, all telemetry; in float64."""
    plain = {"trainer__precision": "fp64", "trainer__compile": False, "control__attribute_every": 2}
    every = {
        "trainer__precision": "fp64",
        "data__workers": 1,
        "telemetry__level": "full",
        "control__attribute_every": 2,
        "library__enabled": True,
        "library__when_idle": False,
    }
    [alone] = run_distributed(live, 1, config_of(tmp_path / "none", "off", **plain), tmp_path / "1", False)
    ranks = run_distributed(live, 2, config_of(tmp_path / "cache", "ahead", **every), tmp_path / "2", False)
    assert alone["helper"] is ranks[1]["helper"] is None
    assert ranks[0]["helper"] is not None
    assert len(ranks[0]["births"]) >= 3
    assert ranks[0]["bits"] == ranks[1]["bits"]
    assert ranks[0]["replica"] == ranks[1]["replica"]
    same_tensors(ranks[0]["weights"], alone["weights"])

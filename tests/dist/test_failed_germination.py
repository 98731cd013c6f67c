"""A germination that fails, at whatever step, on one rank or on both: as if it had never been asked for.

One run fails in every way in turn, in one slot, while another seed lives and learns; a control run never tries. After
every tick every bit of the two runs is compared: weights, buffers, moments, parameter groups, wrapper, random streams,
the whole agreed state. What may differ is that somebody asked: proposal ids, and, while a seed is staged, that it is.
"""

import hashlib
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.config.tree import EsperConfig
from esper.kasmina.births import Birth, Library, LibraryConfig, Order
from esper.kasmina.births.build import birth_key
from esper.kasmina.blueprints import blueprint
from esper.leyline.commands import Command
from esper.leyline.events import BirthVetoed, CommandRefused, Fault, StageChanged
from esper.leyline.stages import Op
from esper.leyline.topology import Topology
from esper.tolaria.growth import size
from esper.tolaria.ranks.memory import free_bytes
from esper.tolaria.training.engine import Engine
from tests.support.dist import run_distributed
from tests.support.small_runs import Commands, Outcome, play
from tests.support.tiny import replica, tiny_config

A, B = "r0c0", "r1c0"
MAP, CPU = Topology.FEATURE_MAP, torch.device("cpu")
go_on = threading.Event()
armed: list[str] = [""]  # how the next brittle seed of this process fails

# How it fails -> (the veto, words that the rank itself says). In every one the constructor has drawn by then.
BUILDS = {
    "constructor": ("BUILD_FAILED", "cannot serve dim = 4: no such thing"),
    "bug": ("BUILD_FAILED", "KeyError: 'oops'"),
    "host memory": ("OUT_OF_MEMORY", "MemoryError"),
    "device memory": ("OUT_OF_MEMORY", "OutOfMemoryError: CUDA out of memory"),
    "count": ("BUILD_FAILED", "brittle has 12 parameters, its formula says 8"),
    "weights": ("NONFINITE_AT_BIRTH", "brittle is not finite at birth"),
    "forward raises": ("BUILD_FAILED", "RuntimeError: no kernel"),
    "forward reshapes": ("BUILD_FAILED", "brittle maps (1, 4, 8, 8) torch.float32 to (1, 4, 8, 7) torch.float32"),
    "forward recasts": ("BUILD_FAILED", "torch.float64"),
    "forward gives nan": ("NONFINITE_AT_BIRTH", "not finite at birth: of ones it makes nan"),
    "forward gives none": ("BUILD_FAILED", "brittle returns NoneType, not a tensor"),
    "no room": ("OUT_OF_MEMORY", "bytes, 100 are free here"),
}
ENTRIES = {
    "damaged": ("LIBRARY_DAMAGED", "the file is damaged"),
    "lost": ("LIBRARY_MISSING", "the index names it and it is not there"),
    "late": ("NOT_READY after 2 ticks", "still being built"),
}
FIRST, APART = 4, 2  # tick of the first failure, ticks from one to the next


class Brittle(nn.Module):
    """A scale and a shift per channel; fails as armed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.1 * torch.rand(dim, 1, 1))
        self.shift = nn.Parameter(0.1 * torch.rand(dim, 1, 1))
        self.how = how = "" if self.scale.device.type == "meta" else armed[0]
        if how == "constructor":
            raise ValueError("no such thing")
        if how == "bug":
            {}["oops"]
        if how == "host memory":
            raise MemoryError
        if how == "device memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if how == "count":
            self.more = nn.Parameter(torch.rand(dim))
        if how == "weights":
            with torch.no_grad():
                self.shift[0] = torch.inf
        if how == "late":
            assert go_on.wait(120)

    def forward(self, x_BCHW: Tensor) -> Any:
        delta = nn.functional.dropout(x_BCHW * self.scale + self.shift, 0.5, self.training)
        if self.how == "forward raises":
            raise RuntimeError("no kernel")
        if self.how == "forward gives none":
            return None
        if self.how == "forward gives nan":
            return delta * torch.nan
        return delta[..., :-1] if self.how == "forward reshapes" else delta.double() if "recasts" in self.how else delta


def config(**settings: Any) -> EsperConfig:
    modes = len({**BUILDS, **ENTRIES})
    return tiny_config(
        "cnn",
        trainer__steps=FIRST + APART * modes + 5,
        control__every=1,
        control__digest_every=1,
        control__stage_ticks=2,
        control__validate_every=99,
        control__timeout_s=60.0,
        **settings,
    )


def look(engine: Engine) -> dict[str, Any]:
    """Every bit of this rank."""
    streams = pickle.dumps((torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))
    optimizer = engine.owner.optimizer
    return {
        **replica(engine),
        "streams": hashlib.sha256(streams).hexdigest(),
        "keys": list(engine.grown.model.state_dict()),
        "options": [[(k, v) for k, v in sorted(g.items()) if k != "params"] for g in optimizer.param_groups],
        "entries": len(optimizer.state),
        "wrapped": engine.growth._wrapped,
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
    }


def but_for_asking(found: dict[str, Any], *, staged: bool) -> dict[str, Any]:
    """A look without what a proposal alone may change."""
    state = {**found["state"]}
    state["slots"] = [{**entry} for entry in state["slots"]]
    loose = ["proposal", "staged_tick", *(["staged"] if staged else [])]
    for entry in state["slots"]:
        for key in loose:
            entry.pop(key)
        if entry.get("staged"):
            entry["staged"] = {**entry["staged"], "proposal": 0}
    for key in ["proposals", *(["germinations"] if staged else [])]:
        state.pop(key)
    return {**found, "state": state}


def failing(ways: dict[str, tuple[str, str]], ranks: tuple[int, ...]) -> Callable[[Engine], None]:
    """Fails in these ways in turn on these ranks; at the end the same birth goes well everywhere."""
    plan = {FIRST + APART * index: way for index, way in enumerate(ways)}

    def script(engine: Engine) -> None:
        seed = Command(slot=A, op=Op.GERMINATE, blueprint="brittle", ticks=1)
        due = {1: [Command(slot=B, op=Op.GERMINATE, blueprint="norm", ticks=1)], 3: [Command(slot=B, op=Op.ADVANCE)]}
        due |= {tick: [seed] for tick in plan}
        last = engine.terms.total_steps - 4
        due |= {last: [seed], last + 2: [Command(slot=A, op=Op.ADVANCE)]}
        if engine.world.rank == 0:
            engine.controller = Commands(due)
        engine.notes["looks"] = []
        own = engine.tick

        def tick() -> None:
            now = engine.state.tick + 1
            if now in plan and engine.world.rank in ranks:
                armed[0] = plan[now]
                prepare(engine, armed[0])
            elif now == last:
                armed[0] = ""
                prepare(engine, "")
            own()
            engine.notes["looks"].append(look(engine))
            if engine.state.slot(A).staged is None:
                go_on.set()
                engine.notes["waiting"] = [*engine.growth.waiting, *engine.growth.staged, *engine.growth.vetoes]

        engine.tick = tick  # type: ignore[method-assign]

    return script


def prepare(engine: Engine, way: str) -> None:
    """Spoils what this rank's library has of the coming birth, or has none of it."""
    library = engine.growth.library
    if library is None:
        return
    for thread in [thread for thread in threading.enumerate() if thread.name == "esper-library"]:
        thread.join()  # it may still write what it handed over at an earlier tick
    go_on.clear()
    key = birth_key(engine.settings.seed, A, 1)
    birth = Birth.of("brittle", dim=4, topology=MAP, dtype=torch.float32, key=key)
    for path in [path for path in library.store.root.rglob("*") if path.is_file()]:
        path.unlink()
    if way in ("damaged", "lost"):
        other = Library(LibraryConfig(enabled=True, background=False), library.store.root)
        other.take(other.begin(Order(birth=birth, device=CPU)))
        (path,) = (library.store.root / "seeds").iterdir()
        if way == "lost":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    library.memory.__init__(library.memory.limit)  # type: ignore[misc]  # as after a restart


def play_scenarios(rank: int, run_dir: Path) -> dict[str, Outcome]:
    blueprint("brittle", topology=MAP, parameters=lambda dim: 2 * dim, flops=lambda dim, positions: 0)(Brittle)
    size.free_bytes = lambda device: 100 if armed[0] == "no room" else free_bytes(device)  # what a rank measures
    found: dict[str, Outcome] = {}
    for name, (ways, ranks, library) in SCENARIOS.items():
        settings = {"library__enabled": library, "library__wait_s": 0.05 if "late" in ways else 30.0}
        settings |= {"library__when_idle": False, "library__root": str(run_dir / f"{name}-{rank}")}
        armed[0] = ""
        found[name] = play(config(**settings), run_dir / name, failing(ways, ranks), group=len(found))
    return found


LATE = {"late": ENTRIES["late"]}
STORED = {way: said for way, said in ENTRIES.items() if way != "late"}
SCENARIOS: dict[str, tuple[dict[str, tuple[str, str]], tuple[int, ...], bool]] = {
    "control": ({}, (), False),
    "built here, rank 1": (BUILDS, (1,), False),
    "built here, both": (BUILDS, (0, 1), False),
    "library, rank 1": ({**BUILDS, **STORED}, (1,), True),
    "library, both": ({**BUILDS, **STORED}, (0, 1), True),
    "late, rank 1": (LATE, (1,), True),
    "late, both": (LATE, (0, 1), True),
}
attempts = pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "control"])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    run_dir = tmp_path_factory.mktemp("failed")
    return run_distributed(play_scenarios, 2, run_dir, groups=len(SCENARIOS))


@attempts
def test_every_bit_is_as_if_it_had_never_been_asked_for(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    for found in outcomes:
        control, outcome = found["control"].notes["looks"], found[name].notes["looks"]
        assert (found[name].error, len(outcome)) == ("", len(control))
        staged = 0
        for tick, (ours, theirs) in enumerate(zip(outcome, control, strict=True), 1):
            here, there = (found["state"]["slots"][0]["staged"] for found in (ours, theirs))
            waits = (here is None) != (there is None)
            staged += waits
            ours, theirs = but_for_asking(ours, staged=waits), but_for_asking(theirs, staged=waits)
            assert [key for key in theirs if ours[key] != theirs[key]] == [], f"tick {tick}"
        assert staged == len(SCENARIOS[name][0]) * (2 if "late" in name else 1)
        assert found[name].notes["waiting"] == []


@attempts
def test_ranks_are_equal_and_say_which_rank_failed_and_why(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    ways, ranks, _ = SCENARIOS[name]
    assert outcomes[0][name].weights == outcomes[1][name].weights
    for rank, found in enumerate(outcomes):
        vetoes = found[name].of(BirthVetoed)
        assert [(veto.slot, veto.rank, veto.reason) for veto in vetoes] == [
            (A, 1, reason) for reason, _ in ways.values()
        ], "the highest rank speaks for all that failed alike"
        faults = [fault.what for fault in found[name].of(Fault)]
        assert len(faults) == (len(ways) if rank in ranks else 0)
        for what, (_, words) in zip(faults, ways.values()):
            assert words in what
        assert found[name].of(CommandRefused) == []


def test_training_goes_on_and_the_same_birth_goes_well_later(outcomes: list[dict[str, Outcome]]) -> None:
    for name in SCENARIOS:
        outcome = outcomes[1][name]
        changes = [(event.slot, event.target.name) for event in outcome.of(StageChanged)]
        assert changes == [(B, "GERMINATED"), (B, "TRAINING"), (A, "GERMINATED"), (A, "TRAINING")]
        first, last = outcome.notes["looks"][0]["parameters"], outcome.notes["looks"][-1]["parameters"]
        assert first != last
        assert any(key.startswith(f"esper_slots.{A}.") for key in last)

"""kill -9 anywhere, start again, and nothing has happened: bit for bit, on one, two and three ranks.

The run grows by the heuristic, on evidence. It is killed again and again on its way, before, during and after growth;
each process group goes on from the newest checkpoint. At the end weights, moments, random streams, agreed state,
controller, metrics and decisions are those of the run that nobody disturbed, with the same saves.
"""

from pathlib import Path
from typing import Any

import pytest

from esper.kasmina.hosts import registry
from esper.nissa.reading import keep_latest, read_events
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tolaria.data import DigitsConfig, PySourceConfig
from tests.support.fault_places import PLACES
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.noisy_host import NoisyConfig, register_noisy
from tests.support.tiny import tiny_plain

# One kind of run per world size: between them both hosts, dropout, statistics of the batch, both optimizers.
RUNS: dict[int, dict[str, Any]] = {
    1: {"optim__kind": "adamw", "checkpoint__keep": 2},
    2: {"task": "gpt", "optim__kind": "adamw", "trainer__batch": 16},
    3: {"host": NoisyConfig(), "optim__kind": "sgd", "optim__lr": 0.05},
}
BLUEPRINTS = {1: ["conv_small", "bottleneck"], 2: ["mlp_small"], 3: ["conv_light", "depthwise"]}
TICKS = 20


@pytest.fixture(autouse=True)
def _noisy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    register_noisy()


def plain_of(world: int) -> dict[str, Any]:
    """A config that grows within its first half, saved at every second tick."""
    settings = dict(RUNS[world])
    task = settings.pop("task", "cnn")
    data = {
        "cnn": DigitsConfig(validation=40, probe=512, test=939),
        "gpt": PySourceConfig(block=16, max_bytes=11_952, validation=33, probe=512, test=8),
    }[task]
    common = {
        "data": data,
        "trainer__steps": 3 * TICKS,
        "trainer__batch": 20,
        "trainer__accumulate": 2,
        "control__every": 3,
        "optim__lr": 0.01,
        "gates__evidence": "observe",  # in so short a run little is shown; what is measured adds up all the same
        "gates__probe_samples": 64,
        "gates__min_samples": 64,
        "checkpoint__every_ticks": 2,
        "checkpoint__keep": 8,
        "telemetry__level": "full",
        "controller": HeuristicConfig(
            warmup_ticks=3, life_ticks=3, tempo_ticks=1, blueprints=BLUEPRINTS[world], patience=4
        ),
    }
    return tiny_plain(task, **{**common, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of each world size that nobody disturbed: its folder, and what it came to."""
    known: dict[int, tuple[Path, dict[str, Any]]] = {}

    def of(world: int) -> tuple[Path, dict[str, Any]]:
        if world not in known:
            run_dir = prepare_run(tmp_path_factory.mktemp(f"undisturbed-{world}") / "run", plain_of(world))
            assert live(run_dir, world) == [0] * world
            known[world] = run_dir, final(run_dir)
        return known[world]

    return of


def stages(outcome: dict[str, Any]) -> list[tuple[int, str]]:
    """Ticks and targets of all stage changes."""
    return [(event[2], event[4]["target"]) for event in outcome["plain"]["events"] if event[0] == "stage"]


def grown(outcome: dict[str, Any]) -> list[int]:
    """Ticks of births and of fossilisations."""
    changes = [(event[2], event[4]["target"]) for event in outcome["plain"]["events"] if event[0] == "stage"]
    assert any(target == "FOSSILIZED" for _, target in changes), changes
    return [tick for tick, target in changes if target in ("GERMINATED", "FOSSILIZED")]


# Each entry is one process group's end; the next one resumes. Births come at ticks 4 to 6, staged one tick before.
CHAINS: dict[int, list[Kill]] = {
    1: [
        Kill("forward", 2),
        Kill("stage", 4),
        Kill("hash", 5),
        Kill("backward", 6),
        Kill("rename", 7),
        Kill("save", 8),
        Kill("measure", 9),
        Kill("committed", 9),
        Kill("before-commit", 11),
        Kill("rewrap", 12),
        Kill("apply", 13),
        Kill("test", 20),
    ],
    2: [
        Kill("backward", 3, rank=1),
        Kill("stage", 4, rank=1),
        Kill("rewrap", 5, rank=0),
        Kill("save", 6, rank=1),
        Kill("rename", 7, rank=0),
        Kill("apply", 8, rank=1),
        Kill("before-commit", 12, rank=None),
    ],
    3: [
        Kill("stage", 4, rank=2),
        Kill("forward", 5, rank=0),
        Kill("rewrap", 6, rank=1),
        Kill("save", 8, rank=None),
        Kill("backward", 17, rank=1),
    ],
}


@pytest.mark.parametrize("world", CHAINS)
def test_killed_again_and_again_the_run_is_the_one_that_nobody_disturbed(
    world: int, undisturbed: Any, tmp_path: Path
) -> None:
    _, wanted = undisturbed(world)
    changes = grown(wanted)
    kills = [kill.tick for kill in CHAINS[world]]
    between = [kill for kill in kills if min(changes) < kill < max(changes)]
    assert len(between) >= 2, "growth before and after the kills"
    assert max(kills) > max(changes), "and a kill when all of it was done"
    run_dir = prepare_run(tmp_path / "run", plain_of(world))
    for kill in CHAINS[world]:
        live(run_dir, world, kill)
    assert live(run_dir, world) == [0] * world
    assert_same_run(final(run_dir), wanted)

    records = read_events(run_dir / "events.jsonl")
    assert max(record["attempt"] for record in records) == len(CHAINS[world]) + 1
    ticks = [record["tick"] for record in records if record["kind"] == "tick"]
    assert len(ticks) > TICKS, "something was trained twice"
    assert [record["tick"] for record in keep_latest(records) if record["kind"] == "tick"] == list(range(1, TICKS + 1))
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


# The others are struck in tests/faults, under a launcher and torchrun, and in test_governor_resume.py.
ALONE = [place for place in PLACES if place not in ("start", "settle", "close", "rollback", "gone-back")]


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("tick", [4, 11])
@pytest.mark.parametrize("place", ALONE)
@pytest.mark.parametrize("world", CHAINS)
def test_every_kill_alone(world: int, place: str, tick: int, everyone: bool, undisturbed: Any, tmp_path: Path) -> None:
    """Of the last rank (of rank 0 where only it does the work), or of all, early in growth and late."""
    late_births = place == "stage" and tick > 4
    if late_births or (place == "test" and tick == 4) or (everyone and world == 1):
        pytest.skip("the place is not reached then, or it is the same kill")
    rank = 0 if PLACES[place] == "save-commit" else world - 1
    run_dir = prepare_run(tmp_path / "run", plain_of(world))
    live(run_dir, world, Kill(place, tick, None if everyone else rank))
    assert live(run_dir, world) == [0] * world
    assert_same_run(final(run_dir), undisturbed(world)[1])

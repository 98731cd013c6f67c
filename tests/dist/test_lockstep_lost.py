"""Ranks that stop, leave or fail: the others end within the timeout, with an error that names the rank.

Each case is a run of the real worker in processes of its own, since a rank is lost in it; cases wait side by side.
"""

import functools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper.run.train
import esper.worker
from esper.config.tree import write_config
from esper.kasmina.blueprints import blueprint
from esper.leyline.errors import LockstepError
from esper.leyline.stages import Stage
from esper.leyline.topology import Topology
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.heartbeat import PATIENCE_S, Heartbeat
from esper.tolaria.ranks.world import World
from esper.tolaria.training.engine import Engine
from tests.support.dist import Died, run_distributed
from tests.support.patience import load
from tests.support.tiny import act, schedule, tiny_plain

A = "r0c0"
TIMEOUT_S, STARTUP_S = 3.0, 6.0  # limits of the runs, on a quiet machine
SLACK_S = 10.0  # on top of the limits, for ending
FAR_S = 120.0  # limit of a run whose ranks are to notice without it
STRUCK: list[Path] = []  # in the rank that something befalls: the file that says when
Break = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """One rank's worker: exit code, its words (from its own mark), and seconds since the fault struck."""

    code: int
    text: str
    seconds: float


def strike() -> None:
    """Notes when the fault strikes; the clock is one for all processes of a machine."""
    if STRUCK and not STRUCK[0].exists():
        STRUCK[0].write_text(repr(time.monotonic()))


def stand_still() -> None:
    strike()
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    strike()
    os._exit(3)


def at_phase(phase: str, step: int, what: Break) -> Break:
    """Does ``what`` when the rank has marked ``phase`` at ``step`` or later."""

    def arm() -> None:
        own = Heartbeat.mark

        def mark(self: Heartbeat, now: str, error: str = "") -> None:
            own(self, now, error)
            if now == phase and self.step >= step:
                what()

        Heartbeat.mark = mark

    return arm


def in_step(step: int, what: Callable[[Engine], None]) -> Break:
    """Does ``what(engine)`` at the beginning of optimizer step ``step``."""

    def arm() -> None:
        own = Engine.train_step

        def train_step(self: Engine) -> None:
            if self.step == step:
                what(self)
            own(self)

        Engine.train_step = train_step

    return arm


def before_start() -> None:
    stand_still()


def while_building() -> None:
    own = esper.run.train.assemble

    def assemble(*args: Any, **kwargs: Any) -> Engine:
        stand_still()
        return own(*args, **kwargs)

    esper.run.train.assemble = assemble


def miscount(engine: Engine) -> None:
    strike()
    engine.step += 1


def forge_stage(engine: Engine) -> None:
    forged = replace(engine.state.slot(A), stage=Stage.GERMINATED)
    assert engine.state.slot(A).stage is Stage.TRAINING
    strike()
    engine.state = engine.state.with_slots({A: forged})


def raise_in_forward(engine: Engine) -> None:
    def refuse(*args: Any) -> torch.Tensor:
        strike()
        raise ValueError("this sample is cursed")

    engine._loss = refuse


def other_registry() -> None:
    strike()

    @blueprint("extra", topology=Topology.FEATURE_MAP, parameters=lambda dim: dim, flops=lambda dim, positions: 0)
    class Extra(nn.Module):
        """A scale per channel."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(dim, 1, 1))

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return x_BCHW * self.scale


@dataclass(frozen=True, slots=True)
class Case:
    """What befalls which rank, on how many ranks; whether it is lost for good; the limit of the run."""

    arm: Break
    ranks: int = 2
    lost: bool = True
    rank: int = 1
    timeout_s: float = TIMEOUT_S


CASES: dict[str, Case] = {
    "stops before start-up": Case(before_start),
    "stops while building": Case(while_building),
    "stops in forward": Case(at_phase("forward", 5, stand_still)),
    "stops in backward": Case(at_phase("backward", 5, stand_still), ranks=3),
    "stops between observe and commit": Case(at_phase("commit", 5, stand_still)),
    "stops in a save": Case(at_phase("save", 5, stand_still)),
    "rank 0 stops in forward": Case(at_phase("forward", 5, stand_still), ranks=3, rank=0),
    "rank 0 leaves": Case(at_phase("measure", 5, leave), rank=0, timeout_s=FAR_S),
    "leaves": Case(at_phase("measure", 5, leave), ranks=3, timeout_s=FAR_S),
    "counts a step twice": Case(in_step(5, miscount), lost=False),
    "forges a stage": Case(in_step(7, forge_stage), lost=False),
    "raises in forward": Case(in_step(5, raise_in_forward), lost=False, timeout_s=FAR_S),
    "has another registry": Case(other_registry, lost=False),
}


def work(rank: int, name: str, run_dir: Path) -> Ended:
    if rank == CASES[name].rank:
        STRUCK.append(run_dir / "struck")
        CASES[name].arm()
    code = esper.worker.run(run_dir / "config.yaml")
    seconds = time.monotonic() - float((run_dir / "struck").read_text())
    mark = run_dir / "heartbeat" / f"rank-{rank:05d}"
    text = json.loads(mark.read_text())[4] if mark.exists() else ""
    return Ended(code, text, seconds)


@functools.cache
def slowness() -> float:
    """By how much this machine is slower than a quiet one, as the cases began."""
    return load()


def launch(name: str, run_dir: Path) -> tuple[list[Any], dict[str, Any]]:
    run_dir.mkdir()
    life = schedule(act(1, A, "GERMINATE", blueprint="norm", ticks=2), act(3, A, "ADVANCE"))
    plain = tiny_plain(
        "cnn",
        trainer__steps=40,
        controller=life,
        checkpoint__every_ticks=2,
        control__timeout_s=CASES[name].timeout_s * slowness(),
        control__startup_timeout_s=STARTUP_S * slowness(),
        run__dir=str(run_dir),
    )
    write_config(run_dir / "config.yaml", plain)
    case = CASES[name]
    ended = run_distributed(work, case.ranks, name, run_dir, may_die=[case.rank] if case.lost else [])
    return ended, json.loads((run_dir / "STATUS.json").read_text())


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("lost")
    with ThreadPoolExecutor(max_workers=4) as pool:
        futures = {name: pool.submit(launch, name, folder / name.replace(" ", "-")) for name in CASES}
        return {name: future.result() for name, future in futures.items()}


STANDING = {  # where the marks last saw the lost rank, as the others say it
    "stops while building": "rank 1 was last seen in start at step 0, tick 0",
    "stops in forward": "rank 1 was last seen in forward at step 5, tick 2",
    "stops in backward": "rank 1 was last seen in backward at step 5, tick 2",
    "stops between observe and commit": "rank 1 was last seen in commit at step 6, tick 3",
    "stops in a save": "rank 1 was last seen in save at step 8, tick 4",
    "rank 0 stops in forward": "rank 0 was last seen in forward at step 5, tick 2",
    "rank 0 leaves": "rank 0 was last seen in measure at step 6, tick 3",
    "leaves": "rank 1 was last seen in measure at step 6, tick 3",
}


@pytest.mark.parametrize("name", STANDING)
def test_every_rank_that_is_left_names_the_one_that_is_not(
    name: str, launches: dict[str, tuple[list[Any], dict[str, Any]]]
) -> None:
    ended, status = launches[name]
    case = CASES[name]
    assert ended[case.rank] == Died(3 if name.endswith("leaves") else -signal.SIGKILL)
    survivors = [end for end in ended if isinstance(end, Ended)]
    assert len(survivors) == case.ranks - 1
    limit = STARTUP_S if name == "stops while building" else case.timeout_s
    for end in survivors:
        assert end.code == 76
        assert end.text.startswith("lost contact in ")
        assert STANDING[name] in end.text
        others = [rank for rank in range(case.ranks) if rank != case.rank]
        assert not any(f"rank {rank} was" in end.text for rank in others), "blames a victim"
        assert end.seconds < (limit + PATIENCE_S + SLACK_S) * slowness()
    assert (status["status"], status["exit_code"]) == ("failed", 76)
    assert STANDING[name] in status["message"]
    if name.endswith("leaves"):
        assert "Timed out" not in survivors[0].text
        assert survivors[0].seconds < FAR_S / 2 * slowness(), "a closed connection is noticed without a timeout"


def test_a_rank_that_never_comes_is_named_without_any_heartbeat(
    launches: dict[str, tuple[list[Any], dict[str, Any]]],
) -> None:
    ended, status = launches["stops before start-up"]
    assert ended[0].code == 76
    assert ended[0].seconds < (STARTUP_S + SLACK_S) * slowness()
    assert status["message"].startswith("lost contact in start-up: rank 1 never arrived (")


def meet_without_an_agent(rank: int, port: int, rank_0_comes: bool, limit_s: float) -> str:
    """As `srun` starts ranks: the store lives in rank 0."""
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    if rank == 0 and not rank_0_comes:
        stand_still()
    try:
        world = World(WorldConfig(), ControlConfig(timeout_s=limit_s, startup_timeout_s=limit_s))
        world.meet("start-up")
    except LockstepError as error:
        return str(error)
    return "met"


@pytest.mark.parametrize("rank_0_comes", [True, False])
def test_without_torchrun_the_store_is_rank_0s_and_its_absence_is_said(rank_0_comes: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ended = run_distributed(
        meet_without_an_agent, 2, port, rank_0_comes, TIMEOUT_S * slowness(), may_die=() if rank_0_comes else [0]
    )
    if rank_0_comes:
        assert ended == ["met", "met"]
    else:
        assert ended[1].startswith(
            "lost contact in start-up: the rendezvous store cannot be reached; is the first host"
        )


def test_a_rank_that_raises_is_the_cause_in_everybodys_words(
    launches: dict[str, tuple[list[Any], dict[str, Any]]],
) -> None:
    ended, status = launches["raises in forward"]
    assert (ended[1].code, ended[1].text) == (70, "ValueError: this sample is cursed")
    assert ended[0].code == 76
    assert "rank 1 failed at step 5: ValueError: this sample is cursed" in ended[0].text
    assert "Timed out" not in ended[0].text
    assert ended[0].seconds < FAR_S / 2 * slowness(), "no timeout was needed"
    assert status["exit_code"] == 76


def test_a_step_counted_twice_in_training_is_caught_at_the_tick(
    launches: dict[str, tuple[list[Any], dict[str, Any]]],
) -> None:
    ended, _ = launches["counts a step twice"]
    assert [end.code for end in ended] == [76, 76]
    assert ended[0].text == ended[1].text
    assert ended[0].text.startswith("ranks parted before tick 3, step 6: step differs on rank 1 from rank 0; ")


def test_ranks_that_disagree_on_what_learns_name_each_other_and_do_not_hang(
    launches: dict[str, tuple[list[Any], dict[str, Any]]],
) -> None:
    """A stage forged in mid-window: no gradient reaches rank 1's seed, and it says so; rank 0 waits for its part."""
    ended, _ = launches["forges a stage"]
    assert [end.code for end in ended] == [76, 78]
    assert re.match("no gradient reached the seed of slot r0c0 at site ", ended[1].text)
    assert re.search("rank 1 failed at step 7: no gradient reached the seed of slot r0c0", ended[0].text)
    assert max(end.seconds for end in ended) < (TIMEOUT_S + PATIENCE_S + SLACK_S) * slowness()


def test_another_registry_is_refused_at_the_handshake_by_its_entry(
    launches: dict[str, tuple[list[Any], dict[str, Any]]],
) -> None:
    ended, status = launches["has another registry"]
    assert [end.code for end in ended] == [76, 76]
    assert ended[0].text == ended[1].text == status["message"]
    assert re.fullmatch(
        r"ranks are unequal: registry: rank 0 has nothing besides, rank 1 has BCHW/extra\.v1:[0-9a-f]{16} "
        r"\(install the same blueprint packages on every host\)",
        ended[0].text,
    )

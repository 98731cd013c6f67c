"""Guards of growth and of training that no other test makes fire."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.accord.governor.config import GovernorConfig
from esper.accord.health import RunHealth
from esper.accord.state import RunState
from esper.accord.verdict import Symptom
from esper.drill.bus import Bus
from esper.leyline.errors import CheckpointError, ConfigError, DivergedError, LoopError
from esper.session.continuing import _lessons
from esper.session.record import on_every_rank
from esper.tolaria.checkpoint.shared import _open_others
from esper.tolaria.checkpoint.snapshot import COMMON_KEYS, read_common
from esper.tolaria.checkpoint.store import FORMAT, CheckpointStore, rank_file
from esper.tolaria.growth.continuation import Copies
from esper.tolaria.growth.planting import _take_moments
from esper.tolaria.growth.staging import Unfit, check_forward
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.orders.judge import Refused
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from esper.tolaria.training.governor import Governor
from esper.tolaria.training.patience import Improvement
from esper.tolaria.training.precision import LossScale
from tests.support.orders import order_of
from tests.support.refusals import fails
from tests.support.sessions import A, batch, host, make
from tests.tolaria.orders.test_judging import judge_in

X = batch(0, 2)[0]


def average_of(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[], None]:
    def load() -> None:
        average = WeightAverage(esper.attach(host(), {A: "0"}, X), 0.9)
        average.load_state_dict(change(average.state_dict()))

    return load


def longer(state: dict[str, Any]) -> dict[str, Any]:
    name, tensor = next(iter(state["averages"].items()))
    return {**state, "averages": {**state["averages"], name: tensor[:1]}}


def take_moments() -> None:
    source, to = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adagrad([source])
    source.grad = torch.ones(2)
    optimizer.step()
    _take_moments(optimizer, to, source, 0.5)


def stage() -> None:
    site = esper.attach(host(), {A: "0"}, X).sites[A]
    check_forward(nn.Conv2d(4, 5, 1).double(), site, "odd", dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: Improvement("loss", False, 0.0).load_state_dict({"best": 1.0}),
            CheckpointError,
            "^observers: 'bad' is missing$",
        ),
        (
            lambda: LossScale(SimpleNamespace()).load_state_dict({}),  # type: ignore[arg-type]
            CheckpointError,
            "^loss scale: .*scale.* and overflows are what it has$",
        ),
        (
            average_of(lambda state: {**state, "decay": 0.5}),
            CheckpointError,
            r"^ema: saved with the decay 0\.5, this is 0\.9$",
        ),
        (average_of(longer), CheckpointError, r"^ema: .*0\.weight is \(1, .*\) for a parameter \(4, "),
        (take_moments, ConfigError, r"^slots\.copy_moments: Adagrad keeps sum; set it to 0$"),
        (stage, Unfit, r"^odd maps \(1, 4, 6, 6\) torch\.float64 to \(1, 5, 6, 6\) torch\.float64$"),
    ],
)
def test_growth_and_training(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    fails(call, kind, text)


def saved(folder: Path, payload: dict[str, Any]) -> None:
    store = CheckpointStore(folder, attempt=1, keep=3)
    store.write(10, "state.pt", payload)
    store.write(10, rank_file(0), {})
    store.commit(10, tick=1, world_size=1, score=None)
    read_common(store, 10)


def continued(folder: Path) -> None:
    growth: Any = None  # the record is read before anything is touched
    Copies().rebuild({"run_state": {"tick": "three"}}, growth, "step-10")


def unwritten(folder: Path) -> None:
    judge = judge_in(folder)
    judge.ledger.path.mkdir()
    judge.admit(order_of("checkpoint"))


def nothing_to_go_back_to(folder: Path) -> None:
    terms: Any = None
    store = CheckpointStore(folder, attempt=1, keep=3)
    governor = Governor(GovernorConfig(), chance=1.0, terms=terms, world=alone(), store=store)
    sick = RunHealth(symptom=Symptom.COLLAPSE, words="the loss has collapsed")
    governor.find_recovery(RunState(slots=(), governor=sick), from_step=0)


def alone() -> World:
    return World(WorldConfig(nproc_per_node=1), ControlConfig())


def an_error_that_is_not_of_the_network() -> None:
    with alone().collective("sums"):
        raise RuntimeError("a shape is wrong")


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            nothing_to_go_back_to,
            DivergedError,
            r"^the loss has collapsed; there is no cleared snapshot to go back to; lower optim\.lr, or resume an",
        ),
        (lambda tmp: an_error_that_is_not_of_the_network(), RuntimeError, "^a shape is wrong$"),
        (
            lambda tmp: saved(tmp, dict.fromkeys(COMMON_KEYS - {"model"}) | {"weights": {}}),
            CheckpointError,
            r"step-00000010/state\.pt: missing \['model'\], unknown \['weights'\]$",
        ),
        (
            lambda tmp: saved(tmp, dict.fromkeys(COMMON_KEYS) | {"format": FORMAT, "run_state": {"tick": "three"}}),
            CheckpointError,
            r"step-00000010/state\.pt: run_state",
        ),
        (continued, CheckpointError, r"^step-10: continuation\.run_state"),
        (unwritten, Refused, r"ledger\.jsonl cannot be written \(Is a directory\)"),
        (lambda tmp: RunState(slots=()).slot("r9c9"), KeyError, "r9c9"),
    ],
)
def test_what_was_saved_and_agreed(
    call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path
) -> None:
    fails(lambda: call(tmp_path), kind, text)


def test_memory_of_another_process_of_that_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert _open_others("esper-none", str(os.getpid()), ["0"]) == []
    assert "local rank 0's memory cannot be opened (another process)" in "".join(capsys.readouterr())


def test_copies_of_a_session_without_a_batch() -> None:
    session = make()
    base: Any = SimpleNamespace(record=session.state)
    evaluator = session._loop.parts.evaluator
    fails(lambda: _lessons(evaluator, base), LoopError, r"^there is no batch of session\.loss to continue it on$")
    session.close()


def test_an_error_of_one_rank_is_an_error_of_all() -> None:
    def save(world: Any) -> None:
        with on_every_rank(world, "save"):
            if world.rank == 1:
                raise OSError("the disk is full")

    told = [rank.error for rank in Bus(3, seed=1).run(save)]
    assert [type(error) for error in told] == [CheckpointError, OSError, CheckpointError]
    assert {str(told[0]), str(told[2])} == {"save failed on rank 1: OSError: the disk is full"}

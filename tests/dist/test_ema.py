"""The average of the weights on several ranks: one average to the last bit, that of one rank, and no collective."""

from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.config.tree import EsperConfig
from esper.leyline.errors import EsperError
from tests.dist.test_equality import same_tensors
from tests.dist.test_operators import LIVES
from tests.support.collective_counter import CollectiveCounter
from tests.support.dist import run_distributed
from tests.support.sessions import LIFE_STEPS, batch, host, loss, make, probe, replica, shard, train
from tests.support.small_runs import train_on
from tests.support.tiny import bits, make_engine, tiny_config

DECAY = 0.9


def trained(rank: int, config: EsperConfig, run_dir: Path, resume_step: int | None = None) -> dict[str, Any]:
    """A run; the bits of the average after each tick, and its values at the end."""
    engine = make_engine(config, run_dir, attempt=1 if resume_step is None else 2)
    engine.begin(resume_step)
    assert engine.average is not None
    ticks = {}
    while engine.step < engine.terms.total_steps:
        train_on(engine, engine.step + 1)
        ticks[engine.step] = bits(engine.average.averages.items())
    engine.saves.finish(engine.state)
    end = {name: average.clone() for name, average in engine.average.averages.items()}
    engine.world.close()
    return {"steps": ticks, "end": end, "random": float(torch.rand(()))}


def config_of(**settings: Any) -> EsperConfig:
    wanted = {"trainer__steps": 36, "trainer__ema": DECAY, "trainer__precision": "fp64", "controller": LIVES}
    return tiny_config("cnn", **{**wanted, **settings})


def test_ranks_have_one_average_that_of_one_rank_and_resume_it(tmp_path: Path) -> None:
    config = config_of(checkpoint__every_ticks=4, checkpoint__keep=20)
    alone = trained(0, config, tmp_path / "alone")
    mine, theirs = run_distributed(trained, 2, config, tmp_path / "two")
    assert mine["steps"] == theirs["steps"]
    assert mine["random"] != theirs["random"], "ranks share a random stream: this test would see nothing"
    same_tensors(mine["end"], alone["end"])
    for found in run_distributed(trained, 2, config, tmp_path / "two", 16):
        assert found["steps"] == {step: now for step, now in mine["steps"].items() if step > 16}


def counted(rank: int, averaged: bool) -> dict[tuple[str, str], int]:
    session = make()
    if averaged:
        session.ema(DECAY)
    with CollectiveCounter() as counter:
        train(session, range(LIFE_STEPS))
    session.close()
    return dict(counter.counts)


def test_it_costs_no_collective() -> None:
    assert run_distributed(counted, 2, True) == run_distributed(counted, 2, False)


# a session ----------------------------------------------------------------------------------------------------------


def saved(rank: int, folder: Path) -> dict[str, Any]:
    session = make(host(dropout=0.3))
    session.ema(DECAY)
    train(session, range(11))
    session.save(folder / "s.pt")
    train(session, range(11, LIFE_STEPS))
    return look(session)


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(rank)
    session = esper.Session.restore(folder / "s.pt", lambda: host(dropout=0.3), loss=loss, probe=probe())
    train(session, range(session.steps, LIFE_STEPS))
    return look(session)


def look(session: esper.Session) -> dict[str, Any]:
    average = session._loop.average
    assert average is not None
    return {"replica": replica(session), "average": bits(average.averages.items())}


def test_a_session_saves_and_restores_it_on_every_rank(tmp_path: Path) -> None:
    wanted = run_distributed(saved, 2, tmp_path)
    assert wanted[0] == wanted[1]
    assert run_distributed(resumed, 2, tmp_path) == wanted


def on_one_rank(rank: int, folder: Path) -> str:
    """Rank 0 alone asks for an average, and evaluates with it by itself."""
    session = make(actions=())
    ema = session.ema(DECAY) if rank == 0 else None
    train(session, range(3))
    if ema is not None:
        with ema.applied(), torch.no_grad():
            session.model(shard(batch(0), 0, 2)[0])
    train(session, range(3, 5))
    try:
        session.save(folder / "s.pt")
    except EsperError as error:
        return str(error)
    return "saved"


def test_an_average_on_one_rank_alone_is_named_before_it_is_saved(tmp_path: Path) -> None:
    mine, theirs = run_distributed(on_one_rank, 2, tmp_path)
    assert mine == theirs
    assert "ema: rank 0 has 0.9 " in mine
    assert "rank 1 has none (call session.ema(decay) on every rank alike, at the same step)" in mine
    assert "weights" not in mine, "evaluating with it on one rank has left that rank's weights as they were"
    assert not (tmp_path / "s.pt").exists()


@pytest.mark.gpu
def test_on_devices_ranks_have_one_average(tmp_path: Path) -> None:
    mine, theirs = run_distributed(trained, 2, config_of(world__device="gpu"), tmp_path, device="gpu")
    assert mine["steps"] == theirs["steps"]

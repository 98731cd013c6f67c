"""Observers on real ranks: the same on all of them, or the start handshake refuses the run."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import esper.run.train
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.training.engine import Engine
from tests.support.averaging_observer import Averaging
from tests.support.killed_runs import live, prepare_run
from tests.support.tiny import tiny_plain


def observe_on(observed: tuple[int, ...], rank: int) -> None:
    """The worker of these ranks gets an observer more."""
    own = esper.run.train.assemble

    def assemble(*args: object, observers: Sequence[Observer] = (), **parts: object) -> Engine:
        averaging = Averaging()
        engine = own(*args, **parts, observers=[*observers, averaging])  # type: ignore[arg-type]
        averaging.watch(engine.grown.model)
        return engine

    if rank in observed:
        esper.run.train.assemble = assemble  # type: ignore[assignment]


@pytest.mark.parametrize(("observed", "code"), [((0, 1), 0), ((1,), 76)])
def test_ranks_with_different_observers_are_refused_by_name(
    observed: tuple[int, ...], code: int, tmp_path: Path
) -> None:
    run = prepare_run(tmp_path / "run", tiny_plain("cnn", trainer__steps=4))
    assert live(run, 2, prepare=functools.partial(observe_on, observed)) == [code, code]
    status = json.loads((run / "STATUS.json").read_text())
    if code == 0:
        saved = CheckpointStore(run / "checkpoints", attempt=0, keep=1).load(4, "state.pt")
        assert saved["observers"]["averaging"]["ticks"] == 2
        return
    own, other = "first_step saves governor", "first_step averaging saves governor"
    said = f"ranks are unequal: observers: rank 0 has {own}, rank 1 has {other}"
    assert status["message"] == said
    assert not (run / "checkpoints").exists() or not [*(run / "checkpoints").glob("step-*")]

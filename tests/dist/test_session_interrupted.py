"""Interrupted steps, batches and saves of a user's own loop on several ranks."""

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from esper.leyline.commands import Command
from esper.leyline.errors import EsperError, LockstepError, LoopError
from esper.leyline.events import Fault
from esper.leyline.stages import Op
from tests.support.dist import ROOT, run_distributed
from tests.support.sessions import batch, host, make, of, replica, shard, train

STOP, STEPS = 7, 12


def own(rank: int, step: int) -> tuple[torch.Tensor, ...]:
    return shard(batch(step), rank, 2)


def interrupted(rank: int, at: str) -> dict[str, Any]:
    """Rank 0 is struck before it has sent anything of the backward; rank 1 waits for it, or is struck beside it."""
    session = make(host(dropout=0.3))
    train(session, range(STOP))

    def strike(*call: Any) -> None:
        raise KeyboardInterrupt

    if at and rank == 0:
        hook = session.grown.model[0].weight.register_hook(strike)
        with contextlib.suppress(KeyboardInterrupt):
            session.loss(own(rank, STOP)).backward()
        hook.remove()
        session.discard()
    elif at == "backward":  # this rank's backward waits for the other's, until that gives up
        with contextlib.suppress(LockstepError):
            session.loss(own(rank, STOP)).backward()
        session.discard()
    elif at == "loss":
        session.loss(own(rank, STOP))
        session.discard()
    train(session, range(STOP, STEPS))
    found = replica(session)
    session.close()
    return found


@pytest.mark.parametrize("at", ["backward", "loss"])
def test_a_step_interrupted_on_some_ranks_is_dropped_on_all(at: str) -> None:
    wanted, _ = run_distributed(interrupted, 2, "")
    mine, theirs = run_distributed(interrupted, 2, at)
    assert mine == theirs == wanted


def saved(rank: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank 0 saves in the middle of a step that rank 1 has not begun."""
    session = make(host(dropout=0.3))
    train(session, range(STOP + 1))
    if rank == 0:  # a forward that needs no other rank: DDP's buckets have been rebuilt by now
        session.loss(own(rank, STOP + 1))
    session.save(folder / "x.pt")
    train(session, range(STOP + 1, STEPS))
    state = torch.load(folder / "x.pt", weights_only=True)
    state.pop("sha256")
    before = replica(session)
    session.load_state_dict(state)
    train(session, range(STOP + 1, STEPS))
    after = replica(session)
    session.close()
    return before, after


def test_a_save_in_the_middle_of_a_step_on_one_rank_is_the_last_whole_step(tmp_path: Path) -> None:
    wanted, _ = run_distributed(interrupted, 2, "")
    for before, after in run_distributed(saved, 2, tmp_path):
        assert before == after == wanted


def apart(rank: int) -> str:
    session = make(actions=())
    train(session, range(3))
    session._loop.steps += rank  # as after a Ctrl-C that struck one rank behind its optimizer step
    try:
        session.discard()
    except EsperError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def test_ranks_that_stand_at_different_steps_cannot_go_on_from_a_discard() -> None:
    for text in run_distributed(apart, 2):
        assert text == "LockstepError: ranks are unequal: steps: rank 0 has 3, rank 1 has 4"


# batches ------------------------------------------------------------------------------------------------------------


def loaded(rank: int, seed: int) -> tuple[str, list[str]]:
    session = make(actions=())
    torch.manual_seed(seed)
    x, y = batch(0, 64)
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(7 + seed * rank))
    for one in session.epoch(loader):
        session.loss(one).backward()
        session.step()
    found = [event.what for event in of(session, Fault)]
    session.close()
    return "", found


@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_that_train_on_the_same_batches_are_told_once(seed: int) -> None:
    for _, found in run_distributed(loaded, 2, seed):
        if seed:
            assert found == []
        else:
            (text,) = found
            assert text.startswith("ranks 0, 1 train on the same batches: give the loader sampler=DistributedSampler(")


def scripted(rank: int, page: str, folder: Path) -> tuple[list[str], set[int]]:
    """A script of the docs as it stands; what it was told of its batches, and the samples of its sampler."""
    os.chdir(folder)
    text = (ROOT / page).read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    world: dict[str, Any] = {"__name__": "script"}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("default")
        exec(code, world)
    found = [event.what for event in of(world["session"], Fault)]
    return found, set(world["sampler"])


@pytest.mark.parametrize("page", ["README.md", "docs/session.md"])
def test_the_scripts_in_the_docs_share_the_samples_among_the_ranks(page: str, tmp_path: Path) -> None:
    (told, mine), (_, theirs) = run_distributed(scripted, 2, page, tmp_path)
    assert told == []
    assert not mine & theirs
    assert mine | theirs == set(range(1200))


# saves --------------------------------------------------------------------------------------------------------------


class Mine:
    """A controller whose state becomes something that cannot be saved, and cannot be loaded."""

    name = "mine"
    bad = False

    def decide(self, observation: Any) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {1}} if self.bad else {}

    def load_state_dict(self, state: Any) -> None:
        if self.bad:
            raise ValueError("not mine")


def unsaveable(rank: int, folder: Path) -> list[str]:
    controller, texts = Mine(), []
    session = make(controller=controller)
    train(session, range(3))
    state = session.state_dict()
    controller.bad = True
    save, load = (lambda: session.save(folder / "x.pt"), lambda: session.load_state_dict(state))
    for call in (save, lambda: session.load_state_dict({**state, "format": 99}), load):
        try:
            call()
            texts.append("went on")
        except Exception as error:
            texts.append(str(error))
        if call is not load:
            train(session, [session.steps])  # nothing was changed
    with pytest.raises(LoopError, match=r"session\.load_state_dict\(\) was interrupted"):
        train(session, [session.steps])
    controller.bad = False
    session.load_state_dict(state)
    train(session, range(3, 6))
    session.close()
    return texts


def test_a_controller_that_cannot_be_saved_or_loaded_is_an_error_on_every_rank(tmp_path: Path) -> None:
    (save, check, load), others = run_distributed(unsaveable, 2, tmp_path)
    assert save == "controller.seen: a set cannot be saved, only numbers, text, tensors and containers"
    assert check.startswith("state: format 99")
    assert load == "not mine"
    assert others == [f"save failed on rank 0: {save}", check, f"load failed on rank 0: ValueError: {load}"]


# commands -----------------------------------------------------------------------------------------------------------


class Slip(Mine):
    def decide(self, observation: Any) -> list[Any]:
        command: Any = {"op": Op.GERMINATE, "blueprint": "norm", "operator": "ADD"}
        return [Command(slot="r0c0", **command)]


def slipped(rank: int) -> str:
    session = make(controller=Slip())
    try:
        train(session, range(3))
    except EsperError as error:
        return str(error)
    return "went on"


def test_a_slip_in_a_command_is_the_same_error_on_every_rank() -> None:
    mine, theirs = run_distributed(slipped, 2)
    assert mine == theirs
    assert "rank 0 failed in DECIDE: controller mine: r0c0.operator = 'ADD': expected one of Operator.ADD" in mine

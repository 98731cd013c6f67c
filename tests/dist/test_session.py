"""Growth in a user's own loop on several ranks: one network to the last bit, and the network of one rank."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import esper
from esper.leyline.errors import ConfigError, EsperError, LockstepError
from esper.leyline.events import ContributionMeasured
from tests.support.dist import run_distributed
from tests.support.sessions import (
    EVERY,
    GATES,
    LIFE_STEPS,
    STAGES,
    A,
    batch,
    host,
    loss,
    make,
    moments,
    of,
    probe,
    replica,
    scheduled,
    shard,
    stages,
    train,
)
from tests.support.tiny import act

TOLERANCE = 1e-9


def lived(rank: int, batch_norm: bool = False) -> dict[str, Any]:
    """A whole life; after every tick what must be equal on all ranks."""
    session, ticks = make(host(batch_norm=batch_norm)), []
    for step in range(LIFE_STEPS):
        train(session, [step])
        if session.steps % EVERY == 0:
            ticks.append(replica(session))
    tensors = {name: t.detach().clone() for name, t in session.grown.model.state_dict().items()} | moments(session)
    readings = [(event.contribution, event.contribution) for event in of(session, ContributionMeasured)]
    readings += [(slot.contribution, slot.gradient_norm) for slot in session.state.slots]
    found = {"ticks": ticks, "tensors": tensors, "stages": stages(session), "readings": readings}
    session.close()
    return found | {"random": float(torch.rand(()))}


def test_two_ranks_are_one_network_and_that_of_one_rank() -> None:
    alone = lived(0)
    mine, theirs = run_distributed(lived, 2)
    assert mine["ticks"] == theirs["ticks"]
    assert mine["random"] != theirs["random"], "ranks share a random stream: this test would see nothing"
    assert mine["stages"] == alone["stages"] == STAGES
    assert mine["tensors"].keys() == alone["tensors"].keys()
    for name, tensor in alone["tensors"].items():
        torch.testing.assert_close(mine["tensors"][name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
    for found, wanted in zip(mine["readings"], alone["readings"], strict=True):
        for one, other in zip(found, wanted, strict=True):
            assert (one.n, one.tick, one.status) == (other.n, other.tick, other.status)
            if other.value is not None:
                assert one.value == pytest.approx(other.value, rel=TOLERANCE, abs=TOLERANCE)


def test_running_statistics_are_averaged_at_ticks() -> None:
    mine, theirs = run_distributed(lived, 2, True)
    assert mine["ticks"] == theirs["ticks"]


# going on -----------------------------------------------------------------------------------------------------------


def saved(rank: int, folder: Path) -> dict[str, Any]:
    session = make(host(dropout=0.3))
    train(session, range(11))
    session.save(folder / "s.pt")
    train(session, range(11, LIFE_STEPS))
    return {"replica": replica(session), "random": torch.rand(3).tolist()}


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(rank)
    session = esper.Session.restore(folder / "s.pt", lambda: host(dropout=0.3), loss=loss, probe=probe())
    at = session.steps
    train(session, range(at, LIFE_STEPS))
    return {"replica": replica(session), "random": torch.rand(3).tolist()}


def test_a_restore_goes_on_bit_for_bit_on_every_rank(tmp_path: Path) -> None:
    wanted = run_distributed(saved, 3, tmp_path)
    assert run_distributed(resumed, 3, tmp_path) == wanted
    assert len({tuple(rank["random"]) for rank in wanted}) == 3
    fewer = run_distributed(resumed, 2, tmp_path)
    assert fewer[0]["replica"] == fewer[1]["replica"]
    assert fewer[0]["replica"]["state"]["samples"] == wanted[0]["replica"]["state"]["samples"]


# what goes wrong ----------------------------------------------------------------------------------------------------


def failing(fn: Any, *args: Any) -> str:
    try:
        fn(*args)
    except EsperError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def short(rank: int, sized: bool, batches: dict[int, int]) -> tuple[int, int]:
    session = make(actions=())
    data = [shard(batch(step), rank, 2) for step in range(batches[rank])]
    for one in session.epoch(data if sized else iter(data)):
        session.loss(one).backward()
        session.step()
    train(session, [0])
    return session.steps, session.state.tick


@pytest.mark.parametrize("sized", [True, False])
def test_a_short_rank_ends_the_epoch_for_all(sized: bool) -> None:
    assert run_distributed(short, 2, sized, {0: 5, 1: 4}) == [(5, 2), (5, 2)]


def short_by_hand(rank: int) -> str:
    session = make(actions=(), control={"timeout_s": 5.0, "slow_timeout_s": 5.0})
    with session:
        return failing(train, session, range(6 if rank == 0 else 4))


def test_a_rank_that_stops_early_in_a_loop_by_hand_is_named() -> None:
    mine, theirs = run_distributed(short_by_hand, 2)
    assert theirs == "nothing"
    assert mine.startswith("LockstepError: lost contact in backward: rank 1 closed its session at step 4"), mine


def unequal(rank: int, what: str) -> str:
    model, more = host(), {}
    if what == "weights" and rank == 1:
        with torch.no_grad():
            model[0].bias.add_(1e-9)
    if what == "probe" and rank == 1:
        more["probe"] = list(reversed(probe()))
    if what == "settings" and rank == 1:
        more["seed_lr_scale"] = 0.5
    return failing(lambda: make(model, **more))


@pytest.mark.parametrize("what", ["weights", "probe", "settings"])
def test_ranks_that_bring_different_things_are_refused(what: str) -> None:
    mine, theirs = run_distributed(unequal, 2, what)
    assert mine == theirs
    assert f"LockstepError: ranks are unequal: {what}: rank 0 has " in mine


class Idle(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = host(), torch.nn.Linear(2, 2).double()

    def __getitem__(self, index: int) -> torch.nn.Module:
        return self.body[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def idle(rank: int, find_unused: bool) -> str:
    torch.manual_seed(0)
    model = Idle()
    grown = esper.attach(model, {A: "body.0"}, batch(0, 2)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    born = act(1, A, "GERMINATE", blueprint="norm"), act(3, A, "ADVANCE")  # it learns in the last steps
    session = esper.Session(
        grown,
        optimizer,
        controller=scheduled(born),
        loss=loss,
        probe=probe(),
        gates=GATES,
        every=2,
        find_unused=find_unused,
        slots={"incubation": "ste" if find_unused else "shadow"},
    )
    said = failing(train, session, range(9))
    return said if said != "nothing" else session.state.slot(A).stage.name


@pytest.mark.parametrize("find_unused", [False, True])
def test_parameters_without_a_gradient_are_named(find_unused: bool) -> None:
    mine, theirs = run_distributed(idle, 2, find_unused)
    assert mine == theirs
    advice = "freeze them (requires_grad_(False)), or set find_unused=True and slots.incubation to ste or immediate"
    text = f"ConfigError: no gradient reaches spare.weight, spare.bias of the host; {advice}"
    assert mine == ("TRAINING" if find_unused else text)


def mixed(rank: int) -> str:
    session = make(actions=())
    data = [batch(0)]
    return failing(lambda: next(session.epoch(data if rank else iter(data))))


def test_loaders_of_two_kinds_are_refused_on_every_rank() -> None:
    mine, theirs = run_distributed(mixed, 2)
    assert mine == theirs
    assert mine.startswith(f"{ConfigError.__name__}: loader: it has a length on some ranks only; use the same kind")


def parted(rank: int) -> str:
    session = make()
    train(session, range(9))
    if rank == 1:
        with torch.no_grad():
            next(session.grown.slots[A].seed.parameters()).mul_(1.0 + 1e-12)
    return failing(train, session, range(9, 13))


def test_a_rank_that_parted_is_named_at_the_next_tick() -> None:
    mine, theirs = run_distributed(parted, 2)
    assert mine == theirs
    assert mine.startswith(f"{LockstepError.__name__}: ranks parted before tick 5, step 10: slot {A} weights differs")


def guest(rank: int) -> dict[str, Any]:
    """The user's program has a process group of its own, and keeps it."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    session = make()
    train(session, range(LIFE_STEPS))
    found = replica(session)
    session.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"replica": found, "total": total.item(), "stages": stages(session), "rank": os.environ["RANK"]}


def test_a_process_group_of_the_users_is_used_and_left() -> None:
    mine, theirs = run_distributed(guest, 2)
    assert mine["replica"] == theirs["replica"]
    assert mine["total"] == 2.0
    assert mine["stages"] == STAGES


def accumulated(rank: int) -> dict[str, Tensor]:
    session = make()
    for step in range(12):
        x, y = shard(batch(step), rank, session.world.size)
        half = len(x) // 2
        with session.accumulate():
            session.loss((x[:half], y[:half])).backward()
        session.loss((x[half:], y[half:])).backward()
        session.step()
    return {name: p.detach() for name, p in session.grown.model.named_parameters()}


def test_an_accumulated_window_is_reduced_once_and_right() -> None:
    alone = accumulated(0)
    mine, theirs = run_distributed(accumulated, 2)
    for name, wanted in alone.items():
        assert torch.equal(mine[name], theirs[name])
        torch.testing.assert_close(mine[name], wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=name)

"""Sites that a rank may leave out, or that are computed again in backward, under real data parallel training."""

import contextlib
from typing import Any

import torch

import esper
from esper.leyline.alpha import Operator
from tests.kasmina.slots.test_left_out import session as begin
from tests.kasmina.slots.test_recomputed import batches as sequences_of
from tests.kasmina.slots.test_recomputed import life
from tests.support.checkpointed import SITES, ask, sequences, twins
from tests.support.dist import run_distributed
from tests.support.patience import load
from tests.support.sessions import GATES, replica
from tests.support.skipping import ask as ask_skipping
from tests.support.skipping import batches


def leave_out(rank: int, limit: float, *, find_unused: bool) -> str:
    """What a rank's loop ends with when rank 1 leaves the site out now and then."""
    control = {"timeout_s": limit, "slow_timeout_s": limit}
    session = begin("branch", "immediate", control=control, find_unused=find_unused)
    model: Any = session.grown.model
    try:
        for step, batch in enumerate(session.epoch(batches(16, rank))):
            model.skip = rank == 1 and step >= 9 and step % 3 == 0
            session.loss(batch).backward()
            session.step()
        return str(replica(session)["parameters"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        with contextlib.suppress(Exception):
            session.close()


def skip_some(rank: int, incubation: str) -> dict[str, Any]:
    """A life in which the site is left out by one rank, by the other, by both: gradients of the seed, step by step."""
    session = begin("branch", incubation, may_skip=True)
    model: Any = session.grown.model
    holder, steps = session.grown.slots["r0c0"], []
    for step, batch in enumerate(session.epoch(batches(18, rank))):
        model.skip = step % 4 in ((1, 3), (2, 3))[rank]
        learning = [p for p in holder.parameters() if p.requires_grad]
        if incubation == "shadow" and session.state.slot("r0c0").stage.name == "TRAINING":
            local = session.grown.shadow_loss("r0c0", lambda call, batch=batch: ask_skipping(call, batch).mean())
        else:
            local = ask_skipping(model, batch).mean()
        own = torch.autograd.grad(local, learning, allow_unused=True) if learning else ()
        session.loss(batch).backward()
        reduced = [None if p.grad is None else p.grad.clone() for p in learning]
        before = [p.detach().clone() for p in learning]
        session.step()
        moved = [not torch.equal(p, was) for p, was in zip(learning, before, strict=True)]
        if learning and reduced[0] is not None:
            steps.append((step, list(own), reduced, any(moved)))
    found = replica(session)["parameters"]
    session.close()
    return {"steps": steps, "parameters": found}


def live_again(rank: int, form: str) -> dict[str, Any]:
    """The life of a seed inside a segment, on this rank's own batches."""
    torch.manual_seed(rank)
    model = twins(form, drop=0.0)[0]
    grown = esper.attach(model, {"r0c0": SITES["inside"]}, sequences())
    session = esper.Session(
        grown,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        controller={"kind": "schedule", "actions": life("mlp_small", Operator.CONFIDENCE)},
        loss=ask,
        probe=sequences_of(9, 4),
        every=2,
        gates=GATES,
        slots={"incubation": "shadow"},
        class_logits=True,
    )
    for batch in session.epoch(sequences_of(50 + rank, 22)):
        session.loss(batch).backward()
        session.step()
    found = replica(session)
    session.close()
    return {"parameters": found["parameters"], "stage": session.state.slot("r0c0").stage.name}


def run_all(rank: int, limit: float) -> dict[str, Any]:
    lives = {form: live_again(rank, form) for form in ("plain", "default", "reentrant")}
    allowed = leave_out(rank, limit, find_unused=True)
    skipped = {incubation: skip_some(rank, incubation) for incubation in ("shadow", "immediate")}
    refused = leave_out(rank, limit, find_unused=False)
    return {"lives": lives, "skipped": skipped, "allowed": allowed, "refused": refused}


def check_skipped(zero: dict[str, Any], one: dict[str, Any]) -> None:
    """The mean over ranks, exactly, where the site ran on one; no step where it ran on none; one network after all."""
    assert zero["parameters"] == one["parameters"]
    kinds = set()
    for (step, own, reduced, moved), (again, others, theirs, moved_too) in zip(
        zero["steps"], one["steps"], strict=True
    ):
        assert (step, moved) == (again, moved_too)
        kinds.add(step % 4)
        assert moved == (step % 4 != 3)
        for mine, other, mean, same in zip(own, others, reduced, theirs, strict=True):
            assert torch.equal(mean, same)
            assert torch.equal(mean, mine / 2 + other / 2)
    assert kinds == {0, 1, 2, 3}


def test_sites_that_are_computed_again_or_left_out_by_one_rank() -> None:
    """The first as the twin; the second exact where it may skip, else named on both ranks, never in the words of DDP,
    unless unused is allowed."""
    zero, one = run_distributed(run_all, 2, 8.0 * load())
    assert zero["lives"] == one["lives"]
    assert zero["lives"]["default"] == zero["lives"]["reentrant"] == zero["lives"]["plain"]
    assert zero["lives"]["plain"]["stage"] == "FOSSILIZED"
    for incubation in ("shadow", "immediate"):
        check_skipped(zero["skipped"][incubation], one["skipped"][incubation])
    assert zero["allowed"] == one["allowed"]
    assert "Error" not in zero["allowed"]
    named = "ConfigError: site 'site' of slot r0c0 did not run in a forward in which its seed learns"
    assert one["refused"].startswith(named)
    assert "rank 1 closed its session" in zero["refused"]
    assert "Expected to have finished reduction" not in zero["refused"]

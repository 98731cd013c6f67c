"""A host of half precision on two ranks: seeds in float32 beside it, every bit equal."""

from typing import Any

import torch

from tests.support.dist import run_distributed
from tests.support.sessions import A, host, make, replica, train


def lived(rank: int) -> dict[str, Any]:
    session = make(host(dtype=torch.bfloat16))
    train(session, range(20))
    return {"seed": sorted({str(p.dtype) for p in session.grown.slots[A].parameters()}), **replica(session)}


def test_ranks_hold_the_same_seeds_in_float32() -> None:
    mine, theirs = run_distributed(lived, 2)
    assert mine == theirs
    assert mine["seed"] == ["torch.float32"]

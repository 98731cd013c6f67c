"""The harness itself: a test of lockstep is worth what its ranks are."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.support.dist import Died, RanksFailed, run_distributed


def meet(rank: int, factor: int) -> tuple[int, float, float]:
    dist.init_process_group("gloo")
    vector = torch.tensor([float(rank * factor)])
    dist.all_reduce(vector)
    return dist.get_world_size(), float(vector), float(torch.rand(()))


def misbehave(rank: int, how: str) -> str:
    if rank == 1:
        if how == "raise":
            raise ValueError("rank one says no")
        if how == "warn":
            warnings.warn("odd", UserWarning, stacklevel=1)
        if how == "exit":
            os._exit(7)
        if how == "hang":
            time.sleep(60)
    return "fine"


def test_ranks_meet_and_draw_differently() -> None:
    results = run_distributed(meet, 3, 10)
    assert [result[:2] for result in results] == [(3, 30.0)] * 3
    assert len({result[2] for result in results}) == 3


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "rank one says no"), ("warn", "UserWarning: odd"), ("exit", "exit code 7"), ("hang", "in misbehave")],
)
def test_a_rank_that_fails_fails_the_test(how: str, said: str) -> None:
    with pytest.raises(RanksFailed, match=said):
        run_distributed(misbehave, 2, how, still_s=2.0)


def test_a_rank_may_die_where_the_test_says_so() -> None:
    assert run_distributed(misbehave, 2, "exit", may_die=[1]) == ["fine", Died(7)]
    assert run_distributed(misbehave, 2, "hang", may_die=[1]) == ["fine", Died(-9)]

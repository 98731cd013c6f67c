"""Buffers of a host that each rank fills by itself: which are averaged, which are named, and what they are named as."""

import os

import pytest
import torch
from torch import Tensor, nn

from esper.leyline.errors import LockstepError
from tests.support.dist import run_distributed
from tests.support.sessions import EVERY, host, make, train


class Counter(nn.Module):
    """Counts the samples above zero that this rank has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen += int((x.flatten(1).sum(1) > 0).sum()) + int(os.environ["RANK"])
        return x


def with_layer(layer: nn.Module) -> nn.Sequential:
    model = host()
    model[2] = layer
    return model


def counted(rank: int) -> str:
    session = make(with_layer(Counter()), actions=[], control={"digest_every": 2})
    with pytest.raises(LockstepError) as caught:
        train(session, range(4 * EVERY))
    return str(caught.value)


def test_a_counter_that_each_rank_counts_by_itself_is_named() -> None:
    texts = run_distributed(counted, 2)
    assert texts[0] == texts[1]
    assert texts[0] == (
        "ranks parted before tick 2, step 4: parameters differs on rank 1 from rank 0; what differs: 2.seen (buffer of "
        "host); a buffer that each rank fills by itself does not belong in state_dict: persistent=False"
    )


def many(rank: int) -> str:
    session = make(actions=[], control={"digest_every": 2})
    train(session, range(EVERY + 1))
    if rank == 2:
        with torch.no_grad():
            for parameter in session.grown.model.parameters():
                parameter.add_(1e-9)
    with pytest.raises(LockstepError) as caught:
        train(session, range(EVERY + 1, 4 * EVERY), 12)
    return str(caught.value)


def test_of_many_tensors_the_first_are_named_and_the_rest_counted() -> None:
    texts = set(run_distributed(many, 3))
    assert texts == {
        "ranks parted before tick 2, step 4: parameters differs on rank 2; what differs: 0.weight (host), 0.bias "
        "(host), 3.weight (host) and 3 more"
    }

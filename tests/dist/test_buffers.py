"""Buffers of a host that each rank fills by itself: which are averaged, which are named, and what they are named as."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.leyline.errors import ConfigError, LockstepError
from esper.leyline.events import Fault
from tests.support.dist import run_distributed
from tests.support.sessions import EVERY, host, make, of, train


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


class Queue(nn.Module):
    """A memory of normalised features, as contrastive losses keep one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.ones(4, 4, dtype=torch.float64), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                new = F.normalize(x[:1].mean((2, 3)) + 1e-3, dim=1)
                self.queue.copy_(torch.cat([new, self.queue[:-1]]))
        return x


def queued(rank: int, average: list[str], folder: Path) -> dict[str, Any]:
    session = make(with_layer(Queue()), actions=[], control={"digest_every": 2}, average_buffers=average)
    train(session, range(7 * EVERY + 1))
    session.save(folder / "s.pt")
    told = [event.what for event in of(session, Fault)]
    queue = session.grown.model[2].queue
    return {"told": told, "norms": queue.norm(dim=1).tolist(), "queue": queue.tolist()}


def test_a_queue_stays_a_ranks_own_and_is_told_once(tmp_path: Path) -> None:
    mine, theirs = run_distributed(queued, 2, [], tmp_path)
    assert mine["queue"] != theirs["queue"]
    assert mine["norms"] == pytest.approx([1.0] * 4, abs=1e-12)
    assert [text.startswith("buffers of the host differ between ranks") for text in mine["told"]] == [True]
    assert ": 2.queue;" in mine["told"][0]


def test_a_queue_that_the_user_names_is_averaged(tmp_path: Path) -> None:
    mine, theirs = run_distributed(queued, 2, ["*.queue"], tmp_path)
    assert mine["told"] == theirs["told"] == []
    assert mine["queue"] == theirs["queue"], "a save averages, too"
    assert min(mine["norms"]) < 1 - 1e-6


def test_a_name_that_no_buffer_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"average_buffers: 'que' matches no float buffer .* has 2\.queue"):
        make(with_layer(Queue()), actions=[], average_buffers=["que"])

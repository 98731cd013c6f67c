"""What ranks of a user's own loop bring: probes with random augmentation, frozen hosts, layers frozen on the way."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from esper.leyline.errors import EsperError
from tests.support.dist import run_distributed
from tests.support.sessions import LIFE, batch, host, make, replica, stages, train


class Augmented(Dataset[Any]):
    """Samples with noise from one source."""

    def __init__(self, source: str, rank: int) -> None:
        self.source, self.own = source, torch.Generator().manual_seed(rank)
        self.x, self.y = batch(-1, 64)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = {
            "torch": lambda: torch.rand(()).item(),
            "numpy": lambda: float(np.random.rand()),
            "random": random.random,
            "own": lambda: torch.rand((), generator=self.own).item(),
        }[self.source]()
        return self.x[index] + 0.1 * noise, self.y[index]


def augmented(rank: int, source: str) -> tuple[str, bool]:
    random.seed(rank)
    np.random.seed(rank)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    try:
        session = make(probe=DataLoader(Augmented(source, rank), 16), actions=())
    except EsperError as error:
        return str(error), True
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    session.close()
    return "began", torch.equal(before[0], after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("source", ["torch", "numpy", "random"])
def test_a_probe_with_random_augmentation_is_compared_under_fixed_streams(source: str) -> None:
    assert run_distributed(augmented, 2, source) == [("began", True)] * 2


def test_a_probe_that_differs_by_rank_says_what_to_do() -> None:
    for text, _ in run_distributed(augmented, 2, "own"):
        assert text.startswith("ranks are unequal: probe: rank 0 has 64 samples")
        assert "a random augmentation draws from torch's, numpy's or random's global generator" in text


def frozen(rank: int) -> tuple[dict[str, Any], list[Any]]:
    session = make(host().requires_grad_(False), actions=LIFE[:4])
    train(session, range(16))
    found = replica(session), stages(session)
    session.close()
    return found


def test_a_frozen_host_grows_on_every_rank_alike() -> None:
    (mine, lived), (theirs, _) = run_distributed(frozen, 2)
    assert mine == theirs
    assert ("r0c0", "BLENDING") in lived


def unfrozen(rank: int) -> tuple[str, dict[str, Any]]:
    model = host()
    model[0].requires_grad_(False)
    session, text = make(model, actions=()), ""
    train(session, range(3))
    model[0].requires_grad_(True)
    model[7].requires_grad_(False)
    try:
        train(session, [3])
    except EsperError as error:
        text = str(error)
    session.discard()
    train(session, range(3, 8))
    found = replica(session)
    session.close()
    return text, found


def test_layers_that_are_frozen_and_unfrozen_are_named_and_then_followed() -> None:
    (text, mine), (_, theirs) = run_distributed(unfrozen, 2)
    assert text.startswith("requires_grad of 0.bias, 0.weight, 7.bias, 7.weight was changed since the last tick")
    assert mine == theirs

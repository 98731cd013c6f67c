"""What measures leaves the random streams alone, and touches no device but its own."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper.kasmina import streams
from esper.kasmina.streams import (
    cuda_devices,
    rng_state,
    seed_rank,
    seed_streams,
    set_rng_state,
    undisturbed,
)
from esper.leyline.errors import CheckpointError
from esper.session.batches import Batches


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.device]]:
    """The CUDA devices whose streams are read, at each time; no device is really asked."""
    lists: list[list[torch.device]] = []
    read, put_back = streams.read_streams, streams.set_streams
    monkeypatch.setattr(streams, "read_streams", lambda devices=(): (lists.append(list(devices)), read())[1])
    monkeypatch.setattr(streams, "set_streams", lambda state, devices=(): put_back(state))
    return lists


def test_draws_inside_the_block_leave_the_stream_where_it_was():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with undisturbed(torch.device("cpu")):
        first = torch.rand(100)
    with undisturbed(torch.device("cpu"), seed=0):
        seeded = torch.rand(2)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first[:4], expected)
    torch.manual_seed(0)
    assert torch.equal(seeded, torch.rand(2))


def test_pythons_and_numpys_streams_are_kept_too():
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.standard_normal())

    random.seed(5)
    np.random.seed(5)
    random.gauss(0, 1)  # the second of a pair waits inside the state
    np.random.standard_normal()
    device = torch.device("cpu")
    saved = rng_state(device)
    with undisturbed(device, seed=1):
        inside = draw()
    expected = draw()
    set_rng_state({key: None if value is None else value.clone() for key, value in saved.items()}, device)
    assert draw() == expected
    seed_streams(1)
    assert draw() == inside


def test_a_generator_that_cannot_be_saved_is_named(monkeypatch):
    monkeypatch.setattr(np.random, "get_state", lambda legacy: {"bit_generator": "PCG64"})
    with pytest.raises(CheckpointError, match="numpy's global generator is a PCG64"):
        rng_state(torch.device("cpu"))


def test_only_the_named_devices_are_forked(forked):
    device = torch.device("cuda", 3)
    with undisturbed(device, torch.device("cpu"), nn.Linear(2, 2), torch.zeros(2)):
        pass
    assert forked == [[device]]


def test_buffers_count_too():
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2, device="meta"))

    assert cuda_devices(Held()) == []


def test_held_out_batches_of_a_session_touch_the_models_device_alone(forked):
    device = torch.device("cuda", 1)
    Batches([(torch.rand(4, 2), torch.zeros(4)) for _ in range(3)], "probe", device)
    loader = Batches(DataLoader(TensorDataset(torch.rand(9, 2)), batch_size=4), "probe", device)
    assert len(list(loader.share(range(9), 0, 1))) == 3
    assert len(forked) == 4
    assert all(devices == [device] for devices in forked)


def test_ranks_have_streams_of_their_own():
    draws = set()
    for rank in range(4):
        for step in (None, 0, 10):
            seed_rank(7, rank, step)
            draws.add(float(torch.rand(())))
    assert len(draws) == 11, "rank 0 begins as it goes on from step 0; all others differ"
    assert streams.rng_state(torch.device("cpu"))["rng_cuda"] is None

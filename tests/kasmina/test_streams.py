"""What measures leaves the random streams alone, and touches no device but its own."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper.kasmina import streams
from esper.kasmina.streams import cuda_devices, seed_rank, undisturbed
from esper.session.batches import Batches


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.device]]:
    """The device lists of every fork; torch is asked for the CPU's stream alone."""
    lists: list[list[torch.device]] = []
    real = torch.random.fork_rng

    def fork_rng(devices=None, **kwargs):
        assert devices is not None, "without a list torch forks the stream of every GPU of the machine"
        lists.append(list(devices))
        return real([], **kwargs)

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
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

"""The forecast of a seed's memory against tensors that are counted while it trains, and against its formula."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import esper
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.births.own import find_fits
from esper.kasmina.blueprints import registry
from esper.kasmina.memory import HeardMemory, SeedMemory, copy_memory, seed_memory, shadow_memory
from esper.kasmina.slots.phases import Phase
from esper.tolaria.growth.forecast import Forecast

BATCH = 16
SCALARS = 64  # bytes: alpha, its fade, a loss


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _forget(self, place: int) -> None:
        self.now -= self.sizes.pop(place)


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "map": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)
        ),
        (3, 12, 12),
        None,
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)),
        (20, 8),
        "BTC",
    ),
}


def measured(kind: str, site: str, blueprint: str | None, *, shadow: bool = False) -> int:
    """The peak of the second step of training with AdamW, host and seed, counted from before the seed was built."""
    build, shape, layout = HOSTS[kind]
    torch.manual_seed(0)
    model, x = build(), torch.randn(BATCH, *shape)
    grown = esper.attach(model, {"r0c0": site}, x[:2], layout=layout)
    place, slot = grown.sites["r0c0"], grown.slots["r0c0"]
    gc.collect()
    with Live() as live:
        if blueprint is not None:
            key = birth_key(0, "r0c0", 1)
            made = {"dim": place.dim, "topology": place.topology, "key": key, "dtype": torch.float32}
            slot.plant(build_seed(blueprint, device=torch.device("cpu"), **made))
            slot.phase = Phase.OFF if shadow else Phase.BLEND
            slot.set_alpha(0.0 if shadow else 0.5, 1.0)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            live.peak = live.now
            loss = model(x).square().mean()
            if shadow and blueprint is not None:
                loss = loss + grown.incubate("r0c0", x).square().mean()
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize(("kind", "site"), [("map", "1"), ("sequence", "3")])
def test_a_forecast_is_never_below_what_is_counted_and_close_above(kind: str, site: str) -> None:
    build, shape, layout = HOSTS[kind]
    place = esper.attach(build(), {"r0c0": site}, torch.zeros(2, *shape), layout=layout).sites["r0c0"]
    feature, bare = 4 * BATCH * torch.Size(place.shape).numel(), measured(kind, site, None)
    for info in registry.catalogue(place.topology, place.dim, place.positions):
        need = seed_memory(place.topology, info.name, place.dim, place.shape, torch.float32)
        assert need.parameters == info.parameters
        forecast = need.forecast(BATCH, number=4, moments=2, ranks=1)
        counted = measured(kind, site, info.name) - bare
        assert counted - SCALARS <= forecast <= 1.6 * counted + feature, (info.name, counted, forecast)


@pytest.mark.parametrize(("kind", "site"), [("map", "1"), ("map", "3"), ("sequence", "1"), ("sequence", "3")])
def test_a_shadow_forward_is_in_the_forecast(kind: str, site: str) -> None:
    build, shape, layout = HOSTS[kind]
    example = torch.zeros(2, *shape)
    grown = esper.attach(build(), {"r0c0": site}, example, layout=layout)
    place, before = grown.sites["r0c0"], {name: p.requires_grad for name, p in grown.model.named_parameters()}
    each = shadow_memory(grown, example)
    assert {name: p.requires_grad for name, p in grown.model.named_parameters()} == before
    feature, bare = 4 * BATCH * torch.Size(place.shape).numel(), measured(kind, site, None)
    blueprint = registry.catalogue(place.topology, place.dim, place.positions)[-1].name
    need = seed_memory(place.topology, blueprint, place.dim, place.shape, torch.float32)
    own = need.forecast(BATCH, number=4, moments=2, ranks=1)
    forecast = Forecast(batch=BATCH, moments=2, ranks=1, dtype=torch.float32, heard=HeardMemory(shadows=each))
    assert forecast.bytes_of("r0c0", place, blueprint) == own + forecast.shadow_of("r0c0", need.parameters)
    counted = measured(kind, site, blueprint, shadow=True) - bare
    assert counted - SCALARS <= forecast.bytes_of("r0c0", place, blueprint) <= 1.6 * counted + feature


def test_what_is_behind_a_later_site_is_less() -> None:
    build, shape, layout = HOSTS["map"]
    example = torch.zeros(2, *shape)
    both = shadow_memory(esper.attach(build(), {"r0c0": "1", "r1c0": "3"}, example, layout=layout), example)
    assert 0 < both["r1c0"] < both["r0c0"]
    (alone,) = shadow_memory(esper.attach(build(), {"r1c0": "3"}, example, layout=layout), example).values()
    assert alone == both["r1c0"]


def test_counting_a_shadow_leaves_the_model_and_the_streams_as_they_were() -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    example = torch.randn(4, 8)
    grown = esper.attach(host, {"r0c0": "0"}, example)
    state, stream = {k: v.clone() for k, v in host.state_dict().items()}, torch.get_rng_state()
    shadow_memory(grown, example)
    assert not host.training
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(v, host.state_dict()[k]) for k, v in state.items())


def test_the_formula() -> None:
    need = SeedMemory(parameters=100, fixed=7, sample=50)
    assert need.forecast(8, number=4, moments=2, ranks=1) == 100 * 4 * 4 + 7 + 8 * 50
    assert need.forecast(8, number=4, moments=1, ranks=3) == 100 * 4 * 4 + 7 + 8 * 50, "the reducer has a copy"
    assert need.forecast(8, number=8, moments=0, ranks=1) == 100 * 8 * 2 + 7 + 8 * 50


class Block(nn.Module):
    """A residual block of the host's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def test_a_copy_of_the_hosts_block_is_counted_on_the_example() -> None:
    example = torch.randn(4, 20, 8)
    grown = esper.attach(nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 3)), {"r0c0": "1"}, example, layout="BTC")
    fits, _ = find_fits(grown, example, identity=False, patterns=())
    need = copy_memory(grown, "r0c0", fits["r0c0"])
    assert need.parameters == 8 * 32 + 32 + 32 * 8 + 8
    assert need.sample == pytest.approx(4 * 20 * (32 + 8 + 32), rel=0.3), "of the ReLU, a feature, a gradient"

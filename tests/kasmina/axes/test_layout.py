"""The axes of features are found by varying the example; what stays open is asked for by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology, order_of, topology_of
from tests.support.bitwise import bits


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def encoder(first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """A language model over [T, B, C] inside, [B, T] outside."""

    def __init__(self, both: bool = False) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(17, 6), nn.LSTM(6, 8, bidirectional=both)
        self.project = nn.Linear(16 if both else 8, 8)
        self.head = nn.Linear(8, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.project(self.rnn(self.embed(tokens.t()))[0])).transpose(0, 1)


class Waves(nn.Module):
    """[B, 2, T] -> classes; ``left`` pads so that it is causal."""

    def __init__(self, left: bool = False) -> None:
        super().__init__()
        self.left = left
        self.one, self.two, self.head = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        pad = (2, 0) if self.left else (1, 1)
        x = torch.tanh(self.one(nn.functional.pad(x, pad)))
        return self.head(torch.tanh(self.two(nn.functional.pad(x, pad))).mean(2))


class Last(nn.Module):
    """[B, H, W, C] features of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(1, 6, 2, 2), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Patches(nn.Module):
    """Sixteen patches and a class token in front: the number of positions is fixed, and nothing is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Conv2d(1, 16, 2, 2), nn.Parameter(torch.randn(1, 1, 16))
        self.place = nn.Parameter(torch.randn(1, 17, 16))
        self.encoder, self.head = encoder(True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.encoder(x)[:, 0])


TOKENS = torch.arange(72).view(6, 12) % 17
FOUND: dict[str, tuple[Callable[[], nn.Module], str, Any, str, bool | None]] = {
    "encoder, positions first": (lambda: encoder(False), "layers.0", normal(7, 3, 16), "TBC", False),
    "encoder, batch first": (lambda: encoder(True), "layers.0", normal(7, 3, 16), "BTC", False),
    "LSTM as torch builds it": (lambda: nn.Sequential(nn.LSTM(6, 8)), "0", normal(7, 3, 6), "TBC", True),
    "LSTM, batch first": (lambda: nn.Sequential(nn.LSTM(6, 8, batch_first=True)), "0", normal(7, 3, 6), "BTC", True),
    "LSTM inside": (Recurrent, "project", TOKENS, "TBC", True),
    "LSTM of both directions": (lambda: Recurrent(both=True), "project", TOKENS, "TBC", False),
    "convolutions": (Waves, "one", normal(4, 2, 50), "BCT", False),
    "causal convolutions": (lambda: Waves(left=True), "one", normal(4, 2, 50), "BCT", True),
    "one sample": (Waves, "one", normal(1, 2, 50), "BCT", False),
    "images, channels last": (Last, "norm", normal(3, 1, 8, 8), "BHWC", None),
    "images": (Last, "stem", normal(3, 1, 8, 8), "BCHW", None),
    "patches": (Patches, "encoder.layers.0", normal(3, 1, 8, 8), "BTC", False),
    "vectors": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "0", normal(3, 4), "BC", None),
}


@pytest.mark.parametrize("name", FOUND)
def test_layout_and_direction_are_found_and_the_host_is_left_as_it_was(name: str) -> None:
    build, module, example, layout, causal = FOUND[name]
    torch.manual_seed(0)
    host = build()
    before, stream = copy.deepcopy(host.state_dict()), torch.get_rng_state()
    site = esper.attach(host, {"r0c0": module}, example).sites["r0c0"]
    assert site.layout == layout
    assert causal is None or site.causal is causal
    assert site.shape == tuple({"C": site.dim}.get(axis, size) for axis, size in zip(site.topology[1:], site.shape))
    assert host.training
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert len(host.get_submodule(module)._forward_hooks) == 1


def plant(grown: Grown, name: str, alpha: float = 1.0) -> None:
    for slot, site in grown.sites.items():
        key, holder = birth_key(1, slot, 1), grown.slots[slot]
        seed = build_seed(name, dim=site.dim, topology=site.topology, key=key, dtype=torch.float32, device="cpu")
        holder.plant(seed)
        holder.phase = Phase.BLEND
        holder.set_alpha(alpha)
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.mul_(3.0)


SEEDS = {"TBC": "attention", "BTC": "attention", "BCT": "conv_heavy", "BHWC": "conv_light", "BCHW": "conv_light"}


@pytest.mark.parametrize("name", [name for name in FOUND if name != "vectors"])
def test_samples_of_a_batch_never_meet_and_the_export_is_the_same(name: str) -> None:
    build, module, example, layout, _ = FOUND[name]
    torch.manual_seed(0)
    host = build().eval()
    alone = host(example)
    grown = esper.attach(host, {"r0c0": module}, example)
    plant(grown, SEEDS[layout])
    axis = 1 if name in ("encoder, positions first", "LSTM as torch builds it") else 0
    first = example.narrow(axis, 0, 1)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return output[0] if isinstance(output, tuple) else output

    whole, single = run(host, example), run(host, first)
    assert not torch.equal(whole, alone if isinstance(alone, Tensor) else alone[0])
    torch.testing.assert_close(whole.narrow(axis, 0, 1), single, atol=1e-5, rtol=1e-4)
    assert bits(run(grown.export(fold=False), example), whole)
    longer = [n for n in ("LSTM", "encoder", "convolutions") if name.startswith(n)]
    if longer:  # a seed takes any length
        run(host, torch.cat([example, example], 1 - axis if example.ndim == 2 or layout != "BCT" else 2))
    with grown.override({"r0c0": 0.0}):
        assert torch.equal(run(host, example), alone if isinstance(alone, Tensor) else alone[0])


def test_what_stays_open_is_asked_for_by_name_and_taken_when_it_is_said() -> None:
    pointwise = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    example = normal(3, 5, 4)
    with pytest.raises(ConfigError, match=r"'0' of slot r0c0 returns \(3, 5, 4\): .* first or its second .*layout="):
        esper.attach(pointwise, {"r0c0": "0"}, example)
    for layout in ("BTC", "TBC", "BCT", "CBT"):
        site = esper.attach(copy.deepcopy(pointwise), {"r0c0": "0"}, example, layout={"r0c0": layout}).sites["r0c0"]
        assert (site.layout, site.topology) == (layout, topology_of(layout))
    for wrong, said in (
        ({"r0c0": "BT"}, "layout of r0c0 = 'BT': expected a letter"),
        ("BCHW", "give one letter per axis"),
        ({"r1c0": "BTC"}, "r1c0"),
        (7, "layout = 7: expected letters"),
    ):
        with pytest.raises(ConfigError, match=said):
            esper.attach(copy.deepcopy(pointwise), {"r0c0": "0"}, example, layout=wrong)  # type: ignore[arg-type]


class Fixed(nn.Module):
    """Takes batches of three alone."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x.reshape(3, 4))


def test_an_example_that_cannot_be_repeated_needs_the_layout() -> None:
    with pytest.raises(ConfigError, match=r"cannot be repeated with another batch size \(RuntimeError: .*layout="):
        esper.attach(Fixed(), {"r0c0": "site"}, normal(3, 4))
    assert esper.attach(Fixed(), {"r0c0": "site"}, normal(3, 4), layout="BC").sites["r0c0"].topology is Topology.VECTOR


def test_a_feature_without_samples_is_refused() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.place(torch.arange(x.shape[1])[None])).cumsum(1)

    with pytest.raises(ConfigError, match=r"returns \(1, 5, 4\): no axis moves with the number of samples"):
        esper.attach(Places(), {"r0c0": "place"}, normal(3, 5, 4))


def test_layouts_are_orders_of_a_topology() -> None:
    assert [order_of(layout) for layout in ("BTC", "BCHW", "BC", "BCT")] == [None] * 4
    assert order_of("TBC") == (1, 0, 2)
    assert order_of("BHWC") == (0, 3, 1, 2)
    assert topology_of("CBT") is Topology.SIGNAL
    assert topology_of("TCB") is Topology.SEQUENCE

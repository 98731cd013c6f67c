"""Guards of the growing model that no other test makes fire."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.attach import attach
from esper.kasmina.attribution.coalitions import make_plan
from esper.kasmina.axes.positions import FREE, Mixing
from esper.kasmina.births import DamagedEntry, Library, LibraryConfig, Order, SeedStore
from esper.kasmina.births.own import find_fits
from esper.kasmina.births.revive import state_tensors
from esper.kasmina.blueprints import blueprint, registry
from esper.kasmina.blueprints.parts import narrow
from esper.kasmina.blueprints.sequence import MLP, SelfAttention
from esper.kasmina.export.join import _container
from esper.kasmina.export.native import native
from esper.kasmina.export.same import check_same
from esper.kasmina.hosts import CNNConfig, build_host
from esper.kasmina.slots.unfit import check_model
from esper.leyline.errors import ConfigError, ExportError
from esper.leyline.topology import Topology
from tests.kasmina.births.test_library import birth
from tests.kasmina.blocks.test_copies import plant
from tests.support.block_hosts import Residual
from tests.support.refusals import fails

ROWS = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Leaking(nn.Module):
    """Sees its neighbours, and does not say so."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Peeking(Mixing):
    """Sees later positions under a causal host."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, reach: Any = FREE) -> Tensor:
        return x.flip(1).cumsum(1).flip(1)


@pytest.mark.parametrize(
    ("module", "text"),
    [(Leaking, r"\(BTC\): positions see each other; make it a Mixing"), (Peeking, "positions see later ones though")],
)
def test_a_blueprint_that_sees_what_it_must_not(
    module: type[nn.Module], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    declare = blueprint("seer", topology=Topology.SEQUENCE, parameters=lambda d: 0, flops=lambda d, p: 0)
    fails(lambda: declare(module), ConfigError, text)


class TwoLists(nn.Module):
    """Residual blocks in two lists, and one in none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ModuleList([Residual()]), nn.ModuleList([Residual()])
        self.alone = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(self.second[0](self.first[0](x)))


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        ({"r0c0": "alone"}, r"^export --native: slot r0c0: its site 'alone' is no entry of a list of modules$"),
        ({"r0c0": "first.0", "r1c0": "second.0"}, r"the copies stand in several lists of blocks \(first, second\)$"),
    ],
)
def test_copies_that_are_no_blocks_of_one_list(sites: dict[str, str], text: str) -> None:
    torch.manual_seed(3)
    grown = esper.attach(TwoLists().double(), sites, ROWS)
    for slot in grown.slots:
        plant(grown, slot, alpha=1.0)
    fails(lambda: native(grown), ConfigError, text)


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which needs ranks; it is told by its name."""


class Noted(nn.Linear):
    """Its state holds more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Other:
    """A site's output that is no tensor and holds none."""


class Returning(nn.Module):
    """Returns what it was made with, a function of the input."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.what(x * self.weight)


class Around(nn.Module):
    """A host around one site, of whose output it takes no notice."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.site, self.head = Returning(what), nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        self.site(x)
        return self.head(x)


def closed(folder: Path) -> None:
    library = Library(LibraryConfig(enabled=True, background=True), folder)
    library.close()
    library.begin(Order(birth=birth(), device=torch.device("cpu")))


def no_tensors(folder: Path) -> None:
    store, wanted = SeedStore(folder), birth()
    content = store.save(wanted, {"weight": torch.ones(2)})
    other = hashlib.sha256(b"no tensors").hexdigest()
    store.content_path(other).write_bytes(b"no tensors")
    index = store.index_path(wanted)
    index.write_text(index.read_text().replace(content, other))
    store.load(wanted)


class EncoderDecoderCache:
    """Stands for that of transformers; it is told by its name."""

    def update(self) -> None: ...

    def get_seq_length(self) -> int:
        return 0


class Decoder(nn.Module):
    """A host whose block is called with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, past=EncoderDecoderCache())


class Block(Residual):
    def forward(self, x: Tensor, mask: Tensor | None = None, past: Any = None) -> Tensor:
        return super().forward(x)


def test_a_block_with_the_cache_of_an_encoder_and_a_decoder() -> None:
    grown = attach(Decoder().double(), {"r0c0": "block"}, ROWS)
    fits, reasons = find_fits(grown, ROWS, identity=False, patterns=())
    assert not fits
    assert reasons["r0c0"].startswith("the block 'block' keeps an encoder's and a decoder's cache, where a copy has")


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (no_tensors, DamagedEntry, r"\.safetensors: no safetensors file \("),
        (
            lambda tmp: _container(Other(), "the site 'a'"),
            ConfigError,
            r"^the site 'a' returns Other; export takes a tensor, tuple, list, mapping or dataclass there$",
        ),
        (
            lambda tmp: build_host(SimpleNamespace(kind="cnn"), (1, 8, 8), 3),
            ConfigError,
            r"^host: kind 'cnn' takes CNNConfig, got SimpleNamespace$",
        ),
        (lambda tmp: make_plan({"r0c0": 1.0}, pairs=1), ConfigError, r"^pairs = 1: need 0 \(exact\), or at least 2 fo"),
        (closed, RuntimeError, "^the library is closed$"),
        (
            lambda tmp: state_tensors(Noted(2, 2)),
            ValueError,
            r"^a library keeps tensors alone; the state dict holds _extra_state$",
        ),
        (
            lambda tmp: check_same(torch.zeros(2), torch.zeros(3), exact=False),
            ExportError,
            r"^output 0 was torch\.float32 \(2,\), exported torch\.float32 \(3,\)$",
        ),
        (lambda tmp: MLP(8, expansion=0), ValueError, r"^expansion = 0: must be >= 1$"),
        (lambda tmp: SelfAttention(8, heads=0), ValueError, r"^heads = 0: must be >= 1$"),
        (lambda tmp: narrow(8, 0), ValueError, r"^reduction = 0: must be >= 1$"),
        (lambda tmp: build_host(CNNConfig(), (1, 8, 8), 0), ConfigError, r"^host: 0 classes, needs at least 1$"),
        (
            lambda tmp: check_model(nn.Sequential(FullyShardedDataParallel())),
            ConfigError,
            r"^0 is sharded \(FullyShardedDataParallel\): ",
        ),
        (
            lambda tmp: esper.attach(Around(lambda x: Other()), {"r0c0": "site"}, ROWS),
            ConfigError,
            r"^site 'site' of slot r0c0 ",
        ),
    ],
)
def test_models_and_births(call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path) -> None:
    fails(lambda: call(tmp_path), kind, text)


def test_a_mixing_without_a_forward() -> None:
    with pytest.raises(NotImplementedError):
        Mixing()(ROWS)

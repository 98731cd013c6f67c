"""The seed library: what is loaded is what was born, damage is told, and the thread moves nothing of the process."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.births import Birth, DamagedEntry, Library, LibraryConfig, MissingEntry, Order, SeedStore, Ticket
from esper.kasmina.births.build import build_seed
from esper.kasmina.births.memory import Memory
from esper.kasmina.blueprints import blueprint, names, registry
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology
from tests.support.tiny import bits

CPU = torch.device("cpu")
EVERY = [(topology, name) for topology in Topology for name in names(topology)]


def birth(
    name: str = "mlp", *, dim: int = 8, topology: Topology = Topology.SEQUENCE, key: int = 5, **more: object
) -> Birth:
    return Birth.of(name, dim=dim, topology=topology, dtype=more.get("dtype", torch.float32), key=key)  # type: ignore[arg-type]


def direct(wanted: Birth) -> nn.Module:
    return build_seed(
        wanted.blueprint,
        dim=wanted.dim,
        topology=Topology(wanted.topology),
        key=wanted.key,
        dtype=wanted.torch_dtype,
        device="cpu",
    )


def held(seed: nn.Module) -> dict[str, str]:
    return bits([*seed.named_parameters(), *seed.named_buffers()])


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Callable[..., Library]]:
    """Opens libraries in one folder, and closes them."""
    opened = []

    def open_one(**settings: object) -> Library:
        opened.append(Library(LibraryConfig(**{"enabled": True, "background": False, **settings}), tmp_path))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "esper-library"]


def ask(library: Library, wanted: Birth, **more: object) -> Ticket:
    ticket = library.begin(Order(birth=wanted, device=CPU, **more))  # type: ignore[arg-type]
    assert ticket.wait(60)
    return ticket


def get(library: Library, wanted: Birth) -> nn.Module:
    return library.take(ask(library, wanted))


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def register(name: str, factory: type[nn.Module], count: int) -> None:
    blueprint(name, topology=Topology.VECTOR, parameters=lambda dim: count * dim, flops=lambda dim, positions: 0)(
        factory
    )


# the same seed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("topology", "name"), EVERY)
def test_built_found_on_disk_or_in_memory_it_is_the_seed_of_a_direct_birth(
    library: Callable[..., Library], topology: Topology, name: str, dtype: torch.dtype
) -> None:
    wanted = birth(name, topology=topology, dtype=dtype)
    first, other = library(), library(require=True, root="set")
    other.store = first.store
    seeds = [get(first, wanted), get(first, wanted), get(other, wanted)]
    counts = [one.figures(1) for one in (first, other)]
    assert [(c.built, c.memory_hits, c.disk_hits) for c in counts] == [(1, 1, 0), (0, 0, 1)]
    for seed in seeds:
        assert held(seed) == held(direct(wanted))
        assert seed.training
        assert all(p.requires_grad and p.is_leaf for p in seed.parameters())
    storages = [p.data_ptr() for seed in seeds for p in seed.parameters()]
    assert len(set(storages)) == len(storages), "each has memory of its own"


class Odd(nn.Module):
    """A buffer that is not saved, a tensor in an attribute, tied and permuted weights: more than tensors by name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randint(0, 2, (dim,)), persistent=False)
        self.loose = torch.randint(0, 9, (dim,))
        self.first = nn.Linear(dim, 1, bias=False)
        self.second = nn.Linear(dim, 1, bias=False)
        self.second.weight = self.first.weight
        self.wide = nn.Parameter(torch.randn(2, dim).t())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.first.weight * self.mask + self.second(x) + self.loose + self.wide.sum(1)


def test_a_seed_that_is_more_than_its_tensors_is_whole_again(scratch: None, library: Callable[..., Library]) -> None:
    register("odd", Odd, 3)
    wanted = birth("odd", topology=Topology.VECTOR)
    get(library(), wanted)
    one, born = library(require=True, root="set"), direct(wanted)
    loaded = get(one, wanted)
    assert one.figures(0).disk_hits == 1
    assert loaded.first.weight is loaded.second.weight
    assert loaded.wide.stride() == born.wide.stride() == (1, 8)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), born(x))


def test_the_key_of_an_entry_is_all_that_decides_its_bits(scratch: None) -> None:
    base = birth()
    others = [
        birth("mlp_small"),
        birth(dim=9),
        birth(topology=Topology.VECTOR),
        birth(key=6),
        birth(dtype=torch.float64),
    ]
    assert len({one.id for one in (base, *others)}) == 6
    entry = registry.get(Topology.SEQUENCE, "mlp")
    changed = {name: getattr(entry, name) for name in type(entry).__slots__}
    for change in ({"version": 2}, {"arguments": {"expansion": 3}}):
        registry._REGISTRY[Topology.SEQUENCE, "mlp"] = type(entry)(**{**changed, **change})
        assert birth().id != base.id
    assert birth("noop", key=0).id[:16] == "3c2625aaabd76064", "ids must not change: libraries are found by them"


# files -------------------------------------------------------------------------------------------------------------


def files(root: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in root.rglob("*") if path.is_file()}


def test_content_lies_under_its_own_sha256_and_holds_no_code(library: Callable[..., Library], tmp_path: Path) -> None:
    get(library(), birth())
    found = files(tmp_path)
    assert set(found) == {"index", "seeds"}, "and no temporary file"
    data = found["seeds"].read_bytes()
    assert found["seeds"].stem == hashlib.sha256(data).hexdigest()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    assert set(head) - {"__metadata__"} == set(direct(birth()).state_dict())
    index = json.loads(found["index"].read_text())
    assert (index["content"], index["bytes"]) == (found["seeds"].stem, len(data))
    assert index["birth"]["key"] == 5


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def other_shape(path: Path) -> None:
    """A sound content of another network, under this birth."""
    root = path.parents[1]
    store = SeedStore(root)
    content = store.save(birth("mlp_small"), direct(birth("mlp_small")).state_dict())
    index = store.index_path(birth())
    index.write_text(json.dumps({**json.loads(index.read_text()), "content": content}))


def other_dtype(path: Path) -> None:
    store = SeedStore(path.parents[1])
    content = store.save(birth(key=9), direct(birth(dtype=torch.float64)).state_dict())
    index = store.index_path(birth())
    index.write_text(json.dumps({**json.loads(index.read_text()), "content": content}))


def edit(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("kind", "damage", "error", "said"),
    [
        ("seeds", flip, DamagedEntry, "SHA-256 is .* the file is damaged"),
        ("seeds", lambda path: path.write_bytes(path.read_bytes()[:-9]), DamagedEntry, "SHA-256 is"),
        ("seeds", lambda path: path.write_bytes(b""), DamagedEntry, "SHA-256 is .* 0 bytes"),
        ("seeds", Path.unlink, MissingEntry, "the index names it and it is not there"),
        ("seeds", other_shape, DamagedEntry, "does not fit mlp v1 .*size mismatch|Error.* in loading state_dict"),
        ("seeds", other_dtype, DamagedEntry, "is torch.float64, need torch.float32"),
        ("index", lambda path: path.write_text("{"), DamagedEntry, "no readable index entry"),
        ("index", lambda path: path.write_text("{}"), DamagedEntry, "missing birth, bytes"),
        ("index", edit('"key": 5', '"key": 6'), DamagedEntry, "key 6"),
        ("index", edit('"format": 1', '"format": 2'), DamagedEntry, "format 2"),
    ],
)
def test_damage_is_told_and_is_never_built_over(
    library: Callable[..., Library],
    tmp_path: Path,
    kind: str,
    damage: Callable[[Path], object],
    error: type[Exception],
    said: str,
) -> None:
    get(library(), birth())
    damage(files(tmp_path)[kind])
    fresh = library()
    ticket = ask(fresh, birth())
    with pytest.raises(error, match=said) as caught:
        fresh.take(ticket)
    assert str(tmp_path) in str(caught.value)
    assert (fresh.figures(0).built, fresh.figures(0).births) == (0, 0)
    get(fresh, birth(key=77))  # and the library goes on


def test_a_missing_entry_is_built_unless_the_library_is_pinned(library: Callable[..., Library], tmp_path: Path) -> None:
    pinned = library(require=True, root="set")
    with pytest.raises(MissingEntry, match=r"no entry for mlp v1 .*library.require=false"):
        get(pinned, birth())
    assert not list(tmp_path.rglob("*.safetensors"))
    get(library(), birth())
    assert held(get(pinned, birth())) == held(direct(birth()))


def test_a_library_that_cannot_be_written_gives_seeds_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "seeds").write_text("no folder")
    library = Library(LibraryConfig(enabled=True, background=False), tmp_path)
    assert held(get(library, birth())) == held(direct(birth()))
    (text,) = library.troubles
    assert "mlp v1" in text
    assert "is not kept" in text


def test_many_writers_of_one_birth_leave_one_whole_entry(tmp_path: Path) -> None:
    libraries = [Library(LibraryConfig(enabled=True), tmp_path) for _ in range(4)]
    tickets = [one.begin(Order(birth=birth(key=k), device=CPU)) for k in (1, 2) for one in libraries]
    for one, ticket in zip([*libraries, *libraries], tickets, strict=True):
        assert ticket.wait(60)
        assert held(one.take(ticket)) == held(direct(ticket.order.birth))
    for one in libraries:
        one.close()
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.json"))) == 2
    assert not list(tmp_path.rglob("*.tmp"))


# memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_in_bytes_and_the_least_recently_used_goes_first() -> None:
    memory = Memory(limit=100)
    for tick, name in enumerate("abc"):
        memory.tick = tick
        memory.put(name, {"w": torch.zeros(10)})
    assert (len(memory), memory.bytes, memory.evicted) == (2, 80, 1)
    assert memory.get("a") is None
    memory.tick = 7
    assert memory.oldest() == 6
    assert memory.get("b") is not None
    assert memory.oldest() == 5, "c is the older one now"
    memory.put("d", {"w": torch.zeros(10)})
    assert memory.get("c") is None
    assert memory.get("b") is not None
    memory.put("b", {"w": torch.zeros(5)})
    assert memory.bytes == 60
    memory.put("huge", {"w": torch.zeros(26)})
    assert (len(memory), memory.bytes) == (2, 60), "what cannot be held costs no other its place"
    assert (memory.hits, memory.misses, memory.evicted) == (2, 2, 2)


def test_figures_are_those_of_one_interval(library: Callable[..., Library]) -> None:
    one = library(memory_mib=1)
    large = {key: birth("mlp", dim=128, key=key) for key in (1, 2, 3)}  # half a MiB each
    for key in (1, 1, 2, 3, 1):
        get(one, large[key])
    found = one.figures(tick=4)
    assert (found.births, found.memory_hits, found.memory_misses, found.disk_hits, found.built) == (5, 1, 4, 1, 3)
    assert (found.evicted, found.entries, found.failed, found.oldest_ticks) == (3, 1, 0, 4)
    assert found.bytes == sum(t.nbytes for t in direct(large[1]).state_dict().values())
    again = one.figures(tick=6)
    assert (again.births, again.built, again.evicted, again.entries, again.oldest_ticks) == (0, 0, 0, 1, 6)


# the thread --------------------------------------------------------------------------------------------------------


def test_the_thread_moves_no_stream_of_the_process_while_dropout_runs(
    library: Callable[..., Library], scratch: None
) -> None:
    seen = []

    class Drawing(nn.Module):
        """Draws a lot, in many operators, and looks at what is the process's."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(dim, 60))
            for _ in range(30):
                nn.init.trunc_normal_(self.weight)
                nn.init.kaiming_uniform_(self.weight)
            seen.append((torch.get_num_threads(), torch.get_default_dtype(), threading.current_thread().name))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5) * self.weight.sum()

    register("drawing", Drawing, 60)
    one = library(background=True)
    wanted = [birth("drawing", topology=Topology.VECTOR, key=key) for key in range(12)]
    layer = nn.Dropout(0.3)

    def stream(steps: int, during: Callable[[], bool]) -> Tensor:
        torch.manual_seed(3)
        drawn = []
        while len(drawn) < steps or during():
            drawn.append(layer(torch.ones(64)))
        return torch.stack(drawn)

    tickets = [one.begin(Order(birth=w, device=CPU)) for w in wanted]
    beside = stream(200, lambda: not all(ticket.done.is_set() for ticket in tickets))
    alone = stream(len(beside), lambda: False)
    assert torch.equal(beside, alone)
    threads, names_ = {entry[:2] for entry in seen[-12:]}, {entry[2] for entry in seen[-12:]}
    assert threads == {(torch.get_num_threads(), torch.float32)}
    assert names_ == {"esper-library"}
    for ticket in tickets:
        assert held(one.take(ticket)) == held(direct(ticket.order.birth))


def test_where_the_default_dtype_is_another_the_taker_builds(library: Callable[..., Library]) -> None:
    one, expected = library(background=True), held(direct(birth()))
    torch.set_default_dtype(torch.float64)
    try:
        ticket = ask(one, birth())
        assert (ticket.seed, ticket.error) == (None, None), "the thread left the process's dtype alone"
        assert held(one.take(ticket)) == expected
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Gate(nn.Module):
    """Its constructor stands still until the test lets it go on."""

    opened = threading.Event()
    entered = threading.Event()

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        if threading.current_thread().name == "esper-library" and self.weight.device.type != "meta":
            self.entered.set()
            assert self.opened.wait(60)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_one_build_at_a_time_in_order_and_a_cancelled_one_is_not_begun(
    scratch: None, library: Callable[..., Library], tmp_path: Path
) -> None:
    Gate.opened.clear()
    Gate.entered.clear()
    register("gate", Gate, 1)
    one = library(background=True)
    slow, gone, last = (
        one.begin(Order(birth=birth("gate", topology=Topology.VECTOR, key=key), device=CPU)) for key in (1, 2, 3)
    )
    assert Gate.entered.wait(60)
    assert not slow.wait(0.0)
    assert one.figures(1).births == 3, "asking for figures waits for nobody"
    one.cancel(gone)
    Gate.opened.set()
    assert last.wait(60)
    assert slow.done.is_set()
    assert gone.seed is None
    one.close()  # files are written after seeds are handed over
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_closing_joins_the_thread_and_lets_go_of_what_waits(scratch: None, tmp_path: Path) -> None:
    Gate.opened.clear()
    Gate.entered.clear()
    register("gate", Gate, 1)
    one = Library(LibraryConfig(enabled=True), tmp_path)
    first, second = (
        one.begin(Order(birth=birth("gate", topology=Topology.VECTOR, key=key), device=CPU)) for key in (1, 2)
    )
    assert Gate.entered.wait(60)
    opener = threading.Timer(0.2, Gate.opened.set)
    opener.start()
    one.close()
    one.close()
    opener.join()
    assert (first.done.is_set(), second.done.is_set()) == (True, False)
    assert "esper-library" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="closed"):
        one.begin(first.order)


def test_a_thread_ends_when_there_is_no_work_and_the_next_order_starts_another(library: Callable[..., Library]) -> None:
    one = library(background=True)
    for key in (1, 2):
        ask(one, birth(key=key))
        for thread in [thread for thread in threading.enumerate() if thread.name == "esper-library"]:
            thread.join(60)
        assert "esper-library" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [MemoryError("full"), ValueError("odd"), torch.OutOfMemoryError("device")])
def test_what_a_build_or_a_check_raises_reaches_whoever_takes(
    library: Callable[..., Library], background: bool, error: Exception
) -> None:
    one = library(background=background)

    def check(seed: nn.Module) -> None:
        raise error

    ticket = ask(one, birth(), checks=(check,))
    with pytest.raises(type(error), match=str(error)):
        one.take(ticket)
    assert one.figures(0).failed == 1
    get(one, birth())


def test_where_no_core_is_idle_the_taker_builds_and_the_file_comes_when_one_is(tmp_path: Path) -> None:
    free: list[bool] = []
    one = Library(LibraryConfig(enabled=True, memory_mib=0), tmp_path, lambda: bool(free))
    for key in (1, 2):
        ticket = ask(one, birth(key=key))
        assert (ticket.seed, one._thread) == (None, None), "nothing works beside training"
        assert held(one.take(ticket)) == held(direct(birth(key=key)))
    assert not files(tmp_path)
    free.append(True)
    one.figures(1)
    while len(list(tmp_path.rglob("*.json"))) < 2:
        assert one._thread is not None
        one._thread.join(60)
    ticket = ask(one, birth(key=1))
    assert held(one.take(ticket)) == held(direct(birth(key=1)))
    assert one.figures(2).disk_hits == 1
    free.clear()
    one.take(ask(one, birth(key=3)))
    one.close()
    assert len(list(tmp_path.rglob("*.json"))) == 3, "at the end there is time for it"


def test_a_seed_is_handed_over_before_its_file_is_written(
    library: Callable[..., Library], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, go_on, save = library(background=True), threading.Event(), SeedStore.save

    def save_later(store: SeedStore, *entry: Any) -> str:
        assert go_on.wait(60)
        return save(store, *entry)

    monkeypatch.setattr(SeedStore, "save", save_later)
    seed = get(one, birth())
    with torch.no_grad():
        next(seed.parameters()).zero_()  # it is trained meanwhile
    assert not files(tmp_path)
    go_on.set()
    one.close()
    kept = SeedStore(tmp_path).load(birth())
    assert kept is not None
    assert bits(kept.items()) == held(direct(birth()))


# settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wait_s": 0.0}, "wait_s"),
        ({"memory_mib": -1}, "memory_mib"),
        ({"root": " "}, "root"),
        ({"require": True}, "needs library.enabled"),
        ({"enabled": True, "require": True}, "needs library.root"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LibraryConfig(**settings)  # type: ignore[arg-type]

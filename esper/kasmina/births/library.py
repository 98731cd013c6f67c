"""The seed library: finds a birth in memory or on disk, or builds and keeps it, while training goes on.

    begin   a tick stages a seed: its order goes to a thread, and training goes on
    take    the next tick waits for the seed, up to a bound, and plants it

A seed is handed over before its file is written. The thread works only while a core of the machine is idle: else a
seed is built where it is taken, as without a library, and is built once more for its file when a core is free, or at
the end of the run.

The thread builds as `esper.kasmina.births.build` does, from the seed's own private generator. It changes no state of
the process: no global random stream, no default dtype (if that is not float32, the caller of `take` builds the seed),
no thread count, no autograd or dispatch mode of another thread. It lives while there is work and ends by itself. It
builds one seed at a time, under a lock. It compiles nothing: torch's compiler reads the global random state at the
start of a compilation and puts it back at the end, which would disturb dropout in the training thread. A seed that must
be compiled is compiled at the tick.

The weights of a seed that is found are not drawn again; see `revive`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from esper.kasmina.births.config import LibraryConfig
from esper.kasmina.births.figures import Figures
from esper.kasmina.births.key import Birth
from esper.kasmina.births.memory import Memory
from esper.kasmina.births.revive import build_birth, revive, state_tensors
from esper.kasmina.births.store import DamagedEntry, MissingEntry, SeedStore
from esper.kasmina.blueprints.registry import get
from esper.leyline.errors import one_line
from esper.leyline.topology import Topology

KEEPING_S = 10.0  # at the end of a run, for seeds that have no file yet
PATIENCE_S = 60.0  # for a constructor that does not end; its thread is a daemon and does not outlive the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order for a seed.

    Fields:
        birth: the birth of the seed.
        device: the device where it will be used.
        checks: called with the finished seed in the building thread; they raise if it cannot serve.
    """

    birth: Birth
    device: torch.device
    checks: tuple[Callable[[nn.Module], None], ...] = ()


@dataclass(slots=True, eq=False)
class Ticket:
    """An order under way. ``done`` is set once there is a seed or an error, or once the caller of `take` must build."""

    order: Order
    done: threading.Event = field(default_factory=threading.Event)
    seed: nn.Module | None = None
    error: Exception | None = None
    cancelled: bool = False

    def wait(self, seconds: float) -> bool:
        """Waits until the order is done, at most so many seconds; returns whether it is."""
        return self.done.wait(max(0.0, seconds))


class Library:
    """Gives seeds to one rank.

    Args:
        config: settings of the library.
        root: folder of the library.
        idle: says whether a core is free for the thread.

    Fields:
        troubles: a message for each entry that could not be written; the births themselves went well.
    """

    def __init__(self, config: LibraryConfig, root: Path, idle: Callable[[], bool] = lambda: True) -> None:
        self.config, self.store, self.idle = config, SeedStore(root), idle
        self.memory = Memory(config.memory_mib * 2**20)
        self.troubles: list[str] = []
        self._queue: deque[Ticket] = deque()
        self._unkept: deque[Order] = deque()  # built where they were taken; no file yet
        self._lock = threading.Lock()  # guards queue, thread, memory and figures; never held for long
        self._building = threading.Lock()  # one birth at a time
        self._thread: threading.Thread | None = None
        self._closed = False
        self._counts = dict.fromkeys(("births", "disk_hits", "built", "failed"), 0)

    # orders -------------------------------------------------------------------------------------------------------

    def begin(self, order: Order) -> Ticket:
        """Orders a seed. With ``background`` this returns at once, else when the seed is built or has failed.

        Where no core is idle the ticket is done without a seed, and `take` builds it.

        Raises:
            ConfigError: no such blueprint.
        """
        topology = Topology(order.birth.topology)
        # Asked once here: a probe of the device may compile, which the thread must not.
        get(topology, order.birth.blueprint).backend_for(order.device, order.birth.torch_dtype)
        ticket = Ticket(order)
        self._count("births")
        if not self.config.background:
            self._fill_ticket(ticket)
            return ticket
        free = self.idle()
        with self._lock:
            if self._closed:
                raise RuntimeError("the library is closed")
            if free:
                self._queue.append(ticket)
                self._wake()
            else:
                ticket.done.set()
        return ticket

    def _wake(self) -> None:
        """Starts the thread if it does not run; the caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="esper-library", daemon=True)
            self._thread.start()

    def take(self, ticket: Ticket) -> nn.Module:
        """Returns the seed of a ticket that is done.

        Raises:
            MissingEntry: the library lacks an entry that must be there.
            DamagedEntry: the entry is damaged.
            Exception: whatever the constructor or a check raised.
        """
        if ticket.seed is None and ticket.error is None:
            self._fill_ticket(ticket, now=False)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.seed is not None
        return ticket.seed

    def cancel(self, ticket: Ticket) -> None:
        """Cancels an order; a build under way runs to its end and is thrown away."""
        ticket.cancelled = True

    def close(self) -> None:
        """Drops waiting orders, joins the thread (at most `PATIENCE_S`) and keeps what has no file (`KEEPING_S`)."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            thread = self._thread
        if thread is not None:
            thread.join(PATIENCE_S)
        until = time.monotonic() + KEEPING_S
        while self._unkept and time.monotonic() < until and torch.get_default_dtype() is torch.float32:
            self._keep_later(self._unkept.popleft())

    def figures(self, tick: int) -> Figures:
        """Returns the figures since the last call, and begins a new interval.

        Args:
            tick: the present tick, from which ages are counted.
        """
        free = bool(self._unkept) and self.idle()
        with self._lock:
            if free and not self._closed:
                self._wake()
            memory = self.memory
            memory.tick = tick
            figures = Figures(
                **self._counts,
                memory_hits=memory.hits,
                memory_misses=memory.misses,
                evicted=memory.evicted,
                entries=len(memory),
                bytes=memory.bytes,
                oldest_ticks=memory.oldest(),
            )
            memory.reset()
            self._counts = dict.fromkeys(self._counts, 0)
        return figures

    # building -----------------------------------------------------------------------------------------------------

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _work(self) -> None:
        while True:
            free = self.idle()
            with self._lock:
                ticket = self._queue.popleft() if self._queue else None
                late = ticket is None and free and not self._closed and bool(self._unkept)
                if ticket is None and not late:
                    self._thread = None
                    return
            if ticket is None:
                self._keep_later(self._unkept.popleft())
                continue
            if not ticket.cancelled and torch.get_default_dtype() is torch.float32:
                self._fill_ticket(ticket)
            ticket.done.set()

    def _fill_ticket(self, ticket: Ticket, *, now: bool = True) -> None:
        """Finds or builds the seed, hands it over, then keeps it if it was built: ``now``, or later."""
        tensors: dict[str, Tensor] = {}
        built = False
        try:
            with self._building:
                seed, built = self._find_or_build(ticket.order)
                if built and now:
                    tensors = state_tensors(seed)
                seed = seed.to(ticket.order.device)
            for check in ticket.order.checks:
                check(seed)
            ticket.seed = seed
        except Exception as error:
            ticket.error = error
            self._count("failed")
        ticket.done.set()
        if built and now:
            self._keep(ticket.order.birth, tensors)
        elif built:
            self._unkept.append(ticket.order)

    def _find_or_build(self, order: Order) -> tuple[nn.Module, bool]:
        """The seed on the CPU, and whether it was built rather than found."""
        birth, backend = order.birth, self._backend(order)
        with self._lock:
            tensors = self.memory.get(birth.id)
        if tensors is None:
            tensors = self.store.load(birth)
            if tensors is not None:
                self._count("disk_hits")
                self._remember(birth, tensors)
        if tensors is not None:
            try:
                return revive(birth, tensors, backend), False
            except (RuntimeError, ValueError) as error:
                raise DamagedEntry(
                    f"{self.store.index_path(birth)}: does not fit {birth}: {one_line(error)}"
                ) from error
        if self.config.require:
            raise MissingEntry(
                f"{self.store.index_path(birth)}: no entry for {birth}; add it, or set library.require=false"
            )
        seed = build_birth(birth, backend)
        self._count("built")
        return seed, True

    @staticmethod
    def _backend(order: Order) -> str | None:
        birth = order.birth
        return get(Topology(birth.topology), birth.blueprint).backend_for(order.device, birth.torch_dtype)

    def _keep_later(self, order: Order) -> None:
        """Builds a birth again, to the same bits, for its file."""
        with self._building:
            tensors = state_tensors(build_birth(order.birth, self._backend(order)))
        self._keep(order.birth, tensors)

    def _keep(self, birth: Birth, tensors: dict[str, Tensor]) -> None:
        self._remember(birth, tensors)
        try:
            self.store.save(birth, tensors)
        except OSError as error:  # the seed is whole; that it is not kept is reported, and does no harm now
            with self._lock:
                self.troubles.append(f"seed library {self.store.root}: {birth} is not kept: {one_line(error)}")

    def _remember(self, birth: Birth, tensors: dict[str, Tensor]) -> None:
        with self._lock:
            self.memory.put(birth.id, tensors)

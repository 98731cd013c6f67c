"""Process groups and the few collectives that Esper itself issues; on one process each is the identity.

    data     the step's gradient reductions (gloo on CPUs, NCCL on GPUs) and the average of BatchNorm statistics
    control  two all-reduces a tick, always gloo on CPU tensors
    default  only start-up, load, the last save and the final test, with a longer limit

Every group has a timeout. A collective that fails raises a `LockstepError` that names the missing rank by the heartbeat
marks, never a bare transport error.
"""

import contextlib
import datetime
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper.leyline.errors import ConfigError, LockstepError
from esper.tolaria.ranks.config import ControlConfig, Device, WorldConfig
from esper.tolaria.ranks.heartbeat import LOST, Heartbeat
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.queued import Queued
from esper.tolaria.ranks.sockets import Connections, allow_connections, connections, cut
from esper.tolaria.ranks.transport import check_interfaces, describe_absent, is_transport

# Limit of a collective in a user's own loop: there a rank may rightly be late, and `Beats` finds one that is gone.
USERS_LIMIT = dist.distributed_c10d.default_pg_timeout
_numbers = itertools.count()


class World:
    """This process's place among the ranks.

    Fields:
        rank, size: this rank, as torchrun set it, and how many there are.
        local_rank: this rank's number on its machine.
        device: device of the model.
        heartbeat: marks that name a missing rank; set once the run directory is known.
        number: of this world among those of its process, the same on every rank.
        waiting: the collective that this rank is in; "" if it is in none.
    """

    waiting, _since = "", 0.0

    def __init__(
        self,
        config: WorldConfig,
        control: ControlConfig,
        *,
        within: torch.device | None = None,
        alone: bool = False,
    ) -> None:
        """Joins the process group that the environment describes (RANK, WORLD_SIZE, ...); alone without one.

        Args:
            config: processes and devices.
            control: time limits.
            within: device of a model that a user's program has placed. That program may already have a process group;
                then it is left as it is, and only the data and control groups are made.
            alone: rank 0 of 1 whatever the environment says: each rank has networks of its own.

        Raises:
            ConfigError: a GPU world without enough CUDA devices; GLOO_SOCKET_IFNAME names no network interface; the
                machine allows too few open files for so many ranks.
            LockstepError: the ranks did not meet within control.startup_timeout_s.
        """
        self.rank = 0 if alone else int(os.environ.get("RANK", "0"))
        self.size = 1 if alone else int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.heartbeat: Heartbeat | LastWord | None = None
        self.find_unused, self._queued = config.find_unused, Queued()
        if self.size > 1:
            check_interfaces()
        self.device = self._device(config) if within is None else within
        self._made_default = within is None or not dist.is_initialized()
        if not self._made_default:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.control: dist.ProcessGroup | None = None
        self.data: dist.ProcessGroup | None = None
        self._store: dist.Store | None = None
        self.startup_s = control.startup_timeout_s
        self.number = next(_numbers)  # worlds are made in the same order on every rank
        limits = (control.timeout_s, control.slow_timeout_s)
        self._limits = limits if within is None else (USERS_LIMIT.total_seconds(),) * 2
        self._slow = False
        self._connections: Connections = frozenset()
        self._retired: list[Any] = []  # groups that `renew` has replaced
        if self.size == 1:
            return
        startup = datetime.timedelta(seconds=control.startup_timeout_s)
        gpu = config.device is Device.GPU
        allow_connections(self.size, 2 if gpu else 3)
        with self.collective("start-up"):
            if not self._made_default:
                self._store = dist.distributed_c10d._get_default_store()
                self._store.set(self._arrivals()[self.rank], "")
                self._make_groups(gpu)
                return
            store, _, _ = next(dist.rendezvous("env://", timeout=startup))
            # gloo would read the addresses of an earlier world of these processes, whose store may still be there
            self._store = dist.PrefixStore(f"esper/world/{self.number}", store)
            self._store.set(self._arrivals()[self.rank], "")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=startup,
                device_id=self.device if gpu else None,
            )
            self._make_groups(gpu)

    def _arrivals(self) -> list[str]:
        return [f"esper/arrived/{self.number}/{rank}" for rank in range(self.size)]

    def _make_groups(self, gpu: bool) -> None:
        """Makes the groups under the limit of start-up, then gives them the usual one."""
        startup, before = datetime.timedelta(seconds=self.startup_s), connections()
        self.control = dist.new_group(backend="gloo", timeout=startup)
        # NCCL's own watchdog ends the process without a message; ours (`esper.tolaria.ranks.watchdog`) must be first.
        self.data = dist.new_group(backend="nccl" if gpu else "gloo", timeout=startup)
        self._set_limits()
        self._connections = connections() - before

    def cut(self) -> None:
        """Ends every wait in the data and control groups, here and on the peers; they cannot be used any more."""
        cut(self._connections)
        if self.device.type == "cuda" and self.data is not None:
            self.data.abort()

    def renew(self) -> None:
        """Makes new data and control groups, so that nothing that is under way in the old ones meets what comes next.

        Called on every rank. A rank that still waits in an old group has an error there.

        Raises:
            LockstepError: a rank does not come.
        """
        if self.size == 1:
            return
        self.cut()
        self._retired += [self.data, self.control]
        gpu = self.device.type == "cuda"
        allow_connections(self.size, (1 if gpu else 2) * (1 + len(self._retired) // 2) + 1)  # those stay open, too
        with self.collective("renewal of the groups"):
            self._slow = False
            self._make_groups(gpu)

    @property
    def store(self) -> dist.Store | None:
        """The rendezvous store; None when alone."""
        return self._store

    def _device(self, config: WorldConfig) -> torch.device:
        if config.device is Device.CPU:
            return torch.device("cpu")
        if torch.cuda.device_count() <= self.local_rank:
            count = torch.cuda.device_count()
            raise ConfigError(
                f"world.device = gpu: this host has {count} CUDA devices, local rank {self.local_rank} needs one; "
                f"set world=cpu or world.nproc_per_node={max(1, count)}"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    @contextlib.contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Turns a transport failure inside the block into a `LockstepError` that names who is missing."""
        if isinstance(self.heartbeat, LastWord):
            self.heartbeat.check_lost(what)
        before, self._since, self.waiting = self.waiting, time.monotonic(), what
        try:
            yield
            if self.device.type == "cuda" and self.size > 1:
                self._queued.note(what)
        except (RuntimeError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError) as error:
            if self.size == 1 or isinstance(error, torch.OutOfMemoryError) or not is_transport(error):
                raise
            marks, arrivals = self.heartbeat, self._arrivals()
            text = describe_absent(self._store, arrivals) if marks is None else marks.explain()
            first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise LockstepError(f"{LOST} in {what}: {text} ({first})") from error
        finally:
            self.waiting = before

    def wait(self) -> tuple[str, float]:
        """The collective that this rank is in, or that its device has not passed, and since when in `time.monotonic()`;
        "" if there is none. May be called from another thread."""
        return (self.waiting, self._since) if self.waiting else self._queued.wait()

    def all_reduce(self, vector: Tensor, op: Any, *, what: str, on: str = "control") -> Tensor:
        """Reduces ``vector`` in place and returns it.

        Args:
            vector: CPU tensor; on the data group a tensor on `device`.
            op: ``dist.ReduceOp``.
            what: name of the phase, for an error.
            on: the group: ``control``, ``data``, or ``default``, which has the longer limit.
        """
        if self.size > 1:
            with self.collective(what):
                self._reduce(vector, op, on=on, what=what)
        return vector

    def _reduce(self, vector: Tensor, op: Any, *, on: str, what: str) -> None:
        """The transport under `all_reduce`. `esper.drill` puts ranks of one process in its place."""
        group = {"control": self.control, "data": self.data, "default": None}[on]
        dist.all_reduce(vector, op, group=group)

    def _gather(self, vector: Tensor, *, what: str) -> list[Tensor]:
        """The transport under `all_gather`."""
        rows = [torch.empty_like(vector) for _ in range(self.size)]
        dist.all_gather(rows, vector, group=self.control)
        return rows

    def allow_slow(self, slow: bool) -> None:
        """Gives the data and control groups the longer limit, or the usual one; called on every rank at the same step.

        The longer limit is for work that may rightly take longer than control.timeout_s: writing a save, hashing it, a
        first step.
        """
        if self.size == 1 or slow == self._slow:
            return
        self._slow = slow
        self._set_limits()

    def _set_limits(self) -> None:
        limit = datetime.timedelta(seconds=self.limit_s)
        # Despite its underscore, this is torch's way to change a limit later; torchtitan uses it, too.
        dist.distributed_c10d._set_pg_timeout(limit, self.control)
        dist.distributed_c10d._set_pg_timeout(2 * limit if self.device.type == "cuda" else limit, self.data)

    def put(
        self, tensor: Tensor, dtype: torch.dtype | None = None, layout: torch.memory_format = torch.preserve_format
    ) -> Tensor:
        """Copies a CPU tensor to this rank's device; through pinned memory, so that the CPU does not wait for a GPU."""
        tensor = tensor.to(dtype or tensor.dtype, memory_format=layout)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @property
    def slow(self) -> bool:
        """Whether the longer limit is in force."""
        return self._slow

    @property
    def limit_s(self) -> float:
        """Seconds that a collective of the data or control group may take now."""
        return max(self._limits) if self._slow else self._limits[0]

    def all_gather(self, vector: Tensor, *, what: str) -> list[Tensor]:
        """Gathers each rank's ``vector`` (CPU, equal shapes) on the control group. For diagnoses and start-up only."""
        if self.size == 1:
            return [vector]
        with self.collective(what):
            return self._gather(vector, what=what)

    def gather_text(self, text: str, *, what: str, width: int = 320) -> list[str]:
        """Gathers each rank's text, cut to ``width`` bytes, as uint8 rows of that size: no pickled objects."""
        raw = text.encode()[:width].ljust(width, b"\0")
        rows = self.all_gather(torch.tensor(list(raw), dtype=torch.uint8), what=what)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]

    def gather_bytes(self, data: bytes, *, what: str) -> list[bytes]:
        """Gathers each rank's bytes, of any length, on the control group. For start-up and saves."""
        lengths = [int(row) for row in self.all_gather(torch.tensor([len(data)]), what=what)]
        row = torch.zeros(max(lengths), dtype=torch.uint8)
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.all_gather(row, what=what)
        return [bytes(row[:length].numpy()) for row, length in zip(rows, lengths, strict=True)]

    def hear_rank_0(self, text: str, *, what: str, width: int = 4096) -> str:
        """Rank 0's text on every rank, cut to ``width`` bytes; at start-up, on the default group with its longer limit.

        It travels as a sum of bytes to which the other ranks add zeros: no pickled objects.
        """
        raw = text.encode()[:width] if self.rank == 0 else b""
        vector = torch.tensor(list(raw.ljust(width, b"\0")), dtype=torch.uint8)
        self.all_reduce(vector, dist.ReduceOp.SUM, what=what, on="default")
        return bytes(vector.tolist()).rstrip(b"\0").decode(errors="replace")

    def meet(self, what: str) -> None:
        """Waits for all ranks at start-up, on the default group with its longer limit."""
        self.all_reduce(torch.zeros(1), dist.ReduceOp.SUM, what=what, on="default")

    def close(self) -> None:
        """Leaves the process groups without waiting for a peer that may be gone."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        if self.size > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                for group in (None,) if self._made_default else (self.data, self.control):
                    dist.destroy_process_group(group)

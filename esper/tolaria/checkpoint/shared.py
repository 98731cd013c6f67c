"""Snapshots that the ranks of a machine share: what is equal on all of them lies in memory once, not once for each.

    local rank 0   makes an anonymous file in memory for each place of the ring (memfd_create(2)), tells the others its
                   process id and the files' numbers through the rendezvous store, and copies at each snapshot
    the others     open these files as the run begins (/proc/PID/fd), note at a snapshot what lies where, and map a
                   file when they go back

Such a file has no name, so nothing is left when processes die, however they die; and it is no part of /dev/shm, which
containers keep small. Nothing more is communicated: all take the same snapshots at the same ticks; one is gone back to
only at a tick after the one that confirmed it, when the rank that copies has given its word in a later commit; and
none is taken at a tick that goes back, so that nothing is written over while somebody reads it. Each file begins with a
digest of what lies where and how often it was written, which whoever goes back compares.
"""

import contextlib
import datetime
import hashlib
import mmap
import os
import resource
import secrets
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import LockstepError
from esper.nissa.lane import say
from esper.tolaria.checkpoint.hostcopy import Place, place_of, rebuild
from esper.tolaria.ranks.world import World

_HEAD, _ALIGN = 64, 64  # bytes


class SharedCopy:
    """One place of the ring: a `HostCopy` whose tensors lie in a file that other ranks have open, too.

    Args:
        file: number of the file in memory.
        writes: whether this rank is the one that copies.
    """

    def __init__(self, file: int, *, writes: bool) -> None:
        self._file, self._writes, self._takes, self._end = file, writes, 0, _HEAD
        weakref.finalize(self, os.close, file)
        self._map: mmap.mmap | None = None
        self._base = torch.empty(0, dtype=torch.uint8)
        self._offsets: dict[str, int] = {}
        self._digest = b""
        self._event: Any = None
        self._pinned = 0

    def take(self, payload: Any) -> Any:
        """Copies a payload, or only notes where its tensors lie.

        Args:
            payload: dicts, lists and tuples of tensors and of plain immutable values; tensors have the same names,
                types and shapes on all ranks of the machine.

        Returns:
            The same structure with tensors of no memory (device meta), which `read` puts in.
        """
        self._takes += 1
        sources = self._lay_out(payload)
        if self._writes:
            self._copy(sources)
        seen: dict[Place, Tensor] = {}

        def hollow(value: Tensor, path: str) -> Tensor:
            return seen.setdefault(place_of(value, path), torch.empty_like(value, device="meta", requires_grad=False))

        return rebuild(payload, hollow)

    def _lay_out(self, payload: Any) -> dict[str, Tensor]:
        """Gives each tensor its place, those of one memory (tied weights) the same one; returns which to copy."""
        paths: dict[Place, list[tuple[str, Tensor]]] = {}

        def note(value: Tensor, path: str) -> Tensor:
            paths.setdefault(place_of(value, path), []).append((path, value))
            return value

        rebuild(payload, note)
        self._offsets, sources, end, told = {}, {}, _HEAD, hashlib.sha256(str(self._takes).encode())
        for named in sorted(paths.values(), key=lambda named: min(path for path, _ in named)):
            for path, value in sorted(named, key=lambda pair: pair[0]):
                told.update(f"{path} {end} {value.dtype} {tuple(value.shape)} {value.stride()}\n".encode())
                self._offsets[path] = end
            sources[named[0][0]] = named[0][1]
            end += -(-named[0][1].nbytes // _ALIGN) * _ALIGN
        self._digest, self._end = told.digest(), end
        return sources

    def _copy(self, sources: dict[str, Tensor]) -> None:
        devices = {value.device for value in sources.values() if value.is_cuda}
        if self._map is None or len(self._map) < self._end:  # grown, never cut: nobody loses what they have mapped
            os.ftruncate(self._file, self._end)
            self._open(pin=bool(devices))
        assert self._map is not None
        self._map[:_HEAD] = bytes(_HEAD)
        with torch.no_grad():
            for path, value in sources.items():
                self._view(path, value).copy_(value, non_blocking=True)
        self._event = None
        for device in devices:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        self._map[: len(self._digest)] = self._digest

    def _open(self, *, pin: bool) -> None:
        """Maps the file anew; for copies from a GPU its pages are locked in memory, if the driver will."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = 0
        access = mmap.ACCESS_WRITE if self._writes else mmap.ACCESS_COPY  # a reader's slip stays its own
        self._map = mmap.mmap(self._file, 0, access=access)
        self._base = torch.frombuffer(self._map, dtype=torch.uint8)
        if pin:
            failed = int(torch.cuda.cudart().cudaHostRegister(self._base.data_ptr(), len(self._map), 0))
            self._pinned = 0 if failed else self._base.data_ptr()

    def _view(self, path: str, like: Tensor) -> Tensor:
        """The memory of a tensor."""
        strides = torch.empty_like(like, device="meta").stride()
        if not like.numel():
            return torch.empty_strided(like.shape, strides, dtype=like.dtype)
        at = self._offsets[path]
        raw = self._base[at : at + like.numel() * like.element_size()]
        return raw.view(like.dtype).as_strided(like.shape, strides, raw.storage_offset() // like.element_size())

    def ready(self) -> None:
        """Waits until the latest take has arrived; on the rank that copies, before its word of a later tick."""
        if self._event is not None:
            self._event.synchronize()

    def read(self, copied: Any) -> Any:
        """What `take` returned with its tensors put in, which are to be copied and not changed.

        Raises:
            LockstepError: what lies there is not what this rank has noted.
        """
        if not self._writes:
            self._open(pin=False)
        assert self._map is not None
        if self._map[: len(self._digest)] != self._digest:
            raise LockstepError(
                "the snapshot in memory that this machine's ranks share is not the one that this rank took; resume"
            )
        seen: dict[int, Tensor] = {}

        def put_in(value: Tensor, path: str) -> Tensor:
            return seen.setdefault(id(value), self._view(path, value))

        try:
            return rebuild(copied, put_in)
        finally:
            if not self._writes:  # what was put in keeps it mapped
                self._map, self._base = None, self._base[:0].clone()


def share_places(world: World, count: int) -> list[SharedCopy]:
    """Makes the places of a ring that the ranks of this machine share; called on every rank as a run begins.

    Args:
        world: the ranks.
        count: places.

    Returns:
        The places; none if this rank is alone on its machine, or cannot open what another has made.

    Raises:
        LockstepError: local rank 0 does not come.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 or world.store is None:
        return []
    key = f"esper/snapshots/{world.number}/{os.environ.get('GROUP_RANK', '0')}"
    if world.local_rank == 0:
        name = f"esper-{secrets.token_hex(8)}"
        files, why = _make_files(name, count)
        if why:
            say(f"each rank keeps its own snapshots: no shared memory ({why})")
        world.store.set(key, " ".join([name, str(os.getpid()), *map(str, files)]))
        return [SharedCopy(file, writes=True) for file in files]
    with world.collective("start-up"):
        world.store.wait([key], datetime.timedelta(seconds=world.startup_s))
        name, process, *numbers = world.store.get(key).decode().split()
    return [SharedCopy(file, writes=False) for file in _open_others(name, process, numbers)]


def _make_files(name: str, count: int) -> tuple[list[int], str]:
    """Makes the files; none, and why, where there can be none."""
    if not hasattr(os, "memfd_create"):  # a Python that was built for older systems
        return [], "this Python has no memfd_create"
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most != resource.RLIM_INFINITY:  # it holds for files in memory too, and a seed may need more later
        return [], f"files may have {most} bytes at most (ulimit -f)"
    try:
        return [os.memfd_create(name) for _ in range(count)], ""
    except OSError as error:
        return [], error.strerror or str(error)


def _open_others(name: str, process: str, numbers: list[str]) -> list[int]:
    """Opens another process's files; none if it is not seen from here, which is said."""
    files: list[int] = []
    try:
        for number in numbers:
            link = Path(f"/proc/{process}/fd/{number}")
            if name not in os.readlink(link):  # another machine's or container's process of that number
                raise FileNotFoundError(2, "another process")
            files.append(os.open(link, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        say(f"this rank keeps its own snapshots: local rank 0's memory cannot be opened ({error.strerror or error})")
        for file in files:
            with contextlib.suppress(OSError):
                os.close(file)
        return []
    return files

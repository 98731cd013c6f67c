"""Compiles ahead: ``python -m esper.run.kernels.process RANK_PID NICENESS``, with its order on stdin.

A second line says what the agreed record foresees from which the run begins or goes on, in whose order the rest is
compiled; when that is done, it ends.
It builds the host as a rank does, on zeros in place of data, and runs the very code that a birth runs. It knows neither
RUN nor the other ranks, draws from random streams of its own, and leaves nothing but kernels. A seed that cannot be
compiled is left out: its birth will say why.
"""

from esper.run.parent import die_with_parent  # before what takes seconds

# isort: split

import json
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from esper.config.tree import EsperConfig, read_config
from esper.kasmina.births.build import build_gate
from esper.kasmina.blueprints import registry
from esper.kasmina.compiler import Compiler
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.errors import one_line
from esper.leyline.legality import COPY
from esper.run.assembly import attach_host
from esper.run.fields import import_named
from esper.run.kernels.foresee import Foreseen
from esper.run.kernels.wire import make_batch
from esper.tolaria.growth.planting import build
from esper.tolaria.training.precision import autocast, dtype_of

_POLL_S = 0.5


def memory_of(pids: Iterable[int]) -> int:
    """MiB of memory that these processes hold."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def session_members(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.getsid(int(entry)) == session:
                found.append(int(entry))
        except OSError:
            continue
    return found


class Report:
    """Counts what was compiled, and the most memory that was held for it, and says so once."""

    def __init__(self) -> None:
        self.compiled = self.failed = self.memory_mib = 0
        self._began = time.monotonic()
        self._once = threading.Lock()

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def say(self, why: str = "") -> None:
        """Writes the line that `Helper.wait` reads."""
        if self._once.acquire(blocking=False):
            counts = {"compiled": self.compiled, "failed": self.failed, "memory_mib": self.memory_mib}
            told = {**counts, "seconds": self.seconds, "why": why}
            os.write(1, json.dumps(told).encode() + b"\n")


def end_session() -> NoReturn:
    """Ends this process and its compilers."""
    os.killpg(0, signal.SIGKILL)
    os._exit(0)


class Inbox:
    """What the rank writes: lines of JSON. This process ends when its stdin does."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._rest = b""

    def read(self, seconds: float | None = None) -> None:
        """Reads what comes within so many seconds; None waits."""
        if not select.select([0], [], [], seconds)[0]:
            return
        more = os.read(0, 65536)
        if not more:
            end_session()
        *whole, self._rest = (self._rest + more).split(b"\n")
        for line in whole:
            self.lines.put(json.loads(line))

    def first(self) -> Any:
        """Waits for the first line."""
        while self.lines.empty():
            self.read()
        return self.lines.get()


def guard(inbox: Inbox, report: Report, seconds: float, memory_mib: int) -> None:
    """Ends this process when its stdin ends, or when its seconds or its memory are used up; runs in a thread."""
    while True:
        inbox.read(_POLL_S)
        held = memory_of(session_members(os.getsid(0)))
        report.memory_mib = max(report.memory_mib, held)
        if report.seconds > seconds or held > memory_mib:
            over = f"compile.memory_mib = {memory_mib} is used up: {held} MiB"
            report.say(f"compile.seconds = {seconds:g} are used up" if report.seconds > seconds else over)
            end_session()


def in_order(first: list[Any], inbox: Inbox, report: Report) -> Iterator[Any]:
    """What is foreseen: that of the order until the agreed record's has come, and then that."""
    for plain in first:
        if not inbox.lines.empty():
            break
        yield plain
    else:
        report.say()
    yield from inbox.lines.get()


def compile_all(
    compiler: Compiler, grown: Grown, config: EsperConfig, order: dict[str, Any], inbox: Inbox, report: Report
) -> None:
    """Compiles what is foreseen, in its order; what shares its graphs with another is compiled once."""
    done: set[tuple[Any, ...]] = set()
    device, dtype = torch.device(order["device"]), seed_dtype(dtype_of(config.trainer.precision))
    for plain in in_order(order["foreseen"], inbox, report):
        names = {name: None if plain[name] is None else Operator[plain[name]] for name in ("operator", "fades_from")}
        seed = Foreseen(slot=plain["slot"], blueprint=plain["blueprint"], **names)  # type: ignore[arg-type]
        own = (seed.slot,) if seed.blueprint == COPY else place_of(compiler, seed.slot)
        key = (own, seed.blueprint, seed.operator, seed.fades_from)
        if key in done:
            continue
        done.add(key)
        try:
            compile_one(compiler, grown, seed, run_seed=config.seed, dtype=dtype, device=device)
            report.compiled += 1
        except Exception:
            report.failed += 1


def place_of(compiler: Compiler, slot: str) -> tuple[Any, ...]:
    """What the graphs of a seed depend on beside the seed: slots of which this is equal share them."""
    site, feature = compiler.grown.sites[slot], compiler.features[slot]
    channels = compiler.grown.slots[slot].channels is not None
    return site.topology, site.causal, tuple(feature.shape[1:]), feature.stride()[1:], feature.dtype, channels


def compile_one(
    compiler: Compiler, grown: Grown, seed: Foreseen, *, run_seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compiles a seed as `Compiler.stage` does, and as `Compiler.follow` does once an operator fades."""
    module = build(grown, seed.slot, seed.blueprint, 1, run_seed=run_seed, dtype=dtype, device=device)
    beside = compiler.beside(seed.slot, module, seed.operator)
    beside.fades_from = seed.fades_from
    if Operator.GATE in (seed.operator, seed.fades_from):
        site = grown.sites[seed.slot]
        beside.set_gate(build_gate(dim=site.dim, topology=site.topology, key=1, dtype=dtype, device=device))
    compiler.rehearse(beside)


def main() -> None:
    """Entry point."""
    die_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.nice(int(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda number, frame: end_session())
    report, inbox = Report(), Inbox()
    order = inbox.first()
    config = read_config(order["config"])
    limits = (inbox, report, config.compile.seconds, config.compile.memory_mib)
    threading.Thread(target=guard, args=limits, daemon=True).start()
    try:
        torch.set_num_threads(config.world.threads)
        torch.use_deterministic_algorithms(config.trainer.deterministic)
        registry.load_plugins()
        import_named(config)
        device = torch.device(order["device"])
        example = make_batch(order["example"], device)
        grown = attach_host(config, tuple(order["input_shape"]), order["classes"], example, device)
        compiler = Compiler(
            grown,
            config.trainer.compile_backend,
            train_sizes=order["train_sizes"],
            eval_sizes=order["eval_sizes"],
            incubation=config.slots.incubation,
            autocast=lambda: autocast(config.trainer.precision, device),
        )
        compiler.watch(example)
        compile_all(compiler, grown, config, order, inbox, report)
        report.say()
    except Exception as error:
        report.say(one_line(error))
    end_session()


if __name__ == "__main__":
    main()

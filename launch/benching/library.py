"""The stall of a germination: a seed built at the tick, or by the library's thread during training.

One trial orders a birth, trains a few steps, and takes the seed, as the two ticks of a birth do. Its stall is the time
beyond the same number of steps without a birth: the build itself, or the steps that the thread slowed down and the wait
at the end. Every trial is a new birth, which no library holds. The thread needs a core that training leaves idle. If
ranks x threads fill the machine, there is nothing to gain, and the library leaves the build to the tick: the budget is
then that the stall is no longer, else half of it; the line says how many cores there are. The second line is
the processor time that the training thread itself spent on the birth, which a busy machine hardly changes.
"""

import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from benching.harness import Ratio, engine_for, interleave, ratio_of
from esper.accord.effects import Discard, Prepare
from esper.kasmina.births import Library, LibraryConfig
from esper.kasmina.births.idle import IdleCores
from esper.leyline.commands import Command
from esper.leyline.machine.room import usable_cores
from esper.leyline.stages import Op

SLOT, SEED, DIM, STEPS = "r0c0", "mlp", 1024, 4
HOST = [
    "host=gpt",
    "data=pysource",
    "host.layers=1",
    "host.heads=8",
    f"host.dim={DIM}",
    "host.block=16",
    "data.block=16",
    "trainer.batch=2",
    "controller=none",
    "trainer.steps=100000",
]


def bench_stall(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Stall of a germination with the library's thread, against one built at the tick."""
    engine = engine_for(HOST, rank, world_size)
    growth = engine.growth
    folder = Path(tempfile.mkdtemp(prefix="esper-bench-library-"))
    library = Library(LibraryConfig(enabled=True, memory_mib=0), folder, IdleCores())
    command = Command(slot=SLOT, op=Op.GERMINATE, blueprint=SEED)
    births = 0

    def steps() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.train_step()
        return time.perf_counter() - began

    thread_s: dict[str, list[float]] = {"esper": [], "plain": [], "plain again": []}

    def trial(name: str, library_or_none: Library | None) -> float:
        nonlocal births
        births += 1
        growth.library = library_or_none
        steady = steps()
        began = time.perf_counter()
        worked = time.thread_time()
        growth.perform([Prepare(SLOT, command, births)])
        worked = time.thread_time() - worked
        steps()
        settling = time.thread_time()
        growth.settle(lambda slot, seed: None)  # a tick's check is the same in all arms
        thread_s[name].append(worked + time.thread_time() - settling)
        stall = time.perf_counter() - began - steady
        assert not growth.vetoes, growth.failures
        growth.perform([Discard(SLOT)])
        shutil.rmtree(folder / "seeds", ignore_errors=True)
        return stall

    arms = {name: partial(trial, name, library if name == "esper" else None) for name in thread_s}
    try:
        times = interleave(arms, rounds)
    finally:
        library.close()
        shutil.rmtree(folder, ignore_errors=True)
        engine.world.close()
    size = engine.terms.info(SLOT, SEED).parameters
    without, beside = (1e3 * statistics.median(times[name]) for name in ("plain", "esper"))
    where = (
        f"{SEED} of {size / 1e6:.1f} M parameters, {world_size} ranks of one thread on {os.cpu_count()} cores; "
        f"stall {without:.0f} ms without, {beside:.0f} ms with"
    )
    counted = {name: seconds[1:] for name, seconds in thread_s.items()}  # without the warm-up
    spent, less = (1e3 * statistics.median(counted[name]) for name in ("plain", "esper"))
    alone = f"the same births, without the check of a tick: {spent:.0f} ms without, {less:.1f} ms with"
    limit = 0.5 if world_size < usable_cores() else 1.05  # with an idle core, on a full machine
    return [
        ratio_of("germination stall, library / built at the tick", where, f"<= {limit}", limit, times),
        ratio_of("training thread's own processor time for a birth, likewise", alone, "reported", None, counted),
    ]


PARTS = {"library": bench_stall}

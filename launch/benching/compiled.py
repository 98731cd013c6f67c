"""A birth under ``trainer.compile``: compiled at the tick, or ahead by the process beside the ranks.

Every trial begins with an empty folder of kernels, and with no kernel of earlier trials in memory. What is measured is
`Compiler.stage` alone, at the tick, in CPU seconds of this process and of its compilers, one at a time, which a busy
machine hardly changes; the process that compiles ahead had the time that it needs before that.
"""

import os
import resource
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

from torch._inductor import config as inductor
from torch._inductor.utils import clear_caches

from benching.harness import Ratio, config_for, engine_for, ratio_of
from esper.kasmina.compiler import Compiler
from esper.kasmina.kernels.folder import FOLDER
from esper.run.kernels.build import batch_sizes
from esper.run.kernels.start import start_helper
from esper.tolaria.training.precision import dtype_of

SLOT, SEED = "r1c0", "norm"
HOST = [
    "host=cnn",
    "data=digits",
    "data.probe=512",
    "gates.probe_samples=96",
    "trainer.epochs=60",
    "controller=schedule",
    f"controller.actions=[{{tick: 1, slot: {SLOT}, op: GERMINATE, blueprint: {SEED}}}]",
]


def _cpu() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in spent)


def bench_birth(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """A birth that was compiled ahead against one that was not, with torch's own count of graphs found."""
    engine, config = engine_for(HOST, rank, world_size), config_for([*HOST, "trainer.compile=true"])
    example = engine.bundle.example(engine.world.device, dtype_of(config.trainer.precision))
    train, evaluation = batch_sizes(config, engine.bundle, rank, world_size)
    prepared_s: list[float] = []
    held_mib: list[int] = []
    found: dict[str, list[tuple[int, int]]] = {"esper": [], "plain": [], "plain again": []}

    def trial(name: str, ahead: bool) -> float:
        folder = Path(tempfile.mkdtemp(prefix="esper-bench-kernels-"))
        os.environ[FOLDER] = str(folder)
        clear_caches()
        compiler = Compiler(engine.grown, train_sizes=train, eval_sizes=evaluation, incubation=config.slots.incubation)
        compiler.watch(example)
        if ahead:
            beside = start_helper(config, engine.world, engine.bundle, engine.terms, example, (train, evaluation))
            assert beside is not None
            told = beside.helper.wait(600.0)
            assert told is not None, "the process that compiles ahead has died"
            prepared_s.append(told["seconds"])
            held_mib.append(told["memory_mib"])
            beside.close()
        seed = engine.growth.build(SLOT, SEED, 1)
        began = _cpu()
        compiler.stage(SLOT, seed)
        took = _cpu() - began
        found[name].append((compiler.reports[-1].hits, compiler.reports[-1].misses))
        shutil.rmtree(folder, ignore_errors=True)
        return took

    inductor.compile_threads = 1
    arms = {name: partial(trial, name, name == "esper") for name in found}
    arms["plain"]()  # warm-up, not counted: what the first compile of a process imports
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name].append(arm())
    engine.world.close()
    assert all(misses == 0 for _, misses in found["esper"]), found
    cold, warm = (statistics.median(times[name]) for name in ("plain", "esper"))
    hits, misses = found["esper"][-1][0], found["plain"][-1][1]
    where = (
        f"{SEED} on the demo's CNN; {cold:.1f} CPU s cold ({misses} graphs compiled), {warm:.2f} ahead ({hits} found, "
        f"none compiled); the process needed {statistics.median(prepared_s):.0f} s before, import included, and "
        f"{max(held_mib)} MiB of its own"
    )
    return [ratio_of("birth under compile, prepared ahead / cold", where, "<= 0.12", 0.12, times)]


PARTS = {"compiled": bench_birth}

"""What stands between steps: a save against a synchronous one, and the share of a run that its ticks take.

A save's stall is the time from the beginning of its tick to the next step, and what steps and the tick that settles it
take longer than usual until it is committed. The thread that writes needs a core that training leaves idle: on a full
machine its work takes time from the steps, and is written all the same. The second line is the processor time of the
training thread alone, which a busy machine hardly changes.

Of a run's ticks validation is left out, since a run that does not grow has it, too. Looks at seeds are forwards of the
network, as many as `gates` says; they have a line of their own.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benching.harness import Part, Ratio, engine_for, interleave, interval, ratio_of
from benching.kasmina import blend
from esper.tolaria.checkpoint.store import rank_file
from esper.tolaria.lockstep.wire import SaveWord
from esper.tolaria.training.engine import Engine

BLENDED = ("r0c0", "r1c0")
STEADY = 5  # steps from which it is known what one takes
SAVED = [
    "host=gpt",
    "data=pysource",
    "host.layers=3",
    "host.heads=8",
    "host.dim=512",
    "host.block=32",
    "data.block=32",
    "controller=none",
    "governor.enabled=false",
    "control.validate_every=1000000",
    "trainer.steps=100000",
]
GROWING = [
    "host=gpt",
    "data=pysource",
    "host.dim=128",
    "host.layers=4",
    "trainer.batch=64",
    "controller=heuristic",
    "trainer.steps=100000",
]


def bench_save(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """The stall of a save beside training, against a synchronous save in the training thread."""
    engine = engine_for([*SAVED, f"trainer.batch={2 * world_size}"], rank, world_size)
    saver, store = engine.saver, engine.saver.store
    thread_s: dict[str, list[float]] = {"esper": [], "plain": [], "plain again": []}
    sizes: list[int] = []

    def timed_tick(saved: bool) -> None:
        engine.saves.every_ticks = int(saved)
        engine.tick()

    def is_writing() -> bool:
        words = torch.tensor([float(saver.word is SaveWord.WRITING)])
        return bool(engine.world.all_reduce(words, dist.ReduceOp.MAX, what="writing"))

    def beside(step_s: float, tick_s: float) -> float:
        """Until the save is committed, without what the same steps and the second tick take anyway."""
        began, worked, steps = time.perf_counter(), time.thread_time(), 0
        timed_tick(True)
        thread_s["esper"].append(time.thread_time() - worked)
        while is_writing() or not steps:
            engine.train_step()
            steps += 1
        timed_tick(False)
        return time.perf_counter() - began - steps * step_s - tick_s

    def at_once(name: str, step_s: float, tick_s: float) -> float:
        began, worked = time.perf_counter(), time.thread_time()
        timed_tick(False)
        common, own = engine.collect_saved(engine.state)
        if rank == 0:
            store.write(engine.step, "state.pt", common)
        store.write(engine.step, rank_file(rank), own)
        engine.world.meet("written")
        if rank == 0:
            sizes.append(store.commit(engine.step, tick=engine.state.tick, world_size=world_size, score=None))
        engine.world.meet("committed")
        thread_s[name].append(time.thread_time() - worked)
        return time.perf_counter() - began

    def trial(arm: Callable[[float, float], float]) -> float:
        engine.saves.settle_now(engine.state)
        engine.train_step()  # the first one after a save has other limits
        took = [_seconds(engine.train_step) for _ in range(STEADY)]
        tick_s = _seconds(partial(timed_tick, False))
        engine.train_step()
        return arm(statistics.median(took), tick_s)

    arms = {"esper": partial(trial, beside)}
    arms |= {name: partial(trial, partial(at_once, name)) for name in ("plain", "plain again")}
    times = interleave(arms, rounds)
    engine.saves.settle_now(engine.state)
    engine.world.close()
    mine, theirs = (statistics.median(times[name]) for name in ("esper", "plain"))
    parameters = sum(p.numel() for p in engine.grown.model.parameters())
    cores = os.cpu_count() or 1
    where = (
        f"GPT 3x512, {parameters / 1e6:.1f} M, AdamW, {sizes[-1] / 2**20 if sizes else 0:.0f} MiB, {world_size} ranks "
        f"of one thread on {cores} cores; {1e3 * mine:.0f} ms beside training, {theirs:.2f} s at once"
    )
    counted = {name: seconds[1:] for name, seconds in thread_s.items()}  # without the warm-up
    own = {name: 1e3 * statistics.median(seconds) for name, seconds in counted.items()}
    alone = f"of the tick with the copy {own['esper']:.0f} ms, of a tick and a synchronous save {own['plain']:.0f} ms"
    limit = 0.1 if world_size < cores else None
    budget = "<= 0.1" if limit else "reported"
    return [
        ratio_of("stall of a save, beside training / at once", where, budget, limit, times),
        ratio_of("training thread's own processor time for a save, likewise", alone, "reported", None, counted),
    ]


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class _Clocks:
    """Seconds within some methods, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, owner: Any, method: str, name: str) -> None:
        call = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, method, watched)


def _tick_shares(engine: Engine, rounds: int) -> dict[str, list[float]]:
    """Of each tick with the steps before it, validation left out, by name: the share of the tick without its looks, of
    the looks, and of the controller; and what validation takes beside that."""
    clocks = _Clocks()
    shares: dict[str, list[float]] = {"tick": [], "looks": [], "controller": [], "validation": []}
    clocks.watch(engine.evaluator, "validation_sums", "validation")
    clocks.watch(engine.evaluator, "probe_sums", "looks")
    if engine.controller is not None:
        clocks.watch(engine.controller, "decide", "controller")
    for _ in range(rounds):
        clocks.spent = dict.fromkeys(shares, 0.0)
        began = time.perf_counter()
        while not engine.tick_due():
            engine.train_step()
        tick_s = _seconds(engine.tick)
        whole = time.perf_counter() - began - clocks.spent["validation"]
        clocks.spent["tick"] = tick_s - clocks.spent["validation"] - clocks.spent["looks"]
        for name, found in shares.items():
            found.append(clocks.spent[name] / whole)
    return shares


def bench_share(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """The share of wall time that ticks and the controller take, under the heuristic, with two seeds blended."""
    engine = engine_for(GROWING, rank, world_size)
    blend(engine, BLENDED, "mlp_small")
    engine.train_step()
    _tick_shares(engine, 1)  # warm-up, not counted
    shares = _tick_shares(engine, max(2, rounds))
    births, every = engine.state.births, engine.settings.control.every
    engine.world.close()
    of = {name: statistics.median(found) for name, found in shares.items()}
    size = sum(p.numel() for p in engine.grown.model.parameters())
    where = (
        f"GPT 4x128 and its seeds, {size / 1e6:.1f} M, {world_size} ranks, batch 64x64 tokens, a tick every {every} "
        f"steps, {births} births on the way; the controller {of['controller']:.1e}; validation beside it "
        f"{of['validation']:.3f}"
    )

    def line(name: str, values: list[float], limit: float | None) -> Ratio:
        same = [after / before for before, after in zip(values[::2], values[1::2], strict=False)]
        budget = "reported" if limit is None else f"<= {limit}"
        return Ratio(name, where, budget, limit, *interval(values), *interval(same))

    both = [tick + looks for tick, looks in zip(shares["tick"], shares["looks"], strict=True)]
    name = "share of wall time that ticks and the controller take; beside it a tick's to that of the one before"
    return [line(name, shares["tick"], 0.02), line("the same with looks at seeds", both, None)]


PARTS: dict[str, Part] = {"save": bench_save, "share": bench_share}

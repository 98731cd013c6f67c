"""Costs of lockstep: a step with empty slots, a tick, a growth, each against hand-written code."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benching.harness import Part, Ratio, bare_host, counting, engine_for, interleave, plain_loop, ratio_of, timed
from esper.accord.absorb import absorb
from esper.accord.observation import observation_of
from esper.accord.reducer import reduce_tick
from esper.kasmina.attach import attach
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import wait
from esper.leyline.stages import Stage
from esper.tolaria.growth.wrapper import wrap as wrap_in_ddp
from esper.tolaria.lockstep.wire import RankWord
from esper.tolaria.training.engine import Engine


def bench_step(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Step time with empty slots against plain DDP of the host."""
    host = ["host=gpt", "data=pysource", "host.dim=128", "host.layers=4", "trainer.batch=64", "controller=none"]
    engine = engine_for([*host, "optim.clip_norm=1.0", "trainer.steps=100000"], rank, world_size)
    arms = {
        "esper": timed(engine.train_step, 5),
        "plain": timed(counting(plain_loop(engine, bare_host(engine))), 5),
        "plain again": timed(counting(plain_loop(engine, bare_host(engine))), 5),
    }
    times = interleave(arms, rounds)
    size = sum(p.numel() for p in engine.grown.model.parameters())
    ms = 1e3 * statistics.median(times["plain"])
    where = f"GPT 4x128, {size / 1e6:.1f} M, {world_size} ranks, batch 64x64 tokens, {ms:.0f} ms a step"
    result = ratio_of("step, all slots empty / plain DDP", where, "<= 1.01", 1.01, times)
    engine.world.close()
    return [result]


def live_slots(engine: Engine, count: int) -> None:
    """Plants a TRAINING seed in each of the first ``count`` slots, in the state that growth would give it."""
    changed = {}
    for entry in engine.state.slots[:count]:
        engine.growth.plant(entry.slot, engine.growth.build(entry.slot, "mlp_small", 1))
        changed[entry.slot] = replace(
            entry,
            stage=Stage.TRAINING,
            generation=1,
            blueprint="mlp_small",
            operator=Operator.ADD,
            curve=Curve.COSINE,
            learn_step=0,
            finite=True,
            owned=True,
        )
    engine.state = engine.state.with_slots(changed)
    engine.growth.follow(engine.state)


def bench_tick(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """A tick with 8 live slots against two pickled object broadcasts a slot."""
    host = ["host=gpt", "data=pysource", "host.layers=8", "host.dim=64", "controller=none", "slots.max_live=null"]
    engine = engine_for([*host, "trainer.steps=100000"], rank, world_size)
    live_slots(engine, 8)
    commands = {entry.slot: wait(entry.slot) for entry in engine.state.slots}
    values = {f"{slot}.finite": 1.0 for slot in engine.grown.slots}

    def tick() -> None:
        sums = engine.lockstep.observe(values)
        state = absorb(engine.state, sums, engine.terms, step=0, epoch=0)
        observation_of(state, engine.terms)
        digests = engine.lockstep.digests_of(state, engine.grown, parameters=False)
        agreed = engine.lockstep.commit(state, commands if rank == 0 else None, digests, {}, RankWord())
        reduce_tick(state, agreed.commands, agreed.vetoes, engine.terms, stage_ticks=4)

    gate = {"gate": "G2", "passed": True, "score": 1.0, "checks": [("stage", True, "ok", True)] * 5}
    order = {"op": "WAIT", "slot": "r0c0", "target": 1.0, "curve": "COSINE", "ticks": 3}

    def pickled() -> None:
        for _ in range(8):
            dist.broadcast_object_list([gate if rank == 0 else None], src=0)
            dist.broadcast_object_list([order if rank == 0 else None], src=0)

    arms = {"esper": timed(tick, 20), "plain": timed(pickled, 20), "plain again": timed(pickled, 20)}
    times = interleave(arms, rounds)
    counts = {name: count_collectives(step) for name, step in (("esper", tick), ("plain", pickled))}
    fewer, ms = counts["plain"] / counts["esper"], 1e3 * statistics.median(times["esper"])
    where = f"8 live slots, {world_size} ranks; {counts['esper']} collectives against {counts['plain']} "
    where += f"({fewer:.0f} times fewer); {ms:.2f} ms a tick"
    result = ratio_of("tick with digests and gates / pickled broadcasts alone", where, "8 x fewer, counted", 1.0, times)
    engine.world.close()
    return [result]


def count_collectives(step: Callable[[], None]) -> int:
    """Counts the collectives of one call, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("c10d::"))


class Wide(nn.Module):
    """A 50 M-parameter host: 12 linear layers of 2048 x 2048."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2048, 2048) for _ in range(12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, 2048]."""
        for layer in self.layers:
            x = x + 0.1 * torch.relu(layer(x))
        return x


def bench_growth(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """A growth of a 50 M-parameter host against a plain DDP re-wrap: wrap only, and the whole stall."""
    engine = engine_for(["controller=none"], rank, world_size)  # for its world
    world = engine.world
    torch.manual_seed(0)
    host = Wide()
    grown = attach(host, {"r0c0": "layers.5"}, torch.randn(2, 2048))
    parameters = sum(p.numel() for p in host.parameters())
    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(rank))
    holder = grown.slots["r0c0"]

    def step(call: Callable[..., Any]) -> float:
        began = time.perf_counter()
        call(x).square().mean().backward()
        host.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    def trial(wrap: Callable[[nn.Module], Callable[..., Any]]) -> tuple[float, float]:
        """One growth: (seconds of the wrap, seconds of the whole stall)."""
        holder.uproot()
        call = wrap(host)
        steady = statistics.median([step(call) for _ in range(7)][2:])
        del call
        dist.barrier()
        began = time.perf_counter()
        holder.plant(_Seed())
        holder.phase = Phase.BLEND
        holder.set_alpha(0.5)
        call = wrap(host)
        wrapped = time.perf_counter() - began
        stall = wrapped + sum(step(call) - steady for _ in range(2))
        return wrapped, stall

    def esper_wrap(model: nn.Module) -> Callable[..., Any]:
        return wrap_in_ddp(model, world)

    def plain_wrap(model: nn.Module) -> Callable[..., Any]:
        return nn.parallel.DistributedDataParallel(model)

    rng = random.Random(2)
    wraps: dict[str, list[float]] = {"esper": [], "plain": [], "plain again": []}
    stalls: dict[str, list[float]] = {"esper": [], "plain": [], "plain again": []}
    arms = {"esper": esper_wrap, "plain": plain_wrap, "plain again": plain_wrap}
    trial(plain_wrap)
    for _ in range(max(6, rounds // 2)):
        order = list(arms)
        rng.shuffle(order)
        for name in order:
            wrapped, stall = trial(arms[name])
            wraps[name].append(wrapped)
            stalls[name].append(stall)
    seconds = statistics.median(wraps["plain"])
    where = f"{parameters / 1e6:.0f} M parameters, {world_size} ranks; plain re-wrap {seconds:.3f} s"
    whole = f"{where}, its whole stall {statistics.median(stalls['plain']):.3f} s"
    world.close()
    return [
        ratio_of("growth, wrap only / plain re-wrap", where, ">= 20 x faster", 1 / 20, wraps),
        ratio_of("growth, whole stall / plain re-wrap", whole, ">= 2.5 x shorter", 1 / 2.5, stalls),
    ]


class _Seed(nn.Module):
    """A small seed for the wide host."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(2048, 32), nn.Linear(32, 2048)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.1 * self.up(torch.relu(self.down(x)))


PARTS: dict[str, Part] = {"step": bench_step, "tick": bench_tick, "growth": bench_growth}

"""Benchmarks: ratios measured side by side in one interleaved run, with an A/A arm beside each.

    python launch/bench.py lockstep [--rounds N] [--ranks R] [--json FILE]

Every arm runs in the same processes; in each round the arms take turns in an order drawn anew, so that drift of the
machine hits all alike. A ratio is the median over rounds of the paired ratio, with a 95 % bootstrap interval; beside
it stands A/A, the same quantity between two copies of the baseline. Where the interval straddles the budget, or A/A's
noise is wider than the margin to it, the result is called unresolved, not met.
"""

import argparse
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from esper.assembly import assemble
from esper.config import build_config
from esper.kasmina.attach import attach
from esper.kasmina.slot import Phase
from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import wait
from esper.leyline.protocols import NullSink
from esper.leyline.stages import Stage
from esper.tolaria.checkpoint import CheckpointStore
from esper.tolaria.data import load_data
from esper.tolaria.engine import Engine
from esper.tolaria.heartbeat import Heartbeat
from esper.tolaria.reducer import reduce_tick
from esper.tolaria.views import absorb, observe
from esper.tolaria.wire import RankWord
from esper.tolaria.world import World

CONF = Path(__file__).resolve().parents[1] / "conf"


@dataclass
class Ratio:
    """One line of the result."""

    name: str
    host: str
    budget: str
    limit: float  # met when the ratio is at or below it; "times faster" budgets are turned into ratios
    ratio: float
    low: float
    high: float
    aa: float
    aa_low: float
    aa_high: float

    @property
    def verdict(self) -> str:
        """Met or missed where the interval lies on one side of the limit and the margin is wider than A/A's noise."""
        noise = self.ratio * max(abs(self.aa_high - 1.0), abs(1.0 - self.aa_low))
        if self.low <= self.limit <= self.high or noise > abs(self.limit - self.ratio):
            return "unresolved"
        return "met" if self.ratio <= self.limit else "missed"


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def interleave(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Runs every arm once a round, in an order that all ranks draw alike; returns seconds per arm and round."""
    rng = random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for name in arms:  # warm-up, not counted
        arms[name]()
    for _ in range(rounds):
        order = list(arms)
        rng.shuffle(order)
        for name in order:
            if dist.is_initialized():
                dist.barrier()
            times[name].append(arms[name]())
    return times


def ratio_of(name: str, host: str, budget: str, limit: float, times: dict[str, list[float]]) -> Ratio:
    """Esper against the baseline, and the baseline's second copy against its first."""
    pairs = [a / b for a, b in zip(times["esper"], times["plain"], strict=True)]
    same = [a / b for a, b in zip(times["plain again"], times["plain"], strict=True)]
    return Ratio(name, host, budget, limit, *interval(pairs), *interval(same))


def engine_for(overrides: list[str], rank: int, world_size: int) -> Engine:
    """An engine of the shipped config, in a temporary run directory."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = OmegaConf.to_container(compose("config", overrides=overrides), resolve=False)
    assert isinstance(plain, dict)
    plain.pop("launch", None)
    plain["run"]["dir"] = "bench"
    config = build_config(plain)
    folder = Path(tempfile.gettempdir()) / f"esper-bench-{os.environ['MASTER_PORT']}"
    world = World(config.world, config.control)
    world.heartbeat = Heartbeat(folder / "heartbeat", rank, world_size)
    engine = assemble(
        config, world=world, heartbeat=world.heartbeat, bundle=load_data(config.data),
        store=CheckpointStore(folder / "checkpoints", attempt=1, keep=1), sink=NullSink(), digest=0, run_id="bench",
    )  # fmt: skip
    engine.begin(None)
    return engine


def plain_loop(engine: Engine) -> Callable[[int], None]:
    """What somebody would write by hand for the same host, batches, clipping and optimizer: plain DDP."""
    grown = engine.fresh()
    model = nn.parallel.DistributedDataParallel(grown.model)
    for slot in grown.sites.values():  # the baseline has no hooks
        grown.model.get_submodule(slot.module)._forward_hooks.clear()
    optimizer = torch.optim.AdamW(grown.model.parameters(), lr=1e-3)
    parameters = list(grown.model.parameters())
    world, task, bundle = engine.world, engine.bundle.task, engine.bundle

    def step(index: int) -> None:
        indices = engine.plan.indices(index)
        per_rank = -(-len(indices) // world.size)
        mine = indices[world.rank * per_rank : (world.rank + 1) * per_rank]
        x, y = bundle.train_batch(mine, seed=0, epoch=0)
        loss, correct = task.per_sample(model(x), y)
        total = loss.mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        (total.item(), correct.mean().item())  # anybody logs these

    return step


def timed(step: Callable[[], Any], count: int) -> Callable[[], float]:
    """Seconds per call over ``count`` calls."""

    def arm() -> float:
        began = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - began) / count

    return arm


def bench_step(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Step time with empty slots against plain DDP of the host."""
    host = ["host=gpt", "data=pysource", "host.dim=128", "host.layers=4", "trainer.batch=64", "controller=none"]
    engine = engine_for([*host, "optim.clip_norm=1.0", "trainer.steps=100000"], rank, world_size)
    counters = {"a": 0, "b": 0}
    plain, again = plain_loop(engine), plain_loop(engine)

    def run(key: str, step: Callable[[int], None]) -> None:
        step(counters[key])
        counters[key] += 1

    arms = {
        "esper": timed(engine.train_step, 5),
        "plain": timed(lambda: run("a", plain), 5),
        "plain again": timed(lambda: run("b", again), 5),
    }
    times = interleave(arms, rounds)
    size = sum(p.numel() for p in engine.grown.model.parameters())
    ms = 1e3 * statistics.median(times["plain"])
    where = f"GPT 4x128, {size / 1e6:.1f} M, {world_size} ranks, batch 64x64 tokens, {ms:.0f} ms a step"
    result = ratio_of("step, all slots empty / plain DDP", where, "<= 1.01", 1.01, times)
    engine.world.close()
    return [result]


def live_slots(engine: Engine, count: int) -> None:
    """Plants a TRAINING seed in every slot, as a life would have it."""
    changed = {}
    for entry in engine.state.slots[:count]:
        engine.growth.plant(entry.slot, engine.growth.build(entry.slot, "mlp_small", 1))
        changed[entry.slot] = replace(
            entry, stage=Stage.TRAINING, generation=1, blueprint="mlp_small", operator=Operator.ADD,
            curve=Curve.COSINE, learn_step=0, finite=True, owned=True,
        )  # fmt: skip
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
        observe(state, engine.terms)
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
    """Collectives issued in one call, counted by the profiler below our code."""
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
        return world.wrap(model)

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


PARTS = {"step": bench_step, "tick": bench_tick, "growth": bench_growth}


def _rank(rank: int, world_size: int, port: int, part: str, rounds: int, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    results = PARTS[part](rank, world_size, rounds)
    if rank == 0:
        Path(out).write_text(json.dumps([vars(result) for result in results]))


def lockstep(ranks: int, rounds: int, parts: Sequence[str]) -> list[Ratio]:
    """Runs the parts one after another, each in fresh processes."""
    results = []
    for part in parts:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            mp.spawn(_rank, args=(ranks, port, part, rounds, file.name), nprocs=ranks)
            results += [Ratio(**row) for row in json.loads(Path(file.name).read_text())]
    return results


def main() -> None:
    """Prints one line a ratio; ``--json`` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["lockstep"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = lockstep(args.ranks, args.rounds, args.parts)
    for r in results:
        print(f"{r.name}\n    {r.host}")
        print(
            f"    ratio {r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]   A/A {r.aa:.3f} [{r.aa_low:.3f}, {r.aa_high:.3f}]",
            end="",
        )
        print(f"   budget {r.budget}: {r.verdict}")
    if args.json:
        args.json.write_text(json.dumps([{**vars(r), "verdict": r.verdict} for r in results], indent=1) + "\n")
    sys.exit(0)


if __name__ == "__main__":
    main()

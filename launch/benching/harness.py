"""The harness of the benchmarks: interleaved arms, paired ratios, an A/A ratio, and counts where noise is too large.

Every arm runs in the same processes. In each round the arms take turns in an order drawn anew, so that drift of the
machine affects all alike. A ratio is the median over rounds of the paired ratio, with a 95 % bootstrap interval. A/A is
the same quantity between two copies of the baseline.
"""

import itertools
import json
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.config.tree import EsperConfig, build_config
from esper.launcher.compose import conf_folder
from esper.leyline.protocols import NullSink
from esper.run.assembly import assemble
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World
from esper.tolaria.training.engine import Engine

DEVICE = "ESPER_BENCH_DEVICE"  # variable: cpu or gpu, where the ranks of a benchmark compute
Part = Callable[[int, int, int], "list[Ratio]"]  # (rank, ranks, rounds) -> lines; the same on every rank


@dataclass
class Ratio:
    """One line of the result.

    Fields:
        name: the quantity.
        host: the network and machine it was measured on, in words.
        budget: in words.
        limit: the budget is met if the ratio is at most this ("times faster" becomes a ratio); None without a budget.
        ratio: median of paired ratios.
        low: lower end of its interval.
        high: upper end of its interval.
        aa: the ratio between two copies of the baseline.
        aa_low: lower end of its interval.
        aa_high: upper end of its interval.
    """

    name: str
    host: str
    budget: str
    limit: float | None
    ratio: float
    low: float
    high: float
    aa: float
    aa_low: float
    aa_high: float

    @property
    def verdict(self) -> str:
        """ "met" or "missed" if the interval is on one side of the limit and the margin is wider than A/A's noise."""
        if self.limit is None:
            return "reported"
        noise = self.ratio * max(abs(self.aa_high - 1.0), abs(1.0 - self.aa_low))
        if self.low <= self.limit <= self.high or noise > abs(self.limit - self.ratio):
            return "unresolved"
        return "met" if self.ratio <= self.limit else "missed"


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median with its 95 % bootstrap interval."""
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


def ratio_of(name: str, host: str, budget: str, limit: float | None, times: dict[str, list[float]]) -> Ratio:
    """The ratio of Esper to the baseline, and of the baseline's second copy to its first."""
    pairs = [a / b for a, b in zip(times["esper"], times["plain"], strict=True)]
    same = [a / b for a, b in zip(times["plain again"], times["plain"], strict=True)]
    return Ratio(name, host, budget, limit, *interval(pairs), *interval(same))


def config_for(overrides: list[str]) -> EsperConfig:
    """Composes the shipped config."""
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        where = f"world.device={os.environ.get(DEVICE, 'cpu')}"
        plain = OmegaConf.to_container(compose("config", overrides=[*overrides, where]), resolve=False)
    assert isinstance(plain, dict)
    plain.pop("launch", None)
    plain["run"]["dir"] = "bench"
    return build_config(plain)


def engine_for(overrides: list[str], rank: int, world_size: int) -> Engine:
    """Builds an engine from the shipped config, in a temporary run directory."""
    config = config_for(overrides)
    folder = Path(tempfile.gettempdir()) / f"esper-bench-{os.environ['MASTER_PORT']}"
    world = World(config.world, config.control)
    world.heartbeat = Heartbeat(folder / "heartbeat", rank, world_size)
    engine = assemble(
        config,
        world=world,
        heartbeat=world.heartbeat,
        bundle=load_data(config.data),
        store=CheckpointStore(folder / "checkpoints", attempt=1, keep=1),
        sink=NullSink(),
        digest=0,
        run_id="bench",
    )
    engine.begin(None)
    return engine


def bare_host(engine: Engine) -> nn.Module:
    """A fresh copy of the engine's host, without hooks and slots."""
    host = engine.fresh().model
    for module in host.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    del host.esper_slots
    return host


def plain_loop(engine: Engine, network: nn.Module) -> Callable[[int], None]:
    """A hand-written step with plain DDP, on the engine's batches, with the same clipping and optimizer."""
    model = nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    parameters = list(network.parameters())
    world, task, bundle = engine.world, engine.task, engine.bundle

    def step(index: int) -> None:
        indices = engine.plan.indices(index)
        per_rank = -(-len(indices) // world.size)
        own_indices = indices[world.rank * per_rank : (world.rank + 1) * per_rank]
        x, y = engine.evaluator.to_device(*bundle.train_batch(own_indices, seed=0, epoch=0))
        loss, correct = task.per_sample(model(x), y)
        total = loss.mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        (total.item(), correct.mean().item())  # every training loop logs these

    return step


def counting(step: Callable[[int], None]) -> Callable[[], None]:
    """Turns a step that takes its number into one that counts, from 0."""
    numbers = itertools.count()
    return lambda: step(next(numbers))


def dispatched(step: Callable[[], Any], see: Callable[[Any, Any, Any], None]) -> None:
    """Runs one call and passes each dispatched operator, backward included, to ``see``: (operator, args, result)."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            see(func, args, result)
            return result

    with Watching():
        step()


def timed(step: Callable[[], Any], count: int, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Seconds per call over ``count`` calls.

    Args:
        step: the call.
        count: calls per measurement.
        clock: wall time; `time.process_time` for a single thread that never waits, since a busy machine disturbs it
            far less.
    """

    def wait() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def arm() -> float:
        wait()
        began = clock()
        for _ in range(count):
            step()
        wait()
        return (clock() - began) / count

    return arm


def _rank(rank: int, world_size: int, port: int, part: Part, rounds: int, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    results = part(rank, world_size, rounds)
    if rank == 0:
        Path(out).write_text(json.dumps([vars(result) for result in results]))


def run(parts: Mapping[str, Part], *, ranks: int, rounds: int) -> list[Ratio]:
    """Runs the parts one after another, each in fresh processes of one thread.

    Args:
        parts: the functions of a module, by name.
        ranks: number of processes.
        rounds: number of rounds of each part.
    """
    results = []
    for part in parts.values():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            mp.spawn(_rank, args=(ranks, port, part, rounds, file.name), nprocs=ranks)
            results += [Ratio(**row) for row in json.loads(Path(file.name).read_text())]
    return results

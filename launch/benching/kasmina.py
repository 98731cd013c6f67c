"""Costs of a growing model: a step with seeds, leave-one-out, memory layout, each against hand-written code."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benching.harness import (
    Part,
    Ratio,
    bare_host,
    counting,
    dispatched,
    engine_for,
    interleave,
    plain_loop,
    ratio_of,
    timed,
)
from esper.kasmina.attach import attach
from esper.kasmina.attribution.coalitions import QuantityKind, make_plan
from esper.kasmina.attribution.prefixes import How
from esper.kasmina.attribution.worth import attribute
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.hosts import CNNConfig, GPTConfig, build_host
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.stages import Stage
from esper.tolaria.data.task import Task
from esper.tolaria.training.engine import Engine

ALPHA = 0.5


class GPTByHand(nn.Module):
    """A GPT whose forward names its seeds: the hand-written module of the same graph."""

    def __init__(self, host: nn.Module, seeds: dict[int, nn.Module]) -> None:
        super().__init__()
        self.host = host
        self.seeds = nn.ModuleDict({str(row): seed for row, seed in seeds.items()})

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] int64 -> logits [B, T, V]."""
        host: Any = self.host
        x = host.tokens(tokens_BT) + host.positions(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for row, block in enumerate(host.blocks):
            x = block(x)
            if str(row) in self.seeds:
                x = x + ALPHA * self.seeds[str(row)](x)
        return host.head(host.norm(x))


def blend(engine: Engine, slots: Sequence[str], blueprint: str) -> dict[str, nn.Module]:
    """Plants seeds that stay in BLENDING at `ALPHA`, in the state that growth would give them; returns copies."""
    ramp = Ramp(
        start=ALPHA, target=ALPHA, first_step=0, last_step=0, curve=Curve.LINEAR, steepness=6.0, operator=Operator.ADD
    )
    changed, copies = {}, {}
    for entry in engine.state.slots:
        if entry.slot in slots:
            seed = engine.growth.build(entry.slot, blueprint, 1)
            copies[entry.slot] = copy.deepcopy(seed)
            engine.growth.plant(entry.slot, seed)
            changed[entry.slot] = replace(
                entry,
                stage=Stage.BLENDING,
                generation=1,
                blueprint=blueprint,
                operator=Operator.ADD,
                curve=Curve.LINEAR,
                target=ALPHA,
                ramp=ramp,
                learn_step=0,
                finite=True,
                owned=True,
            )
    engine.state = engine.state.with_slots(changed)
    engine.growth.follow(engine.state)
    return copies


def bench_step(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Step time with three blended seeds against a hand-written module of the same graph under plain DDP."""
    host = ["host=gpt", "data=pysource", "host.dim=128", "host.layers=4", "trainer.batch=64", "controller=none"]
    engine = engine_for([*host, "optim.clip_norm=1.0", "trainer.steps=100000"], rank, world_size)
    slots = ("r0c0", "r1c0", "r2c0")
    seeds = blend(engine, slots, "mlp_small")

    def by_hand() -> Callable[[], None]:
        rows = {int(slot[1]): copy.deepcopy(seed).requires_grad_() for slot, seed in seeds.items()}
        return counting(plain_loop(engine, GPTByHand(bare_host(engine), rows)))

    plain = by_hand()
    arms = {"esper": timed(engine.train_step, 5), "plain": timed(plain, 5), "plain again": timed(by_hand(), 5)}
    times = interleave(arms, rounds)
    ours, theirs = operators(engine.train_step), operators(plain)
    size = sum(p.numel() for p in engine.grown.model.parameters())
    ms = 1e3 * statistics.median(times["plain"])
    where = (
        f"GPT 4x128 with 3 mlp_small, {size / 1e6:.1f} M, {world_size} ranks, batch 64x64 tokens, {ms:.0f} ms a step"
    )
    where += f"; {ours} operators against {theirs}"
    engine.world.close()
    return [ratio_of("step, 3 blended seeds / hand-written module of the same graph", where, "<= 1.03", 1.03, times)]


def grown_host(config: Any, shape: tuple[int, ...], classes: int, slots: Sequence[str], blueprint: str) -> Grown:
    """A host without an engine, with a seed at `ALPHA` in each of ``slots``."""
    torch.manual_seed(0)
    model = build_host(config, shape, classes)
    points = model.injection_points()  # type: ignore[operator]
    example = torch.zeros(2, *shape) if len(shape) == 3 else torch.zeros(2, *shape, dtype=torch.int64)
    grown = attach(model, {point.slot: point.module for point in points}, example)
    for slot in slots:
        site = grown.sites[slot]
        seed = build_seed(
            blueprint,
            dim=site.dim,
            topology=site.topology,
            key=birth_key(0, slot, 1),
            dtype=torch.float32,
            device="cpu",
        )
        grown.slots[slot].plant(seed)
        grown.slots[slot].phase = Phase.BLEND
        grown.slots[slot].set_alpha(ALPHA)
    return grown


def leave_one_out_naive(grown: Grown, slots: Sequence[str], x: Tensor, y: Tensor, task: Task) -> Callable[[], Any]:
    """One full forward pass with all seeds and one without each."""

    def forwards() -> list[float]:
        grown.model.eval()
        sums = []
        with torch.no_grad():
            for left_out in (None, *slots):
                with grown.override({} if left_out is None else {left_out: 0.0}):
                    loss, correct = task.per_sample(grown.model(x), y)
                sums.append((loss.sum().item(), correct.sum().item()))
        return [loss - sums[0][0] for loss, _ in sums[1:]]

    return forwards


def leave_one_out(name: str, grown: Grown, x: Tensor, y: Tensor, task: Task, limit: float, rounds: int) -> list[Ratio]:
    """`attribute` against `leave_one_out_naive` on one batch: with shared prefixes, and with coalitions stacked."""
    slots = [slot for slot, holder in grown.slots.items() if holder.seed is not None]
    plan = make_plan(dict.fromkeys(slots, ALPHA), ask=(QuantityKind.LEAVE_ONE_OUT,))
    naive = leave_one_out_naive(grown, slots, x, y, task)

    def shared() -> Any:
        return attribute(grown, plan, [(x, y)], task.per_sample)

    def stacked() -> Any:
        return attribute(grown, plan, [(x, y)], task.per_sample, how=How.STACKED)

    arms = {"esper": shared, "stacked": stacked, "plain": naive, "plain again": naive}
    times = interleave({arm: timed(work, 1, time.process_time) for arm, work in arms.items()}, rounds)
    with FlopCounterMode(display=False) as ours:
        shared()
    with FlopCounterMode(display=False) as theirs:
        naive()
    flops = f"{ours.get_total_flops() / theirs.get_total_flops():.3f} of the FLOPs; "
    where = f"{name}, batch {len(x)}, seeds in {', '.join(slots)}, "
    where += f"{1e3 * statistics.median(times['plain']):.0f} ms of one thread"
    what = "leave-one-out of 3 seeds / separate full passes"
    return [
        ratio_of(what, flops + where, f"<= {limit}", limit, times),
        ratio_of(what.replace("seeds", "seeds, stacked"), where, "none", None, times | {"esper": times["stacked"]}),
    ]


def bench_attribution(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Leave-one-out of three seeds with shared prefixes against separate full passes; each rank on its own."""
    stream = torch.Generator().manual_seed(rank)
    images, labels = torch.randn(128, 3, 32, 32, generator=stream), torch.randint(10, (128,), generator=stream)
    slots = ("r0c0", "r0c1", "r1c0")
    small, light = (
        grown_host(CNNConfig(widths=[16, 32]), (3, 32, 32), 10, slots, blueprint)
        for blueprint in ("conv_small", "conv_light")
    )
    tokens = torch.randint(256, (64, 65), generator=stream)
    gpt = grown_host(GPTConfig(layers=4, dim=128), (64,), 256, ("r0c0", "r1c0", "r2c0"), "mlp_small")
    return [
        *leave_one_out("CNN 16-32 on 32x32, conv_small", small, images, labels, Task.CLASSIFICATION, 0.6, rounds),
        *leave_one_out("CNN 16-32 on 32x32, conv_light", light, images, labels, Task.CLASSIFICATION, 0.6, rounds),
        *leave_one_out(
            "GPT 4x128, 64 tokens, mlp_small", gpt, tokens[:, :-1], tokens[:, 1:], Task.LANGUAGE, 0.7, rounds
        ),
    ]


def copies(step: Callable[[], Any]) -> int:
    """Counts the feature maps that one call copies, forward and backward."""
    wide = 0

    def see(func: Any, args: Any, result: Any) -> None:
        nonlocal wide
        copied = func._opname in ("clone", "contiguous", "copy_", "_to_copy")
        wide += int(copied and result.ndim == 4 and min(result.shape[1:]) > 1)

    dispatched(step, see)
    return wide


def operators(step: Callable[[], Any]) -> int:
    """Counts the ATen operators that one call dispatches, backward included."""
    seen: list[str] = []
    dispatched(step, lambda func, args, result: seen.append(func._opname) if func.namespace == "aten" else None)
    return len(seen)


def bench_layout(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Forward and backward of a grown CNN in channels-last against the same in torch's default layout."""
    slots = ("r0c0", "r0c1", "r1c0")
    stream = torch.Generator().manual_seed(rank)
    x, y = torch.randn(128, 3, 32, 32, generator=stream), torch.randint(10, (128,), generator=stream)

    def step(layout: torch.memory_format) -> Callable[[], None]:
        grown = grown_host(CNNConfig(widths=[16, 32]), (3, 32, 32), 10, slots, "conv_light")
        model, images = grown.model.to(memory_format=layout), x.contiguous(memory_format=layout)

        def run() -> None:
            nn.functional.cross_entropy(model(images), y).backward()
            model.zero_grad(set_to_none=True)

        return run

    last, plain = step(torch.channels_last), step(torch.contiguous_format)
    arms = {"esper": last, "plain": plain, "plain again": step(torch.contiguous_format)}
    times = interleave({arm: timed(work, 1, time.process_time) for arm, work in arms.items()}, rounds)
    where = (
        f"CNN 16-32 on 32x32, 3 conv_light, batch 128, {1e3 * statistics.median(times['plain']):.0f} ms of one thread; "
    )
    where += f"{copies(last)} copies of feature maps"
    return [ratio_of("step of a grown CNN, channels-last / default layout", where, "0 copies, counted", None, times)]


PARTS: dict[str, Part] = {"step": bench_step, "attribution": bench_attribution, "layout": bench_layout}

"""The share of a step for which training waits for data: fetched when they are asked for, or ahead by workers.

A step takes 256 images of 224 x 224 pixels, cropped and mirrored, and then computes for a second (products of matrices
in the training thread). Workers need a core that training leaves idle; the line says how many the machine has, and its
load.
"""

import os
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from benching.harness import Ratio, interval
from esper.tolaria.data.configs import Augment
from esper.tolaria.data.parts import PART_NAMES, Bundle, ImagePart, make_bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.data.task import Task
from esper.tolaria.training.feed import Feed

IMAGES, SIDE, BATCH, STEP_S, WORKERS = 1024, 224, 256, 1.0, 2


class _Alone:
    rank, size, device = 0, 1, torch.device("cpu")


def _images() -> Bundle:
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=draws)
    part = ImagePart(images, torch.arange(IMAGES) % 10, [120.0] * 3, [60.0] * 3)
    return make_bundle(
        name="images",
        task=Task.CLASSIFICATION,
        input_shape=(3, SIDE, SIDE),
        classes=10,
        parts=dict.fromkeys(PART_NAMES, part),
        record={},
        augment=Augment.CROP_FLIP,
        crop_pad=4,
        digest=0,
    )


def _compute(seconds: float) -> None:
    """Computes for so many seconds of this thread's processor time."""
    until, a = time.thread_time() + seconds, torch.randn(256, 256)
    while time.thread_time() < until:
        a = torch.tanh(a @ a)


def _shares(bundle: Bundle, steps: int, workers: int) -> tuple[list[float], float]:
    """Share of each step's time spent waiting; and the training thread's own processor seconds for data, a step."""
    world: Any = _Alone()
    plan = BatchPlan(IMAGES, BATCH, 1)
    feed = Feed(plan, world, 1, steps + 1, replace(bundle, workers=workers), int)
    shares, fetched = [], 0.0
    for step in range(steps + 1):
        began, worked = time.perf_counter(), time.thread_time()
        for indices, _ in feed.pieces(step):
            feed.batch(indices, plan.locate(step)[0])
        fetched += (time.thread_time() - worked) * (step > 0)  # the first one starts the workers
        _compute(STEP_S)
        shares.append(feed.take_waited_ms() / 1e3 / (time.perf_counter() - began))
    feed.close()
    return shares[1:], fetched / steps


def bench_wait(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Share of a step that waits for data, with two workers; beside it none, and none again."""
    bundle = _images()
    (without, seconds), (ahead, less), (again, _) = (_shares(bundle, rounds, workers) for workers in (0, WORKERS, 0))
    where = (
        f"{BATCH} images of {SIDE}x{SIDE}, steps of {STEP_S:.0f} s of computing, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.0f}; without workers {statistics.median(without):.3f} of a step; the training thread's "
        f"own time for data {1e3 * seconds:.0f} ms a step without, {1e3 * less:.0f} ms with"
    )
    same = [a / b for a, b in zip(again, without, strict=True)]
    name = "share of a step that waits for data, two workers"
    return [Ratio(name, where, "<= 0.01", 0.01, *interval(ahead), *interval(same))]


PARTS = {"wait": bench_wait}

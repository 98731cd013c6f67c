"""Batches of the built-in kinds that workers fetch ahead are those that a rank fetches itself."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.leyline.errors import ConfigError
from esper.tolaria.data import Augment, Bundle, RecallConfig, TextConfig, TokensConfig, load_data
from esper.tolaria.data.parts import PART_NAMES, ImagePart, make_bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.data.task import Task
from esper.tolaria.tasks.mixing import MixedPart
from esper.tolaria.training.feed import Feed
from tests.support.bitwise import bits


class Second:
    rank, size, device = 1, 2, torch.device("cpu")


def images(_folder: Path) -> Bundle:
    draws = torch.Generator().manual_seed(3)
    data = torch.randint(0, 256, (60, 3, 9, 7), dtype=torch.uint8, generator=draws)
    part = ImagePart(data, torch.arange(60) % 4, [100.0, 110.0, 120.0], [50.0, 60.0, 70.0])
    parts: Any = {**dict.fromkeys(PART_NAMES, part), "train": MixedPart(part, mixup=0.4, cutmix=0.4)}
    return make_bundle(
        name="images",
        task=Task.CLASSIFICATION,
        input_shape=(3, 9, 7),
        classes=4,
        parts=parts,
        record={},
        augment=Augment.CROP_FLIP,
        crop_pad=2,
    )


def recall(_folder: Path) -> Bundle:
    return load_data(RecallConfig(train=60, validation=4, probe=4, test=4))


def text(folder: Path) -> Bundle:
    for name, seed in (("train", 1), ("test", 2)):
        (folder / f"{name}.txt").write_bytes(np.random.default_rng(seed).bytes(2**24 + 17 if seed == 1 else 3000))
    return load_data(TextConfig(root=str(folder), block=63, max_bytes=2**24, validation=4, probe=4))


def tokens(folder: Path) -> Bundle:
    (folder / "train").mkdir()
    np.random.default_rng(4).integers(0, 900, 9000).astype("<u2").tofile(folder / "train" / "0.bin")
    return load_data(TokensConfig(root=str(folder), block=31, vocabulary=900, validation=4, probe=4, test=4))


def fed(bundle: Bundle, workers: int, first: int, last: int, jump: int | None = None) -> list[Any]:
    """Batches of steps first to last; from ``jump`` on the cursor is five further, as after a rollback."""
    object.__setattr__(bundle, "workers", workers)
    plan = BatchPlan(60, 7, 5)
    far = 0
    feed = Feed(plan, Second(), 2, 40, bundle, lambda step: step + far)
    found = []
    for step in range(first, last):
        if step == jump:
            far = 5
        epoch, _ = plan.locate(step + far)
        found += [feed.batch(indices, epoch) for indices, _ in feed.pieces(step)]
    if workers:
        assert feed._ahead is not None
        assert feed._ahead.active, "workers read, and not this process"
    feed.close()
    return found


@pytest.mark.parametrize("kind", [images, recall, text, tokens])
def test_batches_are_the_same_bits_with_any_number_of_workers_and_after_any_resume(kind: Any, tmp_path: Path) -> None:
    """Over the end of an epoch (step 9), from the middle, and where the cursor jumps."""
    bundle = kind(tmp_path)
    undisturbed = fed(bundle, 0, 0, 14, jump=11)
    assert bits(fed(bundle, 2, 0, 14, jump=11), undisturbed)
    assert bits(fed(bundle, 1, 6, 11), undisturbed[12:22])


@pytest.mark.parametrize("kind", [text, tokens])
def test_a_mapped_file_is_mapped_again_by_a_worker_and_not_sent(kind: Any, tmp_path: Path) -> None:
    part = kind(tmp_path).train
    sent = pickle.dumps(part)
    assert len(sent) < 16 * len(part) + 4096, "numbers of windows alone"
    again, rows = pickle.loads(sent), torch.arange(5)
    assert bits(again.fetch(rows), part.fetch(rows))


def test_a_part_that_no_worker_can_have_is_one_line(tmp_path: Path) -> None:
    bundle = images(tmp_path)
    bundle.train.part.extra = lambda: None
    with pytest.raises(ConfigError, match=r"data.workers = 1: .*set data.workers=0") as error:
        fed(bundle, 1, 0, 1)
    assert "\n" not in str(error.value)

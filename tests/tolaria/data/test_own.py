"""Data of a user's own: the same samples on any number of workers, and one line for what is wrong with them."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import esper
from esper.config.tree import build_config
from esper.leyline.errors import ConfigError, DataError, LockstepError
from esper.tolaria.data import CustomDataConfig, load_data
from esper.tolaria.data.own.custom import DatasetPart
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.data.task import Task as Labels
from esper.tolaria.tasks.bind import why_no_target
from esper.tolaria.tasks.labels import LabelTask
from esper.tolaria.training.feed import Feed
from tests.support.tiny import make_engine
from tests.support.toy_tasks import Rows, toy_plain

HERE = "tests.tolaria.data.test_own"


class Drawing:
    """Draws from every stream there is."""

    def __init__(self, size: int = 60) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        return torch.tensor([float(index), *drawn]).double(), torch.tensor(index % 3)


def shift(sample: Any, generator: torch.Generator) -> Any:
    x, y = sample
    return torch.cat([x, torch.rand(1, generator=generator).double()]), y


def pad(sample: Any, generator: torch.Generator) -> Any:
    return torch.cat([sample[0], torch.zeros(1).double()]), sample[1]


def drawing(size: int = 60) -> esper.Data:
    return esper.Data(train=Drawing(size), cluster=[index // 4 for index in range(size)], augment=shift, classes=3)


def whole(size: int = 40) -> esper.Data:
    rows = Rows(torch.arange(size).double()[:, None], torch.zeros(size))
    return esper.Data(train=rows, validation=rows, probe=rows, test=rows)


def partly() -> esper.Data:
    return esper.Data(train=Drawing(), test=Drawing())


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield 1


class Endless:
    """A sample for any number."""

    def __getitem__(self, index: int) -> Any:
        x = torch.randn(2, generator=torch.Generator().manual_seed(index))
        return x, int(x[0] > 0)


def endless() -> esper.Data:
    return esper.Data(train=Endless(), classes=2)


def stream() -> esper.Data:
    return esper.Data(train=Stream())


def local() -> esper.Data:
    class Local(Drawing):
        pass

    return esper.Data(train=Local(), classes=3)


def two_rows(samples: list[Any]) -> Any:
    return torch.zeros(2, 3), torch.zeros(2)


def odd_collate() -> esper.Data:
    return esper.Data(train=Drawing(), collate=two_rows)


class Keeping(Drawing):
    """Keeps a generator, or makes one that nobody seeds."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.kept = np.random.default_rng(0) if keeps else None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + (self.kept or np.random.default_rng()).random(), y


def keeping(keeps: bool = True) -> esper.Data:
    return esper.Data(train=Keeping(keeps), classes=3)


def keeping_test() -> esper.Data:
    return esper.Data(train=Drawing(), validation=Drawing(), probe=Drawing(), test=Keeping(True), classes=3)


def noisy(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]) + torch.rand(()), torch.stack([y for _, y in samples])


def noisy_collate() -> esper.Data:
    return esper.Data(train=Drawing(), collate=noisy, classes=3)


def gaps() -> esper.Data:
    rows = Rows(torch.full((60, 2), torch.nan), torch.zeros(60))
    return esper.Data(train=rows)


class Broken(Drawing):
    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise KeyError("column 'age'")
        return super().__getitem__(index)


def broken() -> esper.Data:
    return esper.Data(train=Broken(), classes=3)


def widening(samples: list[Any]) -> Any:
    """One number more of each sample where there are many."""
    x = torch.stack([x for x, _ in samples])
    return (x if len(x) < 20 else torch.cat([x, x[:, :1]], 1)), torch.stack([y for _, y in samples])


def wide() -> esper.Data:
    rows = Rows(torch.randn(60, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(60) % 3)
    return esper.Data(train=rows, validation=rows, probe=rows, test=rows, classes=3, collate=widening)


def nothing() -> int:
    return 3


def config(name: str, **more: Any) -> CustomDataConfig:
    return CustomDataConfig(path=f"{HERE}:{name}", **{"validation": 8, "probe": 8, "test": 8, **more})


class Alone:
    rank, size, device = 0, 1, torch.device("cpu")


class Second:
    rank, size, device = 1, 2, torch.device("cpu")


def fed(workers: int, world: Any, first: int, last: int, jump: int | None = None) -> list[Any]:
    """Batches of steps first to last; from ``jump`` on the cursor is five further, as after a rollback."""
    bundle = load_data(config("drawing", workers=workers))
    plan = BatchPlan(len(bundle.train), 7, 5)
    far = 0

    def cursor(step: int) -> int:
        return step + far

    feed = Feed(plan, world, 2, 40, bundle, cursor)
    found = []
    for step in range(first, last):
        if step == jump:
            far = 5
        epoch, _ = plan.locate(cursor(step))
        found += [feed.batch(indices, epoch) for indices, _ in feed.pieces(step)]
        if step == first:
            torch.rand(3)  # somebody else's draws move nothing
    feed.close()
    return found


def test_batches_are_the_same_bits_with_any_number_of_workers_and_after_any_resume() -> None:
    undisturbed = fed(0, Second(), 0, 16)
    goes = fed(2, Second(), 0, 6) + fed(1, Second(), 6, 11) + fed(0, Second(), 11, 16)
    for (x, y), (other, label) in zip(undisturbed, goes, strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, label)
    jumped, plain = fed(1, Second(), 0, 9, jump=4), fed(0, Second(), 0, 9, jump=4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(jumped, plain, strict=True))


def test_a_sample_is_the_same_on_any_rank_and_other_in_another_epoch() -> None:
    bundle = load_data(config("drawing"))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    x, _ = bundle.train_batch(torch.tensor([3, 9]), seed=1, epoch=2)
    alone, _ = bundle.train_batch(torch.tensor([9]), seed=1, epoch=2)
    assert torch.equal(x[1:], alone)
    assert not torch.equal(alone, bundle.train_batch(torch.tensor([9]), seed=1, epoch=3)[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    held, _ = bundle.probe.fetch(torch.arange(3))
    assert torch.equal(held, bundle.probe.fetch(torch.arange(3))[0])
    assert held.shape[1] == 4, "only training samples are augmented"


def test_clusters_are_dealt_whole_and_parts_may_be_given() -> None:
    bundle = load_data(config("drawing"))
    of = {name: set((getattr(bundle, name).content()[0] // 4).tolist()) for name in ("train", "probe", "test")}
    assert not of["train"] & of["probe"]
    assert not of["test"] & of["probe"]
    assert len(bundle.probe_clusters) == len(of["probe"])
    given = load_data(config("whole", options={"size": 30}))
    assert [len(getattr(given, part)) for part in ("train", "validation", "probe", "test")] == [30] * 4
    assert given.digest != load_data(config("whole")).digest, "a data set that shrinks is another"


def test_data_without_an_end_are_passed_over_by_a_length_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"train \(Endless\) has no length; set data.length to the samples of a pass"):
        load_data(config("endless"))
    bundle = load_data(config("endless", length=90))
    sizes = [len(getattr(bundle, part)) for part in ("train", "validation", "probe", "test")]
    assert sum(sizes) == 90
    rows = torch.arange(sizes[0])
    x, y = bundle.train.fetch_train(rows, seed=1, epoch=3)
    again, _ = bundle.train.fetch_train(rows[7:9], seed=1, epoch=3)
    assert torch.equal(x[7:9], again), "read from any place"
    assert torch.equal(y, (x[:, 0] > 0).long())


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("partly", ConfigError, "validation, probe is None and other parts are not"),
        ("stream", ConfigError, "train is Stream, a stream; need a map-style data set with __getitem__"),
        ("nothing", ConfigError, "returned int, need an esper.Data"),
        ("odd_collate", DataError, r"made inputs \[2, 3\] of 1 samples of the part train"),
        ("missing", ConfigError, "has no missing"),
    ],
)
def test_wrong_data_are_one_line(name: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text) as error:
        load_data(config(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "more", "part"),
    [
        ("keeping", {}, "train"),
        ("keeping", {"keeps": False}, "train"),
        ("keeping_test", {}, "test"),
        ("noisy_collate", {}, "train"),
    ],
)
def test_samples_with_a_stream_of_their_own_are_refused(name: str, more: dict[str, Any], part: str) -> None:
    text = rf"data: samples \[\d+, \d+\] of the part {part}, read twice, are not the same: .* no resume would be exact"
    with pytest.raises(DataError, match=text) as error:
        load_data(config(name, options=more))
    assert "\n" not in str(error.value)
    for fine in ("drawing", "gaps"):
        load_data(config(fine))


def test_a_sample_that_cannot_be_read_is_named() -> None:
    part = DatasetPart(broken(), Broken(), torch.arange(60), "train")
    with pytest.raises(DataError, match=r"data: sample 17 cannot be read: KeyError: .*column 'age'") as error:
        part.fetch(torch.arange(60))
    assert "\n" not in str(error.value)
    queue = part.read_ahead(1, 1)
    assert queue is not None
    queue.begin(iter([(torch.tensor([3, 17]), 0)]))
    with queue.opened(), pytest.raises(DataError, match=r"a worker.*sample 17 cannot be read") as error:
        part.fetch_train(torch.tensor([3, 17]), seed=1, epoch=0)
    assert "\n" not in str(error.value)
    queue.close()


def test_a_label_out_of_range_is_one_line() -> None:
    data = esper.Data(train=Drawing(), classes=2)
    task = LabelTask(Labels.CLASSIFICATION)
    part = DatasetPart(data, Drawing(), torch.arange(60), "train").split_by(task.split, partial(why_no_target, task, 2))
    with pytest.raises(DataError, match=r"data: sample 2 of the part train: a target is 2, expected 0 to 1"):
        part.fetch(torch.arange(3))


def test_what_no_worker_can_have_is_one_line() -> None:
    bundle = load_data(config("local", workers=1))
    feed = Feed(BatchPlan(30, 5, 1), Alone(), 1, 5, bundle, int)
    with pytest.raises(ConfigError, match=r"data.workers = 1: .*cannot be sent to a worker"):
        feed.pieces(0)


def test_options_that_a_function_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"data.options = .*{HERE}:nothing does not take these"):
        load_data(config("nothing", options={"folder": str(tmp_path)}))


@pytest.mark.parametrize("what", ["trained", "measured"])
def test_inputs_of_other_shapes_are_told_where_the_host_fails(what: str, tmp_path: Path) -> None:
    plain = toy_plain("classification", trainer__batch=32 if what == "trained" else 8, control__every=2)
    plain["data"] |= {"path": f"{HERE}:wide", "options": {}}
    engine = make_engine(build_config(plain), tmp_path)
    engine.begin(None)
    size = 32 if what == "trained" else 60
    text = rf"the host fails on inputs \[{size}, 5\], and was tried with \[2, 4\]: RuntimeError: .*linear.py, line"
    with pytest.raises((DataError, LockstepError), match=text) as error:
        engine.run()
    assert "\n" not in str(error.value)

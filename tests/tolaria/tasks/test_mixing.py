"""Mixed and weighted samples: functions of the sample alone, and losses between the two targets."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import esper
from esper.leyline.errors import ConfigError
from esper.tolaria.data import CustomDataConfig, DigitsConfig, load_data
from esper.tolaria.data.task import Task as Labels
from esper.tolaria.tasks import ClassificationConfig, SegmentationConfig
from esper.tolaria.tasks.bind import bind
from esper.tolaria.tasks.labels import LabelTask
from esper.tolaria.tasks.mixing import MixedPart
from esper.tolaria.tasks.targets import Mixed, Weighted
from tests.support.toy_tasks import Rows

DIGITS = DigitsConfig(validation=40, probe=64, test=40)
G = torch.Generator().manual_seed(4)


@pytest.mark.parametrize("how", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_a_sample_is_mixed_alike_in_any_batch_and_otherwise_in_another_epoch(how: dict[str, float]) -> None:
    bundle = bind(load_data(DIGITS), ClassificationConfig(**how))
    ids = torch.tensor([5, 900, 31, 7])
    x, y = bundle.train_batch(ids, seed=3, epoch=1)
    alone, target = bundle.train_batch(ids[2:3], seed=3, epoch=1)
    assert torch.equal(alone[0], x[2])
    assert isinstance(y, Mixed)
    assert torch.equal(target.share, y.share[2:3])
    assert torch.equal(target.second, y.second[2:3])
    other, _ = bundle.train_batch(ids, seed=3, epoch=2)
    assert not torch.equal(other, x)
    assert ((y.share >= 0) & (y.share <= 1)).all()
    part = bundle.train
    assert isinstance(part, MixedPart)
    plain, _ = bundle.train.fetch(ids)
    partner, second = bundle.train.fetch(part.partners(ids, 3, 1))
    assert torch.equal(second, y.second)
    if "cutmix" not in how:
        share = y.share.view(-1, 1, 1, 1).float()
        torch.testing.assert_close(x, share * plain + (1 - share) * partner)
    elif "mixup" not in how:
        from_one, from_two = x == plain, x == partner
        assert (from_one | from_two).all()
        assert torch.equal(bundle.validation.fetch(ids[:1])[0], load_data(DIGITS).validation.fetch(ids[:1])[0])
    assert not bundle.refills, "training samples are others than those of the probe"


def test_losses_lie_between_the_two_targets_and_weights_multiply() -> None:
    logits, first, second = torch.randn(6, 4, generator=G), torch.arange(6) % 4, torch.arange(6).flip(0) % 4
    share, task = torch.rand(6, generator=G, dtype=torch.float64), LabelTask(Labels.CLASSIFICATION, smoothing=0.1, f1=4)
    found = task.scored(logits, Mixed(first, second, share))
    one, two = (F.cross_entropy(logits, y, reduction="none") for y in (first, second))
    torch.testing.assert_close(found.loss, share.float() * one + (1 - share.float()) * two)
    assert found.correct is not None
    assert found.sums["tp0"].shape == (6,)
    smooth = [F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1) for y in (first, second)]
    learned = task.learned(logits, Mixed(first, second, share))
    torch.testing.assert_close(learned, share.float() * smooth[0] + (1 - share.float()) * smooth[1])
    weight = torch.arange(6).double()
    batch: dict[str, Any] = {"x": logits, "labels": first, "sample_weight": weight}
    inputs, target = task.split(batch)
    assert list(inputs) == ["x"]
    assert isinstance(target, Weighted)
    torch.testing.assert_close(task.scored(logits, target).loss, one * weight.float())
    torch.testing.assert_close(task.learned(logits, target), smooth[0] * weight.float())


def test_what_cannot_be_mixed_is_one_line() -> None:
    from esper.tolaria.data import PySourceConfig

    tokens = load_data(PySourceConfig(block=8, max_bytes=9000, validation=16, probe=16, test=16))
    with pytest.raises(ConfigError, match=r"task.mixup, task.cutmix: inputs are no numbers that can be mixed"):
        MixedPart(tokens.train, mixup=1.0, cutmix=0.0).fetch_train(torch.arange(2), seed=1, epoch=0)


def drawn() -> esper.Data:
    """Pixels of three classes, of which two are rare; some do not count, and one image is no class at all."""
    target = (torch.rand(40, 5, 4, generator=torch.Generator().manual_seed(2)) * 1.3).long() * 2
    target[:, 0, 0], target[:, 1], target[0] = 1, 255, 255
    rows = Rows(torch.zeros(40, 1, 5, 4), target)
    return esper.Data(train=rows, validation=rows, probe=rows, test=rows, classes=3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("how", [{"balanced": True}, {"class_weights": [1.0, 4.0, 2.0]}])
def test_weights_of_pixels_are_torchs_and_have_a_mean_of_one(how: dict[str, Any], smoothing: float) -> None:
    config = SegmentationConfig(**how, label_smoothing=smoothing)
    bundle = bind(load_data(CustomDataConfig(path=f"{__name__}:drawn")), config)
    task = bundle.learns
    _, target = bundle.train.fetch(torch.arange(40))
    counted = target[target != 255]
    weights = task.weights
    assert float(weights[counted].mean()) == pytest.approx(1.0)
    counts = torch.bincount(counted).double()
    assert len(counts.unique()) == 3
    raw = 1 / counts if "balanced" in how else torch.tensor(how["class_weights"]).double()
    torch.testing.assert_close(weights / weights[0], raw / raw[0])
    logits = torch.randn(40, 3, 5, 4, generator=G).double()
    summed = F.cross_entropy(logits, target, weights, ignore_index=255, reduction="none").sum((1, 2))
    number = (target != 255).sum((1, 2))
    torch.testing.assert_close(task.score(logits, target).loss, summed / number.clamp(min=1))
    uniform = -(logits.log_softmax(1).mean(1) * weights[target.where(target != 255, 0)] * (target != 255)).sum((1, 2))
    wanted = ((1 - smoothing) * summed + smoothing * uniform) / number.clamp(min=1)
    torch.testing.assert_close(task.learn(logits, target), wanted)
    assert task.info().unit == "weighted nats"


def test_class_weights_are_normalised_over_the_training_part() -> None:
    bundle = bind(load_data(DIGITS), ClassificationConfig(balanced=True))
    labels = bundle.train.fetch(torch.arange(len(bundle.train)))[1]
    weights = bundle.learns.weights
    assert float(weights[labels].mean()) == pytest.approx(1.0, abs=1e-12)
    counts = torch.bincount(labels).double()
    torch.testing.assert_close(weights * counts, (weights * counts).mean().expand(10))
    with pytest.raises(ConfigError, match=r"task.class_weights: 2 for 10 classes"):
        bind(load_data(DIGITS), ClassificationConfig(class_weights=[1.0, 2.0]))

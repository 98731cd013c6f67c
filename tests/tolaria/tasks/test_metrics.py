"""Metrics are scikit-learn's, however samples were cut into shards and batches."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.tolaria.data.task import Task as Labels
from esper.tolaria.lockstep.measure import sample_sums
from esper.tolaria.tasks.bind import why_no_target
from esper.tolaria.tasks.labels import LabelTask
from esper.tolaria.tasks.masked import mask_tokens
from esper.tolaria.tasks.multilabel import MultiLabelTask
from esper.tolaria.tasks.numbers import RegressionConfig, RegressionTask
from esper.tolaria.tasks.pairs import ContrastiveConfig, ContrastiveTask
from esper.tolaria.tasks.positions import PositionTask
from esper.tolaria.tasks.task import Metric, MetricInfo, Scores, Task, read_logits

G = torch.Generator().manual_seed(3)
CUTS = (5, 1, 30, 17)  # shards of two ranks, ragged


def values(task: Task, output: Tensor, target: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics from sums over ragged shards, and the sums."""
    total: dict[str, float] = {}
    for out, wanted in zip(output.split(CUTS), target.split(CUTS), strict=True):
        scores = task.score(out, wanted)
        correct = torch.zeros_like(scores.loss) if scores.correct is None else scores.correct
        rows = task.rows(scores)
        own = () if rows is None else (rows.double(),)
        for name, value in sample_sums([(scores.loss.double(), correct.double(), *own)], task.columns).items():
            total[name.removeprefix("sum_")] = total.get(name.removeprefix("sum_"), 0.0) + value
    return task.values(total), total


N = sum(CUTS)


def test_classification() -> None:
    logits, target = torch.randn(N, 5, generator=G), torch.randint(4, (N,), generator=G)  # class 4 never occurs
    found, total = values(LabelTask(Labels.CLASSIFICATION, f1=5), logits, target)
    said = logits.argmax(1)
    assert found["f1_macro"] == pytest.approx(sk.f1_score(target, said, average="macro"), abs=1e-12)
    assert total["correct"] / N == pytest.approx(sk.accuracy_score(target, said), abs=1e-12)
    wanted = sk.log_loss(target, F.softmax(logits.double(), 1), labels=range(5))
    assert total["loss"] / N == pytest.approx(wanted, abs=1e-6)


def test_multilabel() -> None:
    logits, target = torch.randn(N, 4, generator=G), torch.randint(2, (N, 4), generator=G)
    found, total = values(MultiLabelTask(4), logits, target)
    said = (logits > 0).int()
    assert found["f1"] == pytest.approx(sk.f1_score(target, said, average="micro"), abs=1e-12)
    assert found["f1_macro"] == pytest.approx(sk.f1_score(target, said, average="macro"), abs=1e-12)
    assert total["correct"] / N == pytest.approx(1 - sk.hamming_loss(target, said), abs=1e-6)


def test_regression() -> None:
    output, target = torch.randn(N, 3, generator=G).double(), torch.randn(N, 3, generator=G).double() * 2 + 1
    task = RegressionTask(RegressionConfig(), 3)
    found, total = values(task, output, target)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(target, output), abs=1e-12)
    assert found["rmse"] == pytest.approx(math.sqrt(sk.mean_squared_error(target, output)), abs=1e-12)
    assert found["r2"] == pytest.approx(sk.r2_score(target, output), abs=1e-9)
    assert total["loss"] / N == pytest.approx(sk.mean_squared_error(target, output), abs=1e-12)
    assert task.chance([target]) == pytest.approx(float(target.var(0, correction=0).mean()), abs=1e-12)


def test_segmentation_with_ignored_pixels() -> None:
    logits, target = torch.randn(N, 3, 4, 5, generator=G), torch.randint(3, (N, 4, 5), generator=G)
    target[torch.rand(N, 4, 5, generator=G) < 0.2] = 255
    target[0] = 255  # nothing of this sample counts
    task = PositionTask("segmentation", 255, classes=3, pixels=True)
    found, _ = values(task, logits, target)
    valid = target != 255
    said, so = logits.argmax(1)[valid], target[valid]
    assert found["mean_iou"] == pytest.approx(sk.jaccard_score(so, said, average="macro"), abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx(sk.accuracy_score(so, said), abs=1e-12)
    loss = task.score(logits, target).loss
    assert loss[0] == 0.0
    own = F.cross_entropy(logits[1:2], target[1:2], ignore_index=255)
    assert loss[1].item() == pytest.approx(own.item(), abs=1e-6)


def test_sequences_with_ignored_places() -> None:
    logits, target = torch.randn(N, 6, 7, generator=G), torch.randint(7, (N, 6), generator=G)
    target[:, 4:] = -100
    found, _ = values(PositionTask("seq2seq", -100), logits, target)
    said = logits.argmax(-1)[:, :4]
    assert found["token_accuracy"] == pytest.approx(sk.accuracy_score(target[:, :4].flatten(), said.flatten()))


def test_pairs_are_found_within_their_group_alone() -> None:
    task = ContrastiveTask(ContrastiveConfig(group=4, temperature=0.5))
    first, second = torch.randn(12, 5, generator=G), torch.randn(12, 5, generator=G)
    whole = task.score((first, second), ()).loss
    for place in range(0, 12, 4):
        rows = slice(place, place + 4)
        z, w = F.normalize(first[rows], dim=1), F.normalize(second[rows], dim=1)
        sims, own = z @ w.T / 0.5, torch.arange(4)
        wanted = (F.cross_entropy(sims, own, reduction="none") + F.cross_entropy(sims.T, own, reduction="none")) / 2
        torch.testing.assert_close(whole[rows], wanted)
    assert torch.equal(task.score(torch.stack([first, second], 1), ()).loss, whole)


def test_class_weights_and_smoothing_are_torchs() -> None:
    logits, target = torch.randn(N, 5, generator=G), torch.randint(5, (N,), generator=G)
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0]).double()
    task = LabelTask(Labels.CLASSIFICATION, smoothing=0.1, weights=weights)
    own = F.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(task.score(logits, target).loss, own * weights.float()[target])
    plain = LabelTask(Labels.CLASSIFICATION, smoothing=0.1)
    wanted = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(plain.learn(logits, target), wanted)
    assert plain.learns_otherwise
    assert not LabelTask(Labels.CLASSIFICATION).learns_otherwise
    torch.testing.assert_close(plain.score(logits, target).loss, own)


def test_masks_belong_to_seed_epoch_and_sample() -> None:
    tokens, ids = torch.randint(20, (50, 8), generator=G), torch.arange(50)
    how: dict[str, Any] = {"share": 0.3, "mask": 20, "vocabulary": 21}
    seen, labels = mask_tokens(tokens, ids, 1, 0, **how)
    alone = mask_tokens(tokens[7:8], ids[7:8], 1, 0, **how)
    assert torch.equal(alone[0][0], seen[7])
    assert torch.equal(alone[1][0], labels[7])
    other, _ = mask_tokens(tokens, ids, 1, 1, **how)
    assert not torch.equal(other, seen)
    asked = labels != -100
    assert asked.any(1).all()
    assert torch.equal(labels[asked], tokens[asked])
    assert torch.equal(seen[~asked], tokens[~asked])
    assert 0.2 < float(asked.float().mean()) < 0.45
    assert 0.6 < float((seen[asked] == 20).float().mean()) < 0.95


class Odd(Task):
    name, columns = "odd", ("a",)
    metrics = (Metric(MetricInfo(name="broken"), lambda sums: math.nan),)

    def __init__(self, loss: Any, sums: dict[str, Tensor]) -> None:
        self.loss, self.sums = loss, sums

    def score(self, output: Any, target: Any) -> Scores:
        return Scores(self.loss, None, self.sums)


@pytest.mark.parametrize(
    ("loss", "sums", "text"),
    [
        (torch.tensor(0.5), {"a": torch.tensor(1.0)}, r"score is \[\] for 2 samples.*not their mean"),
        (torch.zeros(2), {}, "returns the sums none, declared are a"),
        (torch.zeros(2), {"a": torch.zeros(3)}, r"the sum a is \[3\]"),
        (0.5, {"a": torch.zeros(2)}, "odd: score is float for 2 samples"),
    ],
)
def test_a_task_that_breaks_its_word_is_one_line(loss: Any, sums: dict[str, Tensor], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        Odd(loss, sums).check(None, None, 2)
    assert "\n" not in str(error.value)


def test_a_metric_that_is_not_finite_is_one_line() -> None:
    with pytest.raises(ConfigError, match="odd: the metric broken is nan over 3 samples"):
        Odd(None, {}).values({"count": 3.0})


def test_a_metric_that_cannot_be_computed_is_named() -> None:
    class Wrong(Odd):
        metrics = (Metric(MetricInfo(name="share"), lambda sums: 1 / sums["a"]),)

    text = (
        r"odd: the metric share, over 3 samples: ZeroDivisionError: float division by zero; correct it, or return None"
    )
    with pytest.raises(ConfigError, match=text):
        Wrong(None, {}).values({"count": 3.0, "a": 0.0})


def test_outputs_are_read_from_what_models_return() -> None:
    class Output:
        logits = torch.ones(1)

    for output in (torch.ones(1), {"logits": torch.ones(1)}, Output(), (torch.ones(1), None)):
        assert torch.equal(read_logits(output, "x"), torch.ones(1))
    with pytest.raises(ConfigError, match="task x: the host returns int"):
        read_logits(3, "x")
    assert np.isfinite(values(LabelTask(Labels.CLASSIFICATION), torch.randn(N, 3), torch.zeros(N).long())[1]["loss"])


@pytest.mark.parametrize("batch", [3, [torch.ones(2)], {"pixels": torch.ones(2)}])
def test_a_batch_without_a_target_is_one_line(batch: Any) -> None:
    with pytest.raises(ConfigError, match=r"(expected \(inputs, target\)|no target under one of)"):
        Odd(None, {}).split(batch)


def test_a_kind_of_regression_of_ones_own_may_leave_targets_out_by_nan() -> None:
    class Masked(RegressionTask):
        """Answers of which some are not known."""

    target = torch.tensor([1.0, float("nan")])
    assert "a target is nan" in why_no_target(RegressionTask(RegressionConfig(), 1), 1, target)
    assert why_no_target(Masked(RegressionConfig(), 1), 1, target) == ""

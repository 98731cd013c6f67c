import math

import pytest
import torch
import torch.nn.functional as F

from esper.tolaria.data.task import Task


def test_classification_equals_cross_entropy_per_sample():
    logits, target = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    loss, correct = Task.CLASSIFICATION.per_sample(logits, target)
    assert torch.equal(loss, F.cross_entropy(logits, target, reduction="none"))
    assert correct.tolist() == [float(row.argmax() == y) for row, y in zip(logits, target)]


def test_a_sequence_is_one_sample():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64)
    target = torch.randint(11, (3, 6), generator=generator)
    loss, correct = Task.LANGUAGE.per_sample(logits, target)
    for row in range(3):
        by_token = [
            math.log(sum(math.exp(v) for v in logits[row, t])) - logits[row, t, target[row, t]] for t in range(6)
        ]
        assert loss[row].item() == pytest.approx(float(sum(by_token)) / 6, abs=1e-12)
        hits = sum(int(logits[row, t].argmax() == target[row, t]) for t in range(6))
        assert correct[row].item() == pytest.approx(hits / 6)


def test_shifted_logits_are_all_correct():
    target = torch.tensor([[1, 0, 2]])
    loss, correct = Task.LANGUAGE.per_sample(20 * F.one_hot(target, 3).float(), target)
    assert correct.tolist() == [1.0]
    assert 0 <= loss.item() < 1e-6


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_loss_is_never_below_float32(task, given, returned):
    shape = (4, 3) if task is Task.CLASSIFICATION else (4, 2, 3)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(given)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    loss, correct = task.per_sample(logits, target)
    assert (loss.dtype, correct.dtype, loss.shape, correct.shape) == (returned, returned, (4,), (4,))
    exact, _ = task.per_sample(logits.double(), target)
    assert torch.allclose(loss.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", Task)
def test_gradient_reaches_every_logit_of_the_given_dtype(task):
    shape = (4, 3) if task is Task.CLASSIFICATION else (4, 2, 3)
    logits = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    task.per_sample(logits, torch.zeros(shape[:-1], dtype=torch.int64))[0].sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert bool((logits.grad != 0).all())


@pytest.mark.parametrize(
    ("task", "logits", "target"),
    [
        (Task.CLASSIFICATION, (4, 2, 3), (4, 2)),
        (Task.CLASSIFICATION, (4, 3), (5,)),
        (Task.LANGUAGE, (4, 3), (4,)),
        (Task.LANGUAGE, (4, 2, 3), (4, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_named(task, logits, target):
    with pytest.raises(ValueError, match="expected logits") as caught:
        task.per_sample(torch.zeros(logits), torch.zeros(target, dtype=torch.int64))
    assert str(list(logits)) in str(caught.value)
    assert str(list(target)) in str(caught.value)

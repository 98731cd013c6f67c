"""Label noise: the share asked for, never the true class, every other class alike, in the training part alone."""

import torch

from esper.tolaria.data import DigitsConfig, load_data
from esper.tolaria.data.noise import with_label_noise


def test_the_share_asked_for_is_wrong_and_every_other_class_is_as_likely():
    labels = torch.arange(10).repeat(4000)
    noisy = with_label_noise(labels, 0.4, classes=10, split_seed=3)
    wrong = noisy != labels
    assert int(wrong.sum()) == 16_000
    shift = torch.bincount((noisy - labels)[wrong] % 10, minlength=10)
    assert shift[0] == 0
    expected = 16_000 / 9
    chi_squared = float(((shift[1:] - expected) ** 2 / expected).sum())
    assert chi_squared < 26.1  # 0.1 % of a chi-squared with 8 degrees of freedom lie above
    assert torch.equal(noisy, with_label_noise(labels, 0.4, classes=10, split_seed=3))
    assert not torch.equal(noisy, with_label_noise(labels, 0.4, classes=10, split_seed=4))
    assert torch.equal(with_label_noise(labels, 0.0, classes=10, split_seed=3), labels)


def test_only_the_training_part_is_noisy_and_the_digest_tells():
    clean, noisy = load_data(DigitsConfig()), load_data(DigitsConfig(label_noise=0.3))
    every = [torch.arange(len(part)) for part in (clean.train, clean.validation, clean.probe, clean.test)]
    pairs = zip(every, (clean.train, clean.validation, clean.probe, clean.test), strict=True)
    wrong = [
        int((part.fetch(rows)[1] != getattr(noisy, name).fetch(rows)[1]).sum())
        for (rows, part), name in zip(pairs, ("train", "validation", "probe", "test"), strict=True)
    ]
    assert wrong == [round(0.3 * len(clean.train)), 0, 0, 0]
    assert clean.digest != noisy.digest

"""Look-ups from key to key to a value: whoever follows the links has loss 0, whoever does not has chance."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data import RecallConfig, load_data
from esper.tolaria.data.parts import PART_NAMES, Bundle
from esper.tolaria.data.recall import BLANK, follow_links, make_samples

CONFIGS = [
    RecallConfig(hops=1, chains=2, keys=5, questions=3, train=600),
    RecallConfig(train=600),
    RecallConfig(hops=3, chains=4, keys=14, values=7, questions=20, train=600),
]


def loss_of(bundle: Bundle, logits: Tensor, targets: Tensor) -> float:
    return float(bundle.task.per_sample(logits, targets)[0].mean())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.hops} hops")
def test_a_perfect_look_up_has_loss_0_and_one_link_less_has_not(config: RecallConfig) -> None:
    bundle = load_data(config)
    x, y = bundle.test.fetch(torch.arange(len(bundle.test)))
    assert x.shape == y.shape == (512, config.length)
    assert (int(x.max()), int(x.min())) <= (config.vocabulary - 1, 1)
    found = follow_links(x, config)
    assert torch.equal(found, y)
    logits = 1e4 * F.one_hot(found, bundle.classes).float()
    assert loss_of(bundle, logits, y) == 0.0
    astray = follow_links(x.roll(1, 0), config)  # the links of another sample
    assert (astray != y)[:, config.hops * config.chains :].float().mean() > 0.2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.hops} hops")
def test_chance_is_what_a_net_without_links_gets(config: RecallConfig) -> None:
    bundle = load_data(config)
    x, y = bundle.train.fetch(torch.arange(len(bundle.train)))
    links = config.hops * config.chains
    logits = torch.full((*x.shape, bundle.classes), -1e4)
    logits[:, :links, BLANK] = 0.0
    logits[:, links:, 1 : 1 + config.values] = 0.0  # knows what a value is, and where one is asked for
    assert loss_of(bundle, logits, y) == pytest.approx(config.chance, rel=1e-6)
    assert config.chance == pytest.approx(config.questions / config.length * math.log(config.values))
    asked = y[:, links:].flatten()
    shares = torch.bincount(asked, minlength=bundle.classes)[1 : 1 + config.values] / len(asked)
    assert float((shares - 1 / config.values).abs().max()) < 0.05  # none is likelier, so chance is the best guess


def test_no_sequence_is_in_two_parts_and_each_number_has_its_own() -> None:
    config = RecallConfig(train=2000)
    bundle = load_data(config)
    rows = [tuple(row) for name in PART_NAMES for row in getattr(bundle, name).content()[0].tolist()]
    assert len(rows) == len(set(rows)) == 2000 + 256 + 512 + 512
    whole, some = make_samples(config, 0, 50), make_samples(config, 20, 10)
    assert torch.equal(whole[0][20:30], some[0])
    assert torch.equal(whole[1][20:30], some[1])
    other = load_data(RecallConfig(train=2000, split_seed=1))
    assert other.digest != bundle.digest
    with pytest.raises(DataError, match="make the parts smaller"):
        load_data(RecallConfig(hops=1, chains=1, keys=1, values=2, questions=1))


def test_label_noise_is_in_training_answers_alone() -> None:
    clean, noisy = (load_data(RecallConfig(train=2000, label_noise=share)) for share in (0.0, 0.3))
    for name in PART_NAMES:
        (x, before), (same, after) = getattr(clean, name).content(), getattr(noisy, name).content()
        assert torch.equal(x, same)
        changed = before != after
        assert int(changed.sum()) == (round(0.3 * int((before != BLANK).sum())) if name == "train" else 0)
        assert not bool(changed[before == BLANK].any())
        assert not bool((after[before != BLANK] == BLANK).any())

"""BatchNorm and the last batch of an epoch: refused before the first step, with a batch that fits."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.accord.account import step_flops
from esper.kasmina.attach import attach
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError
from esper.run.batch_statistics import check_batches, smallest_piece
from esper.tolaria.data import load_data
from esper.tolaria.data.sampler import BatchPlan
from tests.support.tiny import bits, make_engine, tiny_config

BUNDLE = load_data(tiny_config().data)
SIZE = len(BUNDLE.train)


def vectors() -> Grown:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    return attach(model, {"r0c0": "3"}, BUNDLE.example())


def images() -> Grown:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return attach(nn.Sequential(*layers, nn.Linear(4, 10)), {"r0c0": "2"}, BUNDLE.example())


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 10, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_smallest_piece_is_that_of_the_plan(samples: int, ranks: int, accumulate: int) -> None:
    plan = BatchPlan(samples, samples, 1)
    pieces = [piece for rank in range(ranks) for piece in plan.pieces(0, rank, ranks, accumulate)]
    assert smallest_piece(samples, ranks, accumulate) == min(int(weights.sum()) for _, weights in pieces)


def fitting(batch: int, grown: Grown, ranks: int, accumulate: int = 1) -> int:
    """The batch that the error proposes, which passes."""
    config = tiny_config(trainer__steps=None, trainer__batch=batch, trainer__accumulate=accumulate)
    with pytest.raises(ConfigError, match=r"trainer\.batch = ") as caught:
        check_batches(config, grown, BUNDLE, ranks)
    found = re.search(r"set trainer\.batch=(\d+)", str(caught.value))
    assert found is not None
    check_batches(
        tiny_config(trainer__steps=None, trainer__batch=int(found[1]), trainer__accumulate=accumulate),
        grown,
        BUNDLE,
        ranks,
    )
    return int(found[1])


def leaving(rest: int, least: int = 8) -> int:
    """A batch that leaves ``rest`` samples for the last one of an epoch."""
    return next(batch for batch in range(least, SIZE) if SIZE % batch == rest)


def test_a_last_batch_of_one_is_refused_with_a_batch_that_fits() -> None:
    one = leaving(1)
    assert abs(fitting(one, vectors(), 1) - one) <= 2
    check_batches(tiny_config(trainer__steps=None, trainer__batch=leaving(2)), vectors(), BUNDLE, 1)
    check_batches(tiny_config(trainer__steps=SIZE // one, trainer__batch=one), vectors(), BUNDLE, 1)


def test_without_its_last_batch_such_a_host_trains_and_the_refusal_says_so(tmp_path: Path) -> None:
    """Every count follows: steps of an epoch, samples, FLOPs and the place in the plan."""
    one = leaving(1, 100)
    with pytest.raises(ConfigError, match=r"or trainer\.drop_last=true, which leaves that batch out"):
        check_batches(tiny_config(trainer__steps=None, trainer__batch=one), vectors(), BUNDLE, 1)
    config = tiny_config(trainer__steps=None, trainer__epochs=2, trainer__batch=one, trainer__drop_last=True)
    check_batches(config, vectors(), BUNDLE, 1)
    with pytest.raises(ConfigError, match=r"each batch has 3; some forward then has only one \(ranks: 2"):
        check_batches(tiny_config(trainer__steps=None, trainer__batch=3, trainer__drop_last=True), vectors(), BUNDLE, 2)
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    result = engine.run()
    steps = 2 * (SIZE // one)
    assert (result.step, result.samples) == (steps, steps * one)
    assert result.flops == result.samples * step_flops(engine.state.slots, engine.terms.costs, config.slots)
    assert (engine.state.epoch, engine.plan.locate(steps)) == (2, (2, 0))
    with pytest.raises(ConfigError, match=rf"leaves out each batch, since there are {SIZE} training samples"):
        make_engine(tiny_config(trainer__batch=SIZE + 1, trainer__drop_last=True), tmp_path)


def test_one_sample_is_enough_where_features_have_positions_and_a_stand_in_never_is() -> None:
    check_batches(tiny_config(trainer__steps=None, trainer__batch=leaving(1)), images(), BUNDLE, 1)
    fitting(leaving(1), images(), 2)
    fitting(leaving(3), images(), 2, accumulate=2)
    fitting(leaving(3), vectors(), 2)


def test_a_host_without_batch_norm_takes_any_batch_and_looking_moves_nothing() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    grown = attach(plain, {"r0c0": "2"}, BUNDLE.example())
    check_batches(tiny_config(trainer__steps=None, trainer__batch=leaving(1)), grown, BUNDLE, 4)
    host = images()
    before, stream = bits(host.model.state_dict().items()), torch.get_rng_state()
    check_batches(tiny_config(trainer__steps=None, trainer__batch=leaving(1)), host, BUNDLE, 1)
    assert bits(host.model.state_dict().items()) == before
    assert torch.equal(torch.get_rng_state(), stream)

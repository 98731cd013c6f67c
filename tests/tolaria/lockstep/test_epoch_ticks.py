"""Ticks at each epoch's end, where samples that were left out make an epoch shorter."""

from dataclasses import replace
from pathlib import Path

import pytest

from esper.accord.health import Skip
from esper.tolaria.training.engine import Engine
from tests.support.tiny import make_engine, tiny_config


def ticks(engine: Engine, until: int) -> list[int]:
    """Optimizer steps after which a tick is due; nothing is trained."""
    found = []
    for step in range(1, until + 1):
        engine.step = step
        if engine.tick_due():
            found.append(step)
            engine.state = replace(engine.state, step=step)
    return found


@pytest.mark.parametrize(("first", "count", "second"), [(None, 0, 0), (3, 5, -5), (-2, 6, -2)])
def test_an_epoch_ends_where_its_samples_do(first: int | None, count: int, second: int, tmp_path: Path) -> None:
    """``first``, ``count``: samples left out from there in the second epoch on; -2 with 6 of them ends it by that."""
    engine = make_engine(tiny_config("cnn", control__every=0, trainer__steps=1000), tmp_path)
    engine.begin(None)
    length = engine.plan.steps_per_epoch
    assert length > 12
    if first is not None:
        begins = length + first if first > 0 else 2 * length + first
        governor = replace(engine.state.governor, skips=(Skip(first_step=begins, count=count),))
        engine.state = replace(engine.state, governor=governor)
    third = 3 * length - count
    assert ticks(engine, third) == [length, 2 * length + second, third]

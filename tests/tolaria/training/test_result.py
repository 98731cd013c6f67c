"""The test part is read once, on the checkpoint that validation chose, and not on where the run happened to end."""

from pathlib import Path

import pytest
import torch
from torch import nn

from esper.tolaria.training.result import rebuild_checkpoint
from tests.support.tiny import act, make_engine, schedule, tiny_config

STEPS, SAVES = 120, (40, 80, 120)


def count_correct(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    with torch.no_grad():
        return int((network.eval()(x).argmax(1) == y).sum())


def test_a_run_that_ends_badly_is_tested_where_it_was_best(tmp_path: Path) -> None:
    """A seed is blended in, saved so, and pruned; after the last step every weight is turned round."""
    config = tiny_config(
        "cnn",
        trainer__steps=STEPS,
        control__every=10,
        checkpoint__every_ticks=4,
        trainer__batch=64,
        optim__lr=0.03,
        controller=schedule(
            act(1, "r0c0", "GERMINATE", blueprint="conv_small", ticks=1),
            act(3, "r0c0", "ADVANCE"),
            act(5, "r0c0", "ADVANCE"),
            act(9, "r0c0", "PRUNE"),
        ),
    )
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    scores = {}
    while engine.step < STEPS:
        engine.train_step()
        if engine.step == STEPS:
            with torch.no_grad():
                for parameter in engine.grown.model.parameters():
                    parameter.neg_()
        if engine.tick_due():
            engine.tick()
            scores[engine.step] = engine.state.validation_accuracy.value
    result = engine.finish()
    best = max(SAVES, key=lambda step: scores[step] or 0.0)
    assert best == 80, scores
    assert (scores[STEPS] or 0.0) < 0.5 * (scores[best] or 0.0)
    assert result.best_step == best
    assert result.validation_accuracy.value == result.objective == scores[STEPS], "the end's, not the best's"

    test = engine.bundle.test
    x, y = test.fetch(torch.arange(len(test)))
    network = rebuild_checkpoint(engine.saver.store, best, engine.fresh, engine.growth)
    assert network.slots["r0c0"].seed is not None, "the seed of that checkpoint, which is gone by now"
    assert not engine.state.slot("r0c0").stage.has_seed
    assert result.test_accuracy.n == len(test)
    assert result.test_accuracy.value == pytest.approx(count_correct(network.model, x, y) / len(test), abs=1e-12)
    assert count_correct(engine.grown.model, x, y) / len(test) < 0.5 * (result.test_accuracy.value or 0.0)

"""trainer.ema: the recurrence by hand, a resume and a rollback to the bit, and what validation and the test read."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.config.tree import EsperConfig
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.events import RolledBack
from esper.tolaria.training.config import TrainerConfig
from esper.tolaria.training.engine import Engine
from esper.tolaria.training.result import rebuild_checkpoint
from tests.dist.test_operators import LIVES
from tests.support.averages import Weights, assert_averages, averaged, weights_of
from tests.support.diverging_runs import PLAIN, spoil_data
from tests.support.small_runs import before, train_on
from tests.support.tiny import bits, events, make_engine, replica, tiny_config

DECAY = 0.9
STEPS = 36


def config_of(**settings: object) -> EsperConfig:
    """Births, ramps, gates that come and go, a prune; see `tests.dist.test_operators`."""
    wanted = {"trainer__steps": STEPS, "trainer__ema": DECAY, "trainer__batch": 10, "controller": LIVES}
    return tiny_config("cnn", **{**wanted, **settings})


def averages(engine: Engine) -> dict[str, torch.Tensor]:
    assert engine.average is not None
    return engine.average.averages


def recorded(engine: Engine, until: int) -> list[tuple[Weights, bool]]:
    """Trains; what the weights are after each step and its tick."""
    noted = []
    while engine.step < until:
        train_on(engine, engine.step + 1)
        noted.append((weights_of(engine.grown.model), True))
    return noted


@pytest.mark.parametrize("task", ["cnn", "gpt"])
def test_through_a_life_it_is_the_recurrence_by_name(task: str, tmp_path: Path) -> None:
    settings = {} if task == "cnn" else {"controller": {"kind": "none"}, "trainer__steps": 8}
    config = tiny_config(task, **{"trainer__steps": STEPS, "trainer__ema": DECAY, "controller": LIVES, **settings})
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    start = weights_of(engine.grown.model)
    steps, names = [], set()
    while engine.step < engine.terms.total_steps:
        steps += recorded(engine, engine.step + 1)
        names |= set(averages(engine))
    assert_averages(averages(engine), averaged(DECAY, start, steps), tolerance=1e-5)
    assert {average.dtype for average in averages(engine).values()} == {torch.float32}
    if task == "cnn":
        assert {name.split(".")[1] for name in names - set(averages(engine))} == {"r0c0", "r0c1", "r1c0"}
        assert any(".gate." in name for name in names)


def test_it_stands_first_around_a_tick_so_that_a_save_of_a_birth_holds_the_newborn(tmp_path: Path) -> None:
    assert make_engine(config_of(), tmp_path).cycle.observers.names == ("ema", "saves", "governor")
    assert make_engine(config_of(trainer__ema=None), tmp_path).cycle.observers.names == ("saves", "governor")


@pytest.mark.parametrize("bad", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"ema = .*must be > 0 and < 1, or null for no average"):
        TrainerConfig(ema=bad)


def test_to_validate_with_no_average_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ema_validate = True.*needs trainer\.ema"):
        TrainerConfig(ema_validate=True)


@pytest.mark.parametrize("fused", [False, True], ids=["judged at once", "judged late"])
def test_a_skipped_step_does_not_count(fused: bool, tmp_path: Path) -> None:
    config = config_of(controller={"kind": "none"}, optim__fused=fused, optim__kind="adamw", governor__enabled=False)
    engine = make_engine(config, tmp_path)
    spoil_data(engine, range(5, 7), float("nan"))
    engine.begin(None)
    start = weights_of(engine.grown.model)
    assert engine.owner.late is fused
    steps = recorded(engine, 12)
    before_, *after = [start, *(weights for weights, _ in steps)]
    taken = []
    for weights in after:
        taken.append(any(not torch.equal(value, before_[name]) for name, value in weights.items()))
        before_ = weights
    assert [step for step, moved in enumerate(taken) if not moved] == [5, 6]
    noted = [(weights, moved) for (weights, _), moved in zip(steps, taken, strict=True)]
    assert_averages(averages(engine), averaged(DECAY, start, noted), tolerance=1e-5)


RESUMED = {"checkpoint__every_ticks": 4, "checkpoint__keep": 20}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, Any]]:
    """A run that nobody disturbed: its folder, its averages and what it comes to."""
    run = tmp_path_factory.mktemp("run")
    engine = make_engine(config_of(**RESUMED), run)
    engine.begin(None)
    train_on(engine)
    engine.saves.finish(engine.state)
    return run, bits(averages(engine).items()), replica(engine)


@pytest.mark.parametrize("at", [8, 16, 24])
def test_a_resume_goes_on_bit_for_bit(
    at: int, whole: tuple[Path, dict[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    run, wanted, state = whole
    shutil.copytree(run, tmp_path / "run")
    again = make_engine(config_of(**RESUMED), tmp_path / "run", attempt=2)
    again.begin(at)
    assert again.step == at
    train_on(again)
    assert bits(averages(again).items()) == wanted
    assert replica(again) == state


def test_a_rollback_goes_back_to_the_average_of_then(tmp_path: Path) -> None:
    config = config_of(
        host=PLAIN,
        trainer__steps=60,
        optim__kind="sgd",
        optim__lr=0.05,
        optim__clip_norm=None,
        governor__min_history=4,
        governor__snapshot_ticks=2,
        governor__blame_ticks=1,
        controller={"kind": "none"},
    )
    engine = make_engine(config, tmp_path)
    spoil_data(engine, range(40, 42), 1e3)
    engine.begin(None)
    start, noted = weights_of(engine.grown.model), dict[int, dict[str, str]]()
    then: list[tuple[int, dict[str, str], dict[str, torch.Tensor]]] = []
    own = engine.go_back

    def go_back(*args: object) -> object:
        found = own(*args)  # type: ignore[arg-type]
        values = {name: average.clone() for name, average in averages(engine).items()}
        then.append((engine.step, bits(values.items()), values))
        return found

    engine.cycle.observers.members[2].go_back = go_back  # type: ignore[attr-defined]
    steps: list[tuple[Weights, bool]] = []
    while engine.step < 60:
        train_on(engine, engine.step + 1)
        if then:
            break
        noted[engine.step] = bits(averages(engine).items())
        steps.append((weights_of(engine.grown.model), True))
    assert [event.to_step for event in events(engine).of(RolledBack)] == [then[0][0]]
    to_step, found, values = then[0]
    assert found == noted[to_step]
    assert found != noted[max(noted)]
    assert_averages(values, averaged(DECAY, start, steps[:to_step]), tolerance=1e-5)


# used where asked ---------------------------------------------------------------------------------------------------


def measured(engine: Engine) -> float:
    """Validation loss of what the model's parameters are now, by hand."""
    part = engine.bundle.validation
    x, y = part.fetch(torch.arange(len(part)))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(engine.grown.model.eval()(x), y))


@pytest.mark.parametrize("averaged_too", [False, True])
def test_validation_reads_the_average_where_asked_and_training_is_none_the_wiser(
    averaged_too: bool, tmp_path: Path
) -> None:
    plain = make_engine(config_of(trainer__ema=None), tmp_path / "plain")
    engine = make_engine(config_of(trainer__ema_validate=averaged_too), tmp_path / "ema")
    weights = {}
    for one in (plain, engine):
        one.begin(None)
        train_on(one, 30)
        weights[one] = replica(one)["parameters"]
    assert weights[engine] == weights[plain]
    seen = {"present": engine.state.validation_loss.value}
    before(engine, "tick", lambda: seen.update(live=measured(engine), **averaged_now(engine)))
    train_on(engine, 32)
    wanted = "average" if averaged_too else "live"
    assert engine.state.validation_loss.value == pytest.approx(seen[wanted], rel=1e-5)
    assert seen["live"] != pytest.approx(seen["average"], rel=1e-3)


def averaged_now(engine: Engine) -> dict[str, float]:
    assert engine.average is not None
    with engine.average.applied():
        return {"average": measured(engine)}


@pytest.mark.parametrize("every", [0, 3])
def test_the_final_test_reads_what_validation_read(every: int, tmp_path: Path) -> None:
    config = config_of(trainer__ema_validate=True, checkpoint__every_ticks=every, trainer__batch=64, optim__lr=0.03)
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    result = engine.run()
    assert result.best_step is not None
    store = engine.saver.store
    test = engine.bundle.test
    x, y = test.fetch(torch.arange(len(test)))
    losses = []
    for averaged_ in (True, False):
        network = rebuild_checkpoint(store, result.best_step, engine.fresh, engine.growth, averaged=averaged_).model
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(network.eval()(x), y)))
    assert result.test_loss.value == pytest.approx(losses[0], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_checkpoint_without_an_average_has_none_to_give(tmp_path: Path) -> None:
    engine = make_engine(config_of(trainer__ema=None, trainer__steps=4, checkpoint__every_ticks=1), tmp_path)
    engine.begin(None)
    result = engine.run()
    with pytest.raises(
        CheckpointError, match=r"state\.pt: it holds no average of the weights; train with trainer\.ema"
    ):
        rebuild_checkpoint(engine.saver.store, result.step, engine.fresh, engine.growth, averaged=True)

"""What a step takes, forecast from settings; and blocks whose activations are computed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from esper.kasmina.hosts import GPTConfig, ResNet20Config
from esper.leyline.errors import ConfigError
from esper.run.fitting.forecast import describe_memory, forecast_memory, sizes_kept
from tests.support.small_runs import train_on
from tests.support.tiny import act, bits, custom_host, make_engine, schedule, tiny_config

ACTIONS = schedule(
    act(1, "r0c0", "GERMINATE", blueprint="mlp", ticks=2),
    act(2, "r1c0", "GERMINATE", blueprint="norm", ticks=1),
    act(3, "r0c0", "ADVANCE"),
    act(4, "r0c0", "ADVANCE"),
)


def trained(folder: Path, **settings: Any) -> Any:
    more = {"trainer__steps": 12, "control__every": 2, "controller": ACTIONS}
    engine = make_engine(tiny_config("gpt", **{**more, **settings}), folder)
    engine.begin(None)
    while engine.step < 12:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    engine.saver.close()
    return engine


def test_recomputed_blocks_keep_less_and_come_to_the_same_bits(tmp_path: Path) -> None:
    plain, again = (trained(tmp_path / str(on), trainer__recompute=on) for on in (False, True))
    assert [entry.stage for entry in plain.state.slots] == [entry.stage for entry in again.state.slots]
    weights = again.grown.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.grown.model.state_dict().items())
    kept = [sum(sizes_kept(tiny_config("gpt"), engine.grown, engine.bundle, 4)) for engine in (plain, again)]
    assert kept[1] < 0.75 * kept[0]


def test_recomputed_batch_norms_move_their_statistics_once(tmp_path: Path) -> None:
    settings = {"host": ResNet20Config(width=4), "trainer__steps": 6, "control__every": 3}
    engines = []
    for on in (False, True):
        config = tiny_config("cnn", **settings, trainer__recompute=on)
        engines.append(engine := make_engine(config, tmp_path / str(on)))
        engine.begin(None)
        train_on(engine, 6)
    plain, again = (engine.grown.model.state_dict() for engine in engines)
    assert plain["stages.0.0.norm1.num_batches_tracked"] > 0
    assert bits(plain.items()) == bits(again.items())
    kept = [sum(sizes_kept(config, engine.grown, engine.bundle, 4)) for engine in engines]
    assert kept[1] < 0.6 * kept[0]


def test_what_cannot_be_recomputed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.recompute.*does not go with trainer\.compile"):
        tiny_config("gpt", trainer__recompute=True, trainer__compile=True)
    host = custom_host("tests.support.odd_hosts:counting", {"r0c0": "2"})
    config = tiny_config("cnn", host=host, trainer__recompute=True)
    with pytest.raises(ConfigError, match="host=custom is asked to do so by its own code"):
        make_engine(config, tmp_path)


def test_the_forecast_counts_what_a_step_takes() -> None:
    config = tiny_config("gpt", trainer__batch=32, world__nproc_per_node=2)
    found = forecast_memory(config)
    parameters = found.moments // 2
    assert found.gradients == 2 * parameters
    assert found.weights >= parameters
    assert found.samples == 16
    few = forecast_memory(tiny_config("gpt", trainer__batch=32, world__nproc_per_node=2, trainer__accumulate=4))
    assert few.samples == 4
    assert 3.5 < found.activations / few.activations < 4.5
    assert "16 samples a forward" in describe_memory(config)
    assert "not forecast" in describe_memory(tiny_config("cnn", host=custom_host("os.path:join", {"r0c0": "0"})))


def peak_of(engine: Any) -> int:
    """Bytes of tensors at the peak of a step, as torch's own tracker counts them."""
    for _ in range(2):  # now there are moments
        engine.train_step()
    tracker = MemTracker()
    tracker.track_external(engine.grown.model, engine.owner.optimizer)
    with tracker:
        engine.train_step()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    return int(found["Total"])


@pytest.mark.parametrize("name", ["gpt", "recomputed", "resnet20"])
def test_the_forecast_is_what_a_step_takes_at_its_peak(name: str, tmp_path: Path) -> None:
    host = ResNet20Config(width=8) if name == "resnet20" else GPTConfig(layers=4, heads=4, dim=64, block=16)
    settings = {"trainer__batch": 64, "control__every": 100, "world__nproc_per_node": 1, "host": host}
    config = tiny_config("cnn" if name == "resnet20" else "gpt", **settings, trainer__recompute=name == "recomputed")
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    forecast, measured = forecast_memory(config).total, peak_of(engine)
    assert forecast == pytest.approx(measured, rel=0.15), name


def test_a_format_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision = 'float8'.*fp32, fp64"):
        tiny_config("gpt", trainer__precision="float8")

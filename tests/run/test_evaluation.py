"""What a finished run's network is worth, and what it says, is what the run itself measured."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.config.strict import as_plain
from esper.config.tree import write_config
from esper.leyline.errors import ConfigError, DataError
from esper.run.using.evaluation import evaluate_run
from esper.run.using.prediction import predict_run
from tests.support.dist import run_distributed
from tests.support.tiny import make_engine
from tests.support.toy_tasks import FIRST, HOT, toy_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("run")
    config = toy_config("classification", trainer__steps=48, control__every=6)
    write_config(folder / "config.yaml", as_plain(config))
    engine = make_engine(config, folder)
    engine.begin(None)
    return folder, engine, engine.run()


def test_evaluation_is_what_the_run_read_once(run: Any) -> None:
    folder, _, result = run
    found = evaluate_run(folder)
    assert found.step == result.best_step
    assert found.loss.value == pytest.approx(result.test_loss.value, abs=1e-12)
    assert found.metrics == pytest.approx(result.test_metrics, abs=1e-12)
    plain = json.loads(found.text())
    assert plain["task"]["name"] == "classification"
    assert plain["metrics"]["f1_macro"] == pytest.approx(result.test_metrics["f1_macro"])
    last = evaluate_run(folder, at=48, part="validation")
    assert last.loss.value == pytest.approx(result.validation_loss.value, abs=1e-12)
    other = evaluate_run(folder, settings=["data.split_seed=3"])
    assert other.samples == found.samples
    with pytest.raises(ConfigError, match=r"--data lr=1: write data\.<setting>=<value>"):
        evaluate_run(folder, settings=["lr=1"])
    with pytest.raises(ConfigError, match="--part dev: no such part"):
        evaluate_run(folder, part="dev")


def measured(rank: int, folder: Path, part: str) -> tuple[int, list[float]]:
    found = evaluate_run(folder, part=part)
    return found.samples, [found.loss.value or 0.0, found.loss.se or 0.0, *found.metrics.values()]


def test_ranks_share_the_samples_of_an_evaluation(run: Any) -> None:
    folder, _, _ = run
    samples, alone = measured(0, folder, "test")
    for count, numbers in run_distributed(measured, 3, folder, "test"):
        assert count == samples == 44
        assert numbers == pytest.approx(alone, abs=1e-12)


def test_predictions_are_the_networks(run: Any, tmp_path: Path) -> None:
    folder, _, _ = run
    np.save(tmp_path / "x.npy", HOT.numpy())
    said = predict_run(folder, tmp_path / "x.npy", tmp_path / "y.npz")
    assert said.startswith("esper: 44 answers [class,probability]")
    found = np.load(tmp_path / "y.npz")
    modes = [
        torch.bincount(torch.tensor([(s + k) % 3 for k, n in enumerate((7, 3, 1)) for _ in range(n)])).argmax()
        for s in range(4)
    ]
    assert found["class"].reshape(4, 11)[:, 0].tolist() == [int(m) for m in modes]
    predict_run(folder, tmp_path / "x.npy", tmp_path / "y.csv")
    assert (tmp_path / "y.csv").read_text().startswith("class,probability\n")
    with pytest.raises(ConfigError, match="it is there already"):
        predict_run(folder, tmp_path / "x.npy", tmp_path / "y.csv")
    np.save(tmp_path / "wide.npy", np.zeros((3, 9)))
    with pytest.raises(DataError, match=r"inputs are \[3, 9\], the host takes \['N', 4\]"):
        predict_run(folder, tmp_path / "wide.npy", tmp_path / "z.csv")


def test_answers_that_the_disk_refuses_leave_no_file(run: Any, tmp_path: Path) -> None:
    folder, _, _ = run
    np.save(tmp_path / "x.npy", HOT.numpy())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("y.npz", "y.csv"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            with pytest.raises(DataError, match=rf"--output .*{name}: cannot be written \(File too large\)"):
                predict_run(folder, tmp_path / "x.npy", tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_keywords_and_several_inputs_are_predicted_by_name(tmp_path: Path) -> None:
    for name in ("seq2seq", "contrastive"):
        config = toy_config(name, trainer__steps=4, control__every=2, controller={"kind": "none"})
        (tmp_path / name).mkdir()
        write_config(tmp_path / name / "config.yaml", as_plain(config))
        engine = make_engine(config, tmp_path / name)
        engine.begin(None)
        engine.run()
    tokens, one, two = FIRST.flatten(1).numpy(), np.eye(24), np.eye(24)[::-1]
    np.save(tmp_path / "x.npy", tokens)
    np.savez(tmp_path / "x.npz", tokens=tokens)
    np.savez(tmp_path / "two.npz", one, two)
    for source in ("x.npy", "x.npz"):
        predict_run(tmp_path / "seq2seq", tmp_path / source, tmp_path / f"{source}-said.npz")
    named, alone = (np.load(tmp_path / f"{source}-said.npz") for source in ("x.npz", "x.npy"))
    assert all(len(named[key]) == 20 and np.array_equal(named[key], alone[key]) for key in named.files)
    said = predict_run(tmp_path / "contrastive", tmp_path / "two.npz", tmp_path / "pairs.npz")
    assert "24 answers" in said
    for run, source, text in (
        ("seq2seq", "two.npz", "holds arr_0, arr_1, the host takes tokens"),
        ("contrastive", "x.npy", r"holds 1 tensors, the host takes 2 \(input 0, input 1\); write .npz"),
    ):
        with pytest.raises(DataError, match=text):
            predict_run(tmp_path / run, tmp_path / source, tmp_path / "no.npz")
    assert not (tmp_path / "no.npz").exists()


@pytest.mark.parametrize("name", ["mse", "multilabel", "segmentation", "masked_language", "counting"])
def test_every_task_says_what_its_network_does(name: str, tmp_path: Path) -> None:
    config = toy_config(name, trainer__steps=2, control__every=2, controller={"kind": "none"})
    write_config(tmp_path / "config.yaml", as_plain(config))
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    engine.run()
    x, _ = engine.bundle.test.fetch(torch.arange(9))
    np.save(tmp_path / "x.npy", x.numpy())
    predict_run(tmp_path, tmp_path / "x.npy", tmp_path / "y.npz")
    with torch.no_grad():
        wanted = engine.task.answers(engine.grown.model.eval()(x))
    found = np.load(tmp_path / "y.npz")
    assert set(found.files) == set(wanted)
    for key, value in wanted.items():
        assert found[key].shape[0] == 9
        assert np.allclose(found[key], value.numpy(), atol=1e-12), key

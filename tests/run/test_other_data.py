"""Other data for a trained network, and new rows: made into inputs as its own training part was, whatever they hold."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.config.strict import as_plain
from esper.config.tree import write_config
from esper.leyline.errors import ConfigError, DataError
from esper.run.using.evaluation import evaluate_run, load_trained
from esper.run.using.prediction import predict_run
from esper.tolaria.data import DigitsConfig, DigitsPhasesConfig, load_data
from esper.tolaria.data.digits import read_digits
from esper.tolaria.tasks import ClassificationConfig, RegressionConfig
from tests.support.tiny import custom_host, make_engine, tiny_config
from tests.support.toy_tasks import SYMBOLS, toy_config

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
Row = tuple[float, str, str, float]
COLOURS = ("red", "green", "blue")


def write(path: Path, rows: list[Row]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("size", "colour", "kind", "price"), *rows])
    return str(path)


def rows_of(k: int) -> Row:
    return float(k % 7), COLOURS[k % 3], "abc"[k % 3], 0.5 * k


def trained(folder: Path, task: Any, target: str, kind: str, **settings: Any) -> Path:
    """A run of a table of sixty rows."""
    path = write(folder / "own.csv", [rows_of(k) for k in range(60)])
    data = toy_config("mse").data
    plain = {"kind": "table", "split_seed": 0, "workers": 0, "path": path, "test_path": None, "target": [target]}
    plain |= {"target_kind": kind, "columns": ["size", "colour"], "texts": [], "cluster_column": None}
    sizes = {name: getattr(data, name) for name in ("validation", "probe", "test")}
    host = custom_host("tests.support.toy_tasks:build", {"r0c0": "hidden"}, options={"task": "regression"})
    short = {"trainer__steps": 6, "control__every": 2, "trainer__batch": 8, "controller": {"kind": "none"}}
    task = as_plain(task)
    config = toy_config("mse", data={**plain, **sizes}, task=task, host=host, **{**short, **settings})
    run = folder / "run"
    run.mkdir()
    write_config(run / "config.yaml", as_plain(config))
    engine = make_engine(config, run)
    engine.begin(None)
    engine.run()
    return run


def by_hand(run: Path) -> Callable[[float, str], torch.Tensor]:
    """Input of a row, by the rows that the run was trained on: their prices tell which they were."""
    own = load_trained(run, None, [], False)
    numbers = (2 * own.bundle.train.fetch(torch.arange(len(own.bundle.train)))[1]).long().tolist()
    sizes = np.array([rows_of(k)[0] for k in numbers])
    known = sorted({rows_of(k)[1] for k in numbers})

    def encode(size: float, colour: str) -> torch.Tensor:
        said = [float(colour == one) for one in known]
        return torch.tensor([[(size - sizes.mean()) / sizes.std(), *said]], dtype=torch.float64)

    return encode


def test_a_shifted_table_is_shifted_for_the_network(tmp_path: Path) -> None:
    run = trained(tmp_path, RegressionConfig(), "price", "number")
    encode, model = by_hand(run), load_trained(run, None, [], False).grown.model
    with torch.no_grad():
        wanted = float((model(encode(103.0, "blue"))[0, 0] - 2.0) ** 2)
    other = write(tmp_path / "other.csv", [(103.0, "blue", "a", 2.0)] * 50)
    for key in ("path", "test_path"):  # dealt into parts; or the test part as a whole
        found = evaluate_run(run, settings=[f"data.{key}={other}"])
        assert found.loss.value == pytest.approx(wanted, abs=1e-9), key
        assert found.samples == (16 if key == "path" else 50)
    strange = write(tmp_path / "strange.csv", [*[(1.0, "blue", "a", 2.0)] * 50])
    (tmp_path / "strange.csv").write_text(Path(strange).read_text().replace("1.0,blue", "much,blue", 1))
    with pytest.raises(DataError, match=r"row 0 of the column 'size' is 'much', expected a number, as in the training"):
        evaluate_run(run, settings=[f"data.test_path={strange}"])
    with pytest.raises(ConfigError, match=r"--data data\.kind=digits: this run's network takes data=table"):
        evaluate_run(run, settings=["data.kind=digits"])


def test_classes_keep_their_numbers_and_weights(tmp_path: Path) -> None:
    """Classes b and c alone, of three; most are b, which other data would balance otherwise."""
    run = trained(tmp_path, ClassificationConfig(balanced=True), "kind", "class")
    other = write(tmp_path / "other.csv", [(2.0, "red", "bbbbbc"[k % 6], 0.0) for k in range(60)])
    own, found = load_trained(run, None, [], False), load_trained(run, None, [f"data.test_path={other}"], False)
    rows = torch.arange(60)
    assert found.bundle.test.fetch(rows)[1].tolist() == [1, 1, 1, 1, 1, 2] * 10
    assert torch.equal(found.bundle.learns.weights, own.bundle.learns.weights)
    odd = write(tmp_path / "odd.csv", [(2.0, "red", "z", 0.0)] * 5)
    with pytest.raises(DataError, match="row 0 of the target 'kind' is 'z', a class that the training part did not"):
        evaluate_run(run, settings=[f"data.test_path={odd}"])


def test_data_that_have_moved_are_the_runs_own(tmp_path: Path) -> None:
    run = trained(tmp_path, RegressionConfig(), "price", "number")
    before = evaluate_run(run)
    (run / "data.json").write_text(f'{{"digest": {before.data}}}')
    (tmp_path / "own.csv").rename(tmp_path / "moved.csv")
    other = write(tmp_path / "other.csv", [(103.0, "blue", "a", 2.0)] * 50)
    after = evaluate_run(run, settings=[f"data.path={tmp_path / 'moved.csv'}"])
    assert (after.loss, after.metrics) == (before.loss, before.metrics)
    with pytest.raises(DataError, match=r"own\.csv.*as the run's own training part was, which must be there, too"):
        evaluate_run(run, settings=[f"data.path={other}"])


def test_new_rows_of_a_table_are_predicted_by_their_columns(tmp_path: Path) -> None:
    run = trained(tmp_path, RegressionConfig(), "price", "number")
    encode, model = by_hand(run), load_trained(run, None, [], False).grown.model
    fresh = [(float(k), COLOURS[k % 3], "?", 0.0) for k in range(5)]
    predict_run(run, Path(write(tmp_path / "new.csv", fresh)), tmp_path / "said.npz")
    with torch.no_grad():
        wanted = torch.cat([model(encode(size, colour)) for size, colour, *_ in fresh])
    assert np.load(tmp_path / "said.npz")["output"] == pytest.approx(wanted.numpy(), abs=1e-9)
    (tmp_path / "bare.csv").write_text("0.5,1,0,2\n0.5,1,0,0\n")
    with pytest.raises(DataError, match=r"--input .*bare\.csv: no column 'size', it has 0\.5, 1, 0, 2"):
        predict_run(run, tmp_path / "bare.csv", tmp_path / "no.csv")


def test_classes_are_said_by_name(tmp_path: Path) -> None:
    run = trained(tmp_path, ClassificationConfig(), "kind", "class")
    source = Path(write(tmp_path / "new.csv", [rows_of(k) for k in range(9)]))
    predict_run(run, source, tmp_path / "said.csv")
    predict_run(run, source, tmp_path / "said.npz")
    with (tmp_path / "said.csv").open() as file:
        said = list(csv.DictReader(file))
    assert {row["class"] for row in said} <= {"a", "b", "c"}
    assert [row["class"] for row in said] == np.load(tmp_path / "said.npz")["class"].tolist()
    assert all(0 < float(row["probability"]) <= 1 for row in said)


@pytest.mark.parametrize("kind", [DigitsConfig, DigitsPhasesConfig])
def test_images_are_normalised_by_the_training_part_that_was_learned(kind: Any) -> None:
    own = load_data(kind(validation=40, probe=64, test=40))
    other = load_data(kind(validation=60, probe=64, test=60, split_seed=3), own.record["learned"])
    images, _ = read_digits()
    x = other.test.fetch(torch.arange(40))[0]
    mean, std = (own.record["learned"][key][0] for key in ("mean", "std"))
    pixels = (x * std + mean).double()
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-4, rtol=0)
    assert other.record["learned"] == own.record["learned"]
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= float(images.max())


def test_an_average_that_was_validated_is_what_is_evaluated(tmp_path: Path) -> None:
    settings = {"trainer__ema": 0.8, "trainer__ema_validate": True, "trainer__steps": 24, "control__every": 6}
    config = toy_config("classification", **settings)
    write_config(tmp_path / "config.yaml", as_plain(config))
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    result = engine.run()
    assert evaluate_run(tmp_path).loss.value == pytest.approx(result.test_loss.value, abs=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_answers_are_computed_in_the_format_of_the_run(precision: str, tmp_path: Path) -> None:
    """So what is right of them is what the run has measured."""
    config = tiny_config("cnn", trainer__precision=precision, trainer__steps=6, control__every=2)
    write_config(tmp_path / "config.yaml", as_plain(config))
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    engine.run()
    bundle = engine.bundle
    x, y = bundle.test.fetch(torch.arange(len(bundle.test)))
    np.save(tmp_path / "x.npy", x.numpy())
    predict_run(tmp_path, tmp_path / "x.npy", tmp_path / "y.npz")
    found, measured = np.load(tmp_path / "y.npz"), evaluate_run(tmp_path)
    assert float((found["class"] == y.numpy()).mean()) == pytest.approx(measured.accuracy.value, abs=1e-12)
    model = load_trained(tmp_path, None, [], False).grown.model.eval()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.no_grad(), torch.autocast("cpu", dtype=half):
        wanted = torch.softmax(model(x).double(), -1).max(-1).values
    assert np.array_equal(found["probability"], wanted.numpy())


def test_answers_in_half_precision_are_written(tmp_path: Path) -> None:
    config = toy_config("mse", trainer__precision="bf16", trainer__steps=4, control__every=2)
    write_config(tmp_path / "config.yaml", as_plain(config))
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    engine.run()
    np.save(tmp_path / "x.npy", np.eye(SYMBOLS))
    predict_run(tmp_path, tmp_path / "x.npy", tmp_path / "y.npz")
    assert np.load(tmp_path / "y.npz")["output"].dtype == np.float32

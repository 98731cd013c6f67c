"""Guards of data sets that no other test makes fire."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import esper
from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data import (
    CustomDataConfig,
    HFDataConfig,
    PySourceConfig,
    TableConfig,
    TokensConfig,
    corpus,
    load_data,
)
from esper.tolaria.data.clusters import Clusters
from esper.tolaria.data.configs.own import Target
from esper.tolaria.data.image_clusters import read_clusters
from esper.tolaria.data.own.table import MOST_TEXTS
from esper.tolaria.data.phases import loading
from tests.support.refusals import fails
from tests.support.toy_tasks import Rows

SIZES: dict[str, Any] = {"validation": 8, "probe": 8, "test": 8}


def short_of_clusters() -> esper.Data:
    rows = Rows(torch.zeros(20, 2), torch.zeros(20))
    return esper.Data(train=rows, validation=rows, probe=rows, test=rows, probe_cluster=[0])


def test_clusters_of_another_number() -> None:
    fails(
        lambda: load_data(CustomDataConfig(path=f"{__name__}:short_of_clusters")),
        ConfigError,
        r": probe_cluster has 1 values for 20 samples; give one each$",
    )
    fails(lambda: Clusters(3, torch.zeros(2)), ValueError, r"^labels of clusters \[2\]: need one for each of 3 ")


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / "t.csv"
    path.write_text("who,y\n" + "".join(f"name{k},{k % 2}\n" for k in range(MOST_TEXTS + 40)))
    config = TableConfig(path=str(path), target=["y"], **SIZES)
    fails(lambda: load_data(config), DataError, r"column 'who' holds \d+ different texts, at most \d+; leave it out")
    (tmp_path / "test.csv").write_text("who,y\nname1,7\n")
    other = TableConfig(
        path=str(path), test_path=str(tmp_path / "test.csv"), target=["y"], target_kind=Target.CLASS, **SIZES
    )
    fails(lambda: load_data(other), DataError, r"test\.csv: row 0 of the target 'y' is '7', a class that .* not have; ")
    (tmp_path / "t.parquet").write_bytes(b"nothing")
    odd = TableConfig(path=str(tmp_path / "t.parquet"), target=["y"], **SIZES)
    fails(lambda: load_data(odd), DataError, r"t\.parquet: not readable as a table \(.*\); expected CSV with a header,")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(lambda: load_data(config), ConfigError, r"^data=table: needs pyarrow \(.*\); pip install 'esper\[images\]'$")


def test_images_that_have_no_path(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"img": pa.array([{"bytes": b""}])}), tmp_path / "t.parquet")
    config: Any = SimpleNamespace(cluster_column=None, cluster_csv="c.csv", cluster_folder=None, image_column="img")
    fails(
        lambda: read_clusters(config, tmp_path / "t.parquet"),
        DataError,
        r"column 'img' has no field 'path'; set data\.cluster_column instead$",
    )


def test_texts_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    fails(
        lambda: load_data(TokensConfig(vocabulary=9, root=str(tmp_path))),
        DataError,
        r"train: no \.bin file in it; expected a folder",
    )
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(loading, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    fails(
        lambda: loading.torch_headers(100), DataError, r"include: no C\+\+ headers \(\.h\); expected those that torch"
    )
    fails(lambda: load_data(PySourceConfig()), DataError, r"no \.py files; .*use data=text instead$")


@pytest.mark.parametrize("library", ["datasets", "tokenizers"])
def test_libraries_that_are_not_installed(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "tokenizers":
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n' * 40)
    monkeypatch.setitem(sys.modules, library, None)
    config = HFDataConfig(path=str(tmp_path / "t.jsonl"), text="text", tokenizer="t.json", block=4, **SIZES)
    fails(lambda: load_data(config), ConfigError, rf"^data=hf: needs {library} \(.*\); pip install 'esper\[datasets")


def test_data_sets_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["a"] * 4})
    datasets.DatasetDict({"dev": rows}).save_to_disk(str(tmp_path / "dev"))
    config = HFDataConfig(path=str(tmp_path / "dev"), text="text", tokenizer="t.json", block=4, **SIZES)
    fails(lambda: load_data(config), DataError, "no split train; it has dev$")
    pictures = [image.new("RGB", (4 + k % 2, 4)) for k in range(40)]
    labelled = datasets.Dataset.from_dict(
        {"image": pictures, "label": [0, 1] * 20},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    labelled.save_to_disk(str(tmp_path / "two"))
    pixels = HFDataConfig(path=str(tmp_path / "two"), image="image", target=["label"], **SIZES)

    def read() -> None:
        bundle = load_data(pixels)
        bundle.train.fetch(torch.arange(len(bundle.train)))

    fails(read, DataError, r"images of 4x4 and 4x5 pixels; set data\.side to scale them to one size$")

"""Tables and shards of tokens: what is read, and one line for what cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data import TableConfig, TokensConfig, load_data
from esper.tolaria.data.own.table import read_table
from esper.tolaria.data.sampler import BatchPlan

SMALL: dict[str, Any] = {"validation": 4, "probe": 6, "test": 4}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = ["age,town,who,price,kind"]
    rows += [
        f"{20 + k if k != 3 else ''},{'ABC'[k % 3]},p{k // 2},{k * 1.5},{'low' if k < 20 else 'high'}"
        for k in range(40)
    ]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_numbers_are_standardised_and_texts_are_one_hot_by_the_training_part(file: Path) -> None:
    pytest.importorskip("pyarrow")
    bundle = load_data(TableConfig(path=str(file), target=["price"], columns=["age", "town"], **SMALL))
    x, y = bundle.train.fetch(torch.arange(len(bundle.train)))
    assert bundle.input_shape == (4,)
    assert x[:, 0].mean().abs() < 1e-9
    assert x[:, 0].std(correction=0) == pytest.approx(1.0, abs=0.05)  # a missing one is the mean
    assert torch.equal(x[:, 1:].sum(1), torch.ones(len(x)).double())
    assert y.dtype is torch.float64
    grouped = load_data(TableConfig(path=str(file), target=["price"], cluster_column="who", texts=[], **SMALL))
    assert len(grouped.probe_clusters) == len(grouped.probe) // 2
    classes = load_data(TableConfig(path=str(file), target=["kind"], target_kind="class", columns=["age"], **SMALL))  # type: ignore[arg-type]
    assert classes.classes == 2
    labels = classes.train.fetch(torch.arange(5))[1]
    assert labels.dtype is torch.int64


def test_parquet_is_the_same_table(file: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    csv = pytest.importorskip("pyarrow.csv")
    parquet.write_table(csv.read_csv(file), tmp_path / "t.parquet")
    one, two = read_table(file), read_table(tmp_path / "t.parquet")
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name], equal_nan=one[name].dtype != object) for name in one)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"target": ["cost"]}, "no column 'cost', it has age, town, who, price, kind; set data.target"),
        ({"columns": ["size"]}, "no column 'size'.*set data.columns"),
        ({"target": ["town"]}, "row 0 of the target 'town' is 'A', expected a number"),
        ({"target": ["price"], "target_kind": "labels"}, "row 1: labels are 0 or 1"),
    ],
)
def test_wrong_tables_are_one_line(file: Path, more: dict[str, Any], text: str) -> None:
    pytest.importorskip("pyarrow")
    from esper.config.strict import Reader, as_plain

    plain = {**as_plain(TableConfig(path=str(file), target=["price"], **SMALL)), **more}
    config = Reader().section(TableConfig, plain, "data")
    with pytest.raises((DataError, ConfigError), match=text) as error:
        load_data(config)
    assert "\n" not in str(error.value)


def shards(folder: Path) -> np.ndarray:
    (folder / "train").mkdir()
    tokens = np.random.default_rng(1).integers(1, 50, 3000).astype("<u2")
    tokens[::97] = 0
    tokens[:1700].tofile(folder / "train" / "0.bin")
    tokens[1700:].tofile(folder / "train" / "1.bin")
    return tokens


def test_windows_of_shards_are_the_files(tmp_path: Path) -> None:
    tokens = shards(tmp_path)
    config = TokensConfig(root=str(tmp_path), vocabulary=50, block=9, document_end=0, **SMALL)
    bundle = load_data(config)
    first, second = tokens[:1700], tokens[1700:]
    windows = np.concatenate(
        [first[: len(first) // 10 * 10].reshape(-1, 10), second[: len(second) // 10 * 10].reshape(-1, 10)]
    )
    seen = []
    for part in (bundle.train, bundle.validation, bundle.probe, bundle.test):
        x, y = part.fetch(torch.arange(len(part)))
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen.append(torch.cat([x, y[:, -1:]], 1).numpy())
    assert sorted(map(tuple, np.concatenate(seen).tolist())) == sorted(map(tuple, windows.tolist())), "each once"
    assert 1 <= len(bundle.probe_clusters) <= len(bundle.probe)
    assert load_data(config).digest == bundle.digest
    with (tmp_path / "train" / "1.bin").open("r+b") as file:
        file.write(b"\x07\x00")
    assert load_data(config).digest != bundle.digest


def test_wrong_tokens_are_one_line(tmp_path: Path) -> None:
    shards(tmp_path)
    bundle = load_data(TokensConfig(root=str(tmp_path), vocabulary=20, block=9, **SMALL))
    with pytest.raises(DataError, match=r"window \d+ has token \d+, expected 0 to 19; set data.vocabulary") as error:
        bundle.train.fetch(torch.arange(len(bundle.train)))
    assert "\n" not in str(error.value)
    (tmp_path / "train" / "1.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match="3 bytes are no whole number of 16-bit tokens"):
        load_data(TokensConfig(root=str(tmp_path), vocabulary=50, block=9, **SMALL))
    (tmp_path / "train" / "1.bin").write_bytes(b"")
    with pytest.raises(DataError, match="gives 100 windows, but the parts"):
        load_data(TokensConfig(root=str(tmp_path), vocabulary=50, block=16, validation=50, probe=50, test=4))


def anonymous() -> int:
    """Memory of this process's own, KiB: pages of mapped files are the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
def test_a_corpus_of_four_gib_takes_less_than_one_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("0.bin", "1.bin"):
        with (tmp_path / "train" / name).open("wb") as file:
            file.truncate(2 << 30)  # sparse: it takes no disk
    before = anonymous()
    bundle = load_data(TokensConfig(root=str(tmp_path), vocabulary=50_000, block=256, **SMALL))
    assert len(bundle.train) > 8_000_000
    plan = BatchPlan(len(bundle.train), 64, 1)
    for step in range(100):
        bundle.train_batch(plan.indices(step), seed=1, epoch=0)
    assert anonymous() - before < 1 << 20

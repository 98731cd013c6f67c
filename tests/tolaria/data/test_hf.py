"""data=hf: files on this machine become images, texts or tables, without a network; alike in every process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.leyline.errors import DataError
from esper.tolaria.data import HFDataConfig, load_data
from esper.tolaria.data.task import Task

pytest.importorskip("datasets", reason="datasets is not installed")
SIZES: dict[str, Any] = {"validation": 8, "probe": 8, "test": 8}
ROWS = [{"size": k % 7, "colour": "red" if k % 3 else "blue", "price": 0.5 * k, "of": k // 4} for k in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(folder: Path, suffix: str) -> str:
    """The rows in a file of the library's."""
    import datasets

    path, rows = folder / f"rows{suffix}", datasets.Dataset.from_list(ROWS)
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".csv":
        path.write_text("size,colour,price,of\n" + "".join(",".join(map(str, row.values())) + "\n" for row in ROWS))
    elif suffix == ".parquet":
        rows.to_parquet(str(path))
    else:
        rows.save_to_disk(str(path))
        if suffix == ".arrow":
            path = next(path.glob("*.arrow"))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv", ".arrow", ".folder"])
def test_every_kind_of_file_is_the_same_table(suffix: str, tmp_path: Path) -> None:
    more = {"target": ["price"], "target_kind": "number", "columns": ["size", "colour"], "cluster_column": "of"}
    config = HFDataConfig(path=table(tmp_path, suffix), **SIZES, **more)
    bundle = load_data(config)
    assert load_data(config).digest == bundle.digest
    x, y = bundle.train.fetch(torch.arange(len(bundle.train)))
    assert x.shape == (len(bundle.train), 3)
    row = (y / 0.5).long()
    sizes, red = (row % 7).double(), (row % 3 > 0).double()
    assert torch.allclose(x[:, 0], (sizes - sizes.mean()) / sizes.std(correction=0))
    assert torch.equal(x[:, 2], red)
    parts = [getattr(bundle, name).fetch(torch.arange(len(getattr(bundle, name))))[1] for name in ("probe", "train")]
    probe, train = ({int(v) // 4 for v in part / 0.5} for part in parts)
    assert not probe & train, "what belongs together is dealt whole"


def images(folder: Path, side: int = 6) -> str:
    from PIL import Image

    for split, count in (("train", 40), ("test", 12)):
        for k in range(count):
            path = folder / "pictures" / split / ("light" if k % 2 else "dark") / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((side, side, 3), 100 + k if k % 2 else k, dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return str(folder / "pictures")


def test_a_folder_of_images_is_read_by_number(tmp_path: Path) -> None:
    sizes = {"validation": 8, "probe": 8}
    bundle = load_data(HFDataConfig(path=images(tmp_path), image="image", target=["label"], **sizes))
    assert (bundle.task, bundle.input_shape, bundle.classes) == (Task.CLASSIFICATION, (3, 6, 6), 2)
    assert (len(bundle.train), len(bundle.test)) == (24, 12)
    x, y = bundle.test.fetch(torch.arange(12))
    assert torch.equal(y, (x[:, 0, 0, 0] > -0.3).long())
    seen = [bundle.train.fetch(torch.tensor([k]))[0] for k in (3, 1)]
    assert torch.equal(torch.cat(seen), bundle.train.fetch(torch.tensor([3, 1]))[0])
    small = load_data(HFDataConfig(path=images(tmp_path), image="image", channels=1, side=4, target=["label"], **sizes))
    assert small.input_shape == (1, 4, 4)


def words(folder: Path) -> tuple[str, str]:
    """Texts, and a tokenizer that knows their words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {word: number for number, word in enumerate(["?", "sun", "moon", "is", "up", "down"])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = [{"text": f"{'sun' if k % 2 else 'moon'} is {'up' if k % 3 else 'down'}", "kind": k % 2} for k in range(60)]
    (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "said.jsonl"), str(folder / "tokenizer.json")


def test_texts_are_samples_with_a_target_and_windows_without_one(tmp_path: Path) -> None:
    path, tokenizer = words(tmp_path)
    labelled = load_data(HFDataConfig(path=path, text="text", tokenizer=tokenizer, block=5, target=["kind"], **SIZES))
    x, y = labelled.train.fetch(torch.arange(len(labelled.train)))
    assert (x.shape[1], labelled.classes, labelled.task) == (5, 2, Task.CLASSIFICATION)
    assert torch.equal(y, (x[:, 0] == 1).long())
    assert not x[:, 3:].any(), "filled up"
    small = {"validation": 4, "probe": 4, "test": 4}
    joined = load_data(HFDataConfig(path=path, text="text", tokenizer=tokenizer, block=8, **small))
    x, y = joined.train.fetch(torch.arange(len(joined.train)))
    assert (joined.classes, joined.task, list(x.shape)) == (6, Task.LANGUAGE, [8, 8])
    assert torch.equal(x[:, 1:], y[:, :-1])


def refusal(**settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_data(HFDataConfig(**{**SIZES, **settings}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_or_no_such_thing_is_one_line(tmp_path: Path) -> None:
    assert "no such folder or file; correct data.path, or set data.hub=true" in refusal(path="some/name", target=["y"])
    path = table(tmp_path, ".parquet")
    assert "no column 'weight' in train, it has size, colour, price, of" in refusal(path=path, target=["weight"])
    assert "is int, no image; correct data.image" in refusal(path=path, image="size", target=["colour"])
    _, tokenizer = words(tmp_path)
    assert "row 0 of 'size' is 0, expected a text" in refusal(path=path, text="size", tokenizer=tokenizer)
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    assert "cannot be read as a data set" in refusal(path=str(tmp_path / "broken.parquet"), target=["y"])
    assert "no tokenizer.json" in refusal(path=path, text="colour", tokenizer=path)

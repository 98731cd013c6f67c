import io
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data import Augment, Cifar10Config, ImagesConfig, load_data
from esper.tolaria.data.augment import crop_flip
from esper.tolaria.data.parts import PART_NAMES

SMALL = {"classes": 3, "validation": 8, "probe": 6}


def encoded(pixels_HWC: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format)
    return buffer.getvalue()


def pictures(count: int, seed: int, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path: Path, images: list[bytes | None], labels: list[int | None], column: str = "img") -> None:
    cells = pa.array(
        [{"bytes": data, "path": None} for data in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({column: cells, "label": pa.array(labels, pa.int64())}), path, row_group_size=7)


@pytest.fixture
def root(tmp_path) -> Path:
    for name, count, seed in (("train", 40, 0), ("test", 10, 1)):
        images = [encoded(picture) for picture in pictures(count, seed)]
        write(tmp_path / f"{name}.parquet", images, [row % 3 for row in range(count)])
    return tmp_path


def break_row(
    root: Path, row: int, *, image: bytes | None = b"", label: int | None = 0, keep_image: bool = False
) -> None:
    """Writes train.parquet again with one changed row."""
    images: list[bytes | None] = [encoded(picture) for picture in pictures(40, 0)]
    labels: list[int | None] = [place % 3 for place in range(40)]
    images[row], labels[row] = images[row] if keep_image else image, label
    write(root / "train.parquet", images, labels)


def refusal(root: Path, **changed) -> str:
    """The one line that loading ends with; it names what it read."""
    with pytest.raises(DataError) as caught:
        load_data(Cifar10Config(root=str(root), **(SMALL | changed)))
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)
    return str(caught.value)


def test_parts_hold_every_image_once_with_its_label(root):
    bundle = load_data(Cifar10Config(root=str(root), **SMALL))
    assert bundle.record["sizes"] == {"train": 26, "validation": 8, "probe": 6, "test": 10}
    expected = {
        p.transpose(2, 0, 1).tobytes(): row % 3
        for seed, n in ((0, 40), (1, 10))
        for row, p in enumerate(pictures(n, seed))
    }
    seen: Counter[bytes] = Counter()
    for name in PART_NAMES:
        for image, label in zip(*getattr(bundle, name).content()):
            seen[image.numpy().tobytes()] += 1
            assert expected[image.numpy().tobytes()] == int(label)
    assert seen == Counter(expected.keys())
    in_test = [image.numpy().tobytes() for image in bundle.test.content()[0]]
    assert in_test == [p.transpose(2, 0, 1).tobytes() for p in pictures(10, 1)]


def test_images_are_kept_as_bytes_and_normalised_by_the_training_part(root):
    bundle = load_data(Cifar10Config(root=str(root), **SMALL))
    raw, _ = bundle.train.content()
    assert raw.dtype == torch.uint8
    mean, std = raw.double().mean((0, 2, 3)), raw.double().std((0, 2, 3), correction=0)
    assert bundle.record["learned"]["mean"] == pytest.approx(mean.tolist(), rel=1e-12)
    assert bundle.record["learned"]["std"] == pytest.approx(std.tolist(), rel=1e-12)
    x, _ = bundle.validation.fetch(torch.tensor([3, 0]))
    exact = (bundle.validation.content()[0][[3, 0]].double() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert x.dtype == torch.float32
    assert torch.allclose(x.double(), exact, atol=1e-6)
    assert bundle.input_shape == (3, 6, 5) == tuple(bundle.example().shape[1:])


def test_max_train_shortens_training_and_moves_nothing_else(root):
    whole = load_data(Cifar10Config(root=str(root), **SMALL))
    short = load_data(Cifar10Config(root=str(root), max_train=5, **SMALL))
    assert len(short.train) == 5
    assert torch.equal(short.train.content()[0], whole.train.content()[0][:5])
    for name in ("validation", "probe", "test"):
        assert torch.equal(getattr(short, name).content()[0], getattr(whole, name).content()[0])
    assert short.digest != whole.digest


def test_only_training_batches_are_augmented_by_sample_and_epoch(root):
    bundle = load_data(Cifar10Config(root=str(root), augment=Augment.CROP_FLIP, crop_pad=2, **SMALL))
    indices = torch.tensor([5, 0, 20])
    plain, y = bundle.train.fetch(indices)
    x, labels = bundle.train_batch(indices, seed=3, epoch=1)
    assert torch.equal(x, crop_flip(plain, indices, seed=3, epoch=1, pad=2))
    assert not torch.equal(x, plain)
    assert torch.equal(labels, y)
    alone, _ = bundle.train_batch(indices[1:2], seed=3, epoch=1)
    assert torch.equal(alone[0], x[1])
    assert torch.equal(plain, load_data(Cifar10Config(root=str(root), **SMALL)).train.fetch(indices)[0])


def test_grey_jpegs_of_another_layout(tmp_path):
    smooth = np.linspace(0, 200, 64, dtype=np.uint8).reshape(8, 8)
    for name, count in (("train", 20), ("test", 4)):
        images = [encoded(smooth + np.uint8(row), "JPEG") for row in range(count)]
        write(tmp_path / f"{name}.parquet", images, [row % 2 for row in range(count)], column="image")
    config = ImagesConfig(root=str(tmp_path), channels=1, classes=2, validation=4, probe=4)
    bundle = load_data(config)
    assert bundle.input_shape == (1, 8, 8)
    assert np.abs(bundle.test.content()[0][1, 0].numpy().astype(int) - smooth - 1).max() < 12  # JPEG is lossy
    rgb = load_data(ImagesConfig(root=str(tmp_path), channels=3, classes=2, validation=4, probe=4))
    assert rgb.input_shape == (3, 8, 8)


def test_the_folder_is_found_below_esper_data(root, monkeypatch):
    (root / "cifar10").mkdir()
    for name in ("train.parquet", "test.parquet"):
        (root / name).rename(root / "cifar10" / name)
    monkeypatch.setenv("ESPER_DATA", str(root))
    assert len(load_data(Cifar10Config(**SMALL)).test) == 10
    with pytest.raises(DataError, match=r"data\.root is null") as caught:
        load_data(ImagesConfig(**SMALL))
    assert "ESPER_DATA" not in str(caught.value)
    monkeypatch.delenv("ESPER_DATA")
    with pytest.raises(DataError, match="ESPER_DATA is not set") as caught:
        load_data(Cifar10Config(**SMALL))
    for part in ("data.root=FOLDER", "struct{bytes, path}", "load_dataset('uoft-cs/cifar10')"):
        assert part in str(caught.value)


def test_missing_files_and_columns(root):
    assert "image_column" in refusal(root, image_column="picture")
    assert "no column 'class', it has img: struct<bytes: binary, path: string>" in refusal(root, label_column="class")
    assert "it has img" in refusal(root, image_column="label", label_column="label")
    assert "it has img" in refusal(root, label_column="img")
    (root / "test.parquet").unlink()
    text = refusal(root)
    assert f"{root / 'test.parquet'}: no such file" in text
    assert f"mkdir -p {root} && python -c" in text
    assert "is not a folder" in refusal(root / "nowhere")


def test_a_damaged_parquet_file(root):
    whole = (root / "train.parquet").read_bytes()
    (root / "train.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not readable as Parquet" in refusal(root)
    (root / "train.parquet").write_bytes(b"")
    assert "not readable as Parquet" in refusal(root)


def test_damaged_images_name_their_row(root):
    break_row(root, 17, image=b"no image at all")
    assert "row 17 of column 'img' is no readable image (unknown format)" in refusal(root)
    break_row(root, 4, image=encoded(pictures(1, 9, (64, 64, 3))[0], "JPEG")[:700])
    assert "row 4 of column 'img' is no readable image" in refusal(root)
    break_row(root, 30, image=None)
    assert "row 30 of column 'img' holds no bytes" in refusal(root)


def test_labels_out_of_range_name_their_row(root):
    break_row(root, 11, keep_image=True, label=3)
    text = refusal(root)
    assert "row 11 has label 3, expected 0 to 2" in text
    assert "data.classes" in text
    break_row(root, 11, keep_image=True, label=-1)
    assert "row 11 has label -1" in refusal(root)
    break_row(root, 11, keep_image=True, label=None)
    assert "1 rows without a label" in refusal(root)


def test_images_of_unequal_size(root):
    break_row(root, 21, image=encoded(pictures(1, 9, (7, 5, 3))[0]))
    assert "[3, 7, 5]" in refusal(root)
    break_row(root, 21, keep_image=True)
    images = [encoded(picture) for picture in pictures(10, 1, (9, 5, 3))]
    write(root / "test.parquet", images, [0] * 10)
    assert "images of unequal sizes" in refusal(root)


def test_too_few_images_and_nothing_to_learn(root):
    assert "has 40 samples, but the other parts take 39" in refusal(root, validation=20, probe=19)
    write(root / "test.parquet", [encoded(pictures(1, 1)[0])], [0])
    assert "1 rows, expected at least 2" in refusal(root)
    flat = [encoded(np.full((6, 5, 3), 9, np.uint8))] * 40
    for name in ("train", "test"):
        write(root / f"{name}.parquet", flat, [0] * 40)
    with pytest.raises(DataError, match="channel 0 of the training images is constant"):
        load_data(Cifar10Config(root=str(root), **SMALL))


@pytest.mark.parametrize("package", ["pyarrow", "PIL"])
def test_a_missing_package_says_how_to_install_it(root, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to make an import fail
    with pytest.raises(ConfigError, match=r"needs pyarrow and pillow .*pip install 'esper\[images\]'"):
        load_data(Cifar10Config(root=str(root), **SMALL))


def test_bad_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        ImagesConfig(root="", classes=1, channels=2, max_train=1, crop_pad=0)
    keys = [problem.split(" ")[0] for problem in caught.value.problems]
    assert keys == ["root", "classes", "channels", "max_train", "crop_pad"]


@pytest.mark.data
def test_the_real_cifar10():
    if not Path(os.environ.get("ESPER_DATA") or "/nonexistent", "cifar10").is_dir():
        pytest.skip("ESPER_DATA names no folder with cifar10")
    bundle = load_data(Cifar10Config(max_train=3000, validation=200, probe=200))
    assert bundle.input_shape == (3, 32, 32)
    assert bundle.record["sizes"] == {"train": 3000, "validation": 200, "probe": 200, "test": 10_000}
    _, labels = bundle.test.fetch(torch.arange(10_000))
    assert torch.bincount(labels).tolist() == [1000] * 10
    published = [0.4914, 0.4822, 0.4465]  # mean of the whole training set, as a share of 255
    assert [value / 255 for value in bundle.record["learned"]["mean"]] == pytest.approx(published, abs=0.01)

import dataclasses
import gzip
import os
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from esper.leyline.errors import ConfigError, DataError
from esper.leyline.plain import to_plain
from esper.tolaria.data import (
    DATASETS,
    Augment,
    Cifar10Config,
    DigitsConfig,
    PySourceConfig,
    TextConfig,
    corpus,
    data_config_class,
    load_data,
    register,
)
from esper.tolaria.data import parts as data_parts
from esper.tolaria.data.corpus import STRETCH, deal, standard_library
from esper.tolaria.data.parts import PART_NAMES, BytePart, digest_parts
from esper.tolaria.data.task import Task

SMALL = {"block": 15, "max_bytes": 60_000, "validation": 100, "probe": 150, "test": 200}


def every_sample(bundle) -> list[tuple[bytes, ...]]:
    """The bytes of each sample of all parts."""
    parts = [getattr(bundle, name) for name in PART_NAMES]
    return [tuple(t.numpy().tobytes() for t in row) for part in parts for row in zip(*part.content())]


def refusal(config) -> str:
    """The one line that loading ends with."""
    with pytest.raises(DataError) as caught:
        load_data(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_texts(root: Path, train: bytes, test: bytes) -> str:
    (root / "train.txt").write_bytes(train)
    (root / "test.txt").write_bytes(test)
    return str(root)


@pytest.fixture(scope="module")
def digits():
    return load_data(DigitsConfig())


def test_digits_parts_hold_every_digit_once(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    images, labels = source.images.astype(np.uint8), source.target.astype(np.int64)
    expected = [(image.tobytes(), label.tobytes()) for image, label in zip(images, labels)]
    assert Counter(every_sample(digits)) == Counter(expected)
    sizes = {name: len(getattr(digits, name)) for name in PART_NAMES}
    assert sizes == digits.record["sizes"] == {"train": 873, "validation": 240, "probe": 384, "test": 300}


@pytest.mark.parametrize(
    "content",
    [None, b"no gzip", gzip.compress(b"1,2\n3\n"), gzip.compress(b"1,2\n3,4\n")],
    ids=["absent", "no gzip", "ragged", "too few columns"],  # a compressed file holds the time at which it was made
)
def test_digits_that_cannot_be_read_are_one_line(content, tmp_path, monkeypatch):
    folder = tmp_path / "sklearn" / "datasets" / "data"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "digits.csv.gz").write_bytes(content)
    there = SimpleNamespace(origin=str(tmp_path / "sklearn" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there)
    with pytest.raises(DataError, match=r"digits\.csv\.gz: cannot be read .*; install scikit-learn anew$"):
        load_data(DigitsConfig())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="is not installed; pip install scikit-learn"):
        load_data(DigitsConfig())


def test_digits_are_normalised_by_the_training_part(digits):
    x, y = digits.train.fetch(torch.arange(len(digits.train)))
    assert (x.dtype, y.dtype, digits.task, digits.classes) == (torch.float32, torch.int64, Task.CLASSIFICATION, 10)
    assert tuple(x.shape[1:]) == digits.input_shape == (1, 8, 8)
    assert x.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert x.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert set(y.tolist()) == set(range(10))
    test = digits.test.fetch(torch.arange(300))[0]
    raw = digits.test.content()[0].float()
    assert torch.allclose(
        test * digits.record["learned"]["std"][0] + digits.record["learned"]["mean"][0], raw, atol=1e-4
    )


def test_the_split_follows_split_seed_alone(digits):
    torch.manual_seed(5)
    np.random.seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    again, other = load_data(DigitsConfig()), load_data(DigitsConfig(split_seed=1))
    assert again.digest == digits.digest
    assert torch.equal(again.probe.content()[0], digits.probe.content()[0])
    assert other.digest != digits.digest
    assert Counter(every_sample(other)) == Counter(every_sample(digits))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_batches_without_augmentation_are_the_samples(digits):
    indices = torch.tensor([4, 1, 800])
    x, y = digits.train_batch(indices, seed=1, epoch=2)
    assert torch.equal(x, digits.train.fetch(indices)[0])
    assert torch.equal(y, digits.train.fetch(indices)[1])
    assert digits.example().shape == (2, 1, 8, 8)


def test_pysource_parts_are_pieces_of_the_standard_library_without_overlap():
    bundle = load_data(PySourceConfig(**SMALL))
    sources, files = standard_library(Path(sysconfig.get_paths()["stdlib"]), 60_000)
    corpus = b"".join(sources)
    assert len(corpus) == 60_000
    windows = [(corpus[start : start + 16],) for start in range(0, 60_000, 16)]
    assert Counter(every_sample(bundle)) == Counter(windows)
    assert bundle.record["files"] == files
    assert sum(entry["bytes"] for entry in files) == 60_000
    assert [entry["path"] for entry in files] == sorted(entry["path"] for entry in files)
    assert (bundle.task, bundle.classes, bundle.input_shape) == (Task.LANGUAGE, 256, (15,))
    assert load_data(PySourceConfig(**SMALL)).digest == bundle.digest


def test_the_default_pysource_is_a_megabyte_with_enough_to_probe():
    bundle = load_data(PySourceConfig())
    assert sum(bundle.record["sizes"].values()) == 1_000_000 // 65
    assert bundle.record["sizes"]["train"] > 10_000
    assert to_plain(bundle.record) == bundle.record


def test_the_target_is_the_next_byte(tmp_path):
    root = write_texts(tmp_path, bytes(range(256)) * 40, bytes(range(256)))
    bundle = load_data(TextConfig(root=root, block=7, validation=10, probe=10))
    x, y = bundle.train.fetch(torch.arange(50))
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    assert x.shape == y.shape == (50, 7)
    assert torch.equal(y, (x + 1) % 256)
    assert bundle.test.fetch(torch.tensor([1]))[0].tolist() == [list(range(8, 15))]


def test_text_is_dealt_in_stretches_and_the_probe_window_by_window(tmp_path):
    numbers = np.arange(STRETCH * 20, dtype=">u2").tobytes()  # window i holds the number i
    root = write_texts(tmp_path, numbers, b"some test text")
    bundle = load_data(TextConfig(root=root, block=1, validation=2 * STRETCH, probe=3 * STRETCH))
    held = {
        name: getattr(bundle, name).content()[0].int() @ torch.tensor([256, 1], dtype=torch.int32)
        for name in PART_NAMES
    }
    assert sorted(torch.cat([held[name] for name in ("train", "validation", "probe")]).tolist()) == list(
        range(STRETCH * 20)
    )
    stretches = {name: {number // STRETCH for number in held[name].tolist()} for name in held}
    assert len(stretches["probe"]) >= 18, "96 windows of 20 stretches"
    assert len(stretches["validation"]) <= 4, "2 stretches' worth, less what went to the probe"
    assert len(stretches["validation"] & stretches["train"]) <= 1


@pytest.mark.parametrize("correlation", [0.0, 0.36])
def test_the_mean_over_a_dealt_probe_is_as_uncertain_as_its_windows_say(correlation):
    # Differences of real seeds correlate by 0.1 to 0.4 within a stretch; here their mean over the corpus is exactly 0.
    rng, scores = np.random.default_rng(3), []
    config = TextConfig(probe=1024)
    for seed in range(120):
        config.split_seed = seed
        shared = np.repeat(rng.standard_normal(800), STRETCH)
        d = correlation**0.5 * shared + (1.0 - correlation) ** 0.5 * rng.standard_normal(len(shared))
        windows = torch.from_numpy(d - d.mean()).view(-1, 1)
        probe = windows[deal(config, windows, {"validation": 512, "probe": 1024}, "a test")["probe"]].flatten()
        scores.append(float(probe.mean() / (probe.std() / len(probe) ** 0.5)))
    assert 0.8 < np.std(scores) < 1.25, "t has SD 1; 3.5 where neighbours are dealt together"


def test_text_reads_no_more_than_max_bytes(tmp_path):
    root = write_texts(tmp_path, b"ab" * 5000, b"cd" * 5000)
    bundle = load_data(TextConfig(root=root, block=9, max_bytes=1000, validation=10, probe=10))
    assert bundle.record["sizes"] == {"train": 80, "validation": 10, "probe": 10, "test": 100}


@pytest.mark.parametrize("max_bytes", [None, 1003])
def test_text_that_is_mapped_is_text_that_is_read(tmp_path, monkeypatch, max_bytes):
    text = torch.randint(0, 256, (5003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    root = write_texts(tmp_path, text.numpy().tobytes(), b"lazy dog" * 20)
    config = TextConfig(root=root, block=9, max_bytes=max_bytes, validation=10, probe=10)
    read = load_data(config)
    mapped = []
    real = corpus.map_text
    monkeypatch.setattr(corpus, "LARGE", 161)  # train.txt alone
    monkeypatch.setattr(corpus, "map_text", lambda path, most: mapped.append(path.name) or real(path, most))
    monkeypatch.setattr(data_parts, "PIECE", 7)
    found = load_data(config)
    assert mapped == ["train.txt"]
    assert (found.digest, found.record) == (read.digest, read.record)
    every = torch.arange(len(read.train)).flip(0)
    for x, y in zip(found.train.fetch(every), read.train.fetch(every), strict=True):
        assert torch.equal(x, y)


def test_the_digest_follows_every_byte_and_its_place():
    def parts(**changed: torch.Tensor) -> dict:
        windows = {name: torch.full((2, 8), index, dtype=torch.uint8) for index, name in enumerate(PART_NAMES)}
        return {name: BytePart(tensor) for name, tensor in (windows | changed).items()}

    base = digest_parts(parts())
    assert base == digest_parts(parts())
    assert 0 <= base < 1 << 62
    for name in PART_NAMES:
        changed = parts()[name].content()[0]
        changed[1, 3] ^= 1
        assert digest_parts(parts(**{name: changed})) != base
    swapped = {"train": parts()["test"].content()[0], "test": parts()["train"].content()[0]}
    assert digest_parts(parts(**swapped)) != base
    assert digest_parts(parts(probe=torch.full((4, 4), 2, dtype=torch.uint8))) != base


def test_one_changed_byte_of_a_file_changes_the_digest(tmp_path):
    text = bytearray(b"the quick brown fox " * 500)
    config = TextConfig(root=write_texts(tmp_path, text, b"lazy dog" * 20), block=9, validation=10, probe=10)
    before = load_data(config)
    text[4321] ^= 1
    write_texts(tmp_path, text, b"lazy dog" * 20)
    after = load_data(config)
    assert after.digest != before.digest
    assert [a["xxh3_64"] == b["xxh3_64"] for a, b in zip(after.record["files"], before.record["files"])] == [
        False,
        True,
    ]


def test_unset_folders_name_the_key_the_layout_and_the_command(monkeypatch, tmp_path):
    monkeypatch.delenv("ESPER_DATA", raising=False)
    text = refusal(TextConfig())
    for part in ("data.root", "ESPER_DATA", "train.txt and test.txt", "cp TRAINING_TEXT"):
        assert part in text
    monkeypatch.setenv("ESPER_DATA", str(tmp_path))
    assert f"{tmp_path / 'wikitext2'} (from ESPER_DATA) is not a folder" in refusal(TextConfig())
    (tmp_path / "wikitext2").mkdir()
    assert f"{tmp_path / 'wikitext2' / 'train.txt'}: no such file" in refusal(TextConfig())
    write_texts(tmp_path / "wikitext2", b"x" * 2000, b"y" * 100)
    assert len(load_data(TextConfig(block=9, validation=10, probe=10)).train) == 180


def test_too_little_data_is_an_error(tmp_path):
    root = write_texts(tmp_path, b"x" * 300, b"y" * 12)
    assert "samples of data.block + 1 = 10 bytes" in refusal(TextConfig(root=root, block=9, validation=10, probe=10))
    write_texts(tmp_path, b"x" * 210, b"y" * 40)
    assert "leave 1 for training" in refusal(TextConfig(root=root, block=9, validation=10, probe=10))
    assert "1797 samples" in refusal(DigitsConfig(test=1400))


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path):
    root = write_texts(tmp_path, b"x" * 300, b"y" * 40)
    (tmp_path / "test.txt").unlink()
    (tmp_path / "test.txt").mkdir()
    assert "no such file" in refusal(TextConfig(root=root, block=9, validation=2, probe=2))


# What has no default, since only the user knows it.
NEEDED = {
    "custom": {"path": "lab.data:build"},
    "hf": {"path": "t.csv", "target": ["y"]},
    "table": {"path": "t.csv", "target": ["y"]},
    "tokens": {"vocabulary": 4},
}


def test_kinds_and_their_configs_agree():
    assert {"digits", "pysource", "text", "cifar10", "images"} <= set(DATASETS)
    for kind in DATASETS:
        needed = NEEDED.get(kind, {})
        config = data_config_class(kind)(**needed)
        assert config.kind == kind
        read_back = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(data_config_class(kind)), needed))
        assert dataclasses.asdict(read_back) == dataclasses.asdict(config)


def test_overrides_reach_the_config_class():
    merged = OmegaConf.merge(
        OmegaConf.structured(Cifar10Config), {"augment": "CROP_FLIP", "max_train": 100, "root": "x"}
    )
    assert OmegaConf.to_object(merged) == Cifar10Config(augment=Augment.CROP_FLIP, max_train=100, root="x")


def test_unknown_and_doubled_names_are_errors():
    with pytest.raises(
        ConfigError, match=r"'mnist'.*cifar10, custom, digits, digits_phases, hf, images, .*, text, text_phases, tokens"
    ):
        data_config_class("mnist")
    with pytest.raises(ConfigError, match="needs DigitsConfig, got TextConfig"):
        load_data(TextConfig(kind="digits"))
    with pytest.raises(ConfigError, match=r"'digits' is registered already"):
        register(DigitsConfig)


def test_bad_settings_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        PySourceConfig(block=0, probe=1, max_bytes=0, split_seed=-1)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["split_seed", "probe", "block", "max_bytes"]


@pytest.mark.data
def test_the_text_folder_of_esper_data():
    if not Path(os.environ.get("ESPER_DATA") or "/nonexistent", "wikitext2").is_dir():
        pytest.skip("ESPER_DATA names no folder with wikitext2")
    bundle = load_data(TextConfig())
    assert bundle.record["sizes"]["test"] == bundle.record["files"][1]["bytes"] // 65
    text = bytes(bundle.train.fetch(torch.arange(20))[0].flatten().tolist()).decode("utf-8", "replace")
    assert text.count(" ") > 100

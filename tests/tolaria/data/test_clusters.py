"""Clusters that loaders find: documents, source files, patients. None of them may be in two parts."""

import csv
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data import ImagesConfig, PySourceConfig, TextConfig, load_data
from esper.tolaria.data.clusters import deal_whole
from esper.tolaria.data.configs import TextCluster
from esper.tolaria.data.parts import PART_NAMES, BytePart, make_bundle
from esper.tolaria.data.task import Task
from tests.tolaria.data.test_images import encoded, pictures

SIZES = [3, 17, 1, 40, 8, 8, 5, 29, 2, 60, 11, 4, 33, 21, 7, 9, 50, 6, 13, 10]


def article(number: int, windows: int) -> bytes:
    """An article of so many windows of 16 bytes and a rest; each window names the article, none spans two."""
    body = b" = Title = \n".ljust(16, b".") + b"".join(b"%05d%011d" % (number, k) for k in range(1, windows))
    return body + b"rest\n"


@pytest.fixture
def articles(tmp_path):
    train = b"".join(article(number, windows) for number, windows in enumerate(SIZES))
    (tmp_path / "train.txt").write_bytes(train)
    (tmp_path / "test.txt").write_bytes(article(99, 30))
    return tmp_path


def config(root, **changed) -> TextConfig:
    fields = {"block": 15, "validation": 30, "probe": 90, "cluster": "document", "document_start": "^ = [^=]"}
    fields |= changed
    return TextConfig(root=str(root), **{**fields, "cluster": TextCluster(fields["cluster"])})


def words(part: BytePart) -> Counter[bytes]:
    """How often each article comes up in a part, by its number; windows with a title have none."""
    rows = [row.numpy().tobytes() for row in part.content()[0]]
    return Counter(row[:5] for row in rows if not row.startswith(b" ="))


def test_documents_of_a_file_are_dealt_whole_and_no_window_spans_two(articles):
    bundle = load_data(config(articles))
    seen = {name: words(getattr(bundle, name)) for name in PART_NAMES if name != "test"}
    together = sum(seen.values(), Counter())
    assert together == Counter({b"%05d" % n: size - 1 for n, size in enumerate(SIZES) if size > 1})
    for name, inside in seen.items():
        others = set().union(*(one for other, one in seen.items() if other != name))
        assert inside
        assert not set(inside) & others
    assert 90 <= len(bundle.probe) < 90 + max(SIZES)
    assert bundle.record["probe_clusters"] == len(bundle.probe_clusters) < len(bundle.probe)
    members, places = bundle.probe_clusters.members(torch.arange(len(bundle.probe_clusters)))
    rows = bundle.probe.content()[0][members]
    for place in range(len(bundle.probe_clusters)):
        inside = words(BytePart(rows[places == place]))
        assert len(inside) <= 1  # a title of its own, and windows of one article
    assert len(bundle.train_clusters) + len(bundle.probe_clusters) < len(SIZES)
    assert load_data(config(articles)).digest == bundle.digest != load_data(config(articles, split_seed=1)).digest


def test_files_of_a_folder_are_documents(tmp_path):
    for name, sizes in (("train", SIZES), ("test", [30])):
        folder = tmp_path / name / "deep"
        folder.mkdir(parents=True)
        for number, windows in enumerate(sizes):
            (folder / f"{number:02}.txt").write_bytes(article(number, windows))
    bundle = load_data(config(tmp_path, document_start=None))
    assert not set(words(bundle.probe)) & set(words(bundle.train))
    assert len(bundle.record["files"]) == len(SIZES) + 1
    single = load_data(config(tmp_path, document_start=None, cluster="window"))
    assert len(single.probe_clusters) == len(single.probe) == 90


def test_source_files_are_documents():
    bundle = load_data(
        PySourceConfig(max_bytes=200_000, validation=100, probe=300, test=100, cluster=TextCluster.DOCUMENT)
    )
    assert len(bundle.probe) >= 300
    assert 1 < len(bundle.probe_clusters) < 60
    assert int(bundle.probe_clusters.sizes.sum()) == len(bundle.probe)


def test_what_cannot_be_documents_is_told_in_one_line(articles):
    def refusal(error, **changed) -> str:
        with pytest.raises(error) as caught:
            load_data(config(articles, **changed))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "single document" in refusal(DataError, document_start=None)
    assert "document_start" in refusal(DataError, document_start="never there")
    assert "regular expression" in refusal(ConfigError, document_start="(")
    assert "matches empty text" in refusal(ConfigError, document_start="x*")
    assert "cluster=document" in refusal(ConfigError, cluster="window")
    assert "dealt whole" in refusal(DataError, probe=400)


def test_whole_clusters_are_dealt_to_where_they_suffice():
    labels = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))[torch.randperm(sum(SIZES))]
    dealt = deal_whole(labels, {"validation": 20, "probe": 100}, 3, "here")
    assert sorted(torch.cat([*dealt.values()]).tolist()) == list(range(len(labels)))
    for name, wanted in (("validation", 20), ("probe", 100)):
        mine = labels[dealt[name]]
        rest = torch.cat([labels[rows] for other, rows in dealt.items() if other != name])
        assert not torch.isin(mine, rest).any()
        assert wanted <= len(mine) < wanted + max(SIZES)


def test_a_cluster_in_two_parts_is_refused():
    parts = {name: BytePart(torch.zeros(4, 8, dtype=torch.uint8)) for name in PART_NAMES}
    fixed = {"name": "own", "task": Task.LANGUAGE, "input_shape": (7,), "classes": 256, "parts": parts, "record": {}}
    probe, train = torch.tensor([1, 1, 2, 2]), torch.tensor([3, 3, 4, 5])
    assert len(make_bundle(**fixed, probe_clusters=probe, train_clusters=train).probe_clusters) == 2
    with pytest.raises(DataError, match="1 clusters are in the probe and in the training part"):
        make_bundle(**fixed, probe_clusters=probe, train_clusters=torch.tensor([3, 3, 2, 5]))
    with pytest.raises(DataError, match="needs one for each of 4"):
        make_bundle(**fixed, probe_clusters=probe[:3])


PATIENTS = [f"p{row * row % 13}" for row in range(40)]


@pytest.fixture
def patients(tmp_path):
    """40 images of 13 patients or fewer, named by a column, by the folder of the path, and by a CSV."""
    for name, count, seed in (("train", 40, 0), ("test", 10, 1)):
        cells = [
            {"bytes": encoded(picture), "path": f"scans/{PATIENTS[row]}/{row}.png"}
            for row, picture in enumerate(pictures(count, seed))
        ]
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = {"img": pa.array(cells, struct), "label": pa.array([row % 3 for row in range(count)], pa.int64())}
        pq.write_table(pa.table(table | {"patient": PATIENTS[:count]}), tmp_path / f"{name}.parquet")
    with (tmp_path / "who.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cluster", "path"])
        writer.writerows([who, f"scans/{who}/{row}.png"] for row, who in enumerate(PATIENTS))
    return tmp_path


def images(root, **changed) -> ImagesConfig:
    fixed = {"image_column": "img", "classes": 3, "validation": 8, "probe": 10}
    return ImagesConfig(root=str(root), **(fixed | changed))


@pytest.mark.parametrize("how", [{"cluster_column": "patient"}, {"cluster_csv": "who.csv"}, {"cluster_folder": 1}])
def test_a_patient_is_in_one_part(patients, how):
    bundle = load_data(images(patients, **how))
    owner = {p.transpose(2, 0, 1).tobytes(): PATIENTS[row] for row, p in enumerate(pictures(40, 0))}
    who = {
        name: [owner[image.numpy().tobytes()] for image in getattr(bundle, name).content()[0]]
        for name in ("train", "validation", "probe")
    }
    assert sum(map(len, who.values())) == 40
    sets = [set(one) for one in who.values()]
    assert sum(map(len, sets)) == len(set().union(*sets)) == len(set(PATIENTS))
    members, places = bundle.probe_clusters.members(torch.arange(len(bundle.probe_clusters)))
    together = {int(place): {who["probe"][i] for i in members[places == place].tolist()} for place in places.unique()}
    assert all(len(one) == 1 for one in together.values())
    assert len(together) == len(set(who["probe"]))
    assert load_data(images(patients, cluster_column="patient")).digest == bundle.digest


def test_clusters_of_images_that_are_not_there_are_told_in_one_line(patients):
    def refusal(error=DataError, **changed) -> str:
        with pytest.raises(error) as caught:
            load_data(images(patients, **changed))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no column 'doctor', it has img, label, patient" in refusal(cluster_column="doctor")
    assert "cluster_folder = 2 names no folder" in refusal(cluster_folder=2)
    assert "nowhere.csv: cannot be read" in refusal(cluster_csv="nowhere.csv")
    assert "at most one of" in refusal(ConfigError, cluster_folder=0, cluster_csv="who.csv")
    (patients / "short.csv").write_text("path,cluster\nscans/p0/0.png,p0\n")
    assert "no line for 'scans/p1/1.png', the image of row 1" in refusal(cluster_csv="short.csv")
    (patients / "two.csv").write_text("path,cluster\nscans/p0/0.png,p0\nscans/p0/0.png,p1\n")
    assert "line 3 puts scans/p0/0.png into a second cluster" in refusal(cluster_csv="two.csv")
    (patients / "odd.csv").write_text("path,who\nscans/p0/0.png,p0\n")
    assert "no column cluster" in refusal(cluster_csv="odd.csv")

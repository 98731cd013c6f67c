"""Clusters of images, such as the patient whom several show: named by a column, by a sidecar CSV, or by a folder.

cluster_column    a column of train.parquet holds the cluster of each row
cluster_csv       a CSV in the data set's folder with a header and the columns path and cluster
cluster_folder    the folder at this level of the image's path: 0 is the first one, -1 the one that holds the file
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.clusters import number_labels


class ClusterFields(Protocol):
    """The fields of a data set's config that name clusters."""

    image_column: str
    cluster_column: str | None
    cluster_csv: str | None
    cluster_folder: int | None


def read_clusters(config: ClusterFields, source: Path) -> Tensor | None:
    """The cluster of each row of a Parquet file of images, int64 [N]; None where the config names none.

    Raises:
        DataError: what the config names is not there, or says nothing of a row.
    """
    if config.cluster_column is not None:
        values = _read(source, config.cluster_column)
        return number_labels(from_column(values, config.cluster_column, source))
    if config.cluster_csv is None and config.cluster_folder is None:
        return None
    cells = _read(source, config.image_column, "path")
    paths = [None if cell is None else cell["path"] for cell in cells]
    if config.cluster_csv is not None:
        return number_labels(from_csv(paths, source.parent / config.cluster_csv, source))
    assert config.cluster_folder is not None
    return number_labels(from_folder(paths, config.cluster_folder, source))


def _read(source: Path, column: str, field: str | None = None) -> list[Any]:
    """Values of a column; with ``field``, structs of that field alone."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise DataError(
                f"{source}: no column {column!r}, it has {', '.join(schema.names)}; set data.cluster_column to the one "
                "that names clusters, or to null"
            )
        if field is not None and schema.field(column).type.get_field_index(field) < 0:
            raise DataError(f"{source}: column {column!r} has no field {field!r}; set data.cluster_column instead")
        return file.read(columns=[column if field is None else f"{column}.{field}"]).column(column).to_pylist()


def from_folder(paths: Sequence[str | None], level: int, source: Path) -> list[str]:
    """Cluster of each image: its path up to the folder at ``level``.

    Raises:
        DataError: an image has no path, or one of fewer folders.
    """
    names = []
    for row, path in enumerate(paths):
        folders = Path(path or "").parts[:-1]
        if not -len(folders) <= level < len(folders):
            raise DataError(
                f"{source}: row {row} has the path {path!r}, in which data.cluster_folder = {level} names no folder; "
                "set it to a level that every path has, or name clusters by data.cluster_column or data.cluster_csv"
            )
        names.append("/".join(folders[: level + 1 if level >= 0 else len(folders) + level + 1]))
    return names


def from_csv(paths: Sequence[str | None], file: Path, source: Path) -> list[str]:
    """Cluster of each image as the CSV says; rows for other images are allowed.

    Raises:
        DataError: the file cannot be read, lacks a column or an image, or names two clusters for one.
    """
    layout = "a CSV with a header and the columns path and cluster"
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            missing = {"path", "cluster"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{file}: no column {' and '.join(sorted(missing))}; expected {layout}")
            found: dict[str, str] = {}
            for number, line in enumerate(reader, 2):
                path, cluster = line["path"], line["cluster"]
                if not path or not cluster:
                    raise DataError(f"{file}: line {number} lacks a path or a cluster; expected {layout}")
                if found.setdefault(path, cluster) != cluster:
                    raise DataError(f"{file}: line {number} puts {path} into a second cluster; an image is in one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({' '.join(str(error).split())}); expected {layout}") from error
    for row, path in enumerate(paths):
        if path not in found:
            raise DataError(f"{file}: no line for {path!r}, the image of row {row} in {source}; give each image one")
    return [found[str(path)] for path in paths]


def from_column(values: Sequence[object], column: str, source: Path) -> list[str]:
    """Cluster of each image as the column says.

    Raises:
        DataError: a row has none.
    """
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"{source}: row {row} of column {column!r} is empty; give each image a cluster")
    return [str(value) for value in values]

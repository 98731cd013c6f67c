"""Tables: CSV or Parquet, a row a sample; numbers are standardised, texts become one-hot columns.

Mean, deviation and the texts that a column may hold are those of the training part alone. A text that the training part
does not have is all zeros. A number that is missing (an empty cell, null) is the training part's mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from esper.leyline.errors import ConfigError, DataError, one_line
from esper.tolaria.data.clusters import deal_whole, number_labels
from esper.tolaria.data.configs import TableConfig, Target
from esper.tolaria.data.hashing import split_order
from esper.tolaria.data.parts import PART_NAMES, Bundle, Part, make_bundle
from esper.tolaria.data.task import Task

MOST_TEXTS = 256  # of one column


class TablePart(Part):
    """Rows of a table.

    Args:
        x: float64 [N, F].
        y: int64 [N], or float64 [N] or [N, D].
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`."""
        return self._x[indices], self._y[indices]

    def content(self) -> tuple[Tensor, ...]:
        """Inputs and targets."""
        return self._x, self._y


Columns = dict[str, np.ndarray]


def read_table(path: Path) -> Columns:
    """Columns of a file by name: float64 with NaN for what is missing, or texts.

    Raises:
        DataError: it cannot be read, or has no rows.
    """
    try:
        import pyarrow as pa
        import pyarrow.csv as csv
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"data=table: needs pyarrow ({error}); pip install 'esper[images]'") from error
    try:
        table = csv.read_csv(path) if path.suffix.lower() in (".csv", ".txt") else parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not readable as a table ({one_line(error)}); expected CSV with a header, or Parquet"
        ) from None
    if not table.num_rows:
        raise DataError(f"{path}: no rows; bring some")
    return columns_of(table)


def columns_of(table: Any) -> Columns:
    """Columns of an Arrow table by name: float64 with NaN for what is missing, or texts."""
    import pyarrow as pa

    found: Columns = {}
    for name in table.column_names:
        column = table.column(name)
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            found[name] = column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
        else:
            found[name] = np.array(["" if one is None else str(one) for one in column.to_pylist()], dtype=object)
    return found


def _column(table: Columns, name: str, path: Path, key: str) -> np.ndarray:
    if name not in table:
        raise DataError(f"{path}: no column {name!r}, it has {', '.join(table)}; set {key} to those that are there")
    return table[name]


def as_text(column: np.ndarray) -> list[str]:
    """A column as texts; numbers as short as they are."""
    if column.dtype == object:
        return [str(one) for one in column]
    return [f"{one:g}" for one in column]


def _numbers(column: np.ndarray, name: str, path: Path) -> np.ndarray:
    if column.dtype == object or not np.isfinite(column).all():
        bad = [i for i, one in enumerate(column) if not isinstance(one, float) or not np.isfinite(one)][:1]
        raise DataError(f"{path}: row {bad[0]} of the target {name!r} is {column[bad[0]]!r}, expected a number")
    return column


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Turns columns into inputs, by what the training part holds."""

    numbers: dict[str, tuple[float, float]]
    texts: dict[str, list[str]]
    columns: tuple[str, ...]

    def __call__(self, table: Columns, path: Path) -> Tensor:
        parts = []
        for name in self.columns:
            column = _column(table, name, path, "the columns")
            if name in self.numbers:
                mean, deviation = self.numbers[name]
                if column.dtype == object:
                    strange = next(k for k, one in enumerate(column) if not isinstance(one, float))
                    raise DataError(
                        f"{path}: row {strange} of the column {name!r} is {column[strange]!r}, expected a number, as "
                        "in the training part; correct it"
                    )
                parts.append(((np.nan_to_num(column, nan=mean) - mean) / deviation)[:, None])
            else:
                said = np.array(as_text(column))
                parts.append((said[:, None] == np.array(self.texts[name])[None]).astype(np.float64))
        return torch.from_numpy(np.concatenate(parts, axis=1))


def _learn(table: Columns, names: Sequence[str], texts: Sequence[str], path: Path) -> _Encoder:
    numbers, known = {}, {}
    for name in names:
        column = table[name]
        if column.dtype == object or name in texts:
            known[name] = sorted(set(as_text(column)))
            if len(known[name]) > MOST_TEXTS:
                raise DataError(
                    f"{path}: column {name!r} holds {len(known[name])} different texts, at most {MOST_TEXTS}; leave it "
                    "out by data.columns"
                )
            continue
        present = column[np.isfinite(column)]
        deviation = float(present.std()) if len(present) else 0.0
        numbers[name] = (float(present.mean()) if len(present) else 0.0, deviation or 1.0)
    return _Encoder(numbers, known, tuple(names))


def _encoder(learned: Mapping[str, Any]) -> _Encoder:
    return _Encoder(learned["numbers"], learned["texts"], tuple(learned["columns"]))


def encode_rows(path: Path, learned: Mapping[str, Any]) -> Tensor:
    """Inputs out of a file of new rows, float64 [N, F], by what a training part held (``record["learned"]``).

    Raises:
        DataError: it cannot be read, or lacks a column; one holds texts that held numbers.
    """
    return _encoder(learned)(read_table(path), path)


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets by file; how many classes, labels or numbers there are; the names of classes."""

    of: dict[str, Tensor]
    count: int
    classes: list[str] | None = None


def read_targets(
    config: Any, tables: dict[str, Columns], paths: dict[str, Path], classes: list[str] | None = None
) -> Targets:
    """Targets of each file; ``classes`` are those of other data, None: those that are in the file of training."""
    found: dict[str, Tensor] = {}
    if config.target_kind is Target.CLASS:
        texts = {which: as_text(table[config.target[0]]) for which, table in tables.items()}
        own = sorted(set(texts["train"]), key=lambda one: (not one.isdigit(), int(one) if one.isdigit() else 0, one))
        every, whose = (own, f"{paths['train']} does") if classes is None else (classes, "the training part did")
        place = {text: k for k, text in enumerate(every)}
        for which, said in texts.items():
            strange = next((row for row, one in enumerate(said) if one not in place), None)
            if strange is not None:
                raise DataError(
                    f"{paths[which]}: row {strange} of the target {config.target[0]!r} is {said[strange]!r}, a class "
                    f"that {whose} not have; it has {', '.join(every[:12])}"
                )
            found[which] = torch.tensor([place[one] for one in said])
        return Targets(found, len(every), every)
    for which, table in tables.items():
        columns = [_numbers(table[name], name, paths[which]) for name in config.target]
        rows = torch.from_numpy(np.stack(columns, axis=1))
        if config.target_kind is Target.LABELS:
            wrong = ((rows != 0) & (rows != 1)).any(1).nonzero().flatten()
            if len(wrong):
                raise DataError(f"{paths[which]}: row {int(wrong[0])}: labels are 0 or 1; correct data.target")
        found[which] = rows[:, 0] if rows.shape[1] == 1 and config.target_kind is Target.NUMBER else rows
    return Targets(found, len(config.target))


def load_table(config: TableConfig, learned: Mapping[str, Any] | None = None) -> Bundle:
    """Reads the table; x is float64 [N, F], standardised by the training part.

    Raises:
        DataError: a file cannot be read, or lacks a column; a target is none.
    """
    paths = {"train": Path(config.path).expanduser()}
    if config.test_path is not None:
        paths["test"] = Path(config.test_path).expanduser()
    tables = {which: read_table(path) for which, path in paths.items()}
    files: list[dict[str, Any]] = [
        {"path": path.name, "bytes": path.stat().st_size, "xxh3_64": xxhash.xxh3_64(path.read_bytes()).hexdigest()}
        for path in paths.values()
    ]
    return bundle_of_tables(config, tables, paths, files, learned)


def bundle_of_tables(
    config: Any,
    tables: dict[str, Columns],
    paths: dict[str, Path],
    files: list[dict[str, Any]],
    learned: Mapping[str, Any] | None = None,
) -> Bundle:
    """The parts of tables that are read.

    Args:
        config: has the fields of `TableConfig`, but for the paths.
        tables: "train", and "test" if there is one.
        paths: where each lies, for errors.
        files: for the record.
        learned: see `load_data`.

    Raises:
        DataError: one lacks a column; a target is none.
    """
    left_out = {*config.target, config.cluster_column}
    names = config.columns or [name for name in tables["train"] if name not in left_out]
    names = names if learned is None else learned["columns"]
    for which, table in tables.items():
        for key, wanted in (("data.target", config.target), ("data.columns", names), ("data.texts", config.texts)):
            for name in wanted:
                _column(table, name, paths[which], key)
    targets = read_targets(config, tables, paths, learned["classes"] if learned else None)
    table, size, what = tables["train"], len(targets.of["train"]), f"data={config.kind}: {paths['train']}"
    held = {"validation": config.validation, "probe": config.probe}
    if "test" not in tables:
        held["test"] = config.test
    labels = None
    if config.cluster_column is not None:
        labels = number_labels(as_text(_column(table, config.cluster_column, paths["train"], "data.cluster_column")))
        rows = deal_whole(labels, held, config.split_seed, what)
    else:
        order = split_order(config, size, sum(held.values()), what)
        rest = size - sum(held.values())
        rows = dict(zip((*held, "train"), order.split([*held.values(), rest]), strict=True))
    own = {name: column[rows["train"].numpy()] for name, column in table.items()}
    encode = _encoder(learned) if learned else _learn(own, names, config.texts, paths["train"])
    x = encode(table, paths["train"])
    parts = {name: TablePart(x[places], targets.of["train"][places]) for name, places in rows.items()}
    if "test" in tables:
        parts["test"] = TablePart(encode(tables["test"], paths["test"]), targets.of["test"])
    return make_bundle(
        name=config.kind,
        task=Task.CLASSIFICATION if config.target_kind is Target.CLASS else None,
        input_shape=(x.shape[1],),
        classes=targets.count,
        parts={name: parts[name] for name in PART_NAMES},
        record={"files": files, "learned": {**asdict(encode), "classes": targets.classes}},
        probe_clusters=None if labels is None else labels[rows["probe"]],
        train_clusters=None if labels is None else labels[rows["train"]],
    )

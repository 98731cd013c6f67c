"""Settings of data of one's own."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from esper.leyline.fields import Checks
from esper.leyline.imports import is_dotted
from esper.tolaria.data.registry import DataConfig


@dataclass(kw_only=True, slots=True)
class CustomDataConfig(DataConfig):
    """Where the function is, its keyword arguments, and how its samples are dealt."""

    kind: str = "custom"
    """Registered name of this kind: ``custom``."""

    path: str
    """``package.module:function``, importable on every rank; it returns an `esper.Data`."""

    options: dict[str, Any] | None = None
    """Keyword arguments of the function, {folder: /data/cells}; null: none."""

    validation: int = 512
    """Samples in the validation part, where the function returns one data set alone."""

    probe: int = 1024
    """Samples in the probe part, from which evidence is drawn, likewise."""

    test: int = 1024
    """Samples in the test part, likewise."""

    length: int | None = None
    """Samples of a data set without an end (``__getitem__`` for any number, no ``__len__``) that are a pass over it;
    null: each says how long it is.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("path", is_dotted(self.path), "write package.module:function")
            check("length", self.length is None or self.length >= 2, "samples, must be >= 2, or null")


class Target(StrEnum):
    """CLASS: one of some texts or whole numbers. NUMBER: one or several numbers. LABELS: columns of 0 and 1."""

    CLASS = "class"
    NUMBER = "number"
    LABELS = "labels"


@dataclass(kw_only=True, slots=True)
class TableConfig(DataConfig):
    """A table in CSV (with a header) or Parquet: a row a sample."""

    kind: str = "table"
    """Registered name of this kind: ``table``."""

    path: str
    """The file of all samples, or of those for training and evidence if ``test_path`` names another."""

    test_path: str | None = None
    """File of the test part; null: it is dealt from ``path``."""

    target: list[str]
    """Columns of the target."""

    target_kind: Target = Target.NUMBER
    """What the target is: ``number`` (regression), ``class`` (one column) or ``labels`` (columns of 0 and 1)."""

    columns: list[str] | None = None
    """Columns of the input; null: all others."""

    texts: list[str] = field(default_factory=list)
    """Columns that hold texts although they look like numbers, such as a code."""

    cluster_column: str | None = None
    """Column that names what a row belongs to, such as its patient; dealt whole. null: each row is its own."""

    validation: int = 512
    """Rows in the validation part."""

    probe: int = 1024
    """Rows in the probe part, from which evidence is drawn."""

    test: int = 1024
    """Rows in the test part, without ``test_path``."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            for name in ("path", "test_path", "cluster_column"):
                check(name, getattr(self, name) != "", "must name one")
            check("target", bool(self.target), "name one column or more")
            one = self.target_kind is not Target.CLASS or len(self.target) == 1
            check("target", one, "of target_kind=class: name one column")
            both = sorted(set(self.target) & set(self.columns or ()))
            check("columns", not both, f"{', '.join(both)} is the target")

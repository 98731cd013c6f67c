"""Data sets by name: a loader is registered with its config class; `load_data` finds it by ``config.kind``.

To add a data set: subclass `DataConfig` with a ``kind`` in `esper.tolaria.data.configs`, which needs no torch, write
``loader(config) -> Bundle`` in a module of its own, name it in that file's LOADERS, and add ``conf/data/<kind>.yaml``
(``defaults: [/YourConfig@_here_, _self_]`` and ``kind: <kind>``). Where inputs or targets are made by what the training
part holds (a mean, the names of classes), the record has that under ``learned``, and the loader takes such as a second
argument: then other data are made into inputs as those of a trained network were.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from esper.leyline.errors import ConfigError, DataError
from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What every data set has."""

    kind: str
    """Registered name; chooses the loader."""

    split_seed: int = 0
    """Decides which sample is in which part; independent of the run's seed."""

    validation: int
    """Samples in the validation part."""

    probe: int
    """Samples in the probe part, from which evidence is drawn."""

    workers: int = 0
    """Processes of each rank that read training samples ahead, with their augmentation; any number gives the same bits,
    also after a resume.
    """

    def check_split(self, check: Checks) -> None:
        """Range checks of the shared fields, reported together with the subclass's own."""
        check("workers", self.workers >= 0, "must be >= 0")
        check("split_seed", self.split_seed >= 0, "must be >= 0")
        for name in ("validation", "probe", "test"):  # where files hold the test part, it is no field
            check(name, getattr(self, name, 2) >= 2, "samples, must be >= 2")


Loader = Callable[..., Any]  # config (and perhaps what other data have learned) -> Bundle
C = TypeVar("C", bound=DataConfig)

DATASETS: dict[str, tuple[type[DataConfig], Loader]] = {}


def register(config_class: type[C]) -> Callable[[Loader], Loader]:
    """Registers a loader under the default of its config class's ``kind``.

    Raises:
        ConfigError: the name is taken.
    """
    name = next(field.default for field in dataclasses.fields(config_class) if field.name == "kind")
    if not isinstance(name, str):
        raise ConfigError(f"{config_class.__name__}.kind: needs the data set's name as its default")
    if name in DATASETS:
        raise ConfigError(f"data set {name!r} is registered already; names taken: {', '.join(sorted(DATASETS))}")

    def decorate(loader: Loader) -> Loader:
        DATASETS[name] = (config_class, loader)
        return loader

    return decorate


def data_entry(kind: str) -> tuple[type[DataConfig], Loader]:
    """Config class and loader of a data set.

    Raises:
        ConfigError: unknown name; the text lists the known ones.
    """
    if kind not in DATASETS:
        raise ConfigError(f"data.kind = {kind!r}: unknown data set; known are {', '.join(sorted(DATASETS))}")
    return DATASETS[kind]


def data_config_class(kind: str) -> type[DataConfig]:
    """Config class of a data set.

    Raises:
        ConfigError: unknown name; the text lists the known ones.
    """
    return data_entry(kind)[0]


def data_root(config: DataConfig, root: str | None, folder: str | None, layout: str, fix: str) -> Path:
    """Folder of a data set on disk: ``data.root``, or ``folder`` below the one that ESPER_DATA names.

    Args:
        config: of the data set.
        root: ``data.root``, or None.
        folder: usual name of the folder; None if there is none, so that data.root is needed.
        layout: what the folder must hold, for an error.
        fix: command that would fill FOLDER, for an error.

    Raises:
        DataError: neither is set, or the folder does not exist.
    """
    parent = os.environ.get("ESPER_DATA", "")
    if root is None and (folder is None or not parent):
        other = f" or export ESPER_DATA=PARENT, where PARENT/{folder} is that folder" if folder else ""
        raise DataError(
            f"data={config.kind}: data.root is null{' and ESPER_DATA is not set' if folder else ''}; expected a folder "
            f"with {layout}; set data.root=FOLDER{other}; to fill it: {fix}"
        )
    path = Path(root).expanduser() if root is not None else Path(parent).expanduser() / str(folder)
    if not path.is_dir():
        source = "data.root" if root is not None else "ESPER_DATA"
        raise DataError(
            f"data={config.kind}: {path} (from {source}) is not a folder; expected {layout} in it; set data.root to "
            f"one that has them, or fill it: {fix.replace('FOLDER', str(path))}"
        )
    return path


def data_file(folder: Path, name: str, layout: str, fix: str) -> Path:
    """Path of a file of a data set.

    Raises:
        DataError: the file does not exist.
    """
    path = folder / name
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected {layout} in {folder}; to fill it: {fix.replace('FOLDER', str(folder))}"
        )
    return path

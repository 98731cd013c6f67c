"""Checks data and teacher before any rank starts, without reading them."""

import os
from pathlib import Path
from typing import Any

from esper.config.tree import EsperConfig, read_plain
from esper.config.trust import TRUST_TEACHER, check_trust
from esper.leyline.files import RunDir


def check_data(data: Any) -> None:
    """Calls the loader if its folder is missing, so that its error comes now and not on every rank later.

    Raises:
        DataError: the loader's own error, with path, layout and the command that would fill the folder.
    """
    if not hasattr(data, "root"):
        return  # the data are part of a package and need no folder
    folder: Path | None = None  # if nothing names one
    if data.root is not None:
        folder = Path(data.root).expanduser()
    elif os.environ.get("ESPER_DATA"):
        folder = Path(os.environ["ESPER_DATA"]).expanduser() / (getattr(data, "folder", None) or "")
    if folder is None or not folder.is_dir():
        from esper.tolaria.data import load_data  # here, since loading needs torch

        load_data(data)


def check_teacher(config: EsperConfig) -> None:
    """Refuses a teacher before any process starts whose RUN is somebody else's and names code.

    Raises:
        ConfigError: it is; or its config.yaml cannot be read.
    """
    if config.distill.run is not None and not config.distill.trust:
        path = RunDir(Path(config.distill.run).expanduser().absolute()).config
        check_trust(path, read_plain(path), TRUST_TEACHER)

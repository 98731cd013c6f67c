"""Checks the data before any process starts, without reading them."""

import os
from pathlib import Path
from typing import Any

from esper.tolaria.data import load_data


def check_data(data: Any) -> None:
    """Calls the loader if its folder is missing, so that its error comes now and not on every rank later.

    Raises:
        DataError: the loader's own error, with path, layout and the command that would fill the folder.
    """
    if not hasattr(data, "root"):
        return  # the data are part of a package and need no folder
    if data.root is not None:
        folder = Path(data.root).expanduser()
    elif os.environ.get("ESPER_DATA"):
        folder = Path(os.environ["ESPER_DATA"]).expanduser() / (getattr(data, "folder", None) or "")
    else:
        load_data(data)  # raises, because nothing names a folder
        return
    if not folder.is_dir():
        load_data(data)

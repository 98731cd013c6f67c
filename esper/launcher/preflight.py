"""What the launcher can tell about the data before any process starts, without reading it."""

import os
from pathlib import Path
from typing import Any

from esper.tolaria.data import load_data


def check_data(data: Any) -> None:
    """Lets the loader speak now when its folder is absent, instead of on every rank later.

    Raises:
        DataError: the loader's own, with path, layout and the command that would fill the folder.
    """
    if not hasattr(data, "root"):
        return  # embedded, needs no folder
    if data.root is not None:
        folder = Path(data.root).expanduser()
    elif os.environ.get("ESPER_DATA"):
        folder = Path(os.environ["ESPER_DATA"]).expanduser() / (getattr(data, "folder", None) or "")
    else:
        load_data(data)  # raises: nothing names a folder
        return
    if not folder.is_dir():
        load_data(data)

"""Finds the folder of the YAML settings, conf/."""

from pathlib import Path

from esper.leyline.errors import EsperError
from esper.leyline.files import package_folder


def conf_folder() -> Path:
    """The folder of Hydra's groups: inside an installed package, beside the package in a checkout."""
    package = package_folder()
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise EsperError(f"{package}: no conf/config.yaml in it or beside it; install the project anew")

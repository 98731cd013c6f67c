"""Tries a run's parts on a few samples, in a process of its own: ``python -m esper.run.fitting.trial FD < SETTINGS``,
or a fork of the one that is started ahead (`esper.launcher.ahead`).

SETTINGS are plain data as JSON. The verdict goes to the descriptor FD, as JSON: exit code and lines of the error that
every rank would end with, or 0. Whatever else goes wrong here (memory, say) is no verdict: ranks will tell.
"""

from esper.run.parent import PARENT, die_with_parent  # first: it remembers the launcher

# isort: split

import json
import os
import signal
import sys
from typing import Any

import torch

from esper.config.tree import EsperConfig, build_config
from esper.leyline.errors import EsperError
from esper.run.assembly import build_grown
from esper.tolaria.data import load_data
from esper.tolaria.ranks.config import Device
from esper.tolaria.tasks.bind import bind


def try_parts(config: EsperConfig) -> None:
    """Loads the data, joins them to the task, and builds the host, as every rank does.

    Raises:
        EsperError: they do not fit each other.
    """
    device = torch.device("cuda" if config.world.device is Device.GPU and torch.cuda.is_available() else "cpu")
    build_grown(config, bind(load_data(config.data), config.task), device)


def verdict_of(plain: dict[str, Any]) -> dict[str, Any]:
    """Tries the parts of these settings.

    Returns:
        ``code`` and ``lines`` of the error that every rank would end with; code 0 without one.
    """
    config = build_config(plain)
    torch.set_num_threads(config.world.threads)
    try:
        try_parts(config)
    except EsperError as error:
        return {"code": error.exit_code, "lines": str(error).splitlines()}
    return {"code": 0, "lines": []}


def main() -> None:
    """Entry point."""
    die_with_parent(PARENT, signal.SIGKILL)
    os.write(int(sys.argv[1]), json.dumps(verdict_of(json.load(sys.stdin))).encode())
    os._exit(0)  # nothing is to be kept, and workers of a user's own data may be slow to end


if __name__ == "__main__":
    main()

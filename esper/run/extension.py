"""A run is made longer: what is said, and how a run that is done becomes one that can go on.

    STATUS.json   done -> preempted         1
    result.json   -> result-00001000.json   2
    config.yaml   the new length            3

Killed between two of these, a run is as long as it was and stopped at its end: a resume finishes it again, with the
same result, and the same command makes it longer.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.config.digest import length_of, same_length
from esper.config.tree import EsperConfig, read_plain
from esper.leyline.errors import Preempted
from esper.leyline.files import RunDir, sync, write_json
from esper.tolaria.growth.config import Schedule


def describe_extension(
    config: EsperConfig, plain: dict[str, Any], read_status: Callable[[Path], tuple[dict[str, Any] | None, Any]]
) -> str:
    """One line if the run in ``run.dir`` is about to become longer; else nothing.

    Args:
        config: the settings.
        plain: the same as plain data.
        read_status: see `esper.run.directory`.
    """
    files = RunDir(Path(config.run.dir))
    if not files.config.is_file() or same_length(old := read_plain(files.config), plain):
        return ""
    (key, was), (_, now) = length_of(old), length_of(plain)
    text = f"made longer: {key} = {now}, it was {was}"
    status, _ = read_status(files.path)
    if status is not None and status["status"] == "done":
        text += f"; its result is kept as {files.earlier_result(status['step']).name}"
    if config.optim.schedule is Schedule.WSD:
        text += "; optim.schedule = wsd: the rate is at its peak until the longer run's decay begins"
    elif config.optim.schedule is not Schedule.CONSTANT:
        text += (
            f"; optim.schedule = {config.optim.schedule} is a function of the length: from here on the learning rate "
            "is that of the longer run, higher than it was, and the steps so far were taken under the shorter one"
        )
    return text


def reopen(folder: Path, status: dict[str, Any] | None, plain: dict[str, Any]) -> None:
    """Makes a run that is done one that was stopped, and keeps its result beside; the config is the caller's.

    Args:
        folder: RUN, which the caller has locked.
        status: how the run ended, if it did.
        plain: the settings with the new length.

    Raises:
        OSError: a file cannot be written.
    """
    files = RunDir(folder)
    if status is not None and status["status"] == "done":
        text = "made longer: {} = {}, and has not gone on yet".format(*length_of(plain))
        code = Preempted.exit_code
        write_json(
            files.status, {**status, "status": "preempted", "exit_code": code, "message": text, "objective": None}
        )
    if files.result.is_file():
        files.result.replace(files.earlier_result(int(json.loads(files.result.read_text())["step"])))
        sync(folder)

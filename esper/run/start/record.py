"""RUN/origin.json: what a run has begun with, another run's checkpoint or weights from elsewhere."""

import json
from pathlib import Path
from typing import Any

from esper.leyline.errors import CheckpointError, RunDirError
from esper.leyline.files import RunDir, write_json


def write_origin(run_dir: Path, record: dict[str, Any]) -> None:
    """Writes RUN/origin.json: what the run began with, another run's checkpoint or weights from elsewhere.

    Raises:
        RunDirError: it cannot be written.
    """
    try:
        write_json(RunDir(run_dir).origin, record)
    except OSError as error:
        raise RunDirError(f"{RunDir(run_dir).origin}: cannot be written ({error.strerror}); see to the disk") from error


def read_sunk(run_dir: Path, flops: int | None) -> dict[str, Any]:
    """What the result of a run says of the run that it went on from; nothing for one that began from nothing.

    Args:
        run_dir: RUN.
        flops: of the whole account.

    Raises:
        CheckpointError: RUN/origin.json cannot be read.
    """
    path = RunDir(run_dir).origin
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        sunk = record["flops"] if "run" in record else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore it from a copy") from None
    if "run" not in record:
        return {"origin": record}
    marginal = None if flops is None or sunk is None else flops - sunk
    return {"origin": record, "sunk_flops": sunk, "marginal_flops": marginal}

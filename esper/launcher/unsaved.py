"""Whether a stop has anything to wait for: ranks that compile cannot answer for minutes, and may have nothing to save.

A stop is agreed at the next tick. A rank that is being started, or whose first step is being compiled, comes there only
when that is over. If every rank stands still in such a phase and each of its steps is in a checkpoint, then ending the
ranks at once loses nothing, and the launcher need not wait for the end of its grace.
"""

import json
import time
from pathlib import Path

from esper.leyline.errors import CheckpointError
from esper.leyline.files import RunDir
from esper.tolaria.checkpoint.store import CheckpointStore

STILL_S = 10.0  # without a new mark of any rank: longer than a rank of a busy machine stays in a phase
WAITING = ("start", "forward", "backward")  # a tick, a save and the last test end by themselves


class NothingUnsaved:
    """Says whether the ranks of a run stand still with nothing to save; to be asked often.

    Args:
        folder: the run directory.
        still_s: seconds without a new mark.
    """

    def __init__(self, folder: Path, still_s: float = STILL_S) -> None:
        self._marks, self._store = RunDir(folder).heartbeat, CheckpointStore.of_run(folder)
        self._still_s = still_s
        self._seen: dict[str, bytes] = {}
        self._since = time.monotonic()

    def __call__(self) -> bool:
        """True if every rank has been in one phase for long, and has no step that is not in a checkpoint."""
        try:
            seen = {path.name: path.read_bytes() for path in self._marks.glob("rank-*")}
        except OSError:
            return False
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        if not seen or time.monotonic() - self._since < self._still_s:
            return False
        try:
            saved = max(self._store.steps(), default=0)
            return all(self._waits(mark, saved) for mark in seen.values())
        except (CheckpointError, ValueError):  # not to be read now: then it is as if something were unsaved
            return False

    def _waits(self, mark: bytes, saved: int) -> bool:
        step, _, phase, _, error = json.loads(mark)
        return step <= saved and phase in WAITING and not error

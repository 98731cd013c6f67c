"""The process that compiles ahead, as the rank that starts it sees it.

    rank (local rank 0) -- stdin: its order; what the agreed record foresees; then held open --> helper
                        <- stdout: one line when the order is done --

The helper is told what to compile, and then left alone; nothing in training waits for it, so that it may fail, lag
or be killed. What it has compiled lies on disk, where a birth finds it. It ends when its stdin does, when the rank
dies (see `esper.run.parent`), and when it has used up its seconds or memory.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.kasmina.kernels.folder import FOLDER
from esper.nissa.lane import say
from esper.run.kernels.standing import Standstill

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
LOWEST = 19  # niceness
_GRACE_S = 2.0
_LOOK_S, _LOOKS = 0.25, 4  # seconds between two looks, and looks in a row at a stopped process
_STILL_S = 20.0


class Helper:
    """Starts the process.

    Args:
        order: what it is to compile; see `esper.run.kernels.process`.
        folder: the folder of kernels.
        awaited: ranks wait for it, so it has their priority until `step_back`; else the lowest.

    Fields:
        process: the process.
        told: what it said when it was done; None until then, and if it died before.
    """

    _teller: threading.Thread | None = None

    def __init__(self, order: dict[str, Any], folder: str, *, awaited: bool = False) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        # One compiler at a time: the helper has what the ranks leave of the machine.
        environment = {**kept, FOLDER: folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.told: dict[str, Any] | None = None
        self._said = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "esper.run.kernels.process", str(os.getpid()), str(0 if awaited else LOWEST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a user's code prints has been printed by the rank
            env=environment,
            start_new_session=True,  # its compilers end with it, by one signal
        )
        self.tell(order)

    def tell(self, what: Any) -> None:
        """Writes a line of JSON, in a thread: a process that is busy or stopped may leave a long one unread."""
        line, before = json.dumps(what).encode() + b"\n", self._teller

        def write() -> None:
            if before is not None:
                before.join()
            with contextlib.suppress(OSError, ValueError):  # it has ended, or been closed
                assert self.process.stdin is not None
                self.process.stdin.write(line)
                self.process.stdin.flush()

        self._teller = threading.Thread(target=write, name="esper-helper-tell", daemon=True)
        self._teller.start()

    def wait(self, seconds: float) -> dict[str, Any] | None:
        """Waits until it is done or has died, at most so many seconds; 0 looks once.

        Returns:
            What it says: ``compiled`` and ``failed`` (counts), ``memory_mib`` that it and its compilers held at most,
            ``seconds``, and ``why`` it ended if it has not done all; None if it has said nothing.
        """
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while self.told is None:
            left = max(0.0, until - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                return None
            self._said += more
            if b"\n" in self._said:
                self.told = json.loads(self._said)
        return self.told

    def step_back(self) -> None:
        """Gives it and its compilers the lowest priority: nobody waits for it any longer."""
        with contextlib.suppress(OSError):  # it has ended
            os.setpriority(os.PRIO_PGRP, self.process.pid, LOWEST)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block this rank compiles: a process that is stopped (SIGSTOP) is ended after a moment, and one
        that has got no time to compute for `_STILL_S`, while this rank did not compute either.

        It may hold torch's lock on the very kernel that the rank is about to compile. The rank would wait for it, and
        after torch's own limit of ten minutes the birth would fail: how fast the process is would decide what is born.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._end_if_still, args=(done,), name="esper-helper-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _end_if_still(self, done: threading.Event) -> None:
        looks, still = 0, Standstill(os.getpid(), _STILL_S)  # the process is below this one
        while not done.wait(_LOOK_S):
            state = self._state()
            looks = looks + 1 if state in "Tt" else 0
            why = "was stopped" if looks == _LOOKS else "got no time to compute" if still() and state != "Z" else ""
            if why:
                say(f"the process that compiles ahead {why} and has been ended; births compile by themselves")
                with contextlib.suppress(OSError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                return

    def _state(self) -> str:
        """Its state, as proc(5) has it; Z where it has ended."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "Z"
        return stat.rpartition(")")[2].split()[0]

    def close(self) -> None:
        """Ends the process and its compilers; says so if it had failed."""
        if self.process.returncode is not None:
            return
        told = self.wait(0.0)
        if told is not None and told["why"]:
            say(f"the process that compiles ahead had ended: {told['why']}; births compiled by themselves since then")
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_S)
        if self._teller is not None:
            self._teller.join(_GRACE_S)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

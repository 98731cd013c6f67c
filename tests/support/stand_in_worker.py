"""A worker that only lives, dies and writes its status: the launcher's tests start it through torchrun.

    python -m torch.distributed.run ... -m tests.support.stand_in_worker RUN/config.yaml

What it does is in the variable STAND_IN: ``work`` waits for SIGUSR1 and then says that it was preempted, ``stubborn``
ignores every signal that can be ignored. Each names itself and a helper that it started in the file ``<rank>.pid``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    folder, rank = Path(sys.argv[1]).parent, os.environ["RANK"]
    stop: list[int] = []
    if os.environ["STAND_IN"] == "stubborn":
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
    time.sleep(1.0)  # start-up, in which a signal must neither kill nor get lost
    signal.signal(signal.SIGUSR1, lambda signum, frame: stop.append(signum))
    helper = subprocess.Popen(["sleep", "1000"])
    noted = folder / f".{rank}.pid"
    noted.write_text(f"{os.getpid()} {helper.pid}")
    noted.rename(folder / f"{rank}.pid")
    while not stop or os.environ["STAND_IN"] == "stubborn":
        time.sleep(0.05)
    helper.kill()
    helper.wait()
    (folder / f"{rank}.signals").write_text(str(len(stop)))
    if rank == "0":
        status = {"status": "preempted", "exit_code": 75, "step": 7, "objective": None, "message": "asked to stop"}
        (folder / "STATUS.json").write_text(json.dumps(status))


if __name__ == "__main__":
    main()

"""Runs a `WandbSink` in a process of its own: ``python -m tests.nissa.wandb_child RUN_DIR SCENE FIRST LAST``.

Prints one JSON line: faults, drops, seconds spent in emit and close, what became of handlers and hooks.
"""

import json
import os
import signal
import subprocess
import sys
import time

from esper.leyline.events import RunEnded
from esper.leyline.stages import Stage
from esper.nissa.config import WandbConfig, WandbMode
from esper.nissa.wandb_sink import WandbSink
from tests.nissa.samples import axes, fault, stage_changed, tick_done
from tests.support.patience import load


def service():
    """Process id of the wandb service that this process started."""
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return next(int(line.split()[0]) for line in listing.stdout.splitlines() if "wandb-core" in line)


def hooks():
    return [signal.getsignal(number) for number in signal.valid_signals()], sys.exit, sys.excepthook


def main(run_dir, scene, first, last):
    faults, before = [], hooks()
    sink = WandbSink(
        WandbConfig()
        if scene == "silent"
        else WandbConfig(
            mode=WandbMode.ONLINE if scene == "unreachable" else WandbMode.OFFLINE,
            project="growth",
            job_type="train",
            tags=["test"],
        ),
        run_dir=run_dir,
        run_id="run-1",
        group="sweep-7",
        config_dict={"optim": {"lr": 0.001}, "seed": 3},
        on_fault=faults.append,
        init_timeout_s=2.0 if scene == "unreachable" else 60.0,
        finish_timeout_s=0.5 if scene.startswith("hang") else 60.0,
    )
    same = hooks() == before
    if scene == "service-killed" or scene.startswith("hang"):
        os.kill(service(), signal.SIGKILL if scene == "service-killed" else signal.SIGSTOP)
    began = time.monotonic()
    for tick in range(first, last + 1):
        stage = Stage.TRAINING if tick < 20 else Stage.FOSSILIZED
        if tick == 20:
            sink.emit(stage_changed(tick, Stage.TRAINING, Stage.BLENDING))
        sink.emit(tick_done(tick, stage))
    sink.emit(fault(last))
    emit_s = time.monotonic() - began
    if scene == "kill":  # as when a node dies: the service goes too
        sink.flush()
        time.sleep(3.0 * load())
        os.kill(service(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if scene == "hang in a save":
        began = time.monotonic()
        for _ in range(20):
            sink.flush()
        emit_s += time.monotonic() - began
    status = "preempted" if scene == "preempted" else "done"
    sink.emit(RunEnded(**axes(last), status=status, summary={"accuracy": 0.9, "nested": {"grown": 1}}))
    began = time.monotonic()
    sink.close()
    close_s = time.monotonic() - began
    sink.close()
    sink.emit(tick_done(last))
    report = {
        "faults": [entry.what for entry in faults],
        "at": [entry.step for entry in faults],
        "dropped": sink.dropped,
        "emit_s": emit_s,
        "close_s": close_s,
        "hooks_kept": same and hooks() == before,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

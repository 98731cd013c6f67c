"""Runs a `WandbSink` in a process of its own: ``python -m tests.nissa.wandb_child RUN_DIR SCENE FIRST LAST``.

Prints one JSON line: faults, drops, seconds spent in emit and close, what became of handlers and hooks.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from esper.leyline.commands import Command
from esper.leyline.events import (
    BirthVetoed,
    CheckpointSaved,
    CommandJudged,
    Fault,
    GateJudged,
    OrdersRefused,
    RunEnded,
    SeedBorn,
)
from esper.leyline.stages import Op, Stage
from esper.nissa.config import WandbConfig, WandbMode
from esper.nissa.wandb_artifacts import log_model
from esper.nissa.wandb_sink import WandbSink
from tests.nissa.samples import GATE, axes, fault, refused, run_started, stage_changed, tick_done
from tests.support.patience import load


def _command(proposal, op=Op.GERMINATE, slot="r0c0"):
    return Command(slot=slot, op=op, blueprint="conv_light", reason="plateau", proposal=proposal)


DECISIONS = [
    CommandJudged(**axes(21), command=_command(7), applied=True, reason="plateau"),
    SeedBorn(**axes(22), slot="r0c0", blueprint="conv_light", generation=1, proposal=7, parameters=160, flops=20_480),
    stage_changed(22, Stage.EMPTY, Stage.GERMINATED),  # of proposal 7
    GateJudged(**axes(23), slot="r0c0", enforced=True, result=GATE),
    refused(23),
    CommandJudged(**axes(24), command=_command(9, slot="r0c1"), applied=True, reason="plateau"),
    BirthVetoed(**axes(25), slot="r0c1", blueprint="conv_light", rank=1, reason="OUT_OF_MEMORY", proposal=9),
]


def service():
    """Process id of the wandb service that this process started."""
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return next(int(line.split()[0]) for line in listing.stdout.splitlines() if "wandb-core" in line)


def hooks():
    return [signal.getsignal(number) for number in signal.valid_signals()], sys.exit, sys.excepthook


def main(run_dir, scene, first, last):
    if scene == "export":
        folder = Path(run_dir) / "export-00000250"
        print(log_model(WandbConfig(mode=WandbMode.OFFLINE), Path(run_dir), "run-1", 250, folder))
        return
    faults, before, stopped = [], hooks(), threading.Event()
    sink = WandbSink(
        WandbConfig()
        if scene == "silent"
        else WandbConfig(
            mode=WandbMode.ONLINE if scene in ("unreachable", "stopped") else WandbMode.OFFLINE,
            project="growth",
            job_type="train",
            tags=["test"],
        ),
        run_dir=run_dir,
        run_id="run-1",
        name="demo, heuristic, seed 3",
        group="sweep-7",
        past=lambda start: [] if start.resumed_from is None else DECISIONS[:2],
        config_dict={"optim": {"lr": 0.001}, "seed": 3},
        on_fault=faults.append,
        on_stop=stopped.set,
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
    if scene in ("decisions", "resumed"):
        sink.emit(run_started() if scene == "decisions" else run_started(step=230, resumed_from=230))
        for event in DECISIONS if scene == "decisions" else DECISIONS[2:]:
            sink.emit(event)
        folder = Path(run_dir) / "checkpoints" / "step-250"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"weights")
        saved = {"saved_step": 250, "path": "checkpoints/step-250", "bytes": 7, "save_ms": 1.0, "stall_ms": 0.5}
        sink.emit(CheckpointSaved(**axes(25), **saved))
        for tick in range(26, 66):  # more refusals and faults than anybody wants to be told of
            sink.emit(refused(tick))
            sink.emit(Fault(**axes(tick), what=f"fault {tick}", where="disk"))
            sink.emit(OrdersRefused(**axes(tick), refusal="forged", count=1, total=tick - 25, words="no signature"))
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
    sink.emit(RunEnded(**axes(last), status=status, summary={"wall_s": 1.5, "nested": {"grown": 1}}))
    began = time.monotonic()
    sink.close()
    close_s = time.monotonic() - began
    sink.close()
    sink.emit(tick_done(last))
    report = {
        "faults": [entry.what for entry in faults],
        "at": [entry.step for entry in faults],
        "dropped": sink.dropped,
        "sent": sink.sent,
        "stopped": stopped.wait(60.0 * load()) if scene == "stopped" else stopped.is_set(),
        "emit_s": emit_s,
        "close_s": close_s,
        "hooks_kept": same and hooks() == before,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""One rank of a run, from the beginning of an attempt to its result."""

import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esper.config.digest import config_digest, lasting_digest
from esper.config.tree import EsperConfig
from esper.karn.store.compact import compact_if_worth
from esper.kasmina.blueprints import registry
from esper.leyline.errors import ASKED_IN_WANDB, CheckpointError, one_line
from esper.leyline.events import Fault, RunEnded
from esper.leyline.files import RunDir
from esper.leyline.plain import to_plain
from esper.leyline.protocols import EventSink
from esper.nissa.config import Level
from esper.nissa.fanout import MultiSink
from esper.nissa.summary import print_summary
from esper.run.assembly import assemble
from esper.run.attempt import Attempt
from esper.run.closing import summarise
from esper.run.directory import check_same_data, read_order, write_done, write_result
from esper.run.ending import end_stuck_rank, status_of
from esper.run.environment import Phases
from esper.run.fields import handshake_fields, import_named
from esper.run.start.begin import begin_elsewhere
from esper.run.start.held_out import check_held_out
from esper.run.stopping import StopHandlers
from esper.run.teacher import build_teacher
from esper.run.telling.first_step import FirstStep
from esper.run.telling.profiler import build_profiler
from esper.run.telling.sinks import build_sink
from esper.tolaria.checkpoint.snapshot import share_of
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data
from esper.tolaria.growth.staging import describe_seeds
from esper.tolaria.lockstep.desk import NO_DESK
from esper.tolaria.orders.desk import OrderDesk
from esper.tolaria.orders.opening import open_desk
from esper.tolaria.ranks.handshake import code_digest, newest_valid_everywhere, shake_hands
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.watchdog import Watchdog, phase_that_waits
from esper.tolaria.ranks.world import World
from esper.tolaria.tasks.bind import bind
from esper.tolaria.training.engine import Engine
from esper.tolaria.training.result import RunResult


def build_desk(config: EsperConfig, run_dir: Path, attempt: Attempt, sink: EventSink) -> OrderDesk | None:
    """Opens rank 0's desk for people's orders; None if the run takes none."""

    def set_level(level: str) -> None:
        if isinstance(sink, MultiSink):
            sink.set_level(Level(level) if level else config.telemetry.level)

    return open_desk(
        run_dir,
        config.orders,
        run_id=attempt.run_id,
        attempt=attempt.number,
        lease=attempt.check,
        sink=sink,
        set_level=set_level,
        cool_ticks=config.governor.cool_ticks if config.governor.enabled else None,
    )


def choose_checkpoint(store: CheckpointStore, world: World, sink: EventSink) -> int | None:
    """Chooses the newest checkpoint that is valid on every rank, and reports those that it passes over.

    Returns:
        Its step; None for a run without checkpoints.

    Raises:
        CheckpointError: the run has saved (see `CheckpointStore.signs`), and no checkpoint is valid on all ranks, or
            none is there. The user decides whether to begin anew.
    """
    damage: dict[int, str] = {}
    whole: set[int] = set()

    def valid(step: int) -> bool:
        if step in whole or step in damage:
            return step in whole
        try:
            store.verify(step, share_of(world.rank, world.local_rank))
            whole.add(step)
        except CheckpointError as error:
            damage[step] = str(error)
            if world.rank == 0:
                print(f"esper: passed over a damaged checkpoint: {error}", file=sys.stderr, flush=True)
            sink.emit(Fault(step=step, tick=0, epoch=0, what=f"checkpoint passed over: {error}", where=str(step)))
        return step in whole

    signs = store.signs()
    try:
        steps = store.steps()
    except CheckpointError:  # its text is among the signs
        steps = []
    chosen = newest_valid_everywhere(world, steps, valid)
    count = torch.tensor([len(signs)], dtype=torch.int64)
    if chosen is None and int(world.all_reduce(count, dist.ReduceOp.MAX, what="choice of checkpoint")) > 0:
        seen = "; ".join(damage.values()) or "; ".join(signs) or "no checkpoint is there, and other ranks see one"
        said = world.gather_text(seen, what="choice of checkpoint", width=1024)
        each = "; ".join(said[:1] if len(set(said)) == 1 else (f"rank {r}: {text}" for r, text in enumerate(said)))
        raise CheckpointError(
            f"{store.folder}: no checkpoint is valid on all ranks ({each}); restore one from a copy, or remove that "
            f"folder and {RunDir(store.folder.parent).saved.name} beside it to train from the beginning"
        )
    return chosen


def train(
    config: EsperConfig,
    plain: dict[str, Any],
    run_dir: Path,
    world: World,
    attempt: Attempt,
    phases: Phases | None = None,
) -> RunResult:
    """Trains one rank, from the beginning of an attempt to its result.

    Args:
        config: the run's settings.
        plain: the same as plain data.
        run_dir: RUN.
        world: the ranks.
        attempt: this start's number, and its right to write.
        phases: of the start so far; they end with the first step.
    """
    phases = phases or Phases()
    early: list[int] = []  # stop signals during start-up; SIGHUP still ends the process there
    engine: Engine | None = None

    def ask_stop() -> None:  # from wandb's page
        early.append(0)
        if engine is not None:
            engine.stop_asked, engine.stop_reason = True, ASKED_IN_WANDB

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda number, frame: early.append(number))
    began = time.perf_counter()
    torch.set_num_threads(config.world.threads)
    if config.trainer.deterministic:
        torch.use_deterministic_algorithms(True)
    heartbeat = world.heartbeat = Heartbeat(RunDir(run_dir).heartbeat, world.rank, world.size)
    store = CheckpointStore(
        RunDir(run_dir).checkpoints, attempt=attempt.number, keep=config.checkpoint.keep, lease=attempt.check
    )
    if world.rank == 0:
        store.clean()
    registry.load_plugins()
    modules = import_named(config)
    bundle = bind(load_data(config.data), config.task)
    phases.end("data")
    digest = config_digest(plain)
    sink = build_sink(config, plain, run_dir, attempt, world, ask_stop)
    watchdog: Watchdog | None = None
    desk: OrderDesk | None = None
    try:
        desk = build_desk(config, run_dir, attempt, sink) if world.rank == 0 else None
        teacher = build_teacher(config, bundle, world.device)
        engine = assemble(
            config,
            world=world,
            heartbeat=heartbeat,
            bundle=bundle,
            store=store,
            sink=sink,
            digest=lasting_digest(plain),
            run_id=attempt.run_id,
            teacher=teacher,
            desk=desk or NO_DESK,
            observers=(
                *build_profiler(config.telemetry, heartbeat, run_dir),
                FirstStep(phases, run_dir, attempt, world.rank),
            ),
        )
        phases.end("build")
        world.meet("start-up")
        order = read_order(run_dir)
        fields = handshake_fields(config, engine, bundle, teacher, attempt, order, digest=digest, modules=modules)
        if world.rank == 0 and config.telemetry.console != "off":
            print(f"esper: around each tick, in this order: {', '.join(engine.cycle.observers.names)}", flush=True)
        del teacher  # so that only the engine holds it, and can free it
        shake_hands(world, fields)
        if world.rank == 0:
            attempt.check()
        check_same_data(run_dir, bundle.record, trained=bool(store.signs()), write=world.rank == 0)
        check_held_out(bundle, world)
        if world.size > 1 and world.device.type == "cuda":
            watchdog = Watchdog(
                partial(phase_that_waits, heartbeat),
                heartbeat.explain,
                lambda: world.limit_s,
                partial(end_stuck_rank, attempt, heartbeat),
            )
            if world.rank == 0 and not engine.owner.late:
                print("esper: optim.fused=false: each step waits for the device once, to judge gradients", flush=True)
        chosen = choose_checkpoint(store, world, sink)
        if chosen is None and attempt.number > 1 and world.rank == 0:
            print(f"esper: attempt {attempt.number} begins at step 0: no earlier one has saved", flush=True)
        begin_elsewhere(config, engine, run_dir, chosen)
        engine.begin(chosen, order)
        growth = engine.growth
        shake_hands(world, describe_seeds(world, engine.grown, engine.state, growth.build, growth.dtype))
        world.meet("load")
        StopHandlers(partial(setattr, engine, "stop_asked", True), config.world.grace_s).install()
        engine.stop_asked = engine.stop_asked or bool(early)
        engine.stop_reason = ASKED_IN_WANDB if 0 in early else ""
        phases.end("agree")
        result = engine.run()
        if world.rank == 0:
            attempt.check()
            write_result(run_dir, {**to_plain(result), "data": bundle.record, "code": code_digest()})
            write_done(run_dir, attempt.number, step=result.step, objective=result.objective)
            _close_run(engine, sink, run_dir, world, time.perf_counter() - began, config, phases)
        return result
    except Exception as error:
        _emit_end(error, sink, heartbeat, world.rank)
        raise
    finally:
        if engine is not None:
            engine.feed.close()
            engine.growth.close()
        if desk is not None:
            desk.close()
        if watchdog is not None:
            watchdog.close()
        if engine is not None:
            engine.saver.close()
        sink.close()


def _emit_end(error: Exception, sink: EventSink, heartbeat: Heartbeat, rank: int) -> None:
    """Emits the last events of a run that did not finish. A requested stop is not a fault."""
    axes = {"step": heartbeat.step, "tick": heartbeat.tick, "epoch": 0}
    status = status_of(error, None)
    if status["status"] != "preempted":
        sink.emit(Fault(**axes, what=status["message"], where=heartbeat.phase))
    if rank == 0:
        sink.emit(RunEnded(**axes, status=status["status"], summary={"message": status["message"]}))


def _close_run(
    engine: Engine,
    sink: EventSink,
    run_dir: Path,
    world: World,
    wall_s: float,
    config: EsperConfig,
    phases: Phases,
) -> None:
    """Emits the last event of a finished run and prints the closing table.

    The run is done whatever happens here: an error is one line and an event.
    """
    axes = {"step": engine.step, "tick": engine.state.tick, "epoch": engine.state.epoch}
    sink.flush()
    try:
        summary = summarise(
            run_dir,
            engine.state,
            engine.grown,
            status="done",
            world_size=world.size,
            wall_s=wall_s,
            start=phases.seconds(),
            task=engine.narrator.task,
        )
    except Exception as error:  # most likely the event file that it reads is damaged
        what = f"no closing table: {one_line(error)}; the run itself is done"
        sink.emit(Fault(**axes, what=what, where=RunDir(run_dir).events.name))
        sink.emit(RunEnded(**axes, status="done", summary={"message": what}))
        print(f"esper: {what}", file=sys.stderr, flush=True)
        return
    sink.emit(RunEnded(**axes, status="done", summary=to_plain(summary)))
    sink.close()
    if config.telemetry.console != "off":
        print_summary(summary)
    if told := compact_if_worth(run_dir):
        print(f"esper: {told}", flush=True)

"""The training loop and its tick.

    step    forward (and a shadow forward per TRAINING seed), one backward of the summed losses, per-owner judgement
            and clipping, optimizer step; alpha is evaluated from the committed ramps
    tick    measure -> observe | commit -> follow (see `esper.tolaria.lockstep.tick`) -> save; halves of their own
                       after a panic the run goes back instead of following (see `esper.tolaria.training.governor`)

The course from one tick to the next is a function of the agreed state, the optimizer step and the run's seed, so every
rank takes the same branches. One process runs the same code without collectives.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from esper.accord.breaker import BreakerOrder
from esper.accord.health import take_up
from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import DivergedError, Preempted
from esper.leyline.protocols import Controller, EventSink
from esper.tolaria.checkpoint import snapshot
from esper.tolaria.checkpoint.config import CheckpointConfig
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.checkpoint.saves import Saves
from esper.tolaria.data.parts import Bundle
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.guard import Judgement
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.desk import NO_DESK, Desk
from esper.tolaria.lockstep.measure import measure
from esper.tolaria.lockstep.narrate import Narrator, breaker_events
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.lockstep.tick import Cycle, Marks, Measured, tick_due
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.world import World
from esper.tolaria.training.config import TrainerConfig
from esper.tolaria.training.distill import Distillation
from esper.tolaria.training.evaluate import Evaluator
from esper.tolaria.training.feed import Feed
from esper.tolaria.training.going_back import go_back, resume
from esper.tolaria.training.governor import Governor, Recovery, explain_skips
from esper.tolaria.training.length import find_extension, forwards_of, plan_batches
from esper.tolaria.training.losses import StepLoss
from esper.tolaria.training.observing import build_average, build_observers, build_scaling
from esper.tolaria.training.patience import watch_run
from esper.tolaria.training.result import RunResult, build_result, choose_best, read_part, rebuild_checkpoint


@dataclass(kw_only=True, slots=True)
class EngineSettings:
    """The sections of the config that the loop reads, the run's seed, and what a checkpoint says of the run."""

    seed: int
    trainer: TrainerConfig
    control: ControlConfig
    checkpoint: CheckpointConfig
    identity: snapshot.Identity


class Engine:
    """Runs one network on all ranks. `esper.run.assembly` builds its parts.

    Fields:
        state: the agreed record.
        step: optimizer steps done.
        stop_asked: by a signal or in wandb, agreed at the next tick; ``stop_reason`` ends the sentence that says so.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        world: World,
        heartbeat: Marks,
        grown: Grown,
        owner: ParameterOwner,
        growth: Growth,
        bundle: Bundle,
        controller: Controller | None,
        sink: EventSink,
        saver: Saver,
        terms: Terms,
        lockstep: Lockstep,
        fresh: Callable[[], Grown],
        distillation: Distillation | None,
        governor: Governor | None,
        observers: Sequence[Observer] = (),
        desk: Desk = NO_DESK,
    ) -> None:
        self.settings, self.world, self.heartbeat = settings, world, heartbeat
        self.grown, self.owner, self.growth, self.bundle = grown, owner, growth, bundle
        self.controller, self.sink, self.saver = controller, sink, saver
        self.terms, self.lockstep, self.fresh = terms, lockstep, fresh
        self.governor, self.seed = governor, settings.seed
        self.plan = plan_batches(settings.trainer, bundle, settings.seed)
        self.evaluator = Evaluator.of_run(settings.trainer, grown, bundle, world, self.plan, seed=settings.seed)
        self.average = build_average(settings.trainer, self.evaluator)
        self.scaling = build_scaling(settings.trainer, owner, self.evaluator)
        self.task = self.evaluator.task
        self.narrator = Narrator(sink, grown, self.task.info(settings.trainer.objective))
        self.state = RunState(slots=terms.first_slots())
        self.step, self._lr, self.stop_asked, self.stop_reason = 0, 0.0, False, ""
        self.window = Window(world.device, columns=self.task.columns)
        self.losses = StepLoss(grown, growth, self.window, self.evaluator, self.task, distillation)
        forwards = forwards_of(settings.trainer, bundle, world.size)
        self.feed = Feed(self.plan, world, forwards, terms.total_steps, bundle, self.cursor)
        writers = saver, self.narrator, heartbeat, sink
        self.saves = Saves(
            *writers,
            settings.control,
            self.narrator.task,
            every_ticks=settings.checkpoint.every_ticks,
            total_steps=terms.total_steps,
            collect=self.collect_saved,
        )
        parts = world, heartbeat, grown, growth
        self.cycle = Cycle(
            *parts,
            terms=terms,
            control=settings.control,
            lockstep=lockstep,
            narrator=self.narrator,
            window=self.window,
            evaluator=self.evaluator,
            observers=build_observers(self, self.saves, governor, [*watch_run(self), *observers]),
            desk=desk,
        )

    def begin(self, resume_step: int | None, order: BreakerOrder | None = None) -> None:
        """Starts from nothing, or from a checkpoint.

        Args:
            resume_step: step of a checkpoint that every rank has verified; None starts from nothing.
            order: order to the breaker that every rank has read, or None.

        Raises:
            CheckpointError: the checkpoint does not fit this run.
        """
        changes: dict[str, tuple[Any, Any]] = {}
        if resume_step is not None:
            self.heartbeat.mark("load")
            generation = snapshot.read_generation(self.saver.store, resume_step, self.world)
            changes = snapshot.find_changes(generation, self.settings.identity)
            resume(self, self.evaluator.copies, generation)
            health = take_up(self.state.governor, set(changes), judged=self.governor is not None)
            self.state = replace(self.state, governor=health)
        elif self.step == 0:  # else it goes on from another run, which put it there
            self.growth.plant_record(self.state)
        self.growth.follow(self.state, force=True)
        if self.growth.compiler is not None:
            self.growth.compiler.begin(self.state)
        if self.average is not None:
            self.average.follow()
        self.cycle.desk.begin(self.state)
        self.narrator.report_start(self.state, self.terms, resume_step)
        self.narrator.report_changes(self.state, changes)
        self.narrator.emit(find_extension(self.state, changes, self.settings.trainer, self.owner.config, self.plan))
        if self.governor is not None:
            if order is not None:
                before = self.state.governor.breaker
                self.state = self.governor.obey(self.state, order, begun=resume_step is not None)
                self.narrator.emit_all(breaker_events(before, self.state))
            self.narrator.emit_all(self.governor.begin(self.state, self.collect))
        self.cycle.restart_clock()

    def run(self) -> RunResult:
        """Trains to the end.

        Raises:
            Preempted: a stop was agreed; a checkpoint is written.
            DivergedError: too many steps in a row were skipped, or too many replays ended in a panic again.
            LockstepError: ranks parted, or one is lost.
        """
        while self.step < self.terms.total_steps and not self.cycle.observers.ended:
            self.train_step()
            if self.tick_due():
                self.tick()
        return self.finish()

    def train_step(self) -> None:
        """One optimizer step on this rank's shard of the global batch."""
        step = self.heartbeat.step = self.step
        self.losses.release_teacher(step)
        self.growth.set_alphas(self.state, step)
        self._lr = self.owner.set_lr(step, {entry.slot: entry.learn_step for entry in self.state.slots})
        epoch, _ = self.plan.locate(self.cursor(step))
        pieces = self.feed.pieces(step)
        scale = self.feed.scale(step, pieces, epoch) * self.scaling.value
        for index, (indices, weights) in enumerate(pieces):
            with self.growth.no_sync() if index < len(pieces) - 1 else contextlib.nullcontext():
                self.heartbeat.mark("forward")
                began = time.perf_counter()
                x, y = self.evaluator.to_device(*self.feed.batch(indices, epoch))
                self.window.data_ms += self.feed.take_waited_ms()
                with self.world.collective("forward"):
                    loss = self._loss(x, y, self.world.put(weights), scale)
                self.window.own_ms += 1e3 * (time.perf_counter() - began)
                self.heartbeat.mark("backward")
                with self.world.collective("backward"):
                    loss.backward()
        self.heartbeat.mark("step")
        with self.world.collective("step"):  # the CPU first waits for a device's reduction here, or a step later
            report = self.scaling.step()
            if self.world.slow and isinstance(report, Judgement):
                report.wait()  # a slow step ends before the limit is short again
            self.window.add_step(report, step)
            self.cycle.observers.after_step(report)
        self.world.allow_slow(False)
        self.step += 1

    def cursor(self, step: int) -> int:
        """Where the batch of an optimizer step stands in the plan."""
        return self.state.governor.cursor(step)

    def _loss(self, x: Any, y: Any, weights: Any, scale: float) -> Any:
        """The loss of one forward; see `StepLoss`."""
        return self.losses(x, y, weights, scale, shadowed=self.growth.shadowed_slots(self.state))

    def tick_due(self) -> bool:
        """Whether a tick is due: by count, by epoch, at the end, or at once after a row of skipped steps."""
        control, consecutive = self.settings.control, self.settings.trainer.max_consecutive
        if tick_due(self.state, self.step, self.window.row, control, self.terms, max_consecutive=consecutive):
            return True
        return control.every == 0 and self.plan.epoch_ends(self.cursor(self.step - 1), self.cursor(self.step))

    def tick(self) -> None:
        """Takes one control tick: two collectives, then the same changes on every rank.

        Raises:
            DivergedError: too many steps in a row were skipped.
            Preempted: a stop was agreed; a checkpoint is written.
            LockstepError: ranks parted, or one is lost.
        """
        self.close_tick(self.open_tick())

    def open_tick(self) -> Turn:
        """The first half of a tick: measures and agrees; the run's state and model are as before. See `tick`."""
        with self.world.collective("step"):  # still in that phase: this waits for a rank that is stuck in its step
            self.window.settle()
        epoch = self.plan.locate(self.cursor(self.step - 1))[0] + 1
        return self.cycle.open_tick(self.state, self._measure, step=self.step, epoch=epoch, graded=self.task.graded)

    def close_tick(self, turn: Turn) -> None:
        """The second half: the controller decides, and the run follows. See `tick`."""
        turn = self.cycle.close_tick(turn, self.controller, lr=self._lr)
        self.state = turn.state
        if self.state.judged_row >= self.settings.trainer.max_consecutive:
            raise DivergedError(explain_skips(self.state, turn.agreed.agreed))
        if turn.stop and self.step < self.terms.total_steps:
            self.saves.finish(self.state)
            place = f"step {self.step} of {self.terms.total_steps}"
            raise Preempted(f"stopped at {place}; a checkpoint is written{self.stop_reason}")

    def go_back(self, present: RunState, recovery: Recovery, began: float) -> tuple[RunState, float | None]:
        """Takes all ranks back to one generation; see `esper.tolaria.training.going_back`."""
        return go_back(self, present, recovery, began)

    def oldest_step(self) -> int:
        """Optimizer step before which the governor may not go back: earlier states had a teacher that is gone."""
        return self.losses.teacherless_from

    def _measure(self) -> Measured:
        tick, control, last = self.state.tick + 1, self.settings.control, self.step >= self.terms.total_steps
        validate, attribute = last or tick % control.validate_every == 0, control.attributes(tick, last=last)
        parts = self.state, self.owner, self.evaluator, self.window, self.terms
        values, nonfinite = measure(*parts, step=self.step, validate=validate, attribute=attribute)
        return {**values, "stop": float(self.stop_asked)}, nonfinite

    def collect(self, state: RunState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything of this run in a state: what all ranks share (and rank 0's controller), and this rank's own."""
        controller = {} if self.controller is None else self.controller.state_dict()
        observers = self.cycle.observers.state_dict()
        common = snapshot.collect_common(self.grown, self.owner, state, controller, self.settings.identity, observers)
        return common, snapshot.collect_own(self.world)

    def collect_saved(self, state: RunState) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same for a file, with the network from which copies are made while a seed is continued in them."""
        common, own = self.collect(state)
        base = self.evaluator.copies.saved()
        return {**common, **({"continuation": base} if base else {})}, own

    def finish(self) -> RunResult:
        """Settles the last save, and reads the test part once, with the checkpoint that validation chose."""
        self.feed.close()
        self.saves.finish(self.state)
        self.heartbeat.mark("test")
        store = self.saver.store
        best = choose_best(store, self.world, partial(self.narrator.report_fault, self.state))
        ema = self.settings.trainer.ema_validate
        grown = self.grown if best is None else rebuild_checkpoint(store, best, self.fresh, self.growth, averaged=ema)
        with self.evaluator.validating():  # for the live model, which is tested where validation chose no checkpoint
            test = read_part(self.evaluator.of_network(grown), self.bundle.test, self.world, self.state.tick)
        objective = self.saves.objective(self.state)
        return build_result(self.state, self.grown, self.narrator.task, objective=objective, best=best, test=test)

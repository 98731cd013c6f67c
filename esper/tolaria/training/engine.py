"""The training loop and its tick.

    step    forward (and a shadow forward per TRAINING seed), one backward of the summed losses, per-owner judgement
            and clipping, optimizer step; alpha is evaluated from the committed ramps
    tick    measure -> observe -> commit -> follow (see `esper.tolaria.lockstep.tick`) -> save
                       a tick judged a panic goes back instead (see `esper.tolaria.training.governor`)

Everything that leads from one tick to the next is a function of the agreed state, the optimizer step and the run's
seed; every rank takes the same branches. One process runs the same code without collectives.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from esper.accord.breaker import BreakerOrder
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Verdict
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError, DivergedError, Preempted
from esper.leyline.protocols import Controller, EventSink
from esper.tolaria.checkpoint.config import CheckpointConfig
from esper.tolaria.checkpoint.ring import Generation
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.checkpoint.saves import Saves
from esper.tolaria.checkpoint.snapshot import check_teacher, collect_common, collect_own, put_back, read
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.guard import Judgement
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.measure import measure
from esper.tolaria.lockstep.narrate import Narrator, axes_of
from esper.tolaria.lockstep.tick import Cycle, Measured, tick_due
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World
from esper.tolaria.training.config import TrainerConfig
from esper.tolaria.training.distill import Distillation
from esper.tolaria.training.evaluate import Evaluator
from esper.tolaria.training.governor import Governor, Recovery, rolled_back, told, too_many_skipped, turned
from esper.tolaria.training.losses import StepLoss
from esper.tolaria.training.result import RunResult, choose_best, read_test, rebuild, result_of


@dataclass(kw_only=True, slots=True)
class EngineSettings:
    """Sections of the config that the loop reads, the run's seed, and what identifies the run in a checkpoint."""

    seed: int
    trainer: TrainerConfig
    control: ControlConfig
    checkpoint: CheckpointConfig
    config_digest: int
    run_id: str


class Engine:
    """Runs one network on all ranks. The composition root builds the parts; see `esper.worker.assemble`.

    Fields:
        state: the agreed record. step: optimizer steps done.
        stop_asked: set by a signal handler; agreed at the next tick.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        world: World,
        heartbeat: Heartbeat,
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
    ) -> None:
        self.settings, self.world, self.heartbeat = settings, world, heartbeat
        self.grown, self.owner, self.growth, self.bundle = grown, owner, growth, bundle
        self.controller, self.sink, self.saver = controller, sink, saver
        self.terms, self.lockstep, self.fresh = terms, lockstep, fresh
        self.governor = governor
        self._teacher = None if distillation is None else distillation.teacher.identity
        self.plan = BatchPlan(len(bundle.train), settings.trainer.batch, settings.seed)
        self.evaluator = self._evaluator(grown)
        self.narrator = Narrator(sink, grown)
        self.cycle = Cycle(
            world,
            heartbeat,
            grown,
            growth,
            terms=terms,
            control=settings.control,
            lockstep=lockstep,
            narrator=self.narrator,
        )
        self.state = RunState(slots=terms.first_slots())
        self.step, self.stop_asked = 0, False
        self.window = Window(world.device)
        self.losses = StepLoss(grown, growth, self.window, self.evaluator, bundle.task, distillation)
        self.saves = Saves(saver, self.narrator, heartbeat, sink, settings.control, settings.trainer.objective)
        self._lr, self._clock = 0.0, time.perf_counter()

    def begin(self, resume_step: int | None, order: BreakerOrder | None = None) -> None:
        """Starts from nothing, or from a checkpoint that every rank has verified, under an order that all have read.

        Raises:
            CheckpointError: it does not fit this run.
        """
        if resume_step is not None:
            self.heartbeat.mark("load")
            generation = read(self.saver.store, resume_step, self.world)
            check_teacher(generation.common, self._teacher, generation.where)
            if generation.common["config_digest"] != self.settings.config_digest:
                raise CheckpointError(
                    f"{generation.where}: saved under other settings; config.yaml was edited since: put it back"
                )
            self._go_on_from(generation)
        else:
            self.growth.plant_record(self.state)
        self.growth.follow(self.state, force=True)
        self.narrator.started(self.state, self.terms, resume_step)
        if self.governor is not None:
            if order is not None:
                before = self.state.governor.breaker
                self.state = self.governor.obey(self.state, order, begun=resume_step is not None)
                self.narrator.tell_all(turned(before, self.state))
            self.narrator.tell_all(self.governor.begin(self.state, self.collect))
        self._clock = time.perf_counter()

    def _go_on_from(self, generation: Generation) -> None:
        """Makes this run what a generation says, but for the wrapper."""
        put_back(generation, self.grown, self.owner, self.growth, self.world, self.settings.seed)
        if self.controller is not None:
            self.controller.load_state_dict(generation.common["controller"])
        self.state = generation.state
        self.step = self.heartbeat.step = self.state.step
        self.heartbeat.tick = self.state.tick
        self.window.reset(self.state.skipped_in_row)

    def run(self) -> RunResult:
        """Trains to the end.

        Raises:
            Preempted: a stop was agreed; a checkpoint is written.
            DivergedError: too many steps in a row were skipped, or too many replays came to a panic again.
            LockstepError: ranks parted, or one is lost.
        """
        while self.step < self.terms.total_steps:
            self.train_step()
            if self.tick_due():
                self.tick()
        return self.finish()

    def train_step(self) -> None:
        """One optimizer step on this rank's shard of the global batch."""
        step, trainer = self.step, self.settings.trainer
        self.heartbeat.step = step
        self.losses.let_teacher_go(step)
        self.growth.set_alphas(self.state, step)
        self._lr = self.owner.set_lr(step, {entry.slot: entry.learn_step for entry in self.state.slots})
        at = self.state.governor.cursor(step)
        epoch, _ = self.plan.locate(at)
        # Each rank's loss is its sum * world / global count: DDP's mean over ranks is then the global mean, exactly,
        # whatever the sizes of the shards.
        scale = self.world.size / len(self.plan.indices(at))
        pieces = self.plan.pieces(at, self.world.rank, self.world.size, trainer.accumulate)
        for index, (indices, weights) in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else self.growth.no_sync():
                self.heartbeat.mark("forward")
                x, y = self.bundle.train_batch(indices, seed=self.settings.seed, epoch=epoch)
                x, y = self.evaluator.to_device(x, y)
                with self.world.collective("forward"):
                    loss = self._loss(x, y, self.world.put(weights), scale)
                self.heartbeat.mark("backward")
                with self.world.collective("backward"):
                    loss.backward()
        self.heartbeat.mark("step")
        with self.world.collective("step"):  # where the host first waits for a device's reduction, here or a step later
            report = self.owner.step()
            if self.world.slow and isinstance(report, Judgement):
                report.wait()  # what may take longer is over before the limit is short again
            self.window.step(report, step)
        self.world.allow_slow(False)
        self.step += 1

    def _loss(self, x: Tensor, y: Tensor, weights: Tensor, scale: float) -> Tensor:
        """Of one forward and backward; see `StepLoss`."""
        return self.losses(x, y, weights, scale, shadowed=self.growth.shadowed(self.state))

    def tick_due(self) -> bool:
        """Whether the tick comes now: by count, by epoch, at the end, or at once after a row of skipped steps."""
        control, consecutive = self.settings.control, self.settings.trainer.max_consecutive
        if tick_due(self.state, self.step, self.window, control, self.terms, max_consecutive=consecutive):
            return True
        cursor = self.state.governor.cursor
        return control.every == 0 and self.plan.epoch_ends(cursor(self.step - 1), cursor(self.step))

    def tick(self) -> None:
        """One control tick: two collectives, then the same changes on every rank."""
        began = time.perf_counter()
        beat, settings, before = self.heartbeat, self.settings, self.state
        with self.world.collective("step"):  # still in that phase: a rank that stands still is waited for here
            self.window.settle()
        values, word = self.cycle.measure(self.step, before.tick + 1, self._measure)
        epoch = self.plan.locate(before.governor.cursor(self.step - 1))[0] + 1
        self.state, sums = self.cycle.observe(before, values, step=self.step, epoch=epoch)
        if self.governor is not None:
            self.state = self.governor.judge(self.state, sums, before.step)
        health = self.state.governor
        stop = sums["stop"] > 0
        every = settings.checkpoint.every_ticks
        ended = self.step >= self.terms.total_steps
        due = ended or (every > 0 and self.state.tick % every == 0)
        save = due or stop
        full = save or health.replays > 0 or self.state.tick % settings.control.digest_every == 0
        if save:  # the one before must be out of the way; every rank waits for its own share
            self.saver.wait()
        word = replace(word, save=self.saver.word)
        decision = self.cycle.commit(self.state, self.controller, word, full=full)
        agreed = decision.agreed
        self.narrator.evidence(before, self.state, agreed, self.window.first_skipped)
        self.narrator.tell_all(told(before, self.state))
        beat.mark("save-commit")
        self.saves.flush_before_commit()
        self.narrator.tell_all(self.saver.settle(agreed.ranks, axes_of(self.state)))
        judged = time.perf_counter()
        recovery = self.recovery() if health.verdict is Verdict.PANIC else None
        # After a rollback at once: the checkpoints beyond it have lost their names, and there may be no other.
        save = recovery is not None or (save and self.saves.room(self.state, last=stop or ended))
        wrap_ms = None
        if recovery is None:
            self.state, wrap_ms = self.cycle.follow(decision, force=save)
        steps_ms, tick_ms = 1e3 * (began - self._clock), 1e3 * (time.perf_counter() - began)
        self.narrator.tick(self.state, lr=self._lr, steps_ms=steps_ms, tick_ms=tick_ms, digest_ms=decision.digest_ms)
        if recovery is not None:
            wrap_ms = self.go_back(recovery, judged)
        self.window.reset()
        self.world.allow_slow(save or wrap_ms is not None or self.growth.compiled)
        if save:
            beat.mark("save")
            scored = due or recovery is not None  # that it was stopped here must not change what validation chooses
            self.saves.begin(self.state, self.collect, rank=self.world.rank, scored=scored)
        if self.governor is not None and recovery is None:
            self.narrator.tell_all(self.governor.keep(self.state, self.collect, saved=save))
        self._clock = time.perf_counter()
        if self.state.judged_row >= settings.trainer.max_consecutive:
            raise DivergedError(too_many_skipped(self.state, agreed))
        if stop and self.step < self.terms.total_steps:
            self.saves.finish(self.state)
            raise Preempted(f"stopped at step {self.step} of {self.terms.total_steps}; a checkpoint is written")

    def recovery(self) -> Recovery | None:
        """What to go back to, once every save is settled: none may land beyond it. None: go on."""
        assert self.governor is not None
        self.heartbeat.mark("rollback")
        self.world.allow_slow(True)
        self.saves.settle_now(self.state)
        return self.governor.recovery(self.state, from_step=self.losses.teacherless_from)

    def go_back(self, recovery: Recovery, began: float) -> float | None:
        """All ranks go back to one generation, and on from it otherwise; returns milliseconds of the wrap."""
        assert self.governor is not None
        present, outcome = self.state, recovery.replay.outcome
        self._go_on_from(recovery.generation)
        self.state = outcome.state
        self.growth.perform(outcome.effects)
        wrap_ms = self.growth.follow(self.state, force=True)
        faults = self.governor.gone_back(recovery)
        self.narrator.tell_all([*rolled_back(present, recovery, began), *faults])
        self.narrator.failures(self.state, self.growth.failures)
        return wrap_ms

    def _evaluator(self, grown: Grown) -> Evaluator:
        trainer, seed = self.settings.trainer, self.settings.seed
        return Evaluator(
            grown,
            self.bundle,
            self.world,
            precision=trainer.precision,
            batch=trainer.eval_batch,
            seed=seed,
            channels_last=trainer.channels_last,
        )

    def _measure(self) -> Measured:
        tick = self.state.tick + 1
        validate = tick % self.settings.control.validate_every == 0 or self.step >= self.terms.total_steps
        values, nonfinite = measure(
            self.state, self.owner, self.evaluator, self.window, self.terms.gates, validate=validate
        )
        return {**values, "stop": float(self.stop_asked)}, nonfinite

    def collect(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything of this run: what is equal on all ranks (but for rank 0's controller), and what is not."""
        controller = {} if self.controller is None else self.controller.state_dict()
        digest, run_id = self.settings.config_digest, self.settings.run_id
        common = collect_common(self.grown, self.owner, self.state, controller, digest, run_id, self._teacher)
        return common, collect_own(self.world)

    def finish(self) -> RunResult:
        """Settles the last save, and reads the test part once, on the checkpoint that validation chose."""
        self.saves.finish(self.state)
        self.heartbeat.mark("test")
        store = self.saver.store
        best = choose_best(store, self.world, partial(self.narrator.fault, self.state))
        grown = self.grown if best is None else rebuild(store, best, self.fresh, self.growth)
        test_loss, test_accuracy = read_test(self._evaluator(grown), self.world, self.state.tick)
        objective = self.saves.objective(self.state)
        return result_of(self.state, self.grown, objective=objective, best=best, loss=test_loss, accuracy=test_accuracy)

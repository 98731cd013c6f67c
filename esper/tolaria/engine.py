"""The training loop and its tick.

    step    forward (and a shadow forward per TRAINING seed), one backward of the summed losses, per-owner judgement
            and clipping, optimizer step; alpha is evaluated from the committed ramps
    tick    measure -> observe -> commit -> follow (see `esper.tolaria.tick`) -> save

Everything that leads from one tick to the next is a function of the agreed state, the optimizer step and the run's
seed; every rank takes the same branches. One process runs the same code without collectives.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from esper.kasmina.attach import Grown
from esper.kasmina.confidence import class_logits
from esper.leyline.errors import CheckpointError, DivergedError, Preempted
from esper.leyline.protocols import Controller, EventSink
from esper.tolaria.config import CheckpointConfig, ControlConfig, Objective, TrainerConfig
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.distill import Distillation
from esper.tolaria.evaluate import Evaluator, autocast
from esper.tolaria.final import RunResult, choose_best, read_test, rebuild, topology_of
from esper.tolaria.growth import Growth
from esper.tolaria.heartbeat import Heartbeat
from esper.tolaria.incubation import Call, with_shadows
from esper.tolaria.lockstep import Lockstep
from esper.tolaria.measure import measure
from esper.tolaria.narrate import Narrator, axes_of
from esper.tolaria.ownership import ParameterOwner
from esper.tolaria.saver import Saver
from esper.tolaria.snapshot import check_teacher, collect_common, collect_own, plant_record, restore
from esper.tolaria.state import RunState, Terms
from esper.tolaria.tick import Cycle, Measured, tick_due
from esper.tolaria.window import Window
from esper.tolaria.wire import Agreed, SaveWord
from esper.tolaria.world import World


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
        distillation: Distillation | None = None,
    ) -> None:
        self.settings, self.world, self.heartbeat = settings, world, heartbeat
        self.grown, self.owner, self.growth, self.bundle = grown, owner, growth, bundle
        self.controller, self.sink, self.saver = controller, sink, saver
        self.terms, self.lockstep, self.fresh = terms, lockstep, fresh
        self.distillation = distillation
        self._teacher = None if distillation is None else distillation.teacher.identity
        trainer = settings.trainer
        self.plan = BatchPlan(len(bundle.train), trainer.batch, settings.seed)
        self.evaluator = Evaluator(
            grown, bundle, world, precision=trainer.precision, batch=trainer.eval_batch, seed=settings.seed
        )
        self.narrator = Narrator(sink, grown)
        self.cycle = Cycle(
            world, heartbeat, grown, growth, terms=terms, control=settings.control, lockstep=lockstep,
            narrator=self.narrator,
        )  # fmt: skip
        self.state = RunState(slots=terms.first_slots())
        self.step = 0
        self.stop_asked = False
        self.window = Window(world.device)
        self._lr = 0.0
        self._clock = time.perf_counter()

    # start --------------------------------------------------------------------------------------------------------

    def begin(self, resume_step: int | None) -> None:
        """Starts from nothing, or from a checkpoint that every rank has verified.

        Raises:
            CheckpointError: it does not fit this run.
        """
        if resume_step is not None:
            self.heartbeat.mark("load")
            self.state, payload = restore(
                self.saver.store, resume_step, self.grown, self.owner, self.growth, self.world, self.settings.seed
            )
            check_teacher(payload, self._teacher, str(self.saver.store.path(resume_step)))
            if payload["config_digest"] != self.settings.config_digest:
                where = self.saver.store.path(resume_step)
                raise CheckpointError(f"{where}: saved under other settings; config.yaml was edited since: put it back")
            if self.controller is not None:
                self.controller.load_state_dict(payload["controller"])
            self.step = self.heartbeat.step = self.state.step
            self.heartbeat.tick = self.state.tick
            self.window = Window(self.world.device, self.state.skipped_in_row)
        else:
            plant_record(self.grown, self.growth, self.state, own=True)
        self.growth.follow(self.state, force=True)
        self.narrator.started(self.state, self.terms, resume_step)
        self._clock = time.perf_counter()

    def run(self) -> RunResult:
        """Trains to the end.

        Raises:
            Preempted: a stop was agreed; a checkpoint is written.
            DivergedError: too many steps in a row were skipped.
            LockstepError: ranks parted, or one is lost.
        """
        while self.step < self.terms.total_steps:
            self.train_step()
            if self.tick_due():
                self.tick()
        return self.finish()

    # one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """One optimizer step on this rank's shard of the global batch."""
        step, trainer = self.step, self.settings.trainer
        self.heartbeat.step = step
        self._let_teacher_go(step)
        self.growth.set_alphas(self.state, step)
        self._lr = self.owner.set_lr(step, {entry.slot: entry.learn_step for entry in self.state.slots})
        epoch, _ = self.plan.locate(step)
        # Each rank's loss is its sum * world / global count: DDP's mean over ranks is then the global mean, exactly,
        # whatever the sizes of the shards.
        scale = self.world.size / len(self.plan.indices(step))
        pieces = self.plan.pieces(step, self.world.rank, self.world.size, trainer.accumulate)
        for index, (indices, weights) in enumerate(pieces):
            last = index == len(pieces) - 1
            with contextlib.nullcontext() if last else self.growth.no_sync():
                self.heartbeat.mark("forward")
                x, y = self.bundle.train_batch(indices, seed=self.settings.seed, epoch=epoch)
                x, y = self.evaluator.to_device(x, y)
                with self.world.collective("forward"):
                    loss = self._loss(x, y, weights.to(self.world.device), scale)
                self.heartbeat.mark("backward")
                with self.world.collective("backward"):
                    loss.backward()
        self.heartbeat.mark("step")
        with self.world.collective("step"):  # where the host first waits for a device's reduction
            report = self.owner.step()
        self.world.allow_slow(False)
        self.window.step(report, step)
        self.step += 1

    def _let_teacher_go(self, step: int) -> None:
        """From ``distill.until_step`` on there is no teacher, and nothing of it is left."""
        if self.distillation is None or step < (self.distillation.config.until_step or math.inf):
            return
        self.distillation.release()
        self.distillation = None
        self.growth.parameters.release_teacher()

    def _loss(self, x: Tensor, y: Tensor, weights: Tensor, scale: float) -> Tensor:
        """Host loss plus one shadow loss per TRAINING seed, each with the teacher's term; 0-D, to go backward from."""
        task = self.bundle.task

        def share(loss: Tensor, output: Tensor) -> Tensor:
            if term is not None:
                loss = loss + term(output)
            return (loss * weights.to(loss.dtype)).sum() * scale

        def host() -> Tensor:
            with self.grown.tallied(weights):
                output = self._forward(self.growth.call, x)
            loss, correct = task.per_sample(output, y)
            self.window.samples(loss, correct, weights)
            return share(loss, output)

        def shadow(call: Call) -> Tensor:
            output = self._forward(call, x)
            return share(task.per_sample(output, y)[0], output)

        logits = self._forward(partial(class_logits, self.grown), x)
        lesson = contextlib.nullcontext() if self.distillation is None else self.distillation.lesson(x)
        with lesson as term, self.grown.logits(logits):
            return with_shadows(host, shadow, self.grown, self.growth.shadowed(self.state), self.world.device)

    def _forward(self, call: Call, x: Tensor) -> Any:
        with autocast(self.settings.trainer.precision, self.world.device):
            return call(x)

    # one tick -----------------------------------------------------------------------------------------------------

    def tick_due(self) -> bool:
        """Whether the tick comes now: by count, by epoch, at the end, or at once after a row of skipped steps."""
        control, consecutive = self.settings.control, self.settings.trainer.max_consecutive
        if tick_due(self.state, self.step, self.window, control, self.terms, max_consecutive=consecutive):
            return True
        return control.every == 0 and self.step % self.plan.steps_per_epoch == 0

    def tick(self) -> None:
        """One control tick: two collectives, then the same changes on every rank."""
        began = time.perf_counter()
        beat, settings, before = self.heartbeat, self.settings, self.state
        values, word = self.cycle.measure(self.step, before.tick + 1, self._measure)
        epoch = self.plan.locate(self.step - 1)[0] + 1
        self.state, sums = self.cycle.observe(before, values, step=self.step, epoch=epoch)
        stop = sums["stop"] > 0
        every = settings.checkpoint.every_ticks
        ending = self.step >= self.terms.total_steps
        save = stop or ending or (every > 0 and self.state.tick % every == 0)
        full = save or self.state.tick % settings.control.digest_every == 0
        if save:  # the one before must be out of the way; every rank waits for its own share
            self.saver.wait()
        word = replace(word, save=self.saver.word)
        decision = self.cycle.commit(self.state, self.controller, word, full=full)
        agreed = decision.agreed
        self.narrator.evidence(before, self.state, agreed, self.window.first_skipped)
        beat.mark("save-commit")
        self._flush_before_commit()
        self.narrator.tell_all(self.saver.settle(agreed.ranks, axes_of(self.state)))
        save = save and self._room_for_save(last=stop or ending)
        self.state, wrap_ms = self.cycle.follow(decision, force=save)
        steps_ms, tick_ms = 1e3 * (began - self._clock), 1e3 * (time.perf_counter() - began)
        self.narrator.tick(self.state, lr=self._lr, steps_ms=steps_ms, tick_ms=tick_ms, digest_ms=decision.digest_ms)
        self.window.reset()
        self.world.allow_slow(save or wrap_ms is not None or self.growth.compiled)
        if save:
            beat.mark("save")
            self._save()
        self._clock = time.perf_counter()
        if self.state.skipped_in_row >= settings.trainer.max_consecutive:
            raise DivergedError(self._diverged(agreed))
        if stop and not ending:
            self._finish_save()
            raise Preempted(f"stopped at step {self.step} of {self.terms.total_steps}; a checkpoint is written")

    def _measure(self) -> Measured:
        tick = self.state.tick + 1
        validate = tick % self.settings.control.validate_every == 0 or self.step >= self.terms.total_steps
        values, nonfinite = measure(
            self.state, self.owner, self.evaluator, self.window, self.terms.gates, validate=validate
        )
        return {**values, "stop": float(self.stop_asked)}, nonfinite

    # saving and ending --------------------------------------------------------------------------------------------

    def _objective(self) -> float | None:
        accuracy = self.settings.trainer.objective is Objective.VALIDATION_ACCURACY
        reading = self.state.validation_accuracy if accuracy else self.state.validation_loss
        return reading.value

    def _save(self) -> None:
        """Begins a save of the state at the end of this tick; its fate is told in a later commit."""
        value, fresh = self._objective(), self.state.validation_loss.tick == self.state.tick
        score = None
        if value is not None and fresh:
            score = value if self.settings.trainer.objective is Objective.VALIDATION_ACCURACY else -value
        common = None
        if self.world.rank == 0:
            assert self.controller is not None
            common = collect_common(
                self.grown, self.owner, self.state, self.controller.state_dict(), self.settings.config_digest,
                self.settings.run_id, self._teacher,
            )  # fmt: skip
        self.saver.begin(self.step, self.state.tick, score, common, collect_own(self.world))

    def _room_for_save(self, *, last: bool) -> bool:
        """Whether a save can begin: where the one before is still being written, all ranks have that from one commit.
        The last save of a run waits for it, another is left out."""
        before = self.saver.in_flight
        if before is None:
            return True
        if last:
            self.narrator.tell_all(self.saver.drain(axes_of(self.state), self.settings.control.startup_timeout_s / 2))
            return True
        what = (
            f"save of step {self.step} left out: that of step {before} is still being written; is the disk slow? "
            "raise checkpoint.every_ticks"
        )
        self.narrator.fault(self.state, what, str(self.saver.store.path(self.step)))
        return False

    def _finish_save(self) -> None:
        """Settles the last save, synchronously."""
        self.heartbeat.mark("save-commit")
        self.sink.flush()
        patience = self.settings.control.startup_timeout_s / 2
        self.narrator.tell_all(self.saver.finish(axes_of(self.state), patience))

    def _flush_before_commit(self) -> None:
        """What was told up to a saved tick is written first: a resume from there trains nothing of it again."""
        if self.saver.word in (SaveWord.WRITTEN, SaveWord.FAILED):
            self.sink.flush()

    def finish(self) -> RunResult:
        """Settles the last save, and reads the test part once, on the checkpoint that validation chose."""
        self._finish_save()
        self.heartbeat.mark("test")
        trainer, store = self.settings.trainer, self.saver.store
        best = choose_best(store, self.world, partial(self.narrator.fault, self.state))
        grown = self.grown if best is None else rebuild(store, best, self.fresh, self.growth)
        evaluator = Evaluator(
            grown, self.bundle, self.world, precision=trainer.precision, batch=trainer.eval_batch,
            seed=self.settings.seed,
        )  # fmt: skip
        test_loss, test_accuracy = read_test(evaluator, self.world, self.state.tick)
        return RunResult(
            step=self.step, tick=self.state.tick, validation_loss=self.state.validation_loss,
            validation_accuracy=self.state.validation_accuracy, best_step=best, test_loss=test_loss,
            test_accuracy=test_accuracy, objective=self._objective(), samples=self.state.samples,
            flops=self.state.flops, parameters=sum(p.numel() for p in self.grown.model.parameters()),
            topology=topology_of(self.state),
        )  # fmt: skip

    def _diverged(self, agreed: Agreed) -> str:
        ranks = [str(rank) for rank in agreed.nonfinite_ranks]
        who = f"the loss was not finite on rank {', '.join(ranks)}" if ranks else "no rank's own loss was non-finite"
        return (
            f"diverged: {self.state.skipped_in_row} optimizer steps in a row had a non-finite host gradient, the last "
            f"before step {self.step}; {who}; lower optim.lr, or resume an earlier checkpoint"
        )

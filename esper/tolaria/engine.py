"""The training loop and its tick.

    step    forward (and a shadow forward per TRAINING seed), one backward of the summed losses, per-owner judgement
            and clipping, optimizer step; alpha is evaluated from the committed ramps
    tick    measure -> observe -> absorb -> decide -> commit -> reduce -> perform -> follow -> save

Everything that leads from one tick to the next is a function of the agreed state, the optimizer step and the run's
seed; every rank takes the same branches. One process runs the same code without collectives.
"""

import contextlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from esper.kasmina.attach import Grown
from esper.leyline.commands import Command, wait
from esper.leyline.errors import CheckpointError, DivergedError, Preempted, one_line
from esper.leyline.observation import Observation
from esper.leyline.protocols import Controller, EventSink
from esper.tolaria.config import CheckpointConfig, ControlConfig, Objective, TrainerConfig
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.evaluate import Evaluator, autocast, average_running_statistics
from esper.tolaria.final import RunResult, choose_best, read_test, rebuild
from esper.tolaria.growth import Growth
from esper.tolaria.heartbeat import Heartbeat
from esper.tolaria.lockstep import Lockstep
from esper.tolaria.measure import measure
from esper.tolaria.narrate import Narrator, axes_of
from esper.tolaria.ownership import ParameterOwner
from esper.tolaria.propose import propose
from esper.tolaria.reducer import reduce_tick
from esper.tolaria.saver import Saver
from esper.tolaria.snapshot import collect_common, collect_own, restore, rng_state, set_rng_state
from esper.tolaria.state import RunState, Terms
from esper.tolaria.views import absorb, observe
from esper.tolaria.window import Window
from esper.tolaria.wire import Agreed, Failure, RankWord, SaveWord
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
    ) -> None:
        self.settings, self.world, self.heartbeat = settings, world, heartbeat
        self.grown, self.owner, self.growth, self.bundle = grown, owner, growth, bundle
        self.controller, self.sink, self.saver = controller, sink, saver
        self.terms, self.lockstep, self.fresh = terms, lockstep, fresh
        trainer = settings.trainer
        self.plan = BatchPlan(len(bundle.train), trainer.batch, settings.seed)
        self.evaluator = Evaluator(
            grown, bundle, world, precision=trainer.precision, batch=trainer.eval_batch, seed=settings.seed
        )
        self.narrator = Narrator(sink, grown)
        self.state = RunState(slots=terms.first_slots())
        self.step = 0
        self.stop_asked = False
        self.window = Window(world.device)
        self._lr = 0.0
        self._clock = time.perf_counter()
        self._failure_text = ""

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
            if payload["config_digest"] != self.settings.config_digest:
                where = self.saver.store.path(resume_step)
                raise CheckpointError(f"{where}: saved under other settings; config.yaml was edited since: put it back")
            if self.controller is not None:
                self.controller.load_state_dict(payload["controller"])
            self.step = self.heartbeat.step = self.state.step
            self.heartbeat.tick = self.state.tick
            self.window = Window(self.world.device, self.state.skipped_in_row)
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

    def _loss(self, x: Tensor, y: Tensor, weights: Tensor, scale: float) -> Tensor:
        """Host loss plus one shadow loss per TRAINING seed; 0-D, to be called backward on."""
        device, task, precision = self.world.device, self.bundle.task, self.settings.trainer.precision
        shadowed = self.growth.shadowed(self.state)
        before = rng_state(device) if shadowed else None
        with autocast(precision, device):
            output = self.growth.call(x)
        loss, correct = task.per_sample(output, y)
        self.window.samples(loss, correct, weights)
        weights = weights.to(loss.dtype)
        total = (loss * weights).sum() * scale
        if before is None:
            return total
        after = rng_state(device)
        for slot in shadowed:
            set_rng_state(before, device)
            with autocast(precision, device):
                output = self.grown.incubate(slot, x)
            shadow, _ = task.per_sample(output, y)
            total = total + (shadow * weights).sum() * scale
        set_rng_state(after, device)
        return total

    # one tick -----------------------------------------------------------------------------------------------------

    def tick_due(self) -> bool:
        """Whether the tick comes now: by count, by epoch, at the end, or at once after a row of skipped steps."""
        control, trainer, row = self.settings.control, self.settings.trainer, self.window.skipped_in_row
        since = self.step - self.state.step
        if self.step >= self.terms.total_steps or since >= control.max_steps:
            return True
        if row and (row % trainer.max_skips == 0 or row >= trainer.max_consecutive):
            return True
        if control.every:
            return since >= control.every
        return self.step % self.plan.steps_per_epoch == 0

    def tick(self) -> None:
        """One control tick: two collectives, then the same changes on every rank."""
        began = time.perf_counter()
        beat, settings = self.heartbeat, self.settings
        beat.step, beat.tick = self.step, self.state.tick + 1
        beat.mark("buffers")
        average_running_statistics(self.grown.model, self.world)
        beat.mark("measure")
        values, word = self._measure()
        beat.mark("observe")
        sums = self.lockstep.observe(values)
        before = self.state
        epoch = self.plan.locate(self.step - 1)[0] + 1
        self.state = absorb(before, sums, self.terms, step=self.step, epoch=epoch)
        stop = sums["stop"] > 0
        every = settings.checkpoint.every_ticks
        ending = self.step >= self.terms.total_steps
        save = stop or ending or (every > 0 and self.state.tick % every == 0)
        beat.mark("decide")
        commands, word = self._decide(observe(self.state, self.terms), word)
        digest_began = time.perf_counter()
        full = save or self.state.tick % settings.control.digest_every == 0
        digests = self.lockstep.digests_of(self.state, self.grown, parameters=full)
        digest_ms = 1e3 * (time.perf_counter() - digest_began)
        beat.mark("commit")
        word = replace(word, save=self.saver.word)
        agreed = self.lockstep.commit(self.state, commands, digests, self.growth.vetoes, word, self._failure_text)
        beat.mark("apply")
        outcome = reduce_tick(
            self.state, agreed.commands, agreed.vetoes, self.terms, stage_ticks=settings.control.stage_ticks
        )
        self.narrator.evidence(before, self.state, agreed, self.window.first_skipped)
        beat.mark("save-commit")
        settling = self.saver.word is not SaveWord.NONE
        self._flush_before_commit()
        self.narrator.tell(self.saver.settle(agreed.ranks, axes_of(self.state)))
        beat.mark("stage")
        self.growth.perform(outcome.effects)
        self.state = outcome.state
        beat.mark("rewrap")
        wrap_ms = self.growth.follow(self.state, force=save)
        self.narrator.decisions(outcome.events, commands)
        self.narrator.failures(self.state, self.growth.failures)
        count = len(self.owner.gradient_set())
        self.narrator.rewrapped(self.state, wrap_ms, parameters=count, saved=save)
        steps_ms, tick_ms = 1e3 * (began - self._clock), 1e3 * (time.perf_counter() - began)
        self.narrator.tick(self.state, lr=self._lr, steps_ms=steps_ms, tick_ms=tick_ms, digest_ms=digest_ms)
        self.window.reset()
        self.world.allow_slow(save or settling or wrap_ms is not None)
        if save:
            beat.mark("save")
            self._save()
        self._clock = time.perf_counter()
        if self.state.skipped_in_row >= settings.trainer.max_consecutive:
            raise DivergedError(self._diverged(agreed))
        if stop and not ending:
            self._flush_before_commit()
            self.narrator.tell(self.saver.finish(axes_of(self.state)))
            raise Preempted(f"stopped at step {self.step} of {self.terms.total_steps}; a checkpoint is written")

    def _measure(self) -> tuple[dict[str, float], RankWord]:
        """This rank's entries of the observe vector. Never raises: a failure travels as this rank's word."""
        try:
            tick = self.state.tick + 1
            validate = tick % self.settings.control.validate_every == 0 or self.step >= self.terms.total_steps
            values, nonfinite = measure(
                self.state, self.owner, self.evaluator, self.window, self.terms.gates, validate=validate
            )
            values["stop"] = float(self.stop_asked)
            return values, RankWord(nonfinite_losses=nonfinite)
        except Exception as error:
            traceback.print_exc()  # the others get a line; whoever wrote the code needs the place
            self._failure_text = one_line(error)
            return {}, RankWord(failure=Failure.MEASURE)

    def _decide(self, observation: Observation, word: RankWord) -> tuple[dict[str, Command] | None, RankWord]:
        """Rank 0: one command per slot, with proposal ids. A controller that fails becomes this rank's word."""
        if self.controller is None:
            return None, word
        try:
            if word.failure is Failure.NONE:
                return propose(self.controller, observation, self.state.proposals, self.terms.names), word
        except Exception as error:
            traceback.print_exc()
            self._failure_text = one_line(error)
            word = replace(word, failure=Failure.DECIDE)
        return {entry.slot: wait(entry.slot) for entry in self.state.slots}, word

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
                self.settings.run_id,
            )  # fmt: skip
        self.saver.begin(self.step, self.state.tick, score, common, collect_own(self.world))

    def _flush_before_commit(self) -> None:
        """What was told up to a saved tick is written first: a resume from there trains nothing of it again."""
        if self.saver.word is not SaveWord.NONE:
            self.sink.flush()

    def finish(self) -> RunResult:
        """Settles the last save, and reads the test part once, on the checkpoint that validation chose."""
        self.heartbeat.mark("save-commit")
        self._flush_before_commit()
        self.narrator.tell(self.saver.finish(axes_of(self.state)))
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
        )  # fmt: skip

    def _diverged(self, agreed: Agreed) -> str:
        ranks = [str(rank) for rank in agreed.nonfinite_ranks]
        who = f"the loss was not finite on rank {', '.join(ranks)}" if ranks else "no rank's own loss was non-finite"
        return (
            f"diverged: {self.state.skipped_in_row} optimizer steps in a row had a non-finite host gradient, the last "
            f"before step {self.step}; {who}; lower optim.lr, or resume an earlier checkpoint"
        )

"""The calls of a user's training loop: epoch, loss, accumulate, step, and the tick that follows from them.

Every rank makes the same calls in the same order. A wrong order (a forgotten step, two losses for one step, the
optimizer stepped without the session) raises a `LoopError` that says which call comes first.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import DivergedError, LoopError, one_line
from esper.leyline.protocols import Controller
from esper.session.config import SessionConfig
from esper.session.epoch import agreed_batches
from esper.session.evaluator import BatchEvaluator
from esper.session.model import LiveModel, UserLoss, carry_loss
from esper.session.order import INSTEAD, LOOP, CallOrder
from esper.session.passes import Passes
from esper.session.recorder import Recorder
from esper.tolaria.growth.adopt import AdoptedOptimizer
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.guard import StepReport
from esper.tolaria.growth.terms import follow_learning
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.lockstep.measure import measure
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.tick import Cycle, Measured, tick_due
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.handshake import shake_hands
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.world import World


@dataclass(kw_only=True, slots=True)
class Parts:
    """The parts of a session; see `esper.session.parts.assemble_session`.

    Fields:
        config: the session's settings.
        terms: everything that decisions depend on and that does not change.
        world: this process's place among the ranks.
        marks: where this rank is, for the others to read.
        grown: model and slots.
        growth: changes the model and the optimizer.
        adopted: the user's optimizer.
        model: the model that the user calls.
        evaluator: measures validation and probe.
        cycle: the sequence of a tick.
        window: counts between ticks.
        narrator: turns what happens into events.
        recorder: keeps the newest events.
        controller: on rank 0; None on the others.
        controller_plain: the controller's settings; None if it was given as an object.
        loss: the user's; None without one.
    """

    config: SessionConfig
    terms: Terms
    world: World
    marks: LastWord
    grown: Grown
    growth: Growth
    adopted: AdoptedOptimizer
    model: LiveModel
    evaluator: BatchEvaluator
    cycle: Cycle
    window: Window
    narrator: Narrator
    recorder: Recorder
    controller: Controller | None
    controller_plain: dict[str, Any] | None
    loss: UserLoss | None


class Loop:
    """The loop's calls on a session's parts; `esper.Session` documents them.

    Fields:
        steps: optimizer steps done; a skipped one counts.
        epochs: epochs begun.
        state: the agreed record.
        closed: no call is allowed any more.
        average: of the weights; None without one.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config, self.terms, self.world, self.marks = parts.config, parts.terms, parts.world, parts.marks
        self.grown, self.growth, self.model, self.window = parts.grown, parts.growth, parts.model, parts.window
        self.adopted, self.owner, self._loss = parts.adopted, parts.adopted.owner, parts.loss
        self.state = RunState(slots=self.terms.first_slots())
        self.steps = self.epochs = 0
        self.closed = False
        self.average: WeightAverage | None = None
        self.order = CallOrder(self.grown, self.adopted, self.window, self.world)
        self.passes = Passes(parts.loss, self.model, self.growth, self.window, parts.evaluator)
        self._left_early = 0

    # one step -----------------------------------------------------------------------------------------------------

    def epoch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """See `esper.Session.epoch`."""
        self.check_between("session.epoch()")
        self.end_left_epochs()
        self.epochs += 1
        try:
            yield from agreed_batches(loader, self.world, self.window.add_wait)
        except GeneratorExit:  # left by a break. An error raised in here would be lost, so the next call ends the epoch
            self._left_early += 1
            raise
        if self.order.awaiting:
            raise LoopError(
                "the epoch ended between session.loss(batch) and session.step(); call session.step(), or "
                "session.discard()"
            )
        self._end_epoch()

    def _end_epoch(self) -> None:
        with self.order.changing("the end of an epoch"):
            self.adopted.advance_schedule("epoch", self.epochs)
            if self.config.control.every == 0 and self.steps > self.state.step:
                self._tick()

    def end_left_epochs(self) -> None:
        """Ends epochs whose loop was left early, as if they had come to their end."""
        while self._left_early:
            self._left_early -= 1
            self._end_epoch()

    def loss(self, batch: Any) -> Tensor:
        """See `esper.Session.loss`."""
        if torch.is_grad_enabled():
            self.check_open()
        if self._loss is None:
            raise LoopError("session.loss(batch) needs loss= at construction: (model, batch) -> one value per sample")
        if not torch.is_grad_enabled():
            return self.passes.judge(self.model, batch)[0].mean()
        self.order.check_loss()
        if self.order.between:
            self.end_left_epochs()
        self.marks.step = self.steps
        self.marks.mark("forward")
        try:
            with self.order.one_pass(), self.world.collective("forward"):
                value, total = self.passes.losses(batch, self.state)
        except Exception as error:
            self.marks.mark("forward", one_line(error))
            raise
        loss = carry_loss(value, total, self.adopted.scale(self.world.device))
        self.order.guard_backward(loss, self.marks)
        self.marks.mark(LOOP)
        return loss

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """See `esper.Session.accumulate`."""
        self.check_open()
        if self.order.awaiting:
            raise LoopError(
                "session.accumulate() after the window's last session.loss(batch); call session.step() first, "
                f"{INSTEAD}"
            )
        with self.order.one_window(), self.growth.no_sync():
            yield

    def step(self) -> StepReport:
        """See `esper.Session.step`."""
        self.check_open()
        changed = self.growth.changed_by_hand()
        self.order.check_step(has_loss=self._loss is not None, find_unused=self.config.find_unused, changed=changed)
        first = next(self.grown.model.parameters())
        if (first.dtype, first.device) != (self.growth.host_dtype, self.world.device):
            raise LoopError("the model's dtype or device was changed beside the session; use session.to(...)")
        self.marks.step = self.steps
        self.marks.mark("step")
        with self.order.changing("session.step()"):
            report = self._step()
        self.marks.step = self.steps
        self.marks.mark(LOOP)
        return report

    def _step(self) -> StepReport:
        self.owner.set_lr(self.steps, {entry.slot: entry.learn_step for entry in self.state.slots})
        with self.world.collective("step"):
            report = self.adopted.step_mean(max(1, self.order.passes))
        self.world.allow_slow(False)
        self.window.add_step(report, self.steps)
        self.steps += 1
        self.order.end_step()
        self.adopted.advance_schedule("step", self.steps)
        self.growth.set_alphas(self.state, self.steps)
        self.parts.cycle.observers.after_step(report)
        consecutive, row = self.config.max_consecutive, self.window.row
        if tick_due(self.state, self.steps, row, self.config.control, self.terms, max_consecutive=consecutive):
            self._tick()
        return report

    def discard(self, by: str = "session.discard()") -> None:
        """See `esper.Session.discard`; ``by`` is the call that drops the step under way."""
        self.growth.call = self.grown.model  # the old reducer must be gone first
        self.order.drop(by)
        self.marks.mark("discard")
        self.world.renew()
        shake_hands(self.world, {"steps": str(self.steps), "gradients": " ".join(self.owner.gradient_set())})
        self.follow(force=True)
        self.marks.mark(LOOP)

    def begin_load(self) -> None:
        """Drops the step under way, before a load; what an interruption has torn will be loaded anew."""
        self.order.torn = "" if not self.closed else self.order.torn
        self.check_open()
        self.order.drop("session.load_state_dict()")
        self._left_early = 0
        self.growth.call = self.grown.model
        self.world.renew()

    def come_between_steps(self, what: str) -> None:
        """Brings the loop between two steps on every rank, for a save: a step under way on some rank is dropped."""
        self.check_open()
        if self.order.windowed:
            raise LoopError(f"{what} within session.accumulate(); it belongs after the block")
        self.marks.mark("save")
        underway = torch.tensor([int(not self.order.between)])
        if self.world.all_reduce(underway, dist.ReduceOp.MAX, what="save").item():
            self.discard(what)
        self.end_left_epochs()

    # one tick -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._warn_of_equal_batches()
        self.state = self.parts.cycle.tick(
            self.state,
            self._measure,
            self.parts.controller,
            step=self.steps,
            epoch=max(1, self.epochs),
            lr=self.adopted.lr,
            graded=self.passes.graded,
        ).state
        if self.state.skipped_in_row >= self.config.max_consecutive:
            raise DivergedError(
                f"diverged: {self.state.skipped_in_row} optimizer steps in a row had a non-finite host gradient, the "
                f"last before step {self.steps}; lower the lr, or restore an earlier checkpoint"
            )

    def _measure(self) -> Measured:
        tick, control = self.state.tick + 1, self.config.control
        validate, attribute = tick % control.validate_every == 0, control.attributes(tick)
        parts = self.state, self.owner, self.parts.evaluator, self.window, self.terms
        return measure(*parts, step=self.steps, validate=validate, attribute=attribute)

    def _warn_of_equal_batches(self) -> None:
        if text := self.passes.describe_equal_batches():
            self.parts.narrator.report_fault(self.state, text, "batches")
            if self.world.rank == 0:
                print(f"esper: {text}", file=sys.stderr, flush=True)

    def follow(self, *, force: bool) -> None:
        """Makes the model what the record says at the present step. Called between two steps."""
        if force:
            follow_learning(self.terms, self.grown)
        self.growth.follow(self.state, force=force)
        self.growth.set_alphas(self.state, self.steps)

    def leave(self, why: str) -> None:
        """Gives model and optimizer back and leaves the ranks, which can read why; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        self.growth.call = self.grown.model
        self.growth.close()
        self.model.close()
        self.adopted.close()
        self.parts.recorder.close()
        self.marks.leave(why)
        self.world.close()

    # order of calls -----------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises LoopError once the session is closed or torn by an interruption, or within ``ema.applied()``."""
        if self.closed:
            raise LoopError("the session is closed; the grown model is in session.grown.model")
        if self.average is not None and self.average.in_use:
            raise LoopError("within ema.applied() the model's weights are their averages; call this after the block")
        self.order.check_whole()

    def check_between(self, what: str) -> None:
        """Raises LoopError between a loss and its step."""
        self.check_open()
        self.order.check_between(what)

"""The calls of a user's training loop: epoch, loss, accumulate, step, and the tick that follows from them.

Every rank makes the same calls in the same order. A wrong order (a forgotten step, two losses for one step, the
optimizer stepped without the session) raises a `LoopError` that says which call comes first.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import HOST, Grown
from esper.leyline.errors import ConfigError, DivergedError, LoopError, one_line
from esper.leyline.protocols import Controller
from esper.session.batches import BatchEvaluator
from esper.session.config import SessionConfig
from esper.session.epoch import agreed_batches
from esper.session.model import LiveModel, StandIn, UserLoss, carry_loss, evaluate_loss
from esper.session.recorder import Recorder
from esper.tolaria.growth.adopt import AdoptedOptimizer
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.guard import StepReport
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.lockstep.measure import measure
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.tick import Cycle, Measured, tick_due
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.world import World
from esper.tolaria.training.incubation import Call, with_shadows


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
        self._passes, self._awaiting, self._windowed, self._graded = 0, False, False, False

    # one step -----------------------------------------------------------------------------------------------------

    def epoch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """See `esper.Session.epoch`."""
        self.check_open()
        if self._awaiting or self._windowed:
            raise LoopError("session.epoch() between session.loss(batch) and session.step(); call session.step() first")
        self.epochs += 1
        yield from agreed_batches(loader, self.world)
        if self._awaiting:
            raise LoopError("the epoch ended between session.loss(batch) and session.step(); call session.step()")
        if self.config.scheduler_per == "epoch":
            self.adopted.advance_schedule()
        if self.config.control.every == 0 and self.steps > self.state.step:
            self._tick()

    def loss(self, batch: Any) -> Tensor:
        """See `esper.Session.loss`."""
        if torch.is_grad_enabled():
            self.check_open()
        if self._loss is None:
            raise LoopError("session.loss(batch) needs loss= at construction: (model, batch) -> one value per sample")
        if not torch.is_grad_enabled():
            return self.judge(self.model, batch)[0].mean()
        if self._awaiting:
            raise LoopError(
                "session.loss(batch) was called again before session.step(); call it once per step, or all but the "
                "last within session.accumulate()"
            )
        self.marks.step = self.steps
        self.marks.mark("forward")
        try:
            with self.world.collective("forward"):
                value, total = self._losses(batch)
        except Exception as error:
            self.marks.mark("forward", one_line(error))
            raise
        self._passes += 1
        self._awaiting = not self._windowed
        loss = carry_loss(value, total, self.adopted.scale(self.world.device))
        if self.world.size > 1:
            self._guard_backward(loss)
        return loss

    def judge(self, model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
        """The user's loss of a batch, checked: loss [B], and correct [B] or None."""
        assert self._loss is not None
        return evaluate_loss(self._loss, model, batch)

    def _losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The host's mean loss, and its sum with one shadow loss per seed that learns in a forward pass of its own."""
        means: list[Tensor] = []

        def host() -> Tensor:
            self.model.passing = True
            try:
                loss, correct = self.judge(self.model, batch)
            finally:
                self.model.passing = False
            self._graded = correct is not None
            ones = torch.ones(len(loss), device=loss.device)
            self.window.add_samples(loss, torch.zeros_like(loss) if correct is None else correct, ones)
            means.append(loss.mean())
            return means[0]

        def shadow(call: Call) -> Tensor:
            return self.judge(StandIn(self.grown, call), batch)[0].mean()

        total = with_shadows(host, shadow, self.grown, self.growth.shadowed_slots(self.state), self.world.device)
        return means[0], total

    def _guard_backward(self, loss: Tensor) -> None:
        """Has ``loss.backward()`` name a lost rank: the others wait for it in the reductions within that call."""

        def backward(*args: Any, **kwargs: Any) -> None:
            del loss.backward  # otherwise the tensor would hold a function that holds the tensor
            self.marks.mark("backward")
            with self.world.collective("backward"):
                loss.backward(*args, **kwargs)

        loss.backward = backward  # type: ignore[method-assign]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """See `esper.Session.accumulate`."""
        self.check_open()
        if self._awaiting:
            raise LoopError(
                "session.accumulate() after the window's last session.loss(batch); call session.step() first"
            )
        self._windowed = True
        try:
            with self.growth.no_sync():
                yield
        finally:
            self._windowed = False

    def step(self) -> StepReport:
        """See `esper.Session.step`."""
        self.check_open()
        self._check_step()
        self.marks.step = self.steps
        self.marks.mark("step")
        self.owner.set_lr(self.steps, {entry.slot: entry.learn_step for entry in self.state.slots})
        with self.world.collective("step"):
            report = self.adopted.step_mean(max(1, self._passes))
        self.world.allow_slow(False)
        self.window.add_step(report, self.steps)
        self.steps += 1
        self._passes, self._awaiting = 0, False
        if self.config.scheduler_per == "step":
            self.adopted.advance_schedule()
        self.growth.set_alphas(self.state, self.steps)
        self.parts.cycle.observers.after_step(report)
        consecutive = self.config.max_consecutive
        if tick_due(self.state, self.steps, self.window, self.config.control, self.terms, max_consecutive=consecutive):
            self._tick()
        return report

    def _check_step(self) -> None:
        """Refuses a step for which a call is missing, or a gradient."""
        if self._windowed:
            raise LoopError("session.step() within session.accumulate(); it belongs after the block")
        if self._loss is not None and not self._awaiting:
            last = "; the window's last session.loss(batch) goes outside session.accumulate()" if self._passes else ""
            raise LoopError(f"session.step() without session.loss(batch) before it{last}")
        idle = self.adopted.without_gradient()
        if len(idle) == self._count_learning():
            raise LoopError("session.step(): the host has no gradient; call loss.backward() first")
        if idle and self.world.size > 1 and not self.config.find_unused:  # then DDP did not reduce all gradients
            names = ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else "")
            raise ConfigError(
                f"no gradient reaches {names} of the host; freeze them (requires_grad_(False)), or set "
                "find_unused=True and slots.incubation to ste or immediate"
            )
        first = next(self.grown.model.parameters())
        if (first.dtype, first.device) != (self.growth.dtype, self.world.device):
            raise LoopError("the model's dtype or device was changed beside the session; use session.to(...)")

    def _count_learning(self) -> int:
        """Parameters of the host that need a gradient."""
        return sum(parameter.requires_grad for _, parameter in self.grown.owner_parameters()[HOST])

    # one tick -----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        turn = self.parts.cycle.tick(
            self.state,
            self._measure,
            self.parts.controller,
            step=self.steps,
            epoch=max(1, self.epochs),
            lr=self.adopted.lr,
            graded=self._graded,
        )
        self.state = turn.state
        if self.state.skipped_in_row >= self.config.max_consecutive:
            raise DivergedError(
                f"diverged: {self.state.skipped_in_row} optimizer steps in a row had a non-finite host gradient, the "
                f"last before step {self.steps}; lower the lr, or restore an earlier checkpoint"
            )

    def _measure(self) -> Measured:
        tick = self.state.tick + 1
        validate = tick % self.config.control.validate_every == 0
        return measure(self.state, self.owner, self.parts.evaluator, self.window, self.config.gates, validate=validate)

    def follow(self, *, force: bool) -> None:
        """Makes the model what the record says at the present step. Called between two steps."""
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
        """Raises LoopError once the session is closed, or while the model's weights are their averages."""
        if self.closed:
            raise LoopError("the session is closed; the grown model is in session.grown.model")
        if self.average is not None and self.average.in_use:
            raise LoopError("within ema.applied() the model's weights are their averages; call this after the block")

    def check_between(self, what: str) -> None:
        """Raises LoopError between a loss and its step."""
        self.check_open()
        if self._awaiting or self._passes or self._windowed:
            raise LoopError(f"{what} between session.loss(batch) and session.step(); it belongs after session.step()")

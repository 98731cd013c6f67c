"""One control tick of one network on all ranks; the same for the trainer's loop, a user's own loop and a drill.

    measure   this rank's sums; a failure travels as this rank's word                         (never raises)
    observe   ONE all-reduce; its sums are absorbed into the agreed state
    commit    rank 0 decides; commands, digests and vetoes travel in ONE all-reduce; then the pure reducer
    follow    effects, phases, learning, alpha, wrapper: the model becomes what the state says

`Cycle.tick` is the whole sequence: `open_tick` measures and observes, `close_tick` commits and follows, and whoever
learns a controller looks at the agreed state in between. Saves and the governor are observers, which are called at four
points: see `esper.tolaria.lockstep.observers`. Every branch depends on the agreed state alone, so all ranks take the
same one.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from esper.accord.absorb import absorb
from esper.accord.observation import observation_of
from esper.accord.orders.steering import after_order
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import Grown
from esper.leyline.commands import Command, wait
from esper.leyline.errors import EsperError, one_line
from esper.leyline.evidence import ABSENT
from esper.leyline.orders.verbs import NO_ORDER, RunOrder
from esper.leyline.protocols import Controller
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.size import BirthCheck, MeasuresBirth
from esper.tolaria.lockstep.buffers import average_running_statistics
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.decision import Decision
from esper.tolaria.lockstep.desk import NO_DESK, Desk
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.observers import Observer, Observers, Turn
from esper.tolaria.lockstep.propose import propose
from esper.tolaria.lockstep.window import Window
from esper.tolaria.lockstep.wire import Failure, RankWord
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.world import World

Measured = tuple[dict[str, float], int]  # entries of the observe vector, samples with a non-finite loss


class Marks(Protocol):
    """Marks where this rank is, so that others can name it if it goes missing."""

    step: int
    tick: int

    def mark(self, phase: str, error: str = "") -> None:
        """Notes that this rank enters ``phase``."""


def tick_due(
    state: RunState, step: int, row: int, control: ControlConfig, terms: Terms, *, max_consecutive: int
) -> bool:
    """Whether a tick is due: by count, at the end, or at once after a row of skipped steps.

    Args:
        state: of the latest tick.
        step: optimizer steps done.
        row: optimizer steps skipped in a row; see `Window.row`.
        control: how many steps lie between ticks.
        terms: of the run.
        max_consecutive: skipped steps in a row that end the run.
    """
    since = step - state.step
    if step == terms.total_steps or since >= control.max_steps:
        return since > 0
    if row and (row % terms.max_skips == 0 or row >= max_consecutive):
        return True
    return control.every > 0 and since >= control.every


class Cycle:
    """Takes one network from tick to tick. Holds the parts, and no agreed state.

    Args:
        world: this rank's place.
        marks: mark where this rank is.
        grown: the model.
        growth: changes the model.
        terms: of the run.
        control: ticks and limits.
        lockstep: the two collectives.
        narrator: reports what happened.
        window: this rank's counts between two ticks.
        evaluator: measures the loss around a birth; None where there is none.
        observers: called around a tick, in order.
        desk: on rank 0, hands in people's orders.
    """

    def __init__(
        self,
        world: World,
        marks: Marks,
        grown: Grown,
        growth: Growth,
        *,
        terms: Terms,
        control: ControlConfig,
        lockstep: Lockstep,
        narrator: Narrator,
        window: Window,
        evaluator: MeasuresBirth | None = None,
        observers: Iterable[Observer] = (),
        desk: Desk = NO_DESK,
    ) -> None:
        self.desk = desk
        self.world, self.marks, self.grown, self.growth = world, marks, grown, growth
        self.terms, self.control, self.lockstep, self.narrator = terms, control, lockstep, narrator
        self.window, self.evaluator, self.observers = window, evaluator, Observers(observers)
        self._failure_text, self._waited_ms = "", 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts measuring the time of steps from now on."""
        self._clock = time.perf_counter()

    def tick(
        self,
        before: RunState,
        measure: Callable[[], Measured],
        controller: Controller | None,
        *,
        step: int,
        epoch: int,
        lr: float,
        graded: bool = True,
    ) -> Turn:
        """Takes one tick; the same sequence for the trainer, a session and a drill.

        Args:
            before: the agreed state of the previous tick.
            measure: returns this rank's sums, and its number of samples with a non-finite loss.
            controller: on rank 0, None elsewhere.
            step: optimizer steps done.
            epoch: passes over the data begun.
            lr: the host's learning rate, for the record.
            graded: whether it is known which samples were right; if not, accuracies are absent, never zero.

        Returns:
            The tick, with the new agreed state.

        Raises:
            LockstepError: ranks parted, one failed, or one is lost.
        """
        turn = self.open_tick(before, measure, step=step, epoch=epoch, graded=graded)
        return self.close_tick(turn, controller, lr=lr)

    def open_tick(
        self, before: RunState, measure: Callable[[], Measured], *, step: int, epoch: int, graded: bool = True
    ) -> Turn:
        """The first half of a tick: the agreed state with this tick's measurements, judged by the governor.

        Nothing has been decided, and the model is as it was. See `tick` for arguments and errors.
        """
        began = time.perf_counter()
        values, word = self._measure(step, before.tick + 1, measure)
        turn = self._observe(before, values, word, step=step, epoch=epoch, graded=graded)
        turn.began = began
        self.observers.call("after_observe", turn)
        turn.full |= turn.state.tick % self.control.digest_every == 0
        return turn

    def close_tick(self, turn: Turn, controller: Controller | None, *, lr: float) -> Turn:
        """The second half: decides, commits, and makes the model follow.

        Args:
            turn: what `open_tick` returned.
            controller: on rank 0, None elsewhere.
            lr: the host's learning rate, for the record.

        Returns:
            The tick, with the new agreed state.

        Raises:
            LockstepError: ranks parted, one failed, or one is lost.
        """
        before = turn.before
        self.observers.call("before_commit", turn)
        turn.decision = self._commit(turn, controller)
        self.narrator.report_evidence(before, turn.state, self.terms, turn.decision.agreed, self.window.first_skipped)
        self.narrator.report_left_out(before, turn.state, turn.sums)
        self.narrator.report_worth(before, turn.state, turn.sums)
        self.narrator.report_trouble(before, turn.state)
        self.observers.call("after_commit", turn)
        if turn.instead is None:
            turn.state, turn.wrap_ms = self._follow(turn)
        self.desk.tell(turn.state, turn.agreed.outcome if turn.instead is None else None)
        steps_ms, tick_ms = 1e3 * (turn.began - self._clock), 1e3 * (time.perf_counter() - turn.began)
        own = {"data_ms": self.window.data_ms, "own_ms": self.window.own_ms}
        times = {"steps_ms": steps_ms, "tick_ms": tick_ms, **own}
        self.narrator.report_tick(before, turn.state, lr=lr, digest_ms=turn.decision.digest_ms, **times)
        if turn.instead is not None:
            turn.state, turn.wrap_ms = turn.instead()
        self.window.reset()
        self.world.allow_slow(turn.save or turn.wrap_ms is not None or self.growth.compiled)
        self.observers.call("after_follow", turn)
        self.restart_clock()
        return turn

    def _measure(self, step: int, tick: int, measure: Callable[[], Measured]) -> tuple[dict[str, float], RankWord]:
        """This rank's entries of the observe vector, and its word; never raises."""
        self.marks.step, self.marks.tick = step, tick
        self.marks.mark("buffers")
        average_running_statistics(self.grown.model, self.world, self.lockstep.average)
        self.marks.mark("measure")
        try:
            values, nonfinite = measure()
            return values, RankWord(nonfinite_losses=nonfinite)
        except Exception as error:
            if not isinstance(error, EsperError):
                traceback.print_exc()  # other ranks get one line; the author of the code needs the stack
            self._failure_text = one_line(error)
            return {}, RankWord(failure=Failure.MEASURE)

    def _observe(
        self, before: RunState, values: Mapping[str, float], word: RankWord, *, step: int, epoch: int, graded: bool
    ) -> Turn:
        """Runs the first collective, and absorbs the agreed sums into the state."""
        self.marks.mark("observe")
        sums = self.lockstep.observe(values)
        state = absorb(before, sums, self.terms, step=step, epoch=epoch)
        if not graded:
            state = replace(state, train_accuracy=ABSENT, validation_accuracy=ABSENT)
        return Turn(before, state, sums, word)

    def _commit(self, turn: Turn, controller: Controller | None) -> Decision:
        """Runs the second collective, then the reducer.

        Raises:
            LockstepError: ranks parted, or one of them failed.
        """
        self.marks.mark("decide")
        state = turn.state
        commands, order, word = self._decide(controller, state, turn.word)
        began = time.perf_counter()
        digests = self.lockstep.digests_of(state, self.grown, parameters=turn.full)
        digest_ms = 1e3 * (time.perf_counter() - began)
        self.marks.mark("births")
        check = BirthCheck(self.grown, state, turn.sums, self.evaluator, self.terms)
        self._waited_ms += self.growth.settle(check)
        digests |= self.lockstep.newborn_digests(self.growth.newborns)
        self.marks.mark("commit")
        agreed = self.lockstep.commit(state, commands, digests, self.growth.vetoes, word, self._failure_text, order)
        self.narrator.report_local_buffers(state, self.lockstep.news)
        self.marks.mark("apply")
        ticks = self.control.stage_ticks
        outcome = reduce_tick(state, agreed.commands, agreed.vetoes, self.terms, stage_ticks=ticks, order=agreed.order)
        return Decision(agreed, outcome, commands, digest_ms)

    def _follow(self, turn: Turn) -> tuple[RunState, float | None]:
        """Makes the model what the new state says, and reports it; returns the state and milliseconds of the wrap."""
        self.marks.mark("stage")
        decision = turn.agreed
        state = decision.outcome.state
        self.growth.perform(decision.outcome.effects)
        self.marks.mark("rewrap")
        wrap_ms = self.growth.follow(state, force=turn.save)
        self.narrator.report_decisions(decision.outcome.events, decision.commands, self.terms)
        self.narrator.report_failures(state, self.growth.failures)
        if self.growth.library is not None:
            self.narrator.report_library(state, self.growth.library, waited_ms=self._waited_ms)
            self._waited_ms = 0.0
        if self.growth.compiler is not None:
            self.narrator.report_compiled(state, self.growth.compiler.reports)
            for where, why in self.growth.compiler.take_degraded().items():
                self.narrator.report_fault(state, f"{where} runs without its compiled graph from here on: {why}", where)
        count = len(self.growth.owner.gradient_set())
        self.narrator.report_wrap(state, wrap_ms, parameters=count, saved=turn.save)
        return state, wrap_ms

    def _decide(
        self, controller: Controller | None, state: RunState, word: RankWord
    ) -> tuple[dict[str, Command] | None, RunOrder, RankWord]:
        """On rank 0, one command per slot, with proposal ids, and the order to the whole run. If the controller fails,
        this rank's word says so."""
        if controller is None:
            return None, NO_ORDER, word
        try:
            if word.failure is Failure.NONE:
                observation = observation_of(state, self.terms)
                taken = self.desk.take(state, self.terms, stage_ticks=self.control.stage_ticks)
                asked = None if after_order(state.steering, taken.order, state.tick).paused else controller
                first = taken.commands
                return propose(asked, observation, state.proposals, self.terms.names, first=first), taken.order, word
        except Exception as error:
            traceback.print_exc()
            self._failure_text = one_line(error)
            word = replace(word, failure=Failure.DECIDE)
        return {entry.slot: wait(entry.slot) for entry in state.slots}, NO_ORDER, word

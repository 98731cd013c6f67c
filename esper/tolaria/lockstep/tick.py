"""One control tick of one network on all ranks, for whoever owns the loop around it: the trainer, or a user's own.

    measure   this rank's sums; a failure travels as this rank's word                         (never raises)
    observe   ONE all-reduce, absorbed into the agreed state
    commit    rank 0 decides; commands, digests and vetoes in ONE all-reduce; then the pure reducer
    follow    effects, phases, learning, alpha, wrapper: the model is made what the state says

Between two of these the owner of the loop does what is its own: the trainer settles its saves between commit and
follow. Every step leads from the agreed state, so that all ranks take the same branches.
"""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from esper.accord.absorb import absorb
from esper.accord.effects import Outcome
from esper.accord.observe import observe
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import Grown
from esper.leyline.commands import Command, wait
from esper.leyline.errors import one_line
from esper.leyline.observation import Observation
from esper.leyline.protocols import Controller
from esper.tolaria.growth.growth import Growth
from esper.tolaria.lockstep.buffers import average_running_statistics
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.propose import propose
from esper.tolaria.lockstep.window import Window
from esper.tolaria.lockstep.wire import Agreed, Failure, RankWord
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.world import World

Measured = tuple[dict[str, float], int]  # entries of the observe vector, samples whose loss was not finite


class Marks(Protocol):
    """Where this rank is, for naming it should it go missing."""

    step: int
    tick: int

    def mark(self, phase: str, error: str = "") -> None:
        """Notes that this rank enters ``phase``."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One commit: what all ranks agreed, what it leads to, rank 0's commands, milliseconds of the digests."""

    agreed: Agreed
    outcome: Outcome
    commands: Mapping[str, Command] | None
    digest_ms: float


def tick_due(
    state: RunState, step: int, window: Window, control: ControlConfig, terms: Terms, *, max_consecutive: int
) -> bool:
    """Whether the tick comes now: by count, at the end, or at once after a row of skipped steps.

    Args:
        state: of the latest tick. step: optimizer steps done. window: counted since. control, terms: of the run.
        max_consecutive: skipped steps in a row that end the run.
    """
    row, since = window.row, step - state.step
    if step == terms.total_steps or since >= control.max_steps:
        return since > 0
    if row and (row % terms.max_skips == 0 or row >= max_consecutive):
        return True
    return control.every > 0 and since >= control.every


class Cycle:
    """Takes one network from tick to tick. Holds the parts, and no agreed state.

    Args:
        world, marks: this rank's place. grown, growth: the model and who changes it.
        terms, control, lockstep: of the run. narrator: tells what happened.
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
    ) -> None:
        self.world, self.marks, self.grown, self.growth = world, marks, grown, growth
        self.terms, self.control, self.lockstep, self.narrator = terms, control, lockstep, narrator
        self._failure_text, self._waited_ms = "", 0.0

    def measure(self, step: int, tick: int, own: Callable[[], Measured]) -> tuple[dict[str, float], RankWord]:
        """This rank's entries of the observe vector, and its word.

        Args:
            step, tick: optimizer steps done, and the tick that begins. own: measures.
        """
        self.marks.step, self.marks.tick = step, tick
        self.marks.mark("buffers")
        average_running_statistics(self.grown.model, self.world)
        self.marks.mark("measure")
        try:
            values, nonfinite = own()
            return values, RankWord(nonfinite_losses=nonfinite)
        except Exception as error:
            traceback.print_exc()  # the others get a line; whoever wrote the code needs the place
            self._failure_text = one_line(error)
            return {}, RankWord(failure=Failure.MEASURE)

    def observe(
        self, before: RunState, values: Mapping[str, float], *, step: int, epoch: int
    ) -> tuple[RunState, dict[str, float]]:
        """The first collective: the state with the agreed sums taken in, and those sums."""
        self.marks.mark("observe")
        sums = self.lockstep.observe(values)
        return absorb(before, sums, self.terms, step=step, epoch=epoch), sums

    def commit(self, state: RunState, controller: Controller | None, word: RankWord, *, full: bool) -> Decision:
        """The second collective, and the reducer.

        Args:
            state: of `observe`. controller: on rank 0, None elsewhere. word: this rank's.
            full: digest all parameters and buffers, not live seeds alone.

        Raises:
            LockstepError: ranks parted, or one of them failed.
        """
        self.marks.mark("decide")
        commands, word = self._decide(controller, state, observe(state, self.terms), word)
        began = time.perf_counter()
        digests = self.lockstep.digests_of(state, self.grown, parameters=full)
        digest_ms = 1e3 * (time.perf_counter() - began)
        self.marks.mark("births")
        self._waited_ms += self.growth.settle()
        self.marks.mark("commit")
        agreed = self.lockstep.commit(state, commands, digests, self.growth.vetoes, word, self._failure_text)
        self.marks.mark("apply")
        outcome = reduce_tick(state, agreed.commands, agreed.vetoes, self.terms, stage_ticks=self.control.stage_ticks)
        return Decision(agreed, outcome, commands, digest_ms)

    def follow(self, decision: Decision, *, force: bool) -> tuple[RunState, float | None]:
        """Makes the model what the new state says, and tells of it.

        Args:
            decision: of `commit`. force: wrap anew in any case (a save is a re-wrap point).

        Returns:
            The new agreed state; milliseconds of the wrap, None when there was none.
        """
        self.marks.mark("stage")
        state = decision.outcome.state
        self.growth.perform(decision.outcome.effects)
        self.marks.mark("rewrap")
        wrap_ms = self.growth.follow(state, force=force)
        self.narrator.decisions(decision.outcome.events, decision.commands)
        self.narrator.failures(state, self.growth.failures)
        if self.growth.library is not None:
            self.narrator.library(state, self.growth.library, waited_ms=self._waited_ms)
            self._waited_ms = 0.0
        if self.growth.compiler is not None:
            for where, why in self.growth.compiler.degraded().items():
                self.narrator.fault(state, f"{where} runs without its compiled graph from here on: {why}", where)
        count = len(self.growth.owner.gradient_set())
        self.narrator.rewrapped(state, wrap_ms, parameters=count, saved=force)
        return state, wrap_ms

    def _decide(
        self, controller: Controller | None, state: RunState, observation: Observation, word: RankWord
    ) -> tuple[dict[str, Command] | None, RankWord]:
        """Rank 0: one command per slot, with proposal ids. A controller that fails becomes this rank's word."""
        if controller is None:
            return None, word
        try:
            if word.failure is Failure.NONE:
                return propose(controller, observation, state.proposals, self.terms.names), word
        except Exception as error:
            traceback.print_exc()
            self._failure_text = one_line(error)
            word = replace(word, failure=Failure.DECIDE)
        return {entry.slot: wait(entry.slot) for entry in state.slots}, word

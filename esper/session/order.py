"""Where a user's loop stands within a step: which calls are due, and what dropping the step puts back.

    loss  backward  step                        `passes` 0 -> 1 -> 0
    accumulate(loss backward ...)  loss backward  step

A forward adds its samples to counts and moves the random stream. So the first forward of a step keeps both as they
were; `CallOrder.drop` puts them back and clears the gradients. What an interruption tore, in the middle of an optimizer
step or of a tick, cannot be put back: then only a load helps, and every other call says so.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esper.kasmina.slots.grown import HOST, Grown
from esper.kasmina.streams import rng_state, set_rng_state
from esper.leyline.errors import ConfigError, DivergedError, LoopError, one_line
from esper.tolaria.growth.adopt import AdoptedOptimizer
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.world import World

LOOP = "the loop"  # phase of a rank that is in none of the session's calls
INSTEAD = "or session.discard() to drop the step under way"
LOAD = "call session.load_state_dict(an earlier state), or Session.restore"


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of samples, and random streams, as they were before a forward."""

    sums: Tensor
    tallies: dict[str, tuple[Tensor | None, Tensor | None]]
    streams: dict[str, Any]


class CallOrder:
    """The order of calls within one step.

    Args:
        grown: model and slots.
        adopted: the user's optimizer.
        window: counts between ticks.
        world: this process's place among the ranks.

    Fields:
        passes: losses since the last step.
        awaiting: the step's last loss has been computed; its step is due.
        windowed: within `accumulate`.
        in_backward: a backward has begun and has not come to its end.
        torn: what was interrupted in the middle of a change; empty if nothing was.
        dropped: the call that dropped the step under way; empty after the next loss.
    """

    def __init__(self, grown: Grown, adopted: AdoptedOptimizer, window: Window, world: World) -> None:
        self._grown, self._adopted, self._window, self._world = grown, adopted, window, world
        self.passes, self.awaiting, self.windowed, self.in_backward = 0, False, False, False
        self.torn = self.dropped = ""
        self._kept: Counts | None = None

    @property
    def between(self) -> bool:
        """Whether no step is under way."""
        return not (self.awaiting or self.passes or self.windowed)

    # a step -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Within the block one loss is computed; if it fails, its samples do not count."""
        before = self._read()
        if not self.passes:
            self._kept = before
        try:
            yield
        except BaseException:
            self._put_back(before)
            raise
        self.passes += 1
        self.awaiting, self.dropped = not self.windowed, ""

    def guard_backward(self, loss: Tensor, marks: LastWord) -> None:
        """Has ``loss.backward()`` name a lost rank, for which the others wait within that call, and note its end."""

        def backward(*args: Any, **kwargs: Any) -> None:
            del loss.backward  # otherwise the tensor would hold a function that holds the tensor
            marks.mark("backward")
            self.in_backward = True
            with self._world.collective("backward"):
                loss.backward(*args, **kwargs)
            self.in_backward = False
            marks.mark(LOOP)

        loss.backward = backward  # type: ignore[method-assign]

    @contextlib.contextmanager
    def one_window(self) -> Iterator[None]:
        """Within the block passes add up; an error that leaves it drops the whole window."""
        self.windowed = True
        try:
            yield
        except BaseException:
            self.drop("session.accumulate(), which an error left,")
            raise
        finally:
            self.windowed = False

    def end_step(self) -> None:
        """The step's gradients have been used."""
        self.passes, self.awaiting, self._kept = 0, False, None

    def drop(self, by: str) -> None:
        """Drops the step under way: gradients, passes, window; its samples and its random numbers, too.

        Args:
            by: the call that drops it, for the error of a later `session.step()`.
        """
        self._adopted.optimizer.zero_grad(set_to_none=True)
        if self._kept is not None:
            self._put_back(self._kept)
            self.dropped = by
        self.passes, self.awaiting, self.windowed, self.in_backward, self._kept = 0, False, False, False, None

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Within the block weights or topology change; an interruption leaves them torn."""
        try:
            yield
        except (LoopError, DivergedError):  # raised before the change, or after it
            raise
        except BaseException as error:
            self.torn = f"{what} was interrupted ({one_line(error)})"
            raise

    def _read(self) -> Counts:
        tallies = {slot: (holder.tally.sums, holder.heard.sums) for slot, holder in self._grown.slots.items()}
        return Counts(self._window.sums, tallies, rng_state(self._world.device))

    def _put_back(self, counts: Counts) -> None:
        self._window.take_sums(counts.sums)
        for slot, sums in counts.tallies.items():
            self._grown.slots[slot].tally.load(sums[0])
            self._grown.slots[slot].heard.load(sums[1])
        set_rng_state(counts.streams, self._world.device)

    # refusals -----------------------------------------------------------------------------------------------------

    def check_whole(self) -> None:
        """Raises LoopError if an interruption has torn the network."""
        if self.torn:
            raise LoopError(f"{self.torn}: the network may be half changed; {LOAD}")

    def check_between(self, what: str) -> None:
        """Raises LoopError between a loss and its step."""
        if not self.between:
            raise LoopError(
                f"{what} between session.loss(batch) and session.step(); call session.step() first, {INSTEAD}"
            )

    def check_loss(self) -> None:
        """Raises LoopError if a step is due before the next loss."""
        if self.awaiting:
            raise LoopError(
                "session.loss(batch) was called again before session.step(); call it once per step, or all but the "
                f"last within session.accumulate(), {INSTEAD}"
            )

    def check_step(self, *, has_loss: bool, find_unused: bool, changed: list[str]) -> None:
        """Refuses a step for which a call is missing, or a gradient.

        Args:
            changed: parameters whose ``requires_grad`` was changed since the model was wrapped.
            has_loss: the session was given a loss, so that one must have been computed.
            find_unused: parameters without a gradient are allowed on several ranks.
        """
        if self.windowed:
            raise LoopError("session.step() within session.accumulate(); it belongs after the block")
        if has_loss and not self.awaiting:
            last = "; the window's last session.loss(batch) goes outside session.accumulate()" if self.passes else ""
            last = f"; {self.dropped} has dropped the step under way" if self.dropped else last
            raise LoopError(f"session.step() without session.loss(batch) before it{last}")
        if self.in_backward:
            raise LoopError("session.step() after a backward that was interrupted; call session.discard() first")
        if changed:
            raise LoopError(
                f"requires_grad of {_some(changed)} was changed since the last tick, and this step does not follow; "
                "change it between two steps and call session.discard() then, on every rank"
            )
        idle = self._adopted.without_gradient()
        if idle and len(idle) == self._count_learning():
            raise LoopError(f"session.step(): the host has no gradient; call loss.backward() first, {INSTEAD}")
        if idle and self._world.size > 1 and not find_unused:  # then DDP did not reduce all gradients
            raise ConfigError(
                f"no gradient reaches {_some(idle)} of the host; freeze them (requires_grad_(False)), or set "
                "find_unused=True and slots.incubation to ste or immediate"
            )

    def _count_learning(self) -> int:
        """Parameters of the host that need a gradient."""
        return sum([parameter.requires_grad for _, parameter in self._grown.owner_map()[HOST]])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

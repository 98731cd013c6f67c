"""An average of the weights in a user's loop, from `esper.Session.ema`.

    ema = session.ema(0.999)                # once, before the loop; after a restore again, or not: the file knows it
    ...session.step()                       # updates it
    with ema.applied(): evaluate(session.model)
    plain = ema.export()

What it follows and how is said in `esper.tolaria.lockstep.ema`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from esper.kasmina.export import export
from esper.leyline.errors import CheckpointError, ConfigError
from esper.session.loop import Loop
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.ranks.digest import digest_tensors


class Ema:
    """The average of one session's network, for its user.

    Fields:
        decay: share of the average that one optimizer step keeps.
    """

    def __init__(self, loop: Loop, average: WeightAverage) -> None:
        self._loop, self._average = loop, average
        self.decay = average.decay

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's parameters are the averages; afterwards they are the weights again, bit for bit.

        Buffers (running statistics) are the model's own. Each rank may do it by itself.

        Raises:
            LoopError: between a loss and its step; in the block, from a call that trains, saves or restores.
        """
        if not self._loop.closed and not self._average.in_use:
            self._loop.check_between("ema.applied()")
        with self._average.applied():
            yield

    def export(self, example: Any = None, *, fold: bool = True, partial: bool = False) -> nn.Module:
        """`esper.Session.export` of the average."""
        with self.applied():
            return export(self._loop.grown, example, fold=fold, partial=partial).module

    def state_dict(self) -> dict[str, Tensor]:
        """A state dict of the model with the averages in the place of its parameters; copies."""
        with self.applied():
            return {name: tensor.detach().clone() for name, tensor in self._loop.grown.model.state_dict().items()}


def begin_average(loop: Loop, decay: float) -> WeightAverage:
    """The session's average, begun if there is none.

    Raises:
        ConfigError: the decay is outside (0, 1), or not that of the average that there is.
    """
    decay = float(decay)
    if not 0.0 < decay < 1.0:
        raise ConfigError(f"ema: decay = {decay}: must be > 0 and < 1, such as 0.999")
    if loop.average is None:
        loop.average = WeightAverage(loop.grown, decay)
        loop.parts.cycle.observers.add(loop.average)
    elif loop.average.decay != decay:
        raise ConfigError(
            f"ema: decay = {decay}: this session already keeps an average with {loop.average.decay}, and one is all; "
            f"ask for session.ema({loop.average.decay})"
        )
    return loop.average


def average_words(loop: Loop) -> str:
    """What the ranks compare before a save: decay and bits of the average."""
    average = loop.average
    return "none" if average is None else f"{average.decay} {digest_tensors(average.averages.items())}"


def collect_average(loop: Loop) -> dict[str, Any] | None:
    """What a session's file holds of the average, copies on the CPU; None without one."""
    if loop.average is None:
        return None
    state = loop.average.state_dict()
    return {**state, "averages": {name: t.detach().to("cpu", copy=True) for name, t in state["averages"].items()}}


def check_average(loop: Loop, payload: Mapping[str, Any], where: str) -> None:
    """Refuses a file whose average is not this session's; one that the session has not asked for is welcome.

    Raises:
        CheckpointError: the text says what to do.
    """
    saved, mine = payload["ema"], loop.average
    if mine is not None and saved is None:
        raise CheckpointError(
            f"{where}: saved before session.ema({mine.decay}) began, so it has no average; load it into a session "
            "without one, then call session.ema"
        )
    if mine is not None and saved["decay"] != mine.decay:
        raise CheckpointError(f"{where}: its average has the decay {saved['decay']}, this session's {mine.decay}")


def load_average(loop: Loop, payload: Mapping[str, Any]) -> None:
    """Makes the average what the file says; the model's topology is the file's already."""
    if payload["ema"] is not None:
        begin_average(loop, payload["ema"]["decay"]).load_state_dict(payload["ema"])

"""Births that the library builds beside training, and the wait for them before the commit that settles them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from esper.accord.effects import Veto
from esper.kasmina.births import Library, Ticket
from esper.tolaria.growth.staging import Unfit


@dataclass(frozen=True, slots=True)
class Waiting:
    """A birth that the library is building, and the check that the training thread runs once it is ready."""

    ticket: Ticket
    check: Callable[[nn.Module], None]


class NotReady(Unfit):
    """It is still being built."""

    veto = Veto.NOT_READY


def await_births(library: Library, waiting: dict[str, Waiting]) -> tuple[float, dict[str, nn.Module | Exception]]:
    """Waits for births under way, up to `LibraryConfig.wait_s` for all of them together.

    So a birth takes two ticks on a fast machine and on a slow one. If the wait is not enough, this rank vetoes with
    NOT_READY, and all ranks keep the seed staged.

    Args:
        library: builds them.
        waiting: by slot; those that are built are taken out.

    Returns:
        Milliseconds waited; and by slot the seed, or why there is none.
    """
    began = time.monotonic()
    until = began + library.config.wait_s
    found: dict[str, nn.Module | Exception] = {}
    for slot, birth in list(waiting.items()):
        if not birth.ticket.wait(until - time.monotonic()):
            found[slot] = NotReady()
            continue
        del waiting[slot]
        try:
            seed = library.take(birth.ticket)
            birth.check(seed)
            found[slot] = seed
        except Exception as error:
            found[slot] = error
    return 1e3 * (time.monotonic() - began), found

"""Asks the controller, and turns its answer into one command per slot, each with a proposal id.

A command that cannot travel (an operator by name, half a tick, no target) is refused here, inside the deciding try of a
tick, so that every rank raises the same text. Whether a command is legal is judged by the reducer, alike on every rank.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command, wait
from esper.leyline.errors import ConfigError
from esper.leyline.observation import Observation
from esper.leyline.protocols import Controller
from esper.leyline.stages import Op

ENUMS: dict[str, type[IntEnum]] = {"op": Op, "operator": Operator, "curve": Curve}
NUMBERS = ("steepness", "target")
MOST_TICKS = 2**31 - 1
NONE: Mapping[str, Command] = MappingProxyType({})


def propose(
    controller: Controller | None,
    observation: Observation,
    proposals: int,
    names: Sequence[str],
    *,
    first: Mapping[str, Command] = NONE,
) -> dict[str, Command]:
    """Asks the controller and numbers its commands; slots that it leaves out wait.

    Args:
        controller: of this run; None is not asked, since growth is paused.
        observation: the agreed observation.
        proposals: proposal ids given so far.
        names: the agreed catalogue of blueprints.
        first: people's orders by slot, which come before the controller's own command for that slot.

    Raises:
        ConfigError: the controller named an unknown slot, one slot twice, an unknown blueprint, or gave a field a value
            that it cannot have; the text names slot and field.
    """
    commands = {view.slot: wait(view.slot) for view in observation.slots}
    asked: set[str] = set()
    answer: Any = () if controller is None else controller.decide(observation)
    if controller is None:
        return _put_first(first, commands, proposals)
    if not isinstance(answer, Iterable):
        raise ConfigError(f"controller {controller.name}: decide returned {answer!r}, expected a list of Commands")
    for command in answer:
        if not isinstance(command, Command):
            raise ConfigError(f"controller {controller.name}: decide returned a {command!r}, expected Commands")
        if command.slot not in commands or command.slot in asked:
            raise ConfigError(f"controller {controller.name}: slot {command.slot} unknown or twice")
        if command.blueprint is not None and command.blueprint not in names:
            raise ConfigError(f"controller {controller.name}: no blueprint {command.blueprint!r}")
        asked.add(command.slot)
        try:
            commands[command.slot] = replace(check_command(command), proposal=proposals + len(asked))
        except ValueError as error:
            raise ConfigError(f"controller {controller.name}: {command.slot}.{error}") from None
    return _put_first(first, commands, proposals + len(asked))


def _put_first(first: Mapping[str, Command], commands: dict[str, Command], proposals: int) -> dict[str, Command]:
    """The commands with people's orders in the places of the controller's own, numbered after them."""
    for count, (slot, order) in enumerate(first.items(), 1):
        own, reason = commands[slot], order.reason
        if own.op is not Op.WAIT:
            reason = f"{reason}; it came before the controller's {own.op.name}"
        commands[slot] = replace(order, proposal=proposals + count, reason=reason)
    return commands


def check_command(command: Command) -> Command:
    """Returns a command whose fields have their own types, numpy's numbers turned into Python's.

    Raises:
        ValueError: a field has a value that cannot travel; the text begins with its name.
    """
    for name, kind in ENUMS.items():
        value = getattr(command, name)
        if not isinstance(value, kind):
            members = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
            raise ValueError(f"{name} = {value!r}: expected one of {members}")
    try:
        if isinstance(command.ticks, bool):
            raise TypeError
        ticks = operator.index(command.ticks)
    except TypeError:
        raise ValueError(f"ticks = {command.ticks!r}: expected a whole number") from None
    if abs(ticks) > MOST_TICKS:
        raise ValueError(f"ticks = {ticks}: expected at most {MOST_TICKS}")
    numbers: dict[str, Any] = {}
    for name in NUMBERS:
        value = getattr(command, name)
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise ValueError(f"{name} = {value!r}: expected a number")
        numbers[name] = float(value)
        if not math.isfinite(numbers[name]):
            raise ValueError(f"{name} = {value!r}: expected a finite number")
    return replace(command, ticks=ticks, **numbers)

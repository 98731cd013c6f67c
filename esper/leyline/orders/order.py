"""An order as a person gives it, and what it asks of a run.

An order names one command with its arguments, the run and the attempt it is for, who gives it, when, and a nonce that
no other order has. `text_of` is the canonical text of all that: JSON in ASCII with sorted keys and no blanks. The
signature is over this text, so nothing of an order can be changed, and nothing that is not part of it is read.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command
from esper.leyline.orders.verbs import LEVELS, PHASES, RunOrder, RunVerb
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.slots import parse_slot
from esper.leyline.stages import Op

MOST_BYTES = 4096  # of an order with its signature
MOST_WORDS = 200  # characters of a reason
HEADING = "esper order 1\n"
_NONCE = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_.@+-]{1,64}")

SLOT_COMMANDS: dict[str, tuple[Op, tuple[str, ...]]] = {
    "germinate": (Op.GERMINATE, ("blueprint", "operator", "curve", "steepness", "ticks", "target")),
    "advance": (Op.ADVANCE, ()),
    "set-alpha-target": (Op.SET_ALPHA_TARGET, ("target", "operator", "curve", "steepness", "ticks")),
    "prune": (Op.PRUNE, ("ticks", "curve", "steepness")),
    "fossilise": (Op.FOSSILIZE, ()),
}
RUN_COMMANDS: dict[str, tuple[RunVerb, tuple[str, ...]]] = {
    "pause": (RunVerb.PAUSE, ()),
    "resume": (RunVerb.RESUME, ()),
    "breaker": (RunVerb.BREAKER, ("phase",)),
    "checkpoint": (RunVerb.CHECKPOINT, ()),
    "stop": (RunVerb.STOP, ("after",)),
    "log-level": (RunVerb.LEVEL, ("level",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One order.

    Fields:
        run_id: id of the run.
        attempt: number of the run's attempt.
        sender: who gives it, 1 to 64 letters, digits and _.@+-
        nonce: 32 hexadecimal digits that no other order has.
        time_ms: when it was given, milliseconds since 1970.
        valid_ms: milliseconds from then on in which a tick may take it.
        command: one of `SLOT_COMMANDS` and `RUN_COMMANDS`.
        slot: slot id; None for an order to the whole run.
        arguments: of the command, every one that it has.
        dry_run: whether only the verdict is wanted.
        why: reason, for the record; one printable line.
    """

    run_id: str
    attempt: int
    sender: str
    nonce: str
    time_ms: int
    valid_ms: int
    command: str
    slot: str | None
    arguments: dict[str, Any]
    dry_run: bool
    why: str

    def __post_init__(self) -> None:
        if not _NONCE.fullmatch(self.nonce):
            raise ValueError("nonce: expected 32 hexadecimal digits")
        if not _NAME.fullmatch(self.sender):
            raise ValueError("sender: expected 1 to 64 letters, digits and _.@+-")
        if len(self.why) > MOST_WORDS or not self.why.isprintable():
            raise ValueError(f"why: expected one line of at most {MOST_WORDS} printable characters")
        for name in ("attempt", "time_ms", "valid_ms"):
            if not 0 <= getattr(self, name) < 2**53:
                raise ValueError(f"{name}: expected a whole number from 0")

    @property
    def words(self) -> str:
        """The command as it was typed, for people."""
        rest = [str(value) for value in self.arguments.values() if value not in (None, "")]
        return " ".join([self.command, *([self.slot] if self.slot else []), *rest])


def text_of(order: Order) -> bytes:
    """The canonical text of an order, which is what is signed."""
    text = json.dumps(to_plain(order), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return (HEADING + text).encode("ascii")


def read_order(plain: Any) -> Order:
    """Reads an order from plain data.

    Raises:
        ValueError: something is missing, unknown, or of another kind.
    """
    return from_plain(Order, plain, "order")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number")
    return float(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**31 - 1:
        raise ValueError(f"{name}: expected a whole number from 0")
    return value


def _member(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or value not in kind.__members__:
        raise ValueError(f"{name}: expected one of {', '.join(kind.__members__)}")
    return kind[value]


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> int:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}")
    return choices.index(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a name")
    return value


def _check_names(order: Order, names: tuple[str, ...]) -> None:
    if set(order.arguments) != set(names):
        raise ValueError(f"{order.command}: takes the arguments {', '.join(names) or 'none'}")


def command_of(order: Order) -> Command | RunOrder:
    """What an order asks of a run: a command to one slot, or an order to the whole run.

    Raises:
        ValueError: there is no such command, or an argument is missing, unknown or of another kind.
    """
    given = order.arguments
    if order.command in SLOT_COMMANDS:
        op, names = SLOT_COMMANDS[order.command]
        _check_names(order, names)
        if order.slot is None:
            raise ValueError(f"{order.command}: names no slot")
        parse_slot(order.slot)
        kinds = {
            "blueprint": _text,
            "ticks": _count,
            "target": _number,
            "steepness": _number,
            "operator": lambda name, value: _member(name, value, Operator),
            "curve": lambda name, value: _member(name, value, Curve),
        }
        fields: dict[str, Any] = {name: kinds[name](name, given[name]) for name in names}
        reason = f"order of {order.sender}: {order.why or 'no reason given'}"
        return Command(slot=order.slot, op=op, reason=reason, **fields)
    if order.command not in RUN_COMMANDS:
        raise ValueError(f"command: expected one of {', '.join([*SLOT_COMMANDS, *RUN_COMMANDS])}")
    verb, names = RUN_COMMANDS[order.command]
    _check_names(order, names)
    if order.slot is not None:
        raise ValueError(f"{order.command}: is to the whole run and names no slot")
    if verb is RunVerb.BREAKER:
        return RunOrder(verb=verb, value=_choice("phase", given["phase"], tuple(phase.value for phase in PHASES)))
    if verb is RunVerb.LEVEL:
        return RunOrder(verb=verb, value=_choice("level", given["level"], LEVELS))
    return RunOrder(verb=verb, value=_count("after", given["after"]) if verb is RunVerb.STOP else 0)

"""``esper ctl``: gives an order to a run in training, and says what became of it.

The order is signed with the run's key and put into RUN/orders/inbox; the run's rank 0 judges it and a tick takes it.
What is asked, and what is answered: `esper.leyline.orders`; docs/orders.md.
"""

import argparse
import contextlib
import getpass
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.leyline.alpha import Curve, Operator
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.files import RunDir, write_synced
from esper.leyline.orders.answer import Answer, Outcome, read_answer
from esper.leyline.orders.folder import OrdersDir
from esper.leyline.orders.order import MOST_BYTES, RUN_COMMANDS, SLOT_COMMANDS, Order, command_of, text_of
from esper.leyline.orders.seal import read_key, sign
from esper.leyline.orders.verbs import LEVELS, PHASES
from esper.leyline.plain import to_plain
from esper.nissa.screen import safe_streams
from esper.run.directory import find_run

CODES = {Outcome.APPLIED: 0, Outcome.REFUSED: 1, Outcome.EXPIRED: 75}
_POLL_S = 0.1


def own_name() -> str:
    """Who gives orders here: user@machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = f"uid{os.getuid()}"
    return re.sub(r"[^A-Za-z0-9_.@+-]", "_", f"{user}@{socket.gethostname()}")[:64]


def _seconds(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d+(\.\d*)?", text) else 0.0
    if not 1 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1 to 86400 seconds")
    return value


def _add(commands: Any, name: str, words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=words, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="only say what the verdict would be at the next tick")
    parser.add_argument("--why", metavar="TEXT", default="", help="your reason, for the record")
    parser.add_argument("--as", metavar="NAME", dest="sender", default=own_name(), help="who you are; user@machine")
    parser.add_argument("--wait", metavar="S", type=_seconds, default=300.0, help="seconds for a tick to come; 300")
    return parser


def _add_ramp(parser: argparse.ArgumentParser, ticks: int, *, operator: bool) -> None:
    parser.add_argument("--ticks", metavar="N", type=int, default=ticks, help=f"length of the ramp; {ticks}")
    parser.add_argument("--curve", type=str.upper, choices=list(Curve.__members__), default="COSINE", help="COSINE")
    parser.add_argument("--steepness", metavar="K", type=float, default=6.0, help="of a SIGMOID; 6")
    if operator:
        parser.add_argument("--operator", type=str.upper, choices=list(Operator.__members__), default="ADD", help="ADD")


def build_parser() -> argparse.ArgumentParser:
    """The words of ``esper ctl``."""
    parser = argparse.ArgumentParser("esper ctl", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    described = {
        "germinate": "plant a seed: SLOT BLUEPRINT",
        "advance": "take a seed one stage on: SLOT",
        "set-alpha-target": "blend a seed to another alpha: SLOT ALPHA",
        "prune": "take a seed out, at once or by a ramp: SLOT",
        "fossilise": "keep a seed for good: SLOT",
    }
    slot = {name: _add(commands, name, words) for name, words in described.items()}
    for entry in slot.values():
        entry.add_argument("slot", metavar="SLOT", help="as r0c1")
    slot["germinate"].add_argument("blueprint", metavar="BLUEPRINT", help="see esper blueprints")
    slot["germinate"].add_argument("--target", metavar="ALPHA", type=float, default=1.0, help="alpha to blend to; 1")
    slot["set-alpha-target"].add_argument("target", metavar="ALPHA", type=float, help="0 to 1")
    _add_ramp(slot["germinate"], 5, operator=True)
    _add_ramp(slot["set-alpha-target"], 5, operator=True)
    _add_ramp(slot["prune"], 0, operator=False)
    _add(commands, "pause", "growth stands still, training goes on")
    _add(commands, "resume", "growth goes on")
    breaker = _add(commands, "breaker", "turn the breaker of growth: PHASE")
    breaker.add_argument("phase", type=str.upper, choices=[phase.value for phase in PHASES])
    _add(commands, "checkpoint", "save after the next tick")
    stop = _add(commands, "stop", "save and stop after the next tick, or a later one")
    stop.add_argument("--after", metavar="TICK", type=int, default=0, help="after this tick; the next one")
    level = _add(commands, "log-level", "which events are written: LEVEL")
    level.add_argument("level", choices=LEVELS)
    return parser


def make_order(given: argparse.Namespace, opened: dict[str, Any]) -> Order:
    """The order that was typed, for the attempt that takes orders now.

    Raises:
        ConfigError: it is none.
    """
    names = SLOT_COMMANDS.get(given.command, RUN_COMMANDS.get(given.command, (None, ())))[1]
    try:
        order = Order(
            run_id=opened["run_id"],
            attempt=opened["attempt"],
            sender=given.sender,
            nonce=secrets.token_hex(16),
            time_ms=time.time_ns() // 1_000_000,
            valid_ms=int(1000 * given.wait),
            command=given.command,
            slot=getattr(given, "slot", None),
            arguments={name: getattr(given, name) for name in names},
            dry_run=given.dry_run,
            why=given.why,
        )
        command_of(order)
    except ValueError as error:
        raise ConfigError(f"esper ctl {given.command}: {error}") from None
    return order


def read_open(files: OrdersDir) -> dict[str, Any]:
    """What a running attempt says of the orders that it takes.

    Raises:
        RunDirError: none takes orders.
    """
    try:
        opened = json.loads(files.open.read_text())
        return {"run_id": str(opened["run_id"]), "attempt": int(opened["attempt"])}
    except FileNotFoundError:
        raise RunDirError(
            f"{files.path.parent}: takes no orders: it is not training now, or orders are off there (orders.enabled; "
            "its first lines say why)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{files.open}: cannot be read ({error}); is the run training?") from None


def send(files: OrdersDir, key: bytes, order: Order) -> Path:
    """Puts an order into the inbox; returns its file.

    Raises:
        RunDirError: it cannot be written.
    """
    letter = json.dumps({"order": to_plain(order), "signature": sign(key, text_of(order))}, separators=(",", ":"))
    if len(letter) > MOST_BYTES:
        raise ConfigError(f"esper ctl {order.command}: longer than {MOST_BYTES} bytes; give a shorter reason")
    temporary, path = files.path / f".{order.nonce}.tmp", files.inbox / order.nonce
    try:
        write_synced(temporary, letter, mode=0o600)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunDirError(f"{path}: the order cannot be written ({error.strerror})") from None
    return path


def wait_for(files: OrdersDir, key: bytes, order: Order, sent: Path, seconds: float) -> Answer:
    """Waits for the answer; an order that nobody has read by then is taken back."""
    until = time.monotonic() + seconds
    path = files.answers / order.nonce
    words = f"no answer within {seconds:g} s; is the run training? (esper runs)"
    try:
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError, ValueError):  # a forged answer is none
                answer = read_answer(key, path.read_bytes(), order.nonce)
                path.unlink(missing_ok=True)
                return answer
            time.sleep(_POLL_S)
            if not files.open.exists() and not path.exists():
                until, words = min(until, time.monotonic() + 5.0), "the run ended before it answered"
    finally:
        with contextlib.suppress(OSError):
            sent.unlink(missing_ok=True)
    return Answer(
        nonce=order.nonce,
        outcome=Outcome.EXPIRED,
        words=words,
        tick=None,
        step=None,
        number=None,
        dry_run=order.dry_run,
    )


def describe(answer: Answer) -> str:
    """An answer in one line."""
    became = f"would be {answer.outcome}" if answer.dry_run and answer.tick is not None else str(answer.outcome)
    where = "" if answer.tick is None else f" at tick {answer.tick}, step {answer.step}"
    line = "" if answer.number is None else f" (order {answer.number})"
    return f"{became}{where}{line}: {answer.words}"


@safe_streams()
def main(arguments: Sequence[str]) -> int:
    """Runs ``esper ctl``; returns 0 if the order was applied, 1 if it was refused, 75 if it expired."""
    given = build_parser().parse_args(list(arguments))
    files = OrdersDir(RunDir(find_run(given.run.absolute()).path).orders)
    opened = read_open(files)
    key = read_key(files.key)
    order = make_order(given, opened)
    sent = send(files, key, order)
    try:
        answer = wait_for(files, key, order, sent, given.wait + 10.0)
    except KeyboardInterrupt:
        print("esper: no longer waiting; the order may have been taken, see RUN/orders/journal.jsonl", file=sys.stderr)
        return 130
    print(f"esper: {describe(answer)}", flush=True)
    return CODES[answer.outcome]

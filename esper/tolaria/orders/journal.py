"""The orders that ticks took, each with its tick, on the disk before that tick is committed.

    {"number", "tick", "rollbacks", "attempt", "order", "seal"}      one line each

A run that goes on from an earlier tick, after a kill or a rollback, takes each order again at its own tick.
``rollbacks`` are those that the run had behind it: before its first rollback it takes only orders that it took before
that. Each line is sealed with the run's key over the line and the seal before it, so that nobody without the key can
put an order in, take one out, or change their order. A torn last line is of a tick that was never committed; it goes.
"""

import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline.errors import RunDirError
from esper.leyline.files import append_synced
from esper.leyline.orders.order import Order
from esper.leyline.orders.seal import sign
from esper.leyline.plain import from_plain, to_plain
from esper.nissa.lane import say


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One order that a tick took.

    Fields:
        number: of the line, from 1.
        tick: that took it.
        rollbacks: rollbacks of the run before.
        attempt: that took it first.
        order: the order.
    """

    number: int
    tick: int
    rollbacks: int
    attempt: int
    order: Order


def _seal(key: bytes, before: str, plain: dict[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sign(key, f"esper journal 1\n{before}\n{text}".encode("ascii"))


class Journal:
    """The journal of one run.

    Args:
        path: of the file; made with the first entry.
        key: of the run's orders.

    Raises:
        RunDirError: a line was changed, or cannot be read.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path, self._key, self._last = path, key, ""
        self._by_tick: dict[int, list[Entry]] = {}
        self.count = 0
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunDirError(f"{path}: cannot be read ({error.strerror}); the run needs it to go on") from None
        *lines, torn = data.split(b"\n")
        for line in lines:
            self._keep(self._read(line))
        if torn:
            say(f"{path}: its last line is torn, of a tick that was never committed; it is cut off")
            os.truncate(path, len(data) - len(torn))

    def _read(self, line: bytes) -> Entry:
        where = f"{self.path}: line {self.count + 1}"
        try:
            plain = json.loads(line)
            seal = str(plain.pop("seal"))
            if hmac.compare_digest(seal.encode(), _seal(self._key, self._last, plain).encode()):
                self._last = seal
                return from_plain(Entry, plain, "entry")
            problem = "is not sealed by this run's key"
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            problem = f"cannot be read ({error})"
        raise RunDirError(f"{where} {problem}; restore it from a copy, or move it away: the run then goes on without")

    def _keep(self, entry: Entry) -> None:
        self._by_tick.setdefault(entry.tick, []).append(entry)
        self.count += 1

    def at(self, tick: int, rollbacks: int) -> list[Entry]:
        """The orders that a tick took before, if the run had no more rollbacks behind it than now."""
        return [entry for entry in self._by_tick.get(tick, ()) if entry.rollbacks <= rollbacks]

    def append(self, orders: Sequence[Order], *, tick: int, rollbacks: int, attempt: int) -> list[Entry]:
        """Writes orders down in one go; they are on the disk when this returns.

        Raises:
            OSError: the disk refuses; the journal is as before.
        """
        entries, lines, last = [], [], self._last
        for number, order in enumerate(orders, self.count + 1):
            entry = Entry(number=number, tick=tick, rollbacks=rollbacks, attempt=attempt, order=order)
            plain = to_plain(entry)
            last = _seal(self._key, last, plain)
            lines.append(json.dumps({**plain, "seal": last}, separators=(",", ":"), allow_nan=False) + "\n")
            entries.append(entry)
        append_synced(self.path, "".join(lines).encode("ascii"), mode=0o600)
        self._last = last
        for entry in entries:
            self._keep(entry)
        return entries

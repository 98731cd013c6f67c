"""Orders for tests: made, signed, and laid into an inbox."""

import json
import secrets
from pathlib import Path
from typing import Any

from esper.leyline.orders.folder import OrdersDir
from esper.leyline.orders.order import Order, text_of
from esper.leyline.orders.seal import make_key, sign
from esper.leyline.plain import to_plain
from esper.tolaria.orders.clerk import Clerk
from esper.tolaria.orders.config import OrdersConfig
from esper.tolaria.orders.judge import Judge, now_ms
from esper.tolaria.orders.ledger import Ledger

RAMP = {"operator": "ADD", "curve": "COSINE", "steepness": 6.0, "ticks": 2}


def order_of(command: str, slot: str | None = None, **fields: Any) -> Order:
    """An order of ana for attempt 1 of run "run", given now; ``fields`` are of `Order`, the rest are arguments."""
    own = {name: fields.pop(name) for name in list(fields) if name in Order.__dataclass_fields__}
    base: dict[str, Any] = {
        "run_id": "run",
        "attempt": 1,
        "sender": "ana",
        "nonce": secrets.token_hex(16),
        "time_ms": now_ms(),
        "valid_ms": 60_000,
        "dry_run": False,
        "why": "a test",
    }
    return Order(command=command, slot=slot, arguments=fields, **(base | own))


def letter_of(order: Order, key: bytes) -> bytes:
    """The order as it travels."""
    return json.dumps({"order": to_plain(order), "signature": sign(key, text_of(order))}).encode()


def key_in(folder: Path) -> tuple[OrdersDir, bytes]:
    """RUN/orders in a folder, with its key and an inbox."""
    files = OrdersDir(folder / "orders")
    key, why = make_key(files.key)
    assert key is not None
    assert not why
    for path in (files.inbox, files.answers):
        path.mkdir(exist_ok=True)
    return files, key


def clerk_in(folder: Path, **settings: Any) -> Clerk:
    """A clerk whose thread is not started; `Clerk.look` is one look."""
    files, key = key_in(folder)
    config = OrdersConfig(**settings)
    keep = int(1000 * (config.window_s + config.skew_s))
    ledger = Ledger(files.ledger, keep_ms=keep, now_ms=now_ms())
    return Clerk(files, Judge(key, run_id="run", attempt=1, config=config, ledger=ledger))


def post(clerk: Clerk, data: bytes, name: str | None = None) -> Path:
    """Lays bytes into the inbox, whole at once, as `esper ctl` does."""
    path = clerk.files.inbox / (name or secrets.token_hex(16))
    temporary = clerk.files.path / f".{path.name}.tmp"
    temporary.write_bytes(data)
    return temporary.rename(path)

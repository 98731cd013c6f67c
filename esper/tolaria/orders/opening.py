"""Opens the desk of an attempt on rank 0: key, journal, ledger, clerk."""

from collections.abc import Callable
from pathlib import Path

from esper.leyline.files import RunDir
from esper.leyline.orders.folder import OrdersDir
from esper.leyline.orders.seal import NoKey, make_key
from esper.leyline.protocols import EventSink
from esper.nissa.lane import say
from esper.tolaria.orders.clerk import Clerk
from esper.tolaria.orders.config import OrdersConfig
from esper.tolaria.orders.desk import OrderDesk
from esper.tolaria.orders.journal import Journal
from esper.tolaria.orders.judge import Judge, now_ms
from esper.tolaria.orders.ledger import Ledger


def open_desk(
    run_dir: Path,
    config: OrdersConfig,
    *,
    run_id: str,
    attempt: int,
    lease: Callable[[], None],
    sink: EventSink,
    set_level: Callable[[str], None],
    cool_ticks: int | None,
) -> OrderDesk | None:
    """Opens the desk; see `OrderDesk` for what it needs.

    Returns:
        The desk. None if the run takes no orders and has taken none; one line has said why, unless the settings do.

    Raises:
        RunDirError: orders that the run has taken cannot be read.
    """
    files = OrdersDir(RunDir(run_dir).orders)
    known = files.journal.exists()
    if not config.enabled and not known:
        return None
    if known and not files.key.exists():
        raise NoKey(f"{files.key}: the orders in {files.journal.name} need it; restore it from a copy")
    try:
        key, why = make_key(files.key)
    except OSError as error:
        key, why = None, f"{files.key}: cannot be made ({error.strerror})"
    if why and config.enabled:
        say(f"{why}, so this run takes no orders")
    if key is None:
        return None
    clerk = None
    if config.enabled and not why:
        keep = int(1000 * (config.window_s + config.skew_s))
        ledger = Ledger(files.ledger, keep_ms=keep, now_ms=now_ms())
        clerk = Clerk(files, Judge(key, run_id=run_id, attempt=attempt, config=config, ledger=ledger))
    elif not known:
        return None
    return OrderDesk(
        Journal(files.journal, key),
        clerk,
        sink=sink,
        attempt=attempt,
        lease=lease,
        set_level=set_level,
        cool_ticks=cool_ticks,
    )

"""``esper compare NAME`` of growth policies over tasks: run what is missing, show the table."""

import signal
from collections.abc import Callable
from pathlib import Path

from esper.compare.cells import CellStore
from esper.compare.growth import GrowthCompareConfig
from esper.compare.regret import RegretReport, report_regrets
from esper.leyline.errors import Preempted


def run_over_tasks(
    config: GrowthCompareConfig, out: Path, *, report_only: bool, say: Callable[[str], None]
) -> RegretReport:
    """Runs the cells that are missing and puts all arms side by side.

    The first SIGINT or SIGTERM ends it after the next cell; the same command goes on, and hosts that were in training
    begin again.

    Raises:
        ConfigError: settings of an arm are wrong, or a policy cannot be read.
        Preempted: it was stopped before every cell was there.
        EsperError: there is nothing to put side by side yet.
    """
    store = CellStore(config, out)
    asked: list[int] = []
    if not report_only:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers]
        try:
            store.run(say, lambda: bool(asked))
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
    if asked:
        wanted = {(one.says, one.seed) for one in store.wanted()}
        left = len(wanted - set(store.done))
        raise Preempted(f"stopped with {left} of {len(wanted)} cells left; the same command goes on")
    return report_regrets(store)

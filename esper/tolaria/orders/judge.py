"""Judges an order before it may wait for a tick: signature, run, attempt, freshness, nonce, and what it asks.

The signature comes first, so a stranger's words go no further than a parser of 4 KB of JSON. What is judged on the
clock is judged here, once; from the journal on everything follows from agreed ticks.
"""

import json
import time
from collections.abc import Callable

from esper.leyline.orders.order import MOST_BYTES, Order, command_of, read_order, text_of
from esper.leyline.orders.seal import is_signed
from esper.leyline.orders.verbs import Refusal
from esper.tolaria.orders.config import OrdersConfig
from esper.tolaria.orders.ledger import Ledger


class Refused(Exception):
    """An order that is not taken.

    Args:
        refusal: why, by its kind.
        words: why, for people.
        order: the order if its signature is good, so that it can be answered and named.
    """

    def __init__(self, refusal: Refusal, words: str, order: Order | None = None) -> None:
        super().__init__(words)
        self.refusal, self.words, self.order = refusal, words, order


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Judge:
    """The judge of one attempt.

    Args:
        key: of the run's orders.
        run_id: of the run.
        attempt: number of the attempt.
        config: settings of orders.
        ledger: nonces that have come.
        clock: milliseconds since 1970.
    """

    def __init__(
        self,
        key: bytes,
        *,
        run_id: str,
        attempt: int,
        config: OrdersConfig,
        ledger: Ledger,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.key, self.run_id, self.attempt = key, run_id, attempt
        self.config, self.ledger, self._clock, self._now = config, ledger, clock, 0

    def now(self) -> int:
        """Milliseconds since 1970; never goes back, so that a purged nonce cannot become fresh again."""
        self._now = max(self._now, self._clock())
        return self._now

    def open(self, data: bytes) -> Order:
        """Reads an order and checks its signature.

        Raises:
            Refused: it is oversized, malformed, or signed by another key.
        """
        if len(data) > MOST_BYTES:
            raise Refused(Refusal.OVERSIZED, f"longer than {MOST_BYTES} bytes")
        try:
            letter = json.loads(data)
            if not isinstance(letter, dict) or set(letter) != {"order", "signature"}:
                raise ValueError("expected an order and its signature")
            signature = letter["signature"]
            if not isinstance(signature, str):
                raise ValueError("expected a signature")
            order = read_order(letter["order"])
            text = text_of(order)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise Refused(Refusal.MALFORMED, f"cannot be read ({str(error)[:200]})") from None
        if not is_signed(self.key, text, signature):
            raise Refused(Refusal.FORGED, "its signature is not by this run's key")
        return order

    def admit(self, order: Order) -> None:
        """Checks an order whose signature is good, and notes its nonce.

        Raises:
            Refused: it is not to be taken.
        """
        now, config = self.now(), self.config
        skew, window = int(1000 * config.skew_s), int(1000 * config.window_s)
        if order.run_id != self.run_id:
            raise Refused(Refusal.FORGED, f"it is for run {order.run_id}, this is {self.run_id}", order)
        if order.attempt != self.attempt:
            words = f"it is for attempt {order.attempt}, this is attempt {self.attempt}; give it again"
            raise Refused(Refusal.STALE, words, order)
        if order.nonce in self.ledger:
            raise Refused(Refusal.REPLAYED, "it has come before", order)
        age = now - order.time_ms
        if age > window + skew:
            words = f"it is {age / 1000:.1f} s old, orders.window_s is {config.window_s:g}; give it again"
            raise Refused(Refusal.STALE, words, order)
        if age < -skew:
            words = f"it is of {-age / 1000:.1f} s in the future, orders.skew_s is {config.skew_s:g}; see to the clocks"
            raise Refused(Refusal.STALE, words, order)
        if order.time_ms < self.ledger.since_ms:
            raise Refused(Refusal.STALE, "the ledger was damaged, so older orders are not taken; give it again", order)
        if order.time_ms < self.ledger.latest(order.sender):
            raise Refused(Refusal.OUT_OF_ORDER, f"a later order of {order.sender} has come; give it again", order)
        try:
            self.ledger.purge(now)
            self.ledger.add(order.time_ms, order.nonce, order.sender)
        except OSError as error:
            words = f"{self.ledger.path} cannot be written ({error.strerror})"
            raise Refused(Refusal.UNWRITTEN, words, order) from None
        try:
            command_of(order)
        except ValueError as error:
            raise Refused(Refusal.MALFORMED, str(error), order) from None

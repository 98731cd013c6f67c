"""Takes in orders and hands out answers, in a thread of its own on rank 0.

    inbox/NONCE -> read, remove -> judge -> queue (bounded) -> a tick takes it
    answers/NONCE <- what became of it

A look takes at most `BATCH` files, so strangers who fill the inbox cost a bounded share of one thread and no memory: a
refusal leaves a count and nothing else. A tick finds the queue in memory and touches no file of the inbox.
"""

import contextlib
import os
import re
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from esper.leyline.errors import one_line
from esper.leyline.files import write_json, write_whole
from esper.leyline.orders.answer import Answer, Outcome, write_answer
from esper.leyline.orders.folder import OrdersDir
from esper.leyline.orders.order import MOST_BYTES, Order
from esper.leyline.orders.verbs import Refusal
from esper.nissa.lane import say
from esper.tolaria.orders.judge import Judge, Refused

BATCH = 64  # files read in one look
ANSWERS = 64  # answers in one window to orders that did not come as far as the queue
_NONCE = re.compile(r"[0-9a-f]{32}")


class Clerk:
    """The orders of one attempt, from the inbox to the queue.

    Args:
        files: RUN/orders.
        judge: of this attempt.
    """

    def __init__(self, files: OrdersDir, judge: Judge) -> None:
        self.files, self.judge, self.config = files, judge, judge.config
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), threading.Event()
        self._queue: deque[Order] = deque()
        self._out: deque[Answer] = deque()
        self._counts: Counter[Refusal] = Counter()
        self._words: dict[Refusal, str] = {}
        self._answered, self._purged_ms, self._told = 0, 0, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Opens the inbox, and begins to look.

        Raises:
            OSError: the folder cannot be made.
        """
        for folder in (self.files.inbox, self.files.answers):
            folder.mkdir(mode=0o700, exist_ok=True)
        window, skew = self.config.window_s, self.config.skew_s
        words = {"run_id": self.judge.run_id, "attempt": self.judge.attempt, "window_s": window, "skew_s": skew}
        write_json(self.files.open, words)
        self._thread = threading.Thread(target=self._run, name="esper-orders", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answers every order that waits, ends the thread and shuts the inbox; safe to call twice."""
        with contextlib.suppress(OSError):
            self.files.open.unlink(missing_ok=True)
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10.0)
            self._thread = None
            for order in self.take_all():
                self.refuse(Refusal.EXPIRED, "the run ended before a tick took it", order)
            self._write_answers()

    # on the tick's side -------------------------------------------------------------------------------------------

    def take_all(self) -> list[Order]:
        """Empties the queue; returns its orders as they came."""
        with self._lock:
            orders = list(self._queue)
            self._queue.clear()
        return orders

    def put_back(self, orders: list[Order]) -> None:
        """Puts orders that this tick did not take in front of those that have come since."""
        with self._lock:
            self._queue.extendleft(reversed(orders))

    def answer(self, answer: Answer) -> None:
        """Hands an answer to the thread, which writes it."""
        self._out.append(answer)
        self._wake.set()

    def refuse(self, refusal: Refusal, words: str, order: Order) -> None:
        """Counts a refusal and answers the order."""
        self._count(refusal, f"{order.sender}: {order.words}: {words}")
        outcome = Outcome.EXPIRED if refusal is Refusal.EXPIRED else Outcome.REFUSED
        words = words if outcome is Outcome.EXPIRED else f"{refusal}: {words}"
        self.answer(_answer(order.nonce, outcome, words, dry_run=order.dry_run))

    def counts(self) -> tuple[Counter[Refusal], dict[Refusal, str]]:
        """Refusals in this attempt by reason, and the latest of each in words."""
        with self._lock:
            return Counter(self._counts), dict(self._words)

    # on the thread's side -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(self.config.poll_s)
            self._wake.clear()
            self._guard(self.look)
            self._guard(self._write_answers)

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, training goes on; said once
            if not self._told:
                self._told = True
                say(f"orders: {one_line(error)}; orders may not be read, training goes on")

    def look(self) -> None:
        """One look into the inbox."""
        now = self.judge.now()
        if now - self._purged_ms > 1000 * self.config.window_s:
            self._purged_ms, self._answered = now, 0
            self._remove_old_answers(now)
        found: list[Order] = []
        with os.scandir(self.files.inbox) as entries:
            names = [entry.name for entry in islice(entries, BATCH)]
        for name in names:
            data = self._read(self.files.inbox / name)
            if data is None:
                continue
            try:
                found.append(self.judge.open(data))
            except Refused as refused:
                self._turn_away(refused, None, name)
        for order in sorted(found, key=lambda order: order.time_ms):  # as they were given, not as the folder lists them
            try:
                self.judge.admit(order)
                self._wait(order)
            except Refused as refused:
                self._turn_away(refused, order)

    def _wait(self, order: Order) -> None:
        with self._lock:
            if len(self._queue) < self.config.queue:
                self._queue.append(order)
                return
        raise Refused(Refusal.BUSY, f"{self.config.queue} orders are waiting (orders.queue); give it again later")

    def _read(self, path: Path) -> bytes | None:
        """The first bytes of a file, which is removed; None if it cannot be, so that none is read twice."""
        data = b""
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    data = os.read(handle, MOST_BYTES + 1)
                finally:
                    os.close(handle)
            path.unlink()
        except FileNotFoundError:  # its sender took it back
            return None
        except IsADirectoryError:
            with contextlib.suppress(OSError):
                path.rmdir()
            return None
        return data

    def _turn_away(self, refused: Refused, order: Order | None, name: str = "") -> None:
        """Counts an order that does not come as far as the queue, and answers it; a few in each window, so that a flood
        makes no files. A replay is not answered, since its nonce has the answer of the order that it repeats."""
        words, nonce = refused.words, name if order is None else order.nonce
        self._count(refused.refusal, words if order is None else f"{order.sender}: {order.words}: {words}")
        if refused.refusal is not Refusal.REPLAYED and self._answered < ANSWERS and _NONCE.fullmatch(nonce):
            self._answered += 1
            dry_run = order is not None and order.dry_run
            self._out.append(_answer(nonce, Outcome.REFUSED, f"{refused.refusal}: {words}", dry_run=dry_run))

    def _count(self, refusal: Refusal, words: str) -> None:
        with self._lock:
            self._counts[refusal] += 1
            self._words[refusal] = words

    def _write_answers(self) -> None:
        while self._out:
            answer = self._out.popleft()
            write_whole(self.files.answers / answer.nonce, write_answer(self.judge.key, answer), mode=0o600)

    def _remove_old_answers(self, now: int) -> None:
        oldest = now / 1000 - 10 * self.config.window_s
        with os.scandir(self.files.answers) as entries:
            old = [entry.path for entry in islice(entries, 1024) if entry.stat().st_mtime < oldest]
        for path in old:
            Path(path).unlink(missing_ok=True)


def _answer(nonce: str, outcome: Outcome, words: str, *, dry_run: bool) -> Answer:
    return Answer(nonce=nonce, outcome=outcome, words=words, tick=None, step=None, number=None, dry_run=dry_run)

"""From the inbox to a tick: what the thread does, and that a tick does the same whatever lies in the inbox."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esper.accord.reducer import reduce_tick
from esper.leyline.commands import wait
from esper.leyline.events import OrdersRefused, OrderTaken
from esper.leyline.orders import seal
from esper.leyline.orders.answer import Answer, Outcome, read_answer
from esper.leyline.orders.order import MOST_BYTES, Order
from esper.leyline.orders.seal import NoKey, make_key, read_key
from esper.leyline.orders.verbs import Refusal, RunVerb
from esper.leyline.stages import Op
from esper.tolaria.lockstep.desk import Taken
from esper.tolaria.orders.clerk import ANSWERS, BATCH, Clerk
from esper.tolaria.orders.config import OrdersConfig
from esper.tolaria.orders.desk import OrderDesk
from esper.tolaria.orders.journal import Journal
from esper.tolaria.orders.opening import open_desk
from tests.support.agreed_states import Run, run_of
from tests.support.orders import RAMP, clerk_in, key_in, letter_of, order_of, post
from tests.support.tiny import ListSink

BIRTH: dict[str, Any] = {"blueprint": "light", "target": 1.0, **RAMP}


def look(clerk: Clerk) -> list[Order]:
    """One look; returns what waits."""
    clerk.look()
    orders = clerk.take_all()
    clerk.put_back(orders)
    return orders


def answer_to(clerk: Clerk, order: Order) -> Answer:
    clerk._write_answers()
    return read_answer(clerk.judge.key, (clerk.files.answers / order.nonce).read_bytes(), order.nonce)


def give(clerk: Clerk, *orders: Order) -> None:
    for order in orders:
        post(clerk, letter_of(order, clerk.judge.key), order.nonce)
    clerk.look()


class Ticks:
    """A run of two slots with a desk, taken from tick to tick."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.clerk, self.sink = clerk_in(folder, **settings), ListSink()
        self.run: Run = run_of(2)
        self.levels: list[str] = []
        self.lost = False
        self.desk = OrderDesk(
            Journal(self.clerk.files.journal, self.clerk.judge.key),
            self.clerk,
            sink=self.sink,
            attempt=1,
            lease=self.check,
            set_level=self.levels.append,
            cool_ticks=7,
        )

    def check(self) -> None:
        if self.lost:
            raise NoKey("a newer attempt has begun")

    def tick(self) -> Taken:
        """One tick that takes orders and carries them out."""
        run = self.run
        run.tick()
        state, terms = run.absorbed, run.terms
        taken = self.desk.take(state, terms, stage_ticks=3)
        commands = {entry.slot: wait(entry.slot) for entry in state.slots} | dict(taken.commands)
        run.out = reduce_tick(state, commands, {}, terms, stage_ticks=3, order=taken.order)
        run.state = run.out.state
        self.desk.tell(run.state, run.out)
        return taken

    def told(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.sink.events if type(event) is kind]


def test_orders_wait_as_they_were_given_and_no_file_is_left(tmp_path: Path) -> None:
    clerk = clerk_in(tmp_path)
    orders = [order_of("pause", time_ms=order_of("pause").time_ms + k) for k in range(5)]
    for order in reversed(orders):
        post(clerk, letter_of(order, clerk.judge.key), order.nonce)
    assert look(clerk) == orders
    assert list(clerk.files.inbox.iterdir()) == []


def test_what_is_no_order_is_counted_by_its_reason_and_removed(tmp_path: Path) -> None:
    clerk = clerk_in(tmp_path)
    post(clerk, b"x" * (MOST_BYTES + 1))
    post(clerk, b"x" * (1 << 22))
    post(clerk, b"{}")
    post(clerk, letter_of(order_of("pause"), bytes(32)))
    os.mkfifo(clerk.files.inbox / "fifo")
    (clerk.files.inbox / "link").symlink_to("/etc/hostname")
    (clerk.files.inbox / "folder").mkdir()
    assert look(clerk) == []
    counts, words = clerk.counts()
    assert counts == {Refusal.OVERSIZED: 2, Refusal.MALFORMED: 3, Refusal.FORGED: 1}
    assert words[Refusal.FORGED] == "its signature is not by this run's key"
    assert list(clerk.files.inbox.iterdir()) == []


def test_the_queue_is_bounded_and_a_flood_makes_no_files(tmp_path: Path) -> None:
    clerk = clerk_in(tmp_path, queue=3)
    now = order_of("pause").time_ms
    orders = [order_of("pause", time_ms=now + k) for k in range(5)]
    give(clerk, *orders)
    assert look(clerk) == orders[:3]
    assert clerk.counts()[0] == {Refusal.BUSY: 2}
    assert answer_to(clerk, orders[4]).outcome is Outcome.REFUSED
    forged = letter_of(order_of("pause"), bytes(32))
    for _ in range(20):
        for _ in range(BATCH):
            post(clerk, forged)
        clerk.look()
    clerk._write_answers()
    assert clerk.counts()[0][Refusal.FORGED] == 20 * BATCH
    assert len(list(clerk.files.answers.iterdir())) <= ANSWERS
    assert list(clerk.files.inbox.iterdir()) == []


def test_a_replay_does_not_change_the_answer(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    order = order_of("germinate", "r0c0", **BIRTH)
    give(ticks.clerk, order)
    ticks.tick()
    assert answer_to(ticks.clerk, order).outcome is Outcome.APPLIED
    give(ticks.clerk, order)
    ticks.tick()
    assert answer_to(ticks.clerk, order).outcome is Outcome.APPLIED
    assert [(e.refusal, e.count, e.total) for e in ticks.told(OrdersRefused)] == [("replayed", 1, 1)]


def test_an_order_goes_through_the_gates_and_is_answered(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    birth, early = order_of("germinate", "r0c0", **BIRTH), order_of("fossilise", "r0c1")
    give(ticks.clerk, birth, early)
    taken = ticks.tick()
    asked = {slot: command.op for slot, command in taken.commands.items()}
    assert asked == {"r0c0": Op.GERMINATE, "r0c1": Op.FOSSILIZE}
    told = {event.slot: event for event in ticks.told(OrderTaken)}
    assert told["r0c0"].applied
    assert not told["r0c1"].applied
    assert told["r0c1"].reason == "no edge from EMPTY (legal: GERMINATE)"
    assert (told["r0c0"].sender, told["r0c0"].words, told["r0c0"].why) == (
        "ana",
        "germinate r0c0 light 1.0 ADD COSINE 6.0 2",
        "a test",
    )
    assert {answer_to(ticks.clerk, order).number for order in (birth, early)} == {1, 2}
    assert answer_to(ticks.clerk, early).outcome is Outcome.REFUSED
    assert Journal(ticks.clerk.files.journal, ticks.clerk.judge.key).count == 2


def test_two_people_at_once_take_turns(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    now = order_of("pause").time_ms
    ana, ben = (
        order_of("germinate", "r0c0", sender=name, time_ms=now + k, **BIRTH) for k, name in enumerate(("ana", "ben"))
    )
    later = order_of("pause", sender="ben", time_ms=now + 5)
    give(ticks.clerk, ben, ana, later)
    assert list(ticks.tick().commands) == ["r0c0"]
    assert answer_to(ticks.clerk, ana).outcome is Outcome.APPLIED
    taken = ticks.tick()
    assert taken.order.verb is RunVerb.PAUSE, "ben's orders stay in their order"
    refused = answer_to(ticks.clerk, ben)
    assert refused.outcome is Outcome.REFUSED
    assert refused.words == "the slot changed in this tick", "ana's seed is planted"
    ticks.tick()
    assert ticks.run.state.steering.paused
    assert [event.number for event in ticks.told(OrderTaken)] == [1, 2, 3]


def test_a_dry_run_gives_the_verdict_and_does_nothing(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    dry = [
        order_of("germinate", "r0c0", dry_run=True, **BIRTH),
        order_of("advance", "r0c1", dry_run=True),
        order_of("pause", dry_run=True),
    ]
    give(ticks.clerk, *dry)
    assert ticks.tick() == Taken()
    found = [answer_to(ticks.clerk, order) for order in dry]
    assert [answer.outcome for answer in found] == [Outcome.APPLIED, Outcome.REFUSED, Outcome.APPLIED]
    assert all(answer.dry_run and answer.number is None for answer in found)
    assert not ticks.clerk.files.journal.exists()
    assert not ticks.run.slot("r0c0").taken
    assert ticks.told(OrderTaken) == []


def test_what_this_run_does_not_have_never_reaches_the_wire(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    orders = [order_of("advance", "r9c9"), order_of("germinate", "r0c0", **(BIRTH | {"blueprint": "castle"}))]
    give(ticks.clerk, *orders)
    assert ticks.tick() == Taken()
    words = [answer_to(ticks.clerk, order).words for order in orders]
    assert words[0] == "malformed: no slot r9c9; this run has r0c0, r0c1"
    assert words[1] == "malformed: no blueprint 'castle'; r0c0 takes heavy, light, noop"
    ticks.desk._cool_ticks = None
    breaker = order_of("breaker", phase="OPEN")
    give(ticks.clerk, breaker)
    assert ticks.tick() == Taken()
    assert "no governor" in answer_to(ticks.clerk, breaker).words


def test_an_order_that_no_tick_takes_in_time_expires(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    order, waiting = order_of("pause", valid_ms=0, time_ms=order_of("pause").time_ms - 5), order_of("pause")
    give(ticks.clerk, order)
    assert ticks.tick() == Taken()
    assert answer_to(ticks.clerk, order).outcome is Outcome.EXPIRED
    ticks.clerk.start()
    give(ticks.clerk, waiting)
    ticks.desk.close()
    assert answer_to(ticks.clerk, waiting).words == "the run ended before a tick took it"
    assert not ticks.clerk.files.open.exists()


def test_without_the_lease_or_the_disk_no_order_is_taken(tmp_path: Path) -> None:
    ticks = Ticks(tmp_path)
    ticks.lost = True
    order = order_of("pause")
    give(ticks.clerk, order)
    assert ticks.tick() == Taken()
    assert "a newer attempt has begun" in answer_to(ticks.clerk, order).words
    ticks.lost = False
    ticks.clerk.files.journal.mkdir()  # it cannot be appended to
    again = order_of("pause")
    give(ticks.clerk, again)
    assert ticks.tick() == Taken()
    assert answer_to(ticks.clerk, again).outcome is Outcome.REFUSED


def test_orders_of_the_journal_are_taken_again_at_their_ticks(tmp_path: Path) -> None:
    first = Ticks(tmp_path)
    first.tick()
    give(first.clerk, order_of("germinate", "r0c0", **BIRTH), order_of("log-level", level="lifecycle"))
    first.tick()
    first.tick()
    second = Ticks(tmp_path)  # from the beginning
    give(second.clerk, order_of("checkpoint"))
    for _ in range(3):
        second.tick()
    assert second.told(OrderTaken)[0].words == "checkpoint", "at a tick that took none before"
    again = [event for event in second.told(OrderTaken) if event.again]
    assert [(event.number, event.tick) for event in again] == [(1, 2), (2, 2)]
    assert first.run.slot("r0c0").taken
    assert second.run.slot("r0c0") == first.run.slot("r0c0")
    assert second.levels == ["lifecycle"]


def test_a_tick_touches_no_file_of_the_inbox_in_a_flood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, calls = Ticks(tmp_path, poll_s=0.01), []
    main = threading.get_ident()
    for name in ("open", "scandir", "fsync", "unlink", "lstat"):
        real = getattr(os, name)

        def counted(*args: Any, _real: Any = real, _name: str = name, **more: Any) -> Any:
            if threading.get_ident() == main:
                calls.append(_name)
            return _real(*args, **more)

        monkeypatch.setattr(os, name, counted)

    def count(ticks_: int) -> list[str]:
        calls.clear()
        for _ in range(ticks_):
            ticks.tick()
        return list(calls)

    assert count(20) == []
    forged = letter_of(order_of("pause"), bytes(32))
    for _ in range(500):
        post(ticks.clerk, forged)
    ticks.desk.begin(ticks.run.state)
    until = time.monotonic() + 60
    flooded: list[str] = []
    while ticks.clerk.counts()[0][Refusal.FORGED] < 500:
        flooded += count(1)
        assert time.monotonic() < until
    flooded += count(1)
    ticks.desk.close()
    assert flooded == []
    assert sum(event.count for event in ticks.told(OrdersRefused)) == 500


def test_where_a_file_cannot_be_private_orders_are_off_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seal, "_is_private", lambda handle: False)  # as on drvfs or exFAT
    desk = open_(tmp_path)
    assert desk is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith("cannot be its owner's alone (mode 0600), so this run takes no orders")
    assert not (tmp_path / "orders" / "key").exists()


def open_(folder: Path, **settings: Any) -> OrderDesk | None:
    return open_desk(
        folder,
        OrdersConfig(**settings),
        run_id="run",
        attempt=1,
        lease=lambda: None,
        sink=ListSink(),
        set_level=lambda level: None,
        cool_ticks=None,
    )


def test_a_key_that_others_may_read_gives_no_orders_until_it_is_put_right(tmp_path: Path) -> None:
    files, key = key_in(tmp_path)
    files.key.chmod(0o644)
    with pytest.raises(NoKey, match="not yours alone"):
        read_key(files.key)
    assert make_key(files.key) == (key, ""), "a start puts its own file right"
    assert read_key(files.key) == key
    files.key.write_text("no key")
    with pytest.raises(NoKey, match="holds no key"):
        read_key(files.key)
    files.key.unlink()
    with pytest.raises(NoKey, match="no key can be read"):
        read_key(files.key)


def test_a_run_that_takes_no_orders_keeps_those_that_it_took(tmp_path: Path) -> None:
    assert open_(tmp_path, enabled=False) is None
    assert not (tmp_path / "orders").exists()
    files, key = key_in(tmp_path)
    Journal(files.journal, key).append([order_of("pause")], tick=3, rollbacks=0, attempt=1)
    desk = open_(tmp_path, enabled=False)
    assert desk is not None
    assert desk.clerk is None
    assert len(desk.journal.at(3, 0)) == 1
    files.key.unlink()
    with pytest.raises(NoKey, match="the orders in"):
        open_(tmp_path, enabled=False)

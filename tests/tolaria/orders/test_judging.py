"""Signatures, freshness, nonces: no order passes that its sender did not sign for this attempt, now, once."""

import copy
import gc
import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.orders.answer import Answer, Outcome, read_answer, write_answer
from esper.leyline.orders.order import MOST_BYTES, Order, command_of
from esper.leyline.orders.verbs import Refusal
from esper.leyline.plain import to_plain
from esper.tolaria.orders.config import OrdersConfig
from esper.tolaria.orders.judge import Judge, Refused, now_ms
from esper.tolaria.orders.ledger import Ledger
from tests.support.orders import RAMP, key_in, letter_of, order_of

KEY = bytes(range(32))
GERMINATE: dict[str, Any] = {"blueprint": "conv_light", "target": 1.0, **RAMP}


class Clock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.ms = now_ms()

    def __call__(self) -> int:
        return self.ms


def judge_in(folder: Path, clock: Clock | None = None, attempt: int = 1, **settings: Any) -> Judge:
    config, clock = OrdersConfig(**settings), clock or Clock()
    keep = int(1000 * (config.window_s + config.skew_s))
    ledger = Ledger(folder / "ledger.jsonl", keep_ms=keep, now_ms=clock())
    return Judge(KEY, run_id="run", attempt=attempt, config=config, ledger=ledger, clock=clock)


def ask(judge: Judge, data: bytes) -> Refusal | None:
    """The judge's refusal, or None."""
    try:
        judge.admit(judge.open(data))
    except Refused as refused:
        return refused.refusal if refused.words else None
    return None


def test_a_good_order_passes_once(tmp_path: Path) -> None:
    judge, letter = judge_in(tmp_path), letter_of(order_of("germinate", "r0c0", **GERMINATE), KEY)
    assert ask(judge, letter) is None
    assert ask(judge, letter) is Refusal.REPLAYED


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"run_id": "another"}, Refusal.FORGED),
        ({"attempt": 2}, Refusal.STALE),
        ({"time_ms": -70_000}, Refusal.STALE),  # from now on, and not from when tests were collected
        ({"time_ms": 60_000}, Refusal.STALE),
        ({"command": "explode"}, Refusal.MALFORMED),
        ({"slot": "r0c0"}, Refusal.MALFORMED),
        ({"arguments": {"ticks": 3}}, Refusal.MALFORMED),
    ],
)
def test_each_reason_to_refuse(tmp_path: Path, fields: dict[str, Any], refusal: Refusal) -> None:
    if "time_ms" in fields:
        fields = {"time_ms": now_ms() + fields["time_ms"]}
    assert ask(judge_in(tmp_path), letter_of(replace(order_of("pause"), **fields), KEY)) is refusal


def test_clocks_may_differ_by_the_skew_and_no_more(tmp_path: Path) -> None:
    clock = Clock()
    judge = judge_in(tmp_path, clock, window_s=10.0, skew_s=2.0)
    for age, refusal in ((12_000, None), (12_001, Refusal.STALE), (-2_000, None), (-2_001, Refusal.STALE)):
        order = order_of("pause", time_ms=clock.ms - age, sender=f"of{abs(age)}")
        assert ask(judge, letter_of(order, KEY)) is refusal, age


def test_a_senders_orders_come_in_their_order(tmp_path: Path) -> None:
    judge, now = judge_in(tmp_path), now_ms()
    assert ask(judge, letter_of(order_of("pause", time_ms=now), KEY)) is None
    assert ask(judge, letter_of(order_of("resume", time_ms=now - 1), KEY)) is Refusal.OUT_OF_ORDER
    assert ask(judge, letter_of(order_of("resume", time_ms=now - 1, sender="ben"), KEY)) is None


def test_the_ledger_outlives_a_restart_and_is_purged_by_time(tmp_path: Path) -> None:
    clock = Clock()
    letter = letter_of(order_of("pause", time_ms=clock.ms), KEY)
    assert ask(judge_in(tmp_path, clock), letter) is None
    again = judge_in(tmp_path, clock)
    assert ask(again, letter) is Refusal.REPLAYED
    clock.ms += 200_000
    assert ask(again, letter_of(order_of("resume", time_ms=clock.ms), KEY)) is None
    assert len(again.ledger) == 1, "the old one went"
    assert ask(again, letter) is Refusal.STALE
    clock.ms -= 200_000
    assert ask(again, letter) is Refusal.STALE, "a clock that is put back brings nothing back"


def test_the_ledgers_file_stays_as_long_as_its_window(tmp_path: Path) -> None:
    clock = Clock()
    judge = judge_in(tmp_path, clock, window_s=1.0, skew_s=0.0)
    for _ in range(500):
        clock.ms += 100
        assert ask(judge, letter_of(order_of("pause", time_ms=clock.ms), KEY)) is None
    assert len(judge.ledger) <= 12
    assert len((tmp_path / "ledger.jsonl").read_bytes().splitlines()) < 350


@pytest.mark.parametrize("damage", [b"rubbish\n", b"123 abc", b"\xff\x00\n"])
def test_a_damaged_ledger_lets_no_older_order_in(tmp_path: Path, damage: bytes) -> None:
    clock = Clock()
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(damage)
    judge = judge_in(tmp_path, clock)
    assert ask(judge, letter_of(order_of("pause", time_ms=clock.ms), KEY)) is Refusal.STALE
    clock.ms += 66_000
    assert ask(judge, letter_of(order_of("pause", time_ms=clock.ms), KEY)) is None


@settings(max_examples=50)
@given(data=st.binary(max_size=MOST_BYTES + 50))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        Judge(KEY, run_id="run", attempt=1, config=OrdersConfig(), ledger=None).open(data)  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


FIELDS = st.sampled_from(sorted(Order.__dataclass_fields__))


@settings(max_examples=50)
@given(value=JSON, key=FIELDS, where=st.sampled_from(["order", "signature"]))
def test_any_value_in_any_place_is_refused(value: Any, key: str, where: str) -> None:
    letter = json.loads(letter_of(order_of("prune", "r0c0", ticks=2, curve="COSINE", steepness=6.0), KEY))
    before = copy.deepcopy(letter)
    if where == "order":
        letter["order"][key] = value
    else:
        letter["signature"] = value
    if json.dumps(letter) == json.dumps(before):
        return
    with pytest.raises(Refused) as refused:
        Judge(KEY, run_id="run", attempt=1, config=OrdersConfig(), ledger=None).open(json.dumps(letter).encode())  # type: ignore[arg-type]
    assert refused.value.refusal in (Refusal.MALFORMED, Refusal.FORGED, Refusal.OVERSIZED)


ARGUMENTS = st.dictionaries(st.text(max_size=9), JSON)


@settings(max_examples=50)
@given(command=st.text(max_size=12), slot=st.none() | st.text(max_size=6), arguments=ARGUMENTS)
def test_whatever_a_key_holder_asks_for_is_a_command_or_refused(command: str, slot: str | None, arguments: Any) -> None:
    for name in (command, "germinate", "stop", "breaker", "log-level"):
        try:
            order = replace(order_of("pause"), command=name, slot=slot, arguments=arguments)
            command_of(order)
        except ValueError:
            continue


@pytest.mark.parametrize("deep", ['{"order":' * 800, "[" * 4000, '{"order":{},"signature":"' + "a" * 4000 + '"}'])
def test_deep_and_long_letters_are_refused(deep: str) -> None:
    with pytest.raises(Refused):
        Judge(KEY, run_id="run", attempt=1, config=OrdersConfig(), ledger=None).open(deep.encode())  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_of_forged_mutated_and_replayed_orders_none_passes_and_memory_stays(tmp_path: Path, count: int) -> None:
    judge, random_ = judge_in(tmp_path), random.Random(1)
    taken = letter_of(order_of("germinate", "r0c0", **GERMINATE), KEY)
    assert ask(judge, taken) is None
    unsent = letter_of(order_of("prune", "r0c1", ticks=0, curve="COSINE", steepness=6.0), KEY)
    plain = json.loads(unsent)["order"]
    forged = [json.dumps({"order": plain, "signature": f"{random_.getrandbits(256):064x}"}).encode() for _ in range(64)]

    def attack(index: int) -> bytes:
        kind = index % 3
        if kind == 0:
            return taken
        if kind == 1:
            return forged[index % 64]
        data = bytearray(unsent)  # one bit of the order, its signature or the JSON around them
        at = random_.randrange(len(data))
        data[at] ^= 1 << random_.randrange(8)
        if json.dumps(_loads(bytes(data))) == json.dumps(_loads(unsent)):  # a blank became another
            data[at] ^= 255
        return bytes(data)

    tracemalloc.start()
    passed = [index for index in range(1000) if ask(judge, attack(index)) is None]
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    passed += [index for index in range(count) if ask(judge, attack(index)) is None]
    gc.collect()  # an exception and its traceback hold each other
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert passed == []
    assert after - before < 32 * 1024
    assert len(judge.ledger) == 1
    assert ask(judge, unsent) is None, "the real one still does"


def _loads(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_an_answer_is_the_runs_own_word() -> None:
    answer = Answer(nonce="0" * 32, outcome=Outcome.APPLIED, words="done", tick=3, step=30, number=1, dry_run=False)
    letter = write_answer(KEY, answer)
    assert read_answer(KEY, letter.encode(), answer.nonce) == answer
    with pytest.raises(ValueError, match="not signed"):
        read_answer(bytes(32), letter.encode(), answer.nonce)
    with pytest.raises(ValueError, match="not signed"):
        read_answer(KEY, letter.replace("done", "dune").encode(), answer.nonce)
    with pytest.raises(ValueError, match="not signed"):
        read_answer(KEY, letter.encode(), "1" * 32)


def test_the_key_is_its_owners_alone(tmp_path: Path) -> None:
    files, key = key_in(tmp_path)
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert files.path.stat().st_mode & 0o777 == 0o700
    assert key_in(tmp_path)[1] == key, "it stays"
    assert to_plain(key.hex()) in files.key.read_text()

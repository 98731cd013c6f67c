"""People's orders on real ranks: a kill after an order that was applied comes to the bits of the undisturbed run."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esper.launcher import ctl
from esper.leyline.orders.folder import OrdersDir
from esper.nissa.reading import read_events
from esper.tolaria.orders.desk import OrderDesk
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.orders import RAMP, letter_of, order_of
from tests.support.tiny import tiny_plain

TICKS = 16
# by tick: what is ordered there, once; births come a tick later
ORDERS: dict[int, list[tuple[str, str | None, dict[str, Any]]]] = {
    2: [("germinate", "r0c0", {"blueprint": "conv_light", "target": 1.0, **RAMP})],
    4: [("advance", "r0c0", {}), ("germinate", "r1c0", {"blueprint": "noop", "target": 0.5, **RAMP})],
    5: [("advance", "r0c0", {}), ("advance", "r1c0", {}), ("checkpoint", None, {})],
    7: [("pause", None, {}), ("prune", "r1c0", {"ticks": 0, "curve": "COSINE", "steepness": 6.0})],
    8: [("advance", "r0c0", {})],  # refused: growth is paused
    9: [("resume", None, {}), ("set-alpha-target", "r0c0", {"target": 0.5, **RAMP})],
    10: [("breaker", None, {"phase": "COOLING"})],
    11: [("log-level", None, {"level": "lifecycle"})],
}


def plain_of(run_dir: Path) -> dict[str, Any]:
    settings = {
        "trainer__steps": 3 * TICKS,
        "control__every": 3,
        "checkpoint__every_ticks": 6,
        "checkpoint__keep": 8,
        "telemetry__level": "full",
        "orders__poll_s": 0.01,
    }
    return tiny_plain("cnn", **settings)


def give_orders(rank: int) -> None:
    """On rank 0, lays each order into the inbox right before its tick, and has the clerk look: unless it was taken."""
    if rank:
        return
    take = OrderDesk.take

    def prompt(self: OrderDesk, state: Any, terms: Any, *, stage_ticks: int) -> Any:
        clerk = self.clerk
        assert clerk is not None
        if state.tick in ORDERS and not self.journal.at(state.tick, state.steering.rollbacks):
            for command, slot, fields in ORDERS[state.tick]:
                own = {"run_id": clerk.judge.run_id, "attempt": clerk.judge.attempt}
                order = order_of(command, slot, **own, **fields)
                while order.time_ms == getattr(self, "last_ms", 0):
                    order = order_of(command, slot, **own, **fields)
                self.last_ms = order.time_ms  # type: ignore[attr-defined]
                clerk.judge.admit(clerk.judge.open(letter_of(order, clerk.judge.key)))
                clerk._wait(order)
        return take(self, state, terms, stage_ticks=stage_ticks)

    OrderDesk.take = prompt  # type: ignore[method-assign]


def orders_of(run_dir: Path) -> list[tuple[int, str, bool, str]]:
    """Tick, command, whether it was applied, and why, of the newest attempt that told each."""
    told = {}
    for record in read_events(run_dir / "events.jsonl"):
        if record["kind"] == "order":
            payload = record["payload"]
            key = record["tick"], payload["words"].split()[0], payload["slot"]
            told[key] = (record["tick"], payload["words"].split()[0], payload["applied"], payload["reason"])
    return sorted(told.values())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    prepare_run(run_dir, plain_of(run_dir))
    assert live(run_dir, 2, prepare=give_orders) == [0, 0]
    return run_dir, final(run_dir)


def test_orders_are_committed_like_a_controllers_commands(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    told = {(tick, command): (applied, reason) for tick, command, applied, reason in orders_of(undisturbed[0])}
    assert told[(2, "germinate")][0]
    assert told[(8, "advance")] == (False, "growth is paused by an order")
    assert told[(5, "checkpoint")] == (True, "a checkpoint is saved after tick 6")
    assert told[(10, "breaker")][0]
    records = read_events(undisturbed[0] / "events.jsonl")
    assert [r["tick"] for r in records if r["kind"] == "tick"][-1] < TICKS, "log-level holds from tick 11 on"
    assert {"GERMINATED", "TRAINING", "BLENDING", "PRUNED"} <= {
        r["payload"]["target"] for r in records if r["kind"] == "stage"
    }
    breaker = [r["payload"] for r in records if r["kind"] == "breaker"]
    assert (breaker[0]["target"], breaker[0]["manual"]) == ("COOLING", True)


def test_the_key_is_in_no_other_file(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    files = OrdersDir(undisturbed[0] / "orders")
    text = files.key.read_bytes().strip()
    forms = (text, bytes.fromhex(text.decode()))
    others = [path for path in undisturbed[0].rglob("*") if path.is_file() and path != files.key]
    assert any("step-" in str(path) for path in others)
    assert [path for path in others if any(form in path.read_bytes() for form in forms)] == []


def test_a_kill_after_an_applied_order_comes_to_the_undisturbed_runs_bits(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of(tmp_path))
    for kill in (Kill("apply", 5, rank=0), Kill("forward", 11, rank=1)):
        live(run_dir, 2, kill, prepare=give_orders)
    assert live(run_dir, 2, prepare=give_orders) == [0, 0]
    assert_same_run(final(run_dir), undisturbed[1])
    assert orders_of(run_dir) == orders_of(undisturbed[0])
    again = [r for r in read_events(run_dir / "events.jsonl") if r["kind"] == "order" and r["payload"]["again"]]
    assert {r["tick"] for r in again} >= {2, 4}
    journal = (run_dir / "orders" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["tick"] for line in journal] == [tick for tick in ORDERS for _ in ORDERS[tick]]


def test_a_person_steers_a_run_by_typing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"trainer__steps": 400_000, "control__every": 20, "orders__poll_s": 0.02, "telemetry__level": "full"}
    run_dir = prepare_run(tmp_path / "run", tiny_plain("cnn", **settings))
    codes: list[Any] = []
    training = threading.Thread(target=lambda: codes.append(live(run_dir, 2)))
    training.start()
    until = time.monotonic() + 120
    while not (run_dir / "orders" / "open.json").exists():
        assert time.monotonic() < until
        assert training.is_alive()
        time.sleep(0.05)
    folder = str(run_dir)
    try:
        assert ctl.main([folder, "germinate", "r0c0", "conv_light", "--dry-run"]) == 0
        assert ctl.main([folder, "germinate", "r0c0", "conv_light", "--why", "I want to see it"]) == 0
        assert ctl.main([folder, "germinate", "r0c0", "conv_light"]) == 1
        assert ctl.main([folder, "germinate", "r0c0", "castle"]) == 1
        assert ctl.main([folder, "pause"]) == 0
    finally:
        assert ctl.main([folder, "stop", "--as", "ben"]) == 0
        training.join(60)
    said = capsys.readouterr().out
    assert codes == [[0, 0]]
    assert json.loads((run_dir / "STATUS.json").read_text())["status"] == "preempted"
    lines = [line for line in said.splitlines() if line.startswith("esper: ")]
    assert lines[0].startswith("esper: would be applied at tick ")
    assert "(order 1): r0c0: conv_light is staged" in lines[1]
    assert lines[2].startswith("esper: refused at tick ")
    assert "no blueprint 'castle'; r0c0 takes" in lines[3]
    assert lines[4].endswith("growth stands still from here on")
    assert "the run saves and stops after tick" in lines[5]
    with pytest.raises(Exception, match="takes no orders: it is not training now"):
        ctl.main([folder, "pause"])

"""Orders and a rollback in a whole run of two ranks: what the governor blames is not ordered again, the rest is."""

from pathlib import Path
from typing import Any

from esper.nissa.reading import read_events
from tests.dist.test_orders import ORDERS, give_orders
from tests.support.diverging_runs import GUARDED, PLAIN, register_bomb
from tests.support.killed_runs import live, prepare_run
from tests.support.orders import RAMP
from tests.support.tiny import tiny_plain

BLENDED = 18  # tick at which the bomb begins to blend, by order
# by tick: what is ordered there, once
STEERED: dict[int, list[tuple[str, str | None, dict[str, Any]]]] = {
    14: [("germinate", "r0c0", {"blueprint": "bomb", "target": 1.0, **RAMP, "ticks": 1})],
    16: [("advance", "r0c0", {})],
    BLENDED: [("advance", "r0c0", {}), ("germinate", "r1c0", {"blueprint": "norm", "target": 1.0, **RAMP})],
    BLENDED + 1: [("checkpoint", None, {})],
}
SETTINGS: dict[str, Any] = {
    "host": PLAIN,
    "trainer__steps": 50,
    "control__every": 2,
    **GUARDED,
    "gates__birth_k_se": 1e9,  # else the bomb would not be born
    "orders__poll_s": 0.01,
}


def give_bombs(rank: int) -> None:
    """The orders above, in this process."""
    register_bomb()
    ORDERS.clear()
    ORDERS.update(STEERED)
    give_orders(rank)


def test_a_rollback_takes_orders_again_but_not_what_it_blames(tmp_path: Path) -> None:
    run_dir = prepare_run(tmp_path / "run", tiny_plain("cnn", **SETTINGS))
    assert live(run_dir, 2, prepare=give_bombs) == [0, 0]
    records = read_events(run_dir / "events.jsonl")
    (back,) = [r for r in records if r["kind"] == "rollback"]
    assert (back["payload"]["blamed"], back["payload"]["blamed_ticks"]) == (["r0c0"], [BLENDED])
    assert back["payload"]["to_tick"] < BLENDED < back["tick"]
    told = [r for r in records if r["kind"] == "order"]
    after = told[[r["seq"] < back["seq"] for r in told].count(True) :]
    first, again = told[: len(told) - len(after)], after
    assert [r["payload"]["again"] for r in first] == [False] * 5
    wanted = [
        (r["tick"], r["payload"]["number"])
        for r in first
        if r["tick"] > back["payload"]["to_tick"] and r["payload"]["slot"] != "r0c0"
    ]
    assert [(r["tick"], r["payload"]["number"]) for r in again] == wanted
    assert wanted[0][0] == BLENDED
    assert all(r["payload"]["again"] for r in again)
    germinate, checkpoint = (r["payload"] for r in again)
    assert not germinate["applied"], "through legality and gates like the first time, and the breaker cools now"
    assert "breaker cooling" in germinate["reason"]
    assert checkpoint["applied"]
    stages = [(r["payload"]["slot"], r["payload"]["target"]) for r in records if r["kind"] == "stage"]
    assert ("r0c0", "BLENDING") not in stages[stages.index(("r0c0", "PRUNED")) :]
    assert stages[-1][0] != "r0c0" or stages[-1][1] in ("EMPTY", "RESETTING", "EMBARGOED")

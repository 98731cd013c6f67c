"""One command, one finished run: everything that it leaves behind agrees with everything else."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from esper import cli
from esper.config.tree import load_config
from esper.karn.lives import slot_of
from esper.leyline.events import (
    EVENTS,
    CheckpointSaved,
    CommandRefused,
    Event,
    GateJudged,
    RunEnded,
    RunStarted,
    StageChanged,
    TickDone,
)
from esper.leyline.files import RunDir
from esper.leyline.stages import EDGES, Gate, Mechanical, Op, Stage
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.training.result import rebuild_checkpoint
from tests.e2e.conftest import Finished
from tests.nissa.test_sizes import a_life, a_look, size
from tests.support.commands import GROWING
from tests.support.tiny import make_engine

TICKS, EVERY = 20, 12


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ---------------------------------------------------------------- the run directory


def test_it_ends_well_and_leaves_a_whole_run_directory(grown: Finished) -> None:
    assert grown.code == 0, grown.out + grown.err
    assert grown.err == ""
    names = {path.name for path in grown.run.iterdir()}
    assert names == {
        "attempt.json",
        "checkpoints",
        "config.yaml",
        "data.json",
        "environment.json",
        "events.jsonl",
        "health",
        "heartbeat",
        "lock",
        "orders",
        "result.json",
        "saved.json",
        "STATUS.json",
        "wandb",
    }
    status = read_json(grown.run / "STATUS.json")
    result = read_json(grown.run / "result.json")
    objective = result["validation_accuracy"]["value"]
    ended = {"status": "done", "message": "", "exit_code": 0, "attempt": 1}
    assert status == {**ended, "step": TICKS * EVERY, "objective": objective}
    assert grown.out.splitlines()[-1] == f"esper: done at step {TICKS * EVERY} (run directory: {grown.run})"


def test_the_key_of_orders_is_in_no_other_file_nor_in_an_export(grown: Finished, tmp_path: Path) -> None:
    """Its checkpoints, its record and what wandb has of it are among those files."""
    assert cli.main(["export", str(grown.run), "--partial", "--to", str(tmp_path / "plain")]) == 0
    key = RunDir(grown.run).orders / "key"
    text = key.read_bytes().strip()
    files = [path for path in (*grown.run.rglob("*"), *tmp_path.rglob("*")) if path.is_file() and path != key]
    assert {"state.pt", "events.jsonl", "model.safetensors"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    forms = (text, bytes.fromhex(text.decode()))
    assert [path for path in files if any(form in path.read_bytes() for form in forms)] == []


def test_config_is_read_only_and_whole(grown: Finished) -> None:
    path = grown.run / "config.yaml"
    assert path.stat().st_mode & 0o777 == 0o444
    config, plain = load_config(path)
    assert (config.seed, config.trainer.steps, config.control.every, config.optim.lr) == (1, TICKS * EVERY, EVERY, 0.02)
    assert config.run.dir == str(grown.run)
    assert "launch" not in plain
    assert "${" not in path.read_text()


def test_environment_says_what_it_ran_on(grown: Finished) -> None:
    found = read_json(grown.run / "environment.json")
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] in torch.__version__
    )
    assert found["command"].endswith(f"{' '.join(GROWING)} run.dir=run")
    assert found["folder"] == str(grown.run.parent)
    assert found["earlier"] == []
    assert {"host", "platform", "python", "cpus", "usable_cpus", "time"} <= set(found)


# ---------------------------------------------------------------- events


def test_every_event_is_there_in_order(records: list[dict[str, Any]], events: list[Event]) -> None:
    assert [record["seq"] for record in records] == list(range(len(records))), "nothing dropped"
    assert {(record["attempt"], record["rank"]) for record in records} == {(1, 0)}
    assert len({record["run_id"] for record in records}) == 1
    assert isinstance(events[0], RunStarted)
    assert (events[0].world_size, events[0].resumed_from, events[0].total_steps) == (2, None, TICKS * EVERY)
    assert isinstance(events[-1], RunEnded)
    assert [event.step for event in events] == sorted(event.step for event in events)


def test_no_slot_says_more_than_is_counted_for_a_run_of_a_million_steps(grown: Finished) -> None:
    """What `tests/nissa/test_sizes.py` counts is what a real run says, kind by kind, and at least as long."""
    counted = {event.kind for event in a_life("r0c0", 1, 1)} | {"run_started", "checkpoint", "run_ended"}
    births: Counter[str | None] = Counter()
    looks: Counter[str | None] = Counter()
    written: Counter[str | None] = Counter()
    for line in (grown.run / "events.jsonl").read_bytes().splitlines(keepends=True):
        record = json.loads(line)
        if EVENTS[record["kind"]].level == "lifecycle" and record["kind"] != "health":
            assert record["kind"] in counted
            slot = slot_of(record)
            written[slot] += len(line)
            births[slot] += record["kind"] == "born"
            looks[slot] += record["kind"] == "contribution"
    slots = [slot for slot in births if slot is not None]
    assert len(slots) >= 2
    for slot in slots:
        assert written[slot] <= births[slot] * size(a_life(slot, 1, 0)) + looks[slot] * size([a_look(slot, 1, 1)]), slot


def test_every_tick_once_at_its_step(ticks: list[TickDone]) -> None:
    assert [(event.tick, event.step) for event in ticks] == [(n, n * EVERY) for n in range(1, TICKS + 1)]
    losses = [event.train_loss.value for event in ticks]
    assert all(reading.is_measured for event in ticks for reading in (event.train_loss, event.validation_loss))
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.5 * losses[0], "it learned"


def test_stages_follow_the_edges(ticks: list[TickDone], stages: list[StageChanged]) -> None:
    legal = {(edge.source, edge.cause.name, edge.target) for edge in EDGES}
    now = {line.slot: Stage.EMPTY for line in ticks[0].slots}
    shown: dict[str, Stage] = {}
    causes = {*Op.__members__, *Mechanical.__members__}
    for tick in ticks:
        for event in (event for event in stages if event.tick == tick.tick):
            assert event.cause in causes
            assert (event.source, event.cause, event.target) in legal
            assert event.source is now[event.slot]
            now[event.slot] = event.target
        shown |= {line.slot: line.stage for line in tick.slots}  # those that changed
        assert shown == now
        for line in tick.slots:
            assert line.alpha == 0.0 if not line.stage.is_blended else 0.0 <= line.alpha <= 1.0
            assert line.alpha == 1.0 or line.stage not in (Stage.HOLDING, Stage.FOSSILIZED)
    assert Stage.FOSSILIZED in now.values(), "something grew"


def test_what_fossilised_passed_its_gates_on_evidence(events: list[Event], stages: list[StageChanged]) -> None:
    """Nothing was refused, and each judged edge has the verdict of its gate at its own tick."""
    passed = {(e.tick, e.slot, e.result.gate) for e in events if isinstance(e, GateJudged) and e.result.passed}
    judged = {(edge.source, edge.cause.name, edge.target): edge.gate for edge in EDGES if edge.gate is not None}
    checked = 0
    for event in stages:
        gate = judged.get((event.source, event.cause, event.target))
        if gate is not None and gate is not Gate.G0:
            assert (event.tick, event.slot, gate) in passed
            checked += 1
    assert checked >= 4, "at least one whole life"
    assert not [event for event in events if isinstance(event, CommandRefused)]
    fossils = {(event.tick, event.slot) for event in stages if event.target is Stage.FOSSILIZED}
    last = [e for e in events if isinstance(e, GateJudged) and e.result.gate is Gate.G5 and e.result.passed]
    assert {(event.tick, event.slot) for event in last} == fossils
    assert all(event.enforced and all(check.passed for check in event.result.checks) for event in last)


# ---------------------------------------------------------------- the result


def test_the_test_part_is_read_on_the_best_checkpoint(
    grown: Finished, ticks: list[TickDone], events: list[Event], tmp_path: Path
) -> None:
    """Recounted by hand in one process: the saved network, sample by sample."""
    result = read_json(grown.run / "result.json")
    saves = [event.saved_step for event in events if isinstance(event, CheckpointSaved)]
    assert saves == [48, 96, 144, 192, 240]
    accuracy = {event.step: event.validation_accuracy.value for event in ticks if event.step in saves}
    assert accuracy[result["best_step"]] == max(value for value in accuracy.values() if value is not None)
    assert result["validation_accuracy"]["value"] == accuracy[TICKS * EVERY]

    config, _ = load_config(grown.run / "config.yaml")
    engine = make_engine(config, tmp_path)
    store = CheckpointStore(grown.run / "checkpoints", attempt=0, keep=99)
    network = rebuild_checkpoint(store, result["best_step"], engine.fresh, engine.growth).model.eval()
    test = engine.bundle.test
    x, y = test.fetch(torch.arange(len(test)))
    with torch.no_grad():
        logits = network(x)
    correct = int((logits.argmax(1) == y).sum())
    assert result["test_accuracy"]["n"] == len(test) == config.data.test
    assert result["test_accuracy"]["value"] == correct / len(test)
    loss = torch.nn.functional.cross_entropy(logits, y)
    assert result["test_loss"]["value"] == pytest.approx(float(loss), rel=1e-5)


# ---------------------------------------------------------------- the screen


def test_the_screen_shows_progress_in_plain_lines(grown: Finished, stages: list[StageChanged]) -> None:
    lines = [line for line in grown.out.splitlines() if "around each tick" not in line]
    assert lines[0].startswith("esper: starting 2 ranks in ")
    assert re.fullmatch(r"438 parameters on 2 ranks, 240 steps, slots r0c0, r0c1, r1c0", lines[1])
    plan = r"probe: 512 samples in 512 clusters: 5 looks of 102 a life, 0 in reserve, \d+ of samples not trained on yet"
    assert re.fullmatch(plan, lines[2])
    shown = [int(found[1]) for line in lines if (found := re.match(r"step \d+/240  tick (\d+)  loss \d", line))]
    assert shown[-1] == TICKS
    assert shown == sorted(set(shown))
    changes = [line.split()[1:6] for line in lines if " -> " in line]
    assert changes == [[str(e.step), e.slot, e.source.name, "->", e.target.name] for e in stages]
    assert "\x1b" not in grown.out


def test_the_closing_table_says_what_grew_where_and_why(
    grown: Finished, ticks: list[TickDone], stages: list[StageChanged]
) -> None:
    text = grown.out[grown.out.index("Run done") :]
    first = min(event.step for event in stages if event.target is Stage.BLENDING)
    (before,) = [event for event in ticks if event.step == first]
    assert f"before growth, step {first}" in text
    assert f"at the end, step {TICKS * EVERY}" in text

    def percent(event: TickDone) -> str:
        assert event.validation_accuracy.value is not None
        return f"{100 * event.validation_accuracy.value:.1f} ±"

    (line,) = [line for line in text.splitlines() if line.strip().startswith("validation accuracy")]
    assert re.search(rf"{re.escape(percent(before))} .* {re.escape(percent(ticks[-1]))}", line)
    assert re.search(rf"parameters +438 +{ticks[-1].parameters:,} ", text)
    for slot in ticks[-1].slots:
        if slot.stage is Stage.FOSSILIZED:
            assert re.search(rf"{slot.slot} +{slot.blueprint} +FOSSILIZED +\+\d+ .* G5 passed: contribution", text)
    assert f"run   {grown.run}\n" in text
    for command in ("why", "report", "watch"):
        assert f"esper {command} {grown.run} " in text
    assert f"wandb sync {grown.run}/wandb/offline-run-*" in text


# ---------------------------------------------------------------- again


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every file but those that tell of the start itself."""
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("environment.json", "lock")
    }


def test_the_same_command_again_trains_nothing(grown: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(grown.run)
    starts = len(read_json(grown.run / "environment.json")["earlier"])
    for words in (["train", *GROWING, f"run.dir={grown.run}"], ["resume", str(grown.run)]):
        assert cli.main(words) == 0
        assert capsys.readouterr() == (f"esper: done at step 240 (run directory: {grown.run})\n", "")
    assert contents(grown.run) == before
    assert len(read_json(grown.run / "environment.json")["earlier"]) == starts + 2

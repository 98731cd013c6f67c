"""A long record: `esper runs`, `query`, `why`, `report` and `watch` need no more memory than for a short one."""

import argparse
import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from esper.karn.commands import LOOKING
from esper.karn.lives import lives
from esper.karn.report import gather as gathering
from esper.karn.report import traced
from esper.karn.report.write import render
from esper.karn.store.finding import FoundRun
from esper.karn.store.listing import list_runs
from esper.karn.store.loading import connect, load, write_lines
from esper.karn.watch.pages import PAGES
from esper.karn.why import recoveries
from esper.karn.why.fates import explain_slot
from esper.karn.why.sentence import name_events
from esper.karn.why.ticks import explain_growth
from esper.leyline.commands import Command
from esper.leyline.events import CommandJudged, StageChanged
from esper.leyline.stages import Op, Stage
from esper.nissa.reading import keep_latest, read_events
from tests.karn.test_store import write_run
from tests.nissa.samples import axes, fault, refused, run_started, tick_done
from tests.nissa.test_sizes import a_look

SLOTS = tuple(f"r{row}c0" for row in range(6))
FOSSIL = SLOTS[-1]
LOOKS, TICKS = 3, 6  # of a life
SHORT, LONG = 10, 60  # lives in each slot but the fossil's
UP = (Stage.EMPTY, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)
GONE = (Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.EMPTY)


def moves(slot: str, tick: int, path: tuple[Stage, ...], cause: str, born: dict[str, Any]) -> Iterator[StageChanged]:
    for source, target in pairwise(path):
        yield StageChanged(**axes(tick), slot=slot, source=source, target=target, cause=cause, **born)


def told(lives_each: int) -> Iterator[Any]:
    """A life after the other in every slot but the last, whose fossil is looked at again and again."""
    proposals = count(1)
    yield replace(run_started(), slots=SLOTS)
    kept = {"generation": 1, "blueprint": "norm", "proposal": 0}
    yield from moves(FOSSIL, 1, (*UP, Stage.FOSSILIZED), "ADVANCE", kept)
    for life in range(lives_each):
        tick = 1 + TICKS * life
        for slot in SLOTS[:-1]:
            born = {"generation": 1 + life, "blueprint": "conv_small", "proposal": next(proposals)}
            command = Command(slot=slot, op=Op.GERMINATE, blueprint="conv_small", ticks=3, proposal=born["proposal"])
            yield CommandJudged(**axes(tick), command=command, applied=True, reason=f"{life + 0.5:.4f} is free")
            yield from moves(slot, tick, UP, "GERMINATE", born)
            yield from (a_look(slot, tick, number) for number in range(1, LOOKS + 1))
            prune = Command(slot=slot, op=Op.PRUNE, proposal=next(proposals))
            yield CommandJudged(**axes(tick), command=prune, applied=True, reason=f"{life + 0.25:.4f} is not enough")
            yield from moves(slot, tick, (UP[-1], *GONE), "PRUNE", {**born, "proposal": prune.proposal})
        yield from (refused(tick, "no seed"), fault(tick, f"oddity {life}"), a_look(FOSSIL, tick, 1 + life))
        yield from (tick_done(tick + after) for after in range(TICKS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A short run and one six times as long, each below a folder of its own."""
    root = tmp_path_factory.mktemp("long")
    first, second = (write_run(root / str(each) / "run", list(told(each))) for each in (SHORT, LONG))
    return first, second


@pytest.fixture
def shows_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages show all of no run here, so that the short one fills them, too."""
    for name, most in (("MOST_SEEDS", 20), ("MOST_LOOKS", 2), ("MOST_ROWS", 8), ("MOST_TOLD", 20), ("MOST_MOVES", 40)):
        monkeypatch.setattr(gathering, name, most)
    monkeypatch.setattr(traced, "HELD", 20)
    monkeypatch.setattr(recoveries, "MOST", 5)


def peak(what: Any, run: Path) -> int:
    """Bytes that Python held at most."""
    gc.collect()
    tracemalloc.start()
    try:
        what(run)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def ask(what: str | None, *, end: bool = False) -> Any:
    return lambda run: LOOKING["why"](argparse.Namespace(run=run, what=what, end=end))


READERS: dict[str, tuple[Any, float]] = {  # and the bytes that may be held for each further life
    "runs": (lambda run: list_runs(run.parent), 0),
    "query": (lambda run: load(connect(), run.parent), 700),  # a row of `births`
    "lines": (lambda run: write_lines(FoundRun(name="run", path=run), run / "lines"), 0),
    "why --end": (ask(None, end=True), 0),
    "why": (ask(None), 900),  # two sentences
    "why TICK": (ask("7"), 0),
    "report": (lambda run: gathering.gather(run, "run"), 0),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.usefixtures("shows_little")
def test_memory_does_not_grow_with_the_record(runs: tuple[Path, Path], name: str) -> None:
    what, each = READERS[name]
    what(runs[0])  # whatever is imported and remembered once
    short, long = (peak(what, run) for run in runs)
    born = (LONG - SHORT) * (len(SLOTS) - 1)
    sizes = [(run / "events.jsonl").stat().st_size for run in runs]
    assert sizes[1] > 5.5 * sizes[0]
    assert long - short < 0.08 * (sizes[1] - sizes[0]) + each * born, f"{name}: {short:,} and {long:,} bytes"


@pytest.mark.usefixtures("shows_little")
def test_a_page_of_a_long_run_counts_all_and_says_what_it_leaves_out(runs: tuple[Path, Path]) -> None:
    pytest.importorskip("matplotlib")
    short, long = (gathering.gather(run, "run") for run in runs)
    assert (long.fates["pruned"], long.fates["fossilised"], long.facts.births) == (5 * LONG, 1, 5 * LONG + 1)
    pages = [render([report]) for report in (short, long)]
    assert len(pages[1]) < 1.1 * len(pages[0]), "a page does not grow with its run"
    assert f"<td>{5 * LONG + 1}, 1, {5 * LONG}</td>" in pages[1]
    assert f"{5 * LONG - 20:,} older seeds that are gone are left out, here and in the plots" in pages[1]
    assert f"{10 * LONG - 8 + LONG - 8:,} older records of this table are left out" in pages[1], "of its decisions"
    assert "esper query" in pages[1]
    for page in PAGES.values():
        page(long, 80)
    newest = sorted(lives(keep_latest(read_events(runs[1] / "events.jsonl"))), key=lambda life: life.birth["seq"])[-20:]
    assert [life.birth["seq"] for life in long.lives[1:]] == [life.birth["seq"] for life in newest]
    fossil = long.lives[0]
    assert (fossil.slot, fossil.looks) == (FOSSIL, LONG)
    assert fossil.of("contribution")[-1]["payload"]["look"] == LONG
    assert 2 <= len(fossil.of("contribution")) <= 5
    steps = long.series["train_loss"].steps
    assert steps[-1] == 10 * TICKS * LONG
    assert len({after - before for before, after in pairwise(steps[:-1])}) == 1, "points stand evenly"
    assert 20 <= len(steps) <= 41


@pytest.mark.usefixtures("shows_little")
def test_the_end_of_a_long_run_is_told_in_a_few_lines(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(None, end=True)(runs[1])
    out = capsys.readouterr().out
    assert f"{LONG - 5:,} older vetoes, skipped steps, panics, rollbacks and faults are left out here" in out
    assert f"said: oddity {LONG - 5}, and the like 4 times more" in out


def test_many_events_behind_a_sentence_are_named_by_the_first_and_the_last(runs: tuple[Path, Path]) -> None:
    records = read_events(runs[0] / "events.jsonl")
    assert name_events(records[:8]) == " [#0, #1, #2, #3, #4, #5, #6, #7]"
    assert name_events(records[:9]) == " [#0, #1, #2, #3, 4 more, #8]"


def test_what_is_told_of_each_seed_is_what_the_whole_record_says(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    records = keep_latest(read_events(runs[1] / "events.jsonl"))
    for what, sentences in ((None, explain_growth(records)), ("r1c0", explain_slot(records, "r1c0"))):
        ask(what)(runs[1])
        lines = capsys.readouterr().out.splitlines()
        wanted = [f"{one.text}{name_events(one.events)}" for one in sentences]
        assert lines[: len(wanted)] == wanted
    assert len(wanted) >= LONG
    database = connect()
    load(database, runs[1].parent)
    rows = database.execute("select slot, looks, fate, generation from births").fetchall()
    assert rows == [(life.slot, len(life.of("contribution")), life.fate, life.generation) for life in lives(records)]

"""What people see: plain lines into a pipe, a bar on a terminal, the closing table; and sinks that fail alone."""

import io
import json
import os
import re

import pytest
from rich.console import Console

from esper.leyline.events import Event
from esper.leyline.evidence import ABSENT, measured
from esper.leyline.plain import to_plain
from esper.leyline.stages import Stage
from esper.nissa.config import ConsoleMode, Level
from esper.nissa.console import ConsoleSink
from esper.nissa.envelope import Envelope
from esper.nissa.fanout import MultiSink
from esper.nissa.jsonl import JsonlSink
from esper.nissa.reading import read_events
from esper.nissa.summary import GrownSeed, LibraryTotals, NextCommand, PrunedSeeds, RunSummary, Score, print_summary
from tests.nissa.samples import PROBE, SAMPLES, fault, run_started, stage_changed, tick_done


def terminal():
    return Console(force_terminal=True, file=io.StringIO(), width=100, color_system="standard", legacy_windows=False)


def text_of(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_plain_lines():
    out = io.StringIO()
    sink = ConsoleSink(ConsoleMode.AUTO, stream=out, every_s=0.0)
    missed = ("aten::_fft_r2c (the host)", "mine::scan (blueprint scan)")
    starts = run_started(), run_started(uncounted=missed)
    for event in (*starts, tick_done(4), stage_changed(4, Stage.TRAINING, Stage.BLENDING)):
        sink.emit(event)
    sink.close()
    assert out.getvalue().splitlines() == [
        "1,000 parameters on 2 ranks, 300 steps, slots r0c0, r0c1",
        f"probe: {PROBE}",
        "1,000 parameters on 2 ranks, 300 steps, slots r0c0, r0c1; FLOPs are too low, no formula for "
        "aten::_fft_r2c (the host), mine::scan (blueprint scan)",
        f"probe: {PROBE}",
        "step 40/300  tick 4  loss 0.500  acc 87.5%  val 0.625 50.0%  lr 0.00025  "
        "r0c0 TRAINING 0.04 conv_light  r0c1 EMPTY",
        "step 40  r0c0 TRAINING -> BLENDING conv_light (ADVANCE)",
    ]


def test_every_event_that_people_must_see_has_a_line():
    out = io.StringIO()
    sink = ConsoleSink(ConsoleMode.PLAIN, stream=out)
    for event in SAMPLES:
        sink.emit(event)
    sink.close()
    text = out.getvalue()
    for expected in (
        "step 40  r0c0 ADVANCE refused: dwell is 0 of 1 ticks",
        "step 60  r0c1 norm vetoed by rank 1: out of memory",
        "step 60  2 steps skipped from step 55: gradient not finite, ranks 1",
        "step 60  fault in lockstep: rank 1 is gone",
        "step 50  checkpoint checkpoints/step-50",
        "step 70  panic, DIVERGENCE: training loss 9 against 1",
        "step 70  back to step 40 from memory in 12 ms, replay 2: r0c1 blamed for its change at tick 3; "
        "samples of steps 50 to 70 left out",
        "step 70  breaker of growth ALLOWED -> COOLING, 20 ticks: blame",
        "resumed from step 120",
        "step 70  run done",
    ):
        assert expected in text


def test_plain_ticks_are_thinned_but_the_last_is_shown():
    out = io.StringIO()
    sink = ConsoleSink(ConsoleMode.PLAIN, stream=out, every_s=3600.0)
    for tick in range(1, 50):
        sink.emit(tick_done(tick))
    sink.close()
    assert [line.split()[3] for line in out.getvalue().splitlines()] == ["1", "49"]


def test_bar_shows_progress_scores_and_slots_within_100_columns():
    console = terminal()
    sink = ConsoleSink(ConsoleMode.AUTO, console=console)
    sink.emit(run_started())
    sink.emit(stage_changed(1, Stage.GERMINATED, Stage.TRAINING))
    for tick in range(1, 31):
        sink.emit(tick_done(tick))
    sink.close()
    text = text_of(console)
    assert "r0c0 GERMINATED -> TRAINING conv_light (ADVANCE)" in text
    last = [line.strip() for line in text.splitlines() if line.strip()][-2:]
    assert "300/300" in last[0]
    assert "loss 0.067  acc 98.3%  val 0.083 50.0%" in last[0]
    assert last[1] == "r0c0 TRAINING 0.30 conv_light   r0c1 EMPTY"
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= 100
    raw = console.file.getvalue()
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l") >= 0  # the cursor is given back


def test_close_twice_and_off():
    console = terminal()
    sink = ConsoleSink(ConsoleMode.BAR, console=console)
    sink.emit(run_started())
    sink.close()
    sink.close()
    out = io.StringIO()
    silent = ConsoleSink(ConsoleMode.OFF, stream=out)
    for event in SAMPLES:
        silent.emit(event)
    silent.close()
    assert out.getvalue() == ""


def test_a_closed_pipe_does_not_stop_training():
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1)
    sink = ConsoleSink(ConsoleMode.PLAIN, stream=stream)
    for event in SAMPLES:
        sink.emit(event)
    sink.close()
    stream.close()


def test_a_screen_without_unicode_still_shows_reasons():
    raw = io.BytesIO()
    sink = ConsoleSink(ConsoleMode.PLAIN, stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    sink.emit(fault(1, "0.1 ± 0.2"))
    sink.emit(fault(2))
    assert raw.getvalue().decode().splitlines() == [
        "step 10  fault in lockstep: 0.1 +- 0.2",
        "step 20  fault in lockstep: rank 1 is gone",
    ]


def score(step, parameters, loss, accuracy):
    return Score(
        step=step,
        parameters=parameters,
        loss=measured(loss, tick=1, n=300, se=0.02),
        accuracy=measured(accuracy, tick=1, n=300, se=0.016),
    )


SUMMARY = RunSummary(
    status="done",
    ticks=12,
    world_size=2,
    wall_s=63.2,
    start={"compose": 0.61, "check": 3.02, "import": 0.01, "step": 0.4},
    before=score(150, 12_034, 0.612, 0.812),
    after=score(600, 14_210, 0.365, 0.894),
    grown=(
        GrownSeed(
            slot="r0c0",
            blueprint="conv_light",
            stage=Stage.FOSSILIZED,
            alpha=1.0,
            parameters=2176,
            contribution=measured(0.0231, tick=11, n=256, se=0.0041),
            reason="G5 passed",
        ),
        GrownSeed(
            slot="r1c0",
            blueprint="norm",
            stage=Stage.BLENDING,
            alpha=0.45,
            parameters=64,
            contribution=ABSENT,
            reason="still blending",
        ),
    ),
    pruned=(PrunedSeeds(slot="r0c1", blueprint="attention", reason="no evidence after 5 looks", count=2),),
    library=LibraryTotals(births=7, memory_hits=1, disk_hits=2, built=3, failed=1, evicted=4, waited_ms=12.34),
    run_dir="runs/a",
    next_commands=(NextCommand(command="esper report runs/a", what="one page of the run"),),
)


def test_summary_table_says_it_all():
    console = Console(file=io.StringIO(), width=100)
    print_summary(json.loads(json.dumps(to_plain(SUMMARY))), console)
    lines = [re.sub(r"\s+", " ", line).strip() for line in console.file.getvalue().splitlines()]
    for expected in (
        "Run done · 600 steps, 12 ticks, 2 ranks, 1:03 min",
        "before growth, step 150 at the end, step 600 change",
        "validation accuracy 81.2 ± 1.6 % 89.4 ± 1.6 % +8.2 points",
        "validation loss 0.612 ± 0.020 0.365 ± 0.020 -0.247 nats",
        "parameters 12,034 14,210 +2,176 (+18.1%)",
        "r0c0 conv_light FOSSILIZED +2,176 0.0231 ± 0.0041 G5 passed",
        "r1c0 norm BLENDING at 0.45 +64 absent still blending",
        "r0c1 attention pruned 2 times 0 no evidence after 5 looks",
        "library 7 births: 1 from memory, 2 from disk, 3 built, 1 failed; 4 evicted; ticks waited 12.3 ms",
        "start 4.0 s to the first step: check 3.0, compose 0.6, step 0.4",
        "run runs/a",
        "next esper report runs/a one page of the run",
    ):
        assert expected in lines
    assert max(map(len, console.file.getvalue().splitlines())) <= 100


def test_summary_of_a_run_that_did_not_grow():
    console = Console(file=io.StringIO(), width=100)
    plain = to_plain(SUMMARY) | {"grown": [], "pruned": [], "library": None}
    plain["before"]["accuracy"] = to_plain(ABSENT)
    print_summary(plain, console)
    text = console.file.getvalue()
    assert "Nothing grew." in text
    assert "library" not in text
    assert re.search(r"validation accuracy +absent +89.4 ± 1.6 % +absent", text)


def test_a_summary_with_a_missing_field_is_refused():
    plain = to_plain(SUMMARY)
    del plain["run_dir"]
    with pytest.raises(ValueError, match="RunSummary: missing run_dir"):
        print_summary(plain)


class BrokenSink:
    """Takes one event, then breaks at everything."""

    def __init__(self):
        self.taken = 0

    def emit(self, event: Event) -> None:
        self.taken += 1
        if self.taken > 1:
            raise RuntimeError("no more")

    def flush(self) -> None:
        raise RuntimeError("no flush")

    def close(self) -> None:
        raise RuntimeError("no close")


def test_a_sink_that_breaks_is_left_out_and_the_others_go_on(tmp_path, capsys):
    out, broken = io.StringIO(), BrokenSink()
    jsonl = JsonlSink(tmp_path / "e.jsonl", Envelope("run-1", 1, 0), Level.FULL)
    sink = MultiSink([jsonl, broken, ConsoleSink(ConsoleMode.PLAIN, stream=out, every_s=0.0)])
    for tick in (1, 2, 3):
        sink.emit(tick_done(tick))
    sink.flush()
    sink.close()
    sink.close()
    assert broken.taken == 2
    records = read_events(tmp_path / "e.jsonl")
    assert [(r["kind"], r["tick"]) for r in records] == [("tick", 1), ("tick", 2), ("fault", 2), ("tick", 3)]
    assert records[2]["payload"] == {"what": "sink left out: RuntimeError('no more')", "where": "BrokenSink"}
    assert "step 20  fault in BrokenSink" in out.getvalue()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_sink_that_breaks_at_its_end_is_in_the_event_file(tmp_path, capsys):
    jsonl = JsonlSink(tmp_path / "e.jsonl", Envelope("run-1", 1, 0), Level.OFF)
    sink = MultiSink([jsonl, BrokenSink()])
    sink.emit(tick_done(3))
    sink.close()
    assert [(r["kind"], r["tick"]) for r in read_events(tmp_path / "e.jsonl")] == [("fault", 3)]
    assert "no close" in capsys.readouterr().err

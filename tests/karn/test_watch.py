"""The terminal page: driven by its pilot, every figure looked up in the record, and once in a real tmux."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textual", reason="extra watch")

from esper.karn import commands
from esper.karn.report.gather import gather
from esper.karn.watch.app import WatchApp
from esper.karn.watch.lines import Shown, spark
from esper.karn.watch.pages import PAGES
from esper.leyline.errors import EsperError
from tests.karn.test_report import look_up, run_of_everything, stands_at, within
from tests.karn.test_store import RECORDED


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded run, with growth."""
    return Path(shutil.copytree(RECORDED, tmp_path_factory.mktemp("watch") / "grown"))


def drive(app: WatchApp, act: Callable[[Any], Awaitable[None]], size: tuple[int, int] = (80, 24)) -> None:
    """Runs an app without a terminal, and acts on it."""

    async def go() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await act(pilot)

    asyncio.run(go())


def value_of(run: Path, shown: Shown) -> str:
    """What stands at a figure's place in the record, as the page would show it."""
    if shown.figure.value is None:
        assert stands_at(run, shown.figure.source) is None
        return "–"
    value = look_up(run, shown.figure.source, " ".join(shown.figure.over), shown.figure.times)
    return format(value * shown.scale, shown.form)


def test_every_figure_is_the_one_in_the_record(one: Path) -> None:
    report, count = gather(one, "one"), 0
    for name, page in PAGES.items():
        for shown in page(report, 76).figures():
            assert shown.text == value_of(one, shown), (name, shown)
            count += 1
    assert count > 20


def test_no_measured_figure_stands_outside_of_what_can_be_traced(one: Path) -> None:
    """What is no figure with a source is the record's own words, a figure of the same line in a larger unit, or what
    the page explains of itself."""
    lines = (one / "events.jsonl").read_text().splitlines()
    said = [word for line in lines for word in within(json.loads(line)) if isinstance(word, str)]
    report, seen = gather(one, "one"), 0
    for name, page in PAGES.items():
        for line in page(report, 76).lines:
            values = [piece.figure.value or 0.0 for piece in line if isinstance(piece, Shown)]
            larger = {f"{value / 1000**power:.3g}" for value in values for power in range(6)}
            text = " ".join(getattr(piece, "text", piece) for piece in line if not isinstance(piece, Shown))
            for number in re.findall(r"\d+\.\d+", text.replace("3.0 at 0.05", "")):
                assert number in larger or any(number in word for word in said), (name, text)
                seen += 1
    assert seen > 10


def test_every_figure_of_a_run_that_has_everything(tmp_path: Path) -> None:
    run = run_of_everything(tmp_path / "run")
    report = gather(run, "run")
    pages = {name: page(report, 76) for name, page in PAGES.items()}
    wrong = [shown for page in pages.values() for shown in page.figures() if shown.text != value_of(run, shown)]
    assert wrong == []
    told = pages["health"].render().plain
    for words in ("samples a second", "FLOPs a second", "MFU %", "waits for data %", "memory of rank 1 %", "its birth"):
        assert words in told
    assert "at that rank's machine" in told, "an alarm says what to look at"


def test_each_page_has_something_and_says_what_happened(one: Path) -> None:
    report = gather(one, "one")
    texts = {name: page(report, 76).render().plain for name, page in PAGES.items()}
    assert all(len(text.strip().splitlines()) >= 2 for text in texts.values())
    assert "done" in texts["overview"]
    for life in report.lives:
        assert life.slot in texts["slots"]
        assert life.blueprint in texts["decisions"]
    assert all(f"{life.slot} {life.blueprint}" in texts["evidence"] for life in report.lives)
    assert "F" in texts["slots"] or "x" in texts["slots"]
    assert all("�" not in text for text in texts.values())


def test_keys_change_view_and_run_and_nothing_is_written(one: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(one / "config.yaml", empty / "config.yaml")
    app = WatchApp([one, empty])
    seen: list[str] = []

    async def act(pilot: Any) -> None:
        for key, name in zip("123456", PAGES):
            await pilot.press(key)
            assert app.view == name
            seen.append(app.page.render().plain)
        await pilot.press("n")
        assert app.chosen == 1
        assert "no events" in app.page.render().plain
        await pilot.press("p", "r")
        assert app.chosen == 0
        assert str(app.query_one("#keys").render()).startswith("1-6 view")
        await pilot.press("q")

    drive(app, act)
    assert len(set(seen)) == 6
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == before


def test_it_follows_a_run_that_grows(one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    lines = (one / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    for name in ("result.json", "STATUS.json"):
        (run / name).unlink(missing_ok=True)
    app = WatchApp([run], every_s=0.01)

    async def act(pilot: Any) -> None:
        first = app.page.render().plain
        with (run / "events.jsonl").open("ab") as file:
            file.write(b"".join(lines[len(lines) // 2 :]))
        until = time.monotonic() + 30
        while app.page.render().plain == first:
            assert time.monotonic() < until
            await pilot.pause(0.05)

    drive(app, act)


def test_a_line_of_bars_goes_from_the_least_to_the_greatest(one: Path) -> None:
    series = gather(one, "one").series["train_loss"]
    bars = spark(series, 40)
    assert 0 < len(bars) <= 41
    assert {"▁", "█"} <= set(bars)


def test_what_a_record_says_cannot_steer_the_terminal(one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    text = (run / "events.jsonl").read_text()
    (run / "events.jsonl").write_text(text.replace('"reason":"', '"reason":"\\u001b[2J[red]', 3))
    pages = [page(gather(run, "run"), 76).render().plain for page in PAGES.values()]
    assert not any("\x1b" in page for page in pages)
    assert any("\\x1b[2J[red]" in page for page in pages)


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = type("Given", (), {"runs": [tmp_path]})()
    with pytest.raises(EsperError, match="no run directory"):
        commands.show_watch(given)
    monkeypatch.setitem(sys.modules, "esper.karn.watch.app", None)
    with pytest.raises(EsperError, match=r"pip install 'esper\[watch\]'"):
        commands.show_watch(given)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_real_terminal_of_80_by_24(one: Path, tmp_path: Path) -> None:
    socket = tmp_path / "tmux"
    tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
    command = f"{shlex.quote(sys.executable)} -m esper.cli watch {shlex.quote(str(one))}; echo ended with $?; cat"

    def wait_for(words: str) -> str:
        until = time.monotonic() + 120
        while True:
            shown = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True).stdout
            if words in shown:
                return shown
            assert time.monotonic() < until, shown
            time.sleep(0.2)

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm-256color"}
    subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "24", command], check=True, env=environment)
    try:
        shown = wait_for("validation loss")
        assert "1-6 view  n next run" in shown
        assert max(map(len, shown.splitlines())) <= 80
        subprocess.run([*tmux, "send-keys", "2"], check=True)
        wait_for("r0c0")
        subprocess.run([*tmux, "send-keys", "q"], check=True)
        wait_for("ended with 0")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)

"""The report: every figure stands in the record, nothing from outside is needed, and a browser has no complaint."""

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from esper import cli
from esper.karn.report.gather import gather
from esper.karn.report.plots import looks_of
from esper.karn.report.write import write_report
from esper.karn.why.fates import explain_slot, slots_of
from esper.karn.why.ticks import explain_growth
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.evidence import measured
from esper.leyline.files import RunDir
from esper.leyline.stages import Stage
from esper.nissa.reading import read_latest
from tests.karn.test_store import RECORDED, write_run
from tests.nissa.samples import SAMPLES, run_started, stage_changed, tick_done
from tests.support.browser import open_browser

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the recorded run."""
    run = Path(shutil.copytree(RECORDED, tmp_path_factory.mktemp("report") / "grown"))
    return write_report([run])


class Page(HTMLParser):
    """What a page holds: figures with their source, ids, links, tags, and text outside of figures and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[tuple[dict[str, str], str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.headings: list[int] = []
        self.cells: list[str] = []
        self._open: dict[str, str] | None = None
        self._cell: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "xlink:href") if name in given]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "data-from" in given:
            self._open = given
        if tag == "td":
            self._cell = ""

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.figures.append((self._open, data))
            self._open = None
        elif self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "td" and self._cell is not None:
            self.cells.append(self._cell)
            self._cell = None


def look_up(run: Path, source: str, over: str = "", times: float = 1.0) -> float:
    """A figure in the record, by the page's own words for its place, over the sum of others if it is a rate."""
    value = float(stands_at(run, source))
    place = source.rpartition(" ")[0]
    whole = [float(stands_at(run, f"{place} {name}")) for name in over.split()]
    return value / math.fsum(whole) * times if whole else value


def stands_at(run: Path, source: str) -> Any:
    """What stands at a place in the record."""
    name, *where, path = source.split(" ")
    if where:
        attempt, seq = map(int, where)
        lines = map(json.loads, (run / name).read_text().splitlines())
        record = next(r for r in lines if (r["attempt"], r["seq"]) == (attempt, seq))
        value = record if path.startswith("@") else record["payload"]
    else:
        value = json.loads((run / name).read_text())
    for part in path.removeprefix("@").split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def traced(run: Path, given: dict[str, str]) -> str:
    """A figure of the page as the record has it."""
    value = look_up(run, given["data-from"], given.get("data-over", ""), float(given.get("data-times", 1)))
    return format(value * float(given.get("data-scale", 1)), given["data-format"])


def test_every_figure_is_the_one_in_the_record(one: Path) -> None:
    page = Page(one.read_text())
    assert len(page.figures) > 300
    wrong = [(given, shown) for given, shown in page.figures if traced(one.parent, given) != shown]
    assert wrong == []
    kinds = {given["data-from"].split(" ")[0] for given, _ in page.figures}
    assert kinds == {"events.jsonl", "result.json"}


def within(value: Any) -> list[Any]:
    """Every word and number within a record."""
    if isinstance(value, dict | list):
        return [part for item in (value.values() if isinstance(value, dict) else value) for part in within(item)]
    return [value]


def test_every_figure_of_a_sentence_stands_in_an_event_that_it_names(one: Path) -> None:
    """The sentences on seeds, of the report and of `esper why`: as a number, or in the words of a reason."""
    records = list(read_latest(one.parent / "events.jsonl"))
    told = [sentence for slot in slots_of(records) for sentence in explain_slot(records, slot)]
    figures = 0
    for sentence in [*told, *explain_growth(records)]:
        parts = [part for event in sentence.events for part in within(event["payload"])]
        numbers = [part for part in parts if isinstance(part, float)]
        numbers += [-math.log(event["payload"]["chance"]) for event in sentence.events if "chance" in event["payload"]]
        shown = {f"{number:.{digits}g}" for number in numbers for digits in (2, 3, 4)}
        for figure in re.findall(r"-?\d+\.\d+", sentence.text):
            in_words = any(figure in part for part in parts if isinstance(part, str))
            assert figure in shown or in_words, sentence.text
            figures += 1
    assert figures >= 15


def test_no_cell_has_a_measured_figure_that_cannot_be_traced(one: Path) -> None:
    """Outside of traced figures a cell holds words, steps, ticks, counts and the record's own reasons alone."""
    loose = [cell for cell in Page(one.read_text()).cells if re.search(r"\d\.\d", cell) and "contribution" not in cell]
    assert loose == []


def run_of_everything(folder: Path) -> Path:
    """A run with every kind of event, ticks with all that they can hold, and what ranks wrote of their memory."""
    ticks = [tick_done(tick) for tick in (6, 7, 8)]
    parity = [measured(0.5, tick=tick.tick, n=3) for tick in ticks]
    ticks = [
        replace(tick, slots=(replace(tick.slots[0], gradient_parity=one, update_parity=one), *tick.slots[1:]))
        for tick, one in zip(ticks, parity)
    ]
    born = stage_changed(5, Stage.EMPTY, Stage.GERMINATED)
    others = [event for event in SAMPLES if event.kind not in ("rollback", "tick", "run_started")]
    run = write_run(folder, [run_started(), born, *others, *ticks])
    settings = (run / "config.yaml").read_text()
    peak = "telemetry:\n  health:\n    peak_flops: 1000000.0\n"
    (run / "config.yaml").write_text(settings.replace("telemetry:\n", peak))
    assert "peak_flops" in (run / "config.yaml").read_text()
    (run / "health").mkdir()
    (run / "health" / "rank-00000").write_text("[8, 5.0, 0.25, null]   ")
    (run / "health" / "rank-00001").write_text("[8, 5.0, 0.375, 0.5]")
    (run / "health" / "rank-00002").write_text("[8, 5.0, 0.3")
    return run


def test_every_figure_of_a_run_that_has_everything(tmp_path: Path) -> None:
    run = run_of_everything(tmp_path / "run")
    text = write_report([run]).read_text()
    page = Page(text)
    assert [(given, shown) for given, shown in page.figures if traced(run, given) != shown] == []
    loose = [cell for cell in page.cells if re.search(r"\d\.\d", cell) and not WORDS.search(cell)]
    assert loose == []
    titles = re.findall(r"<figure id=[^>]*><h3>(.*?)</h3>", text)
    system = ["Time of a tick", "Throughput", "Speed", "Use of the devices (MFU)", "Where the time goes"]
    parity = ["Parity of gradients", "Parity of gradients, by parameter", "Parity of updates, by parameter"]
    assert titles[-len(system) :] == system
    assert [title for title in titles if title.startswith("Parity")] == parity
    assert {"Odd moments", "After a birth", "Compiled kernels", "Memory"} <= set(re.findall("<h3>(.*?)</h3>", text))
    rates = {given["data-over"]: float(shown) for given, shown in page.figures if "data-over" in given}
    assert rates["steps_ms"] == 40.0, "5 of 12.5 ms"
    assert {given["data-from"] for given, _ in page.figures} >= {
        "health/rank-00000 2",
        "health/rank-00001 2",
        "health/rank-00001 3",
    }
    assert "rank-00002" not in text
    assert not re.search(r"<tbody></tbody>|<section[^>]*></section>|nan", text)


WORDS = re.compile(r"contribution|rank 1 worked|training loss")  # a record's own words in a cell


def test_a_plot_draws_the_points_of_its_table(one: Path) -> None:
    text = one.read_text()
    report = gather(one.parent, "grown")
    for key in ("loss", "accuracy"):
        figure = text.split(f'<figure id="run-0-{key}">')[1].split("</figure>")[0]
        for index, name in enumerate((f"train_{key}", f"validation_{key}")):
            path = re.search(rf'id="run-0-{key}-line-{index}".*?<path d="([^"]*)"', figure, re.S)
            assert path is not None
            points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path[1])]
            line = report.series[name]
            assert len(points) == len(line.steps) == 20
            # the y axis of SVG points down: a straight line leads from the figures to the places
            low, high = (line.numbers.index(pick(line.numbers)) for pick in (min, max))
            slope = (points[high][1] - points[low][1]) / (line.numbers[high] - line.numbers[low])
            for point, value in zip(points, line.numbers):
                assert math.isclose(point[1], points[low][1] + slope * (value - line.numbers[low]), abs_tol=0.02)
    assert [line.name for line in looks_of(report).values()] == ["r0c0 conv_light", "r0c1 conv_small"]


def test_a_cross_in_its_lane_marks_the_end_of_each_pruned_seed(one: Path) -> None:
    lanes = one.read_text().split('<figure id="run-0-lanes">')[1].split("</figure>")[0]
    marks = re.search(r'id="run-0-lanes-pruned".*?</g>\s*</g>', lanes, re.S)
    assert marks is not None
    pruned = [life for life in gather(one.parent, "grown").lives if life.fate == "pruned"]
    assert marks[0].count("<use ") == len(pruned) > 0


def test_all_that_was_asked_for_is_there_and_nothing_is_empty(one: Path) -> None:
    text = one.read_text()
    titles = re.findall(r"<figure id=[^>]*><h3>(.*?)</h3>", text)
    wanted = [
        "Loss",
        "Accuracy",
        "Life of each slot",
        "Alpha",
        "Contribution",
        "Evidence",
        "Parameters",
        "Training FLOPs",
    ]
    assert titles == [*wanted, "Parity of gradients", "Gradient of the host", "Time of a tick"]
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == ["In numbers", "How it ended", "Curves", "What grew, and why", "Decisions", "Checkpoints"]
    assert "It was kept: fossilised at step 180 (tick 15), since G5 passed" in text
    assert not re.search(r"<tbody></tbody>|<section[^>]*></section>|nan", text)


def test_it_opens_offline_and_a_screen_reader_finds_its_way(one: Path) -> None:
    text = one.read_text()
    page = Page(text)
    assert {"script", "iframe", "object", "img"} & set(page.tags) == set()
    outside = [link for link in page.links if not link.startswith(("#", "data:,"))]
    assert outside == []
    assert re.findall(r"url\((?!#)", text) == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:]))
    assert text.count('<svg role="img" aria-label="') == text.count("<svg ") == text.count("<figure ")
    assert 'lang="en"' in text
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 700_000


def test_the_same_record_gives_the_same_bytes(one: Path, tmp_path: Path) -> None:
    assert write_report([one.parent], tmp_path / "again.html").read_bytes() == one.read_bytes()


def test_several_runs_faults_and_what_is_missing(tmp_path: Path) -> None:
    first = Path(shutil.copytree(RECORDED, tmp_path / "a" / "grown"))
    told = [event for event in SAMPLES if event.kind not in ("rollback", "tick")]
    second = write_run(tmp_path / "b" / "all", told)
    page = write_report([first, second], tmp_path / "both.html").read_text()
    assert "Runs beside each other" in page
    assert re.search(r'<th scope="col">a/grown</th><th scope="col">b/all</th>', page)
    assert "There are no curves: the record has no ticks" in page
    assert "Faults and recoveries · b/all" in page
    assert "Faults and recoveries · a/grown" not in page
    assert "training loss 9 against 1" in page
    ids = Page(page).ids
    assert len(ids) == len(set(ids))


def test_what_a_record_says_is_text(tmp_path: Path) -> None:
    from tests.nissa.samples import fault

    run = write_run(tmp_path / "<b>run", [run_started(), tick_done(1), fault(1, what="<script>alert(1)</script>")])
    page = write_report([run]).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>run" not in page


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(RECORDED, tmp_path / "run"))
    with pytest.raises(RunDirError, match="no run directory"):
        write_report([tmp_path], tmp_path / "x.html")
    with pytest.raises(ConfigError, match="named twice"):
        write_report([run, tmp_path / "." / "run"])
    with pytest.raises(RunDirError, match="cannot be written"):
        write_report([run], tmp_path / "nowhere" / "x.html")
    RunDir(run).events.write_text("")
    with pytest.raises(RunDirError, match="no events"):
        write_report([run])
    assert not (run / "report.html").exists()
    assert cli.main(["report", str(tmp_path)]) == RunDirError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_shows_it_without_a_complaint(one: Path, tmp_path: Path, width: int, dark: bool) -> None:
    with open_browser(one, width=width, dark=dark) as shown:
        assert shown.told == []
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        small = (
            """[...document.querySelectorAll("svg text")].filter(e => e.getBoundingClientRect().height < 8).length"""
        )
        assert shown.page.evaluate(small) == 0, "text of a plot that nobody can read"
        hidden = """[...document.querySelectorAll("figure svg")].filter(s => [...s.querySelectorAll("text")].some(t => {
            const a = t.getBoundingClientRect(), b = s.getBoundingClientRect();
            return a.left < b.left - 2 || a.right > b.right + 2 || a.top < b.top - 2 || a.bottom > b.bottom + 2
        })).length"""
        assert shown.page.evaluate(hidden) == 0, "text of a plot that is cut off"
        ground, ink = shown.page.evaluate(
            """[getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector('svg text')).fill]"""
        )
        assert (ground, ink) == (
            ("rgb(22, 23, 26)", "rgb(232, 232, 228)") if dark else ("rgb(255, 255, 255)", "rgb(27, 27, 27)")
        )
        shown.page.keyboard.press("Tab")
        assert shown.page.evaluate("document.activeElement.textContent") == "To the content"
        shown.page.keyboard.press("Tab")
        assert shown.page.evaluate("document.activeElement.getAttribute('href')") == "#numbers"
        shown.page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 50_000
